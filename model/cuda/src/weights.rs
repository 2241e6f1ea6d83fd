//! Inference: matrices in the format in which they are read, and the key/value cache.

use std::sync::Arc;

use half::{bf16, f16};
use ulmus_backend::{BackendError, Forks, Heads, Spans, WeightFormat};

use super::arguments::{HeadRows, MatrixData};
use super::driver::{Device, Memory};
use super::handle::Address;
use super::matmul::{Form, Operand};
use super::program::{Format, Program, Variant};
use super::{
    AttentionPass, Cuda, DeviceView as _, THREADS, launch, line, packed_heads, query_heads, score_scale,
};

/// Maximum number of rows for matvec.cu. More rows are a product of large matrices.
const MATVEC_ROWS: usize = 8;
/// Number of threads per block in matvec.cu.
const MATVEC_THREADS: usize = 128;
/// Numbers that share a scale in `q8_0`.
const Q8_BLOCK: usize = 32;
/// Number of keys per block in cache.cu.
const CHUNK: usize = 64;
/// Maximum number of query heads per key/value head in cache.cu.
const MAX_GROUP: usize = 8;

/// A matrix `[outputs, inputs]`.
#[derive(Debug)]
pub struct Weights {
    format: WeightFormat,
    outputs: usize,
    inputs: usize,
    values: Memory,
    /// The scales of `q8_0`, one f16 per row and block.
    scales: Option<Memory>,
}

/// Copies values to newly allocated memory.
fn put<T: bytemuck::Pod>(device: &Arc<Device>, values: &[T]) -> Result<Memory, BackendError> {
    let memory = Memory::zeroed(device, size_of_val(values))?;
    device.upload(memory.address(), values);
    Ok(memory)
}

/// Appends the integers and scales of a row. As in GGUF's reference, halves are rounded away from zero, and integers
/// use the scale before it is rounded to f16.
fn quantise(row: &[f32], values: &mut Vec<i8>, scales: &mut Vec<f16>) {
    for block in row.chunks(Q8_BLOCK) {
        let most = block.iter().fold(0_f32, |most, value| most.max(value.abs()));
        let scale = most / 127.0;
        let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
        scales.push(f16::from_f32(scale));
        values.extend(block.iter().map(|value| (value * inverse).round() as i8));
    }
}

impl Weights {
    pub(super) fn new(
        device: &Arc<Device>,
        values: &[f32],
        outputs: usize,
        format: WeightFormat,
    ) -> Result<Self, BackendError> {
        let inputs = values.len() / outputs;
        let mut scales = None;
        let values = match format {
            WeightFormat::F32 => put(device, values)?,
            WeightFormat::F16 => put(device, &values.iter().map(|x| f16::from_f32(*x)).collect::<Vec<_>>())?,
            WeightFormat::Bf16 => {
                put(device, &values.iter().map(|x| bf16::from_f32(*x)).collect::<Vec<_>>())?
            }
            WeightFormat::Q8_0 => {
                let (mut integers, mut of_blocks) = (Vec::with_capacity(values.len()), Vec::new());
                for row in values.chunks(inputs) {
                    quantise(row, &mut integers, &mut of_blocks);
                }
                scales = Some(put(device, &of_blocks)?);
                put(device, &integers)?
            }
        };
        Ok(Self { format, outputs, inputs, values, scales })
    }

    fn data(&self) -> MatrixData {
        let scales = self.scales.as_ref().map_or(Address::NULL, Memory::address);
        MatrixData { values: self.values.address(), scales }
    }

    /// Number of weights that a lane loads at once: 16 bytes, if rows of `x` and of weights allow it, or else one
    /// weight.
    fn loads(&self, x: Address) -> usize {
        let most = match self.format {
            WeightFormat::F32 => 4,
            WeightFormat::F16 | WeightFormat::Bf16 => 8,
            WeightFormat::Q8_0 => 16,
        };
        // Activations of 4 bytes are loaded 4 at a time, and those of 2 bytes 8 at a time.
        if self.inputs.is_multiple_of(most.max(8)) && x.0.is_multiple_of(16) { most } else { 1 }
    }

    fn program(&self, rows: usize, result: Format, x: Address) -> (Program, usize) {
        let loads = self.loads(x);
        (Program::Matvec { weights: self.format, rows, result, loads }, loads)
    }

    /// The format in which a product of large matrices can read the weights without a conversion, if there is one.
    fn as_stored(&self) -> Option<Format> {
        match self.format {
            WeightFormat::F32 => Some(Format::F32),
            WeightFormat::F16 => Some(Format::F16),
            WeightFormat::Bf16 => Some(Format::Bf16),
            WeightFormat::Q8_0 => None,
        }
    }
}

/// The keys and values of one layer, `[sequences, key/value heads, capacity, H]` each.
#[derive(Debug)]
pub struct Cache {
    heads: Heads,
    format: Format,
    capacity: usize,
    keys: Memory,
    values: Memory,
}

impl Cache {
    pub(super) fn new(
        device: &Arc<Device>,
        sequences: usize,
        capacity: usize,
        heads: Heads,
        format: Format,
    ) -> Result<Self, BackendError> {
        let bytes = sequences * heads.key_value_width() * capacity * format.bytes();
        let (keys, values) = (Memory::zeroed(device, bytes)?, Memory::zeroed(device, bytes)?);
        Ok(Self { heads, format, capacity, keys, values })
    }

    fn rows(&self, base: Address) -> HeadRows {
        let (width, capacity) = (self.heads.width, self.capacity);
        HeadRows {
            base,
            sequence: (self.heads.key_value * capacity * width) as i64,
            head: (capacity * width) as i64,
            row: width as i64,
        }
    }
}

impl Cuda {
    pub(super) fn embed_rows(&self, out: Address, table: &Weights, ids: Address, rows: usize) {
        let (program, loads) = table.program(1, self.format, out);
        launch!(self, program, loads, "embed", line(rows), line(MATVEC_THREADS), 0;
            out, table.data(), ids, table.inputs as i32);
    }

    /// `out = x · weightsᵀ`, with `out` in the format `result`.
    pub(super) fn times_weights(
        &self,
        out: Address,
        result: Format,
        x: Address,
        weights: &Weights,
        rows: usize,
    ) {
        if rows > MATVEC_ROWS {
            return self.times_large(out, result, x, weights, rows);
        }
        let (program, loads) = weights.program(rows, result, x);
        let outputs = MATVEC_THREADS / 32 * if rows > 4 { 1 } else { 2 };
        launch!(self, program, loads, "matvec", line(weights.outputs.div_ceil(outputs)), line(MATVEC_THREADS), 0;
            out, x, weights.data(), weights.inputs as i32, weights.outputs as i32);
    }

    /// Like [`Self::times_weights`], as a product of large matrices, whose operands must have the same format: that of
    /// the weights, or f16 for `q8_0`.
    fn times_large(&self, out: Address, result: Format, x: Address, weights: &Weights, rows: usize) {
        let Weights { inputs, outputs, .. } = *weights;
        let format = weights.as_stored().unwrap_or(Format::F16);
        let of_inputs = (rows * inputs * format.bytes()).next_multiple_of(16);
        let expanded = if weights.as_stored().is_none() { outputs * inputs * format.bytes() } else { 0 };
        // The library can only write products of f16 as f16 or f32.
        let narrowed = if format == Format::F16 && result == Format::Bf16 { rows * outputs * 4 } else { 0 };
        let narrowed_at = (of_inputs + expanded).next_multiple_of(16);
        let scratch = self.device.scratch(narrowed_at + narrowed);
        let x = if format == self.format {
            x
        } else {
            self.convert([x, scratch], [self.format, format], rows * inputs);
            scratch
        };
        let values = if expanded > 0 {
            let to = scratch.add(of_inputs);
            self.expand(to, format, weights);
            to
        } else {
            weights.values.address()
        };
        let operand = |address: Address| Operand { address, format, stride: inputs };
        let (into, into_format) =
            if narrowed > 0 { (scratch.add(narrowed_at), Format::F32) } else { (out, result) };
        let product = Operand { address: into, format: into_format, stride: outputs };
        let operands = [operand(x), operand(values)];
        self.device.matmul().multiply(Form::ByRows, [rows, outputs, inputs], operands, product, false);
        if narrowed > 0 {
            self.convert([into, out], [Format::F32, result], rows * outputs);
        }
    }

    /// Converts quantised weights to numbers in `format`.
    fn expand(&self, to: Address, format: Format, weights: &Weights) {
        let as_activations = Self { format, ..self.clone() };
        let (program, loads) = weights.program(1, format, to);
        let blocks = [weights.outputs, weights.inputs.div_ceil(MATVEC_THREADS * loads), 1];
        launch!(as_activations, program, loads, "expand", blocks, line(MATVEC_THREADS), 0;
            to, weights.data(), weights.inputs as i32);
    }

    fn convert(&self, [from, to]: [Address; 2], [from_format, to_format]: [Format; 2], len: usize) {
        let aligned = [from, to].iter().all(|address| address.0.is_multiple_of(16));
        let vector = if aligned && len.is_multiple_of(8) { 8 } else { 1 };
        let program = Program::Convert { from: from_format, to: to_format };
        launch!(self, program, vector, "convert", line(len.div_ceil(THREADS * vector)), line(THREADS), 0;
            to, from, len as i64);
    }

    /// See [`ulmus_backend::Backend::gather`]: rows are embedded by their numbers, with the activations as the table.
    pub(super) fn gather_rows(&self, out: Address, x: Address, rows: Address, count: usize, width: usize) {
        let vector = self.vector(&[width], &[out, x]);
        launch!(self, Program::Embed { table: self.format }, vector, "embed", line(count), line(128), 0;
            out, x, rows, width as i32);
    }

    /// See [`ulmus_backend::Backend::fork`].
    pub(super) fn fork_cache(&self, cache: &Cache, forks: &Forks<'_, Self>) {
        let Cache { heads, format, capacity, .. } = *cache;
        let program = Program::Cache { head: heads.width, cached: format, group: None };
        let blocks = (forks.longest * heads.width).div_ceil(4 * THREADS);
        launch!(self, program, 1, "cache_fork", [blocks, heads.key_value, forks.to.len()], line(THREADS), 0;
            cache.keys.address(), cache.values.address(), forks.from.address(), forks.to.address(),
            forks.positions.address(), capacity as i32, heads.key_value as i32);
    }

    /// See [`ulmus_backend::Backend::cached_attention`].
    pub(super) fn attend_cached(
        &self,
        out: Address,
        cache: &Cache,
        packed: Address,
        spans: &Spans<'_, Self>,
    ) {
        let Cache { heads, format, capacity, .. } = *cache;
        let (keys, values) = (cache.keys.address(), cache.values.address());
        let (sequences, first) = (spans.sequences.address(), spans.first.address());
        let (count, length) = (spans.sequences.len(), spans.length);
        let (query, key_value) = (heads.query as i32, heads.key_value as i32);
        let vector = self.vector(&[heads.width], &[packed, keys, values]);
        let store = Program::Cache { head: heads.width, cached: format, group: None };
        launch!(self, store, vector, "cache_store", line(count * length), line(128), 0;
            keys, values, packed, sequences, first, length as i32, capacity as i32, query, key_value);
        let whole_vectors = matches!(heads.width, 64 | 128) && vector > 1;
        if length == 1 && whole_vectors && heads.group() <= MAX_GROUP {
            // There are enough blocks for a full cache, so that a captured graph works for any position.
            let chunks = capacity.div_ceil(CHUNK);
            let parts =
                self.device.scratch(count * heads.query * chunks * (heads.width + 2) * size_of::<f32>());
            let program = Program::Cache { head: heads.width, cached: format, group: Some(heads.group()) };
            launch!(self, program, 8, "attend_chunk", [chunks, heads.key_value, count], line(128), 0;
                parts, packed, keys, values, sequences, first, capacity as i32, query, key_value,
                score_scale(heads));
            launch!(self, program, 8, "join_chunks", [heads.query, count, 1], line(heads.width), 0;
                out, parts, first, chunks as i32);
            return;
        }
        let [queries, ..] = packed_heads(packed, heads, length, self.format);
        self.attention_pass(&AttentionPass {
            out: query_heads(out, heads, length),
            lse: Address::NULL,
            queries,
            keys: cache.rows(keys),
            values: cache.rows(values),
            cached: format,
            doc_starts: Address::NULL,
            sequences,
            first,
            spans: count,
            length,
            heads,
        });
    }
}
