//! Inference on candle's tensors, for Apple's GPUs (Metal).
//!
//! Kernels are candle's own, fused where it has fused ones. Activations are f32, and are rounded to the format of the
//! weights for products. Sequences, positions and ids stay on the host, where candle expects them, and logits are
//! copied to the host. The result of a kernel replaces the buffer that was allocated for it, so memory is not planned,
//! and the bits of a row may depend on the rows beside it. On the processor, which the tests use, this backend is slow.

#![forbid(unsafe_code)]

use std::ops::Range;
use std::sync::OnceLock;

use candle_core::quantized::{GgmlDType, QMatMul, QTensor};
use candle_core::{D, DType, Device, Error, Module, Tensor};
use candle_nn::{ops, rotary_emb};
use tracing::{Span, trace_span};
use ulmus_plan::{NormKind, Precision};

use ulmus_backend::{
    Acts, ActsMut, Backend, BackendError, CacheFormat, Element, Forks, Heads, In, LAYER_EPSILON, Norm, Out,
    RMS_EPSILON, Rope, Spans, View, ViewMut, WeightFormat, greedy_rows,
};

/// A result of candle.
type Computed<T> = Result<T, Error>;

/// A candle device as a backend.
#[derive(Debug, Clone)]
pub struct Candle {
    device: Device,
}

impl Candle {
    /// Opens the first GPU of an Apple computer.
    ///
    /// # Errors
    /// [`BackendError::Device`] if there is no such GPU, or this program was not built for one.
    pub fn metal() -> Result<Self, BackendError> {
        Ok(Self { device: Device::new_metal(0).map_err(|error| device(&error))? })
    }

    /// The processor, for tests.
    pub fn processor() -> Self {
        Self { device: Device::Cpu }
    }

    /// Runs a kernel within its tracing span.
    fn kernel(span: Span, work: impl FnOnce() -> Computed<()>) {
        let _entered = span.entered();
        work().expect("shapes come from a checked model, and nothing can continue without the device");
    }
}

fn device(error: &Error) -> BackendError {
    BackendError::Device { ordinal: 0, problem: error.to_string() }
}

/// Numbers on the host, with a copy on the device as soon as a kernel has needed one.
#[derive(Debug)]
pub struct Buffer<T> {
    values: Vec<T>,
    copy: OnceLock<Tensor>,
}

fn slice<'a, T>(view: &View<'a, Buffer<T>>) -> &'a [T] {
    &view.buffer.values[view.range.clone()]
}

fn slice_mut<T>(view: ViewMut<'_, Buffer<T>>) -> &mut [T] {
    view.buffer.copy.take();
    &mut view.buffer.values[view.range]
}

/// A view as a tensor `[.., width]` on the device.
fn tensor(view: &View<'_, Buffer<f32>>, width: usize, device: &Device) -> Computed<Tensor> {
    let Buffer { values, copy } = view.buffer;
    if copy.get().is_none() {
        copy.set(Tensor::from_slice(values, values.len(), device)?).ok();
    }
    part(copy.get().expect("the copy was just created"), &view.range, width)
}

/// Rows on the device, as the last kernel has computed them.
#[derive(Debug)]
pub struct Activations {
    /// All rows as one flat tensor.
    values: Tensor,
}

/// Activations as a tensor `[R, width]`.
fn rows(activations: &Acts<'_, Candle>, width: usize) -> Computed<Tensor> {
    part(&activations.buffer.values, &activations.range, width)
}

fn set(activations: ActsMut<'_, Candle>, values: &Tensor) -> Computed<()> {
    let ViewMut { buffer, range } = activations;
    assert_eq!(range.len(), values.elem_count(), "a kernel writes as much as it was asked for");
    let values = values.flatten_all()?;
    // Activations are written whole, or in parts from their beginning.
    let before = (range.start > 0).then(|| buffer.values.narrow(0, 0, range.start)).transpose()?;
    buffer.values = match before {
        Some(before) => Tensor::cat(&[before, values], 0)?,
        None => values,
    };
    Ok(())
}

fn part(flat: &Tensor, range: &Range<usize>, width: usize) -> Computed<Tensor> {
    flat.narrow(0, range.start, range.len())?.reshape(((), width))
}

/// A matrix `[outputs, inputs]`.
#[derive(Debug)]
pub struct Weights {
    matrix: QMatMul,
    outputs: usize,
    inputs: usize,
    /// The type that inputs are rounded to.
    operand: DType,
}

impl Weights {
    fn multiply(&self, x: &Acts<'_, Candle>) -> Computed<Tensor> {
        self.matrix.forward(&rows(x, self.inputs)?.to_dtype(self.operand)?)?.to_dtype(DType::F32)
    }
}

/// The keys and values of each sequence, `[key/value heads, capacity, H]`.
#[derive(Debug)]
pub struct Cache {
    heads: Heads,
    sequences: Vec<[Tensor; 2]>,
}

impl Cache {
    /// Continues a sequence with packed rows, the first of which is at position `first`.
    fn attend(&self, sequence: usize, first: usize, packed: &Tensor) -> Computed<Tensor> {
        let Heads { query, key_value, width } = self.heads;
        let length = packed.dim(0)?;
        let [keys, values] = &self.sequences[sequence];
        let format = keys.dtype();
        let heads = |from: usize, count: usize| {
            let columns = packed.narrow(1, from * width, count * width)?.to_dtype(format)?;
            columns.reshape((length, count, width))?.transpose(0, 1)?.contiguous()
        };
        keys.slice_set(&heads(query, key_value)?, 1, first)?;
        values.slice_set(&heads(query + key_value, key_value)?, 1, first)?;
        let end = first + length;
        // All rows that read the same keys form one matrix.
        let grouped = (key_value, self.heads.group() * length, ());
        let queries = heads(0, query)?.reshape(grouped)?;
        let scores = queries.matmul(&keys.narrow(1, 0, end)?.t()?)?.to_dtype(DType::F32)?;
        let scores = (scores * (1.0 / (width as f64).sqrt()))?.reshape((query, length, end))?;
        let scores = if length > 1 {
            let later =
                |row: usize| (0..end).map(move |key| if key > first + row { f32::NEG_INFINITY } else { 0.0 });
            let mask: Vec<f32> = (0..length).flat_map(later).collect();
            scores.broadcast_add(&Tensor::from_vec(mask, (length, end), packed.device())?)?
        } else {
            scores
        };
        let shares = ops::softmax_last_dim(&scores)?.to_dtype(format)?.reshape(grouped)?;
        let out = shares.matmul(&values.narrow(1, 0, end)?)?.to_dtype(DType::F32)?;
        out.reshape((query, length, width))?.transpose(0, 1)?.reshape((length, self.heads.query_width()))
    }
}

/// The norm of rows, with the weights number `nth` of as many as a row is wide.
fn normed(norm: &Norm<'_, Buffer<f32>>, x: &Tensor, nth: usize) -> Computed<Tensor> {
    let weights = tensor(&norm.weight, x.dim(D::Minus1)?, x.device())?.get(nth)?;
    match norm.kind {
        NormKind::Rms => ops::rms_norm(x, &weights, RMS_EPSILON),
        NormKind::NaiveRms => ops::rms_norm_slow(x, &weights, RMS_EPSILON),
        NormKind::Layer => ops::layer_norm(x, &weights, &weights.zeros_like()?, LAYER_EPSILON),
    }
}

impl Backend for Candle {
    type Buffer<T: Element> = Buffer<T>;
    type Activations = Activations;
    type Graph = ();
    type Weights = Weights;
    type Cache = Cache;

    fn describe(&self) -> String {
        let device = if self.device.is_metal() { "Metal" } else { "processor" };
        format!("{device} through candle")
    }

    fn with_precision(self, _: Precision) -> Self {
        self
    }

    fn allocate<T: Element>(&self, len: usize) -> Result<Buffer<T>, BackendError> {
        Ok(Buffer { values: vec![T::zeroed(); len], copy: OnceLock::new() })
    }

    fn activation_bytes(&self) -> usize {
        size_of::<f32>()
    }

    fn activations(&self, len: usize) -> Result<Activations, BackendError> {
        Ok(Activations {
            values: Tensor::zeros(len, DType::F32, &self.device).map_err(|error| device(&error))?,
        })
    }

    fn set_activations(&self, to: ActsMut<'_, Self>, from: &[f32]) {
        Self::kernel(Span::none(), || set(to, &Tensor::from_slice(from, from.len(), &self.device)?));
    }

    fn read_activations(&self, from: Acts<'_, Self>, to: &mut [f32]) {
        Self::kernel(Span::none(), || {
            to.copy_from_slice(&rows(&from, to.len())?.flatten_all()?.to_vec1()?);
            Ok(())
        });
    }

    fn upload<T: Element>(&self, to: Out<'_, Self, T>, from: &[T]) {
        slice_mut(to).copy_from_slice(from);
    }

    fn download<T: Element>(&self, from: In<'_, Self, T>, to: &mut [T]) {
        to.copy_from_slice(slice(&from));
    }

    fn run<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        self.device.with_context(work)
    }

    fn replay(&self, (): &mut (), work: impl FnOnce() + Send) {
        self.run(work);
    }

    fn norm(&self, out: ActsMut<'_, Self>, x: Acts<'_, Self>, norm: Norm<'_, Buffer<f32>>) {
        Self::kernel(trace_span!("norm"), || set(out, &normed(&norm, &rows(&x, norm.weight.len())?, 0)?));
    }

    fn add_norm(
        &self,
        sum: ActsMut<'_, Self>,
        out: ActsMut<'_, Self>,
        x: Acts<'_, Self>,
        delta: Acts<'_, Self>,
        norm: Norm<'_, Buffer<f32>>,
    ) {
        Self::kernel(trace_span!("norm"), || {
            let width = norm.weight.len();
            let values = (rows(&x, width)? + rows(&delta, width)?)?;
            set(out, &normed(&norm, &values, 0)?)?;
            set(sum, &values)
        });
    }

    fn qk_norm_rope(
        &self,
        out: ActsMut<'_, Self>,
        packed: Acts<'_, Self>,
        norm: Norm<'_, Buffer<f32>>,
        rope: Rope<'_, Self>,
        heads: Heads,
    ) {
        Self::kernel(trace_span!("qk_norm_rope"), || {
            let Heads { query, key_value, width } = heads;
            let packed = rows(&packed, heads.packed_width())?;
            let rows = packed.dim(0)?;
            let first = slice(&rope.first).iter();
            let positions: Vec<u32> = first.flat_map(|first| *first..*first + rope.length as u32).collect();
            let positions = Tensor::from_vec(positions, rows, &self.device)?;
            let table =
                |table: &In<'_, Self>| tensor(table, width / 2, &self.device)?.index_select(&positions, 0);
            let (cos, sin) = (table(&rope.cos)?, table(&rope.sin)?);
            let rotated = |nth: usize, from: usize, count: usize| {
                let heads = packed.narrow(1, from * width, count * width)?.contiguous()?;
                let heads = normed(&norm, &heads.reshape((1, rows, count, width))?, nth)?;
                rotary_emb::rope_thd(&heads, &cos, &sin)?.reshape((rows, count * width))
            };
            let values = packed.narrow(1, (query + key_value) * width, key_value * width)?;
            set(out, &Tensor::cat(&[rotated(0, 0, query)?, rotated(1, query, key_value)?, values], 1)?)
        });
    }

    fn swiglu(&self, out: ActsMut<'_, Self>, x: Acts<'_, Self>, width: usize) {
        Self::kernel(trace_span!("swiglu"), || set(out, &ops::swiglu(&rows(&x, 2 * width)?)?));
    }

    fn weights(&self, values: &[f32], outputs: usize, format: WeightFormat) -> Result<Weights, BackendError> {
        let inputs = values.len() / outputs;
        let operand = match format {
            WeightFormat::F16 => DType::F16,
            WeightFormat::Bf16 => DType::BF16,
            WeightFormat::F32 | WeightFormat::Q8_0 => DType::F32,
        };
        if format == WeightFormat::Q8_0 && !inputs.is_multiple_of(GgmlDType::Q8_0.block_size()) {
            let problem = format!(
                "candle supports q8_0 only for multiples of 32 inputs, not {inputs}; use another type"
            );
            return Err(BackendError::Device { ordinal: 0, problem });
        }
        let matrix = || {
            let values = Tensor::from_slice(values, (outputs, inputs), &Device::Cpu)?;
            if format == WeightFormat::Q8_0 {
                QMatMul::from_qtensor(QTensor::quantize_onto(&values, GgmlDType::Q8_0, &self.device)?)
            } else {
                Ok(QMatMul::Tensor(values.to_dtype(operand)?.to_device(&self.device)?))
            }
        };
        Ok(Weights { matrix: matrix().map_err(|error| device(&error))?, outputs, inputs, operand })
    }

    fn gather(&self, out: ActsMut<'_, Self>, x: Acts<'_, Self>, numbers: In<'_, Self, u32>, width: usize) {
        Self::kernel(trace_span!("gather"), || {
            let numbers = Tensor::from_slice(slice(&numbers), numbers.len(), &self.device)?;
            set(out, &rows(&x, width)?.index_select(&numbers, 0)?)
        });
    }

    fn embed_weights(&self, out: ActsMut<'_, Self>, table: &Weights, ids: In<'_, Self, u32>) {
        Self::kernel(trace_span!("embed"), || {
            let ids = Tensor::from_slice(slice(&ids), ids.len(), &self.device)?;
            set(out, &table.matrix.embedding(&ids)?.to_dtype(DType::F32)?)
        });
    }

    fn linear_weights(&self, out: ActsMut<'_, Self>, x: Acts<'_, Self>, weights: &Weights, _: usize) {
        Self::kernel(trace_span!("linear"), || set(out, &weights.multiply(&x)?));
    }

    fn logits(&self, out: Out<'_, Self>, x: Acts<'_, Self>, table: &Weights, rows: usize) {
        Self::kernel(trace_span!("linear"), || {
            let logits = table.multiply(&x)?.reshape(rows * table.outputs)?;
            slice_mut(out).copy_from_slice(&logits.to_vec1()?);
            Ok(())
        });
    }

    fn cache(
        &self,
        sequences: usize,
        capacity: usize,
        heads: Heads,
        format: CacheFormat,
    ) -> Result<Cache, BackendError> {
        let format = match format {
            CacheFormat::F32 => DType::F32,
            CacheFormat::F16 => DType::F16,
            CacheFormat::Bf16 => DType::BF16,
        };
        let zeros = || Tensor::zeros((heads.key_value, capacity, heads.width), format, &self.device);
        let sequences = (0..sequences).map(|_| Ok([zeros()?, zeros()?])).collect::<Computed<_>>();
        Ok(Cache { heads, sequences: sequences.map_err(|error| device(&error))? })
    }

    fn fork(&self, cache: &mut Cache, forks: Forks<'_, Self>) {
        Self::kernel(trace_span!("fork"), || {
            let pairs = slice(&forks.from).iter().zip(slice(&forks.to)).zip(slice(&forks.positions));
            for ((from, to), positions) in pairs {
                let of = |sequence: u32| cache.sequences[sequence as usize].iter();
                for (from, to) in of(*from).zip(of(*to)) {
                    to.slice_set(&from.narrow(1, 0, *positions as usize)?.contiguous()?, 1, 0)?;
                }
            }
            Ok(())
        });
    }

    fn cached_attention(
        &self,
        out: ActsMut<'_, Self>,
        cache: &mut Cache,
        packed: Acts<'_, Self>,
        spans: Spans<'_, Self>,
    ) {
        Self::kernel(trace_span!("attention"), || {
            let packed = rows(&packed, cache.heads.packed_width())?;
            let spans_of = slice(&spans.sequences).iter().zip(slice(&spans.first)).enumerate();
            let attended = spans_of.map(|(span, (sequence, first))| {
                let rows = packed.narrow(0, span * spans.length, spans.length)?;
                cache.attend(*sequence as usize, *first as usize, &rows)
            });
            set(out, &Tensor::cat(&attended.collect::<Computed<Vec<_>>>()?, 0)?)
        });
    }

    fn greedy(&self, out: Out<'_, Self, u32>, logits: In<'_, Self>) {
        greedy_rows(slice_mut(out), slice(&logits));
    }

    fn cross_entropy(&self, out: Out<'_, Self>, logits: Out<'_, Self>, targets: In<'_, Self, u32>) {
        ulmus_cpu::cross_entropy(slice_mut(out), slice_mut(logits), slice(&targets));
    }
}
