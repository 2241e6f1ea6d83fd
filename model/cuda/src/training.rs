//! The operations of the CUDA backend that only training needs.

use std::ops::Range;

use tracing::trace_span;
use ulmus_backend::{
    Acts, ActsMut, AdamW, AttentionShape, BLOCK, Backend, BackendError, CommunicatorError, CommunicatorId,
    Dropout, DropoutPart, Element, GiveUp, HeadGradients, Heads, HostCopy, In, LinearShape, LowRank, Norm,
    Out, Params, Quantum, Rope, TrainingBackend, View, ViewMut, dropout_threshold,
};
use ulmus_plan::ROW_BLOCK;

use super::arguments::AdamWStep;
use super::driver::Memory;
use super::handle::Address;
use super::matmul::{Form, Operand};
use super::nccl;
use super::program::{Format, Program, Tiling, Variant};
use super::{
    ANY_ROWS, AttentionPass, Buffer, Communicator, Cuda, DeviceView as _, THREADS, launch, line,
    packed_heads, query_heads, score_scale,
};

/// Number of elements per thread in the kernels that round gradients, as in optimizer.cu.
const OWN: usize = 4;

/// The grid of kernels with a thread per vector of a row.
fn columns(rows: usize, width: usize, vector: usize) -> [usize; 3] {
    [rows, width.div_ceil(THREADS * vector), 1]
}

/// Weights in f32 and, if activations are bfloat16, a rounded copy that matrix products read.
#[derive(Debug)]
pub struct Parameters {
    values: Buffer<f32>,
    rounded: Option<Memory>,
}

/// Parameters as an operand of a matrix product.
fn operand(parameters: &Params<'_, Cuda>, stride: usize) -> Operand {
    let (memory, format) = match &parameters.buffer.rounded {
        Some(rounded) => (rounded, Format::Bf16),
        None => (&parameters.buffer.values.memory, Format::F32),
    };
    let address = memory.address().add(parameters.range.start * format.bytes());
    Operand { address, format, stride }
}

impl TrainingBackend for Cuda {
    const HEAD_ROWS: usize = 4096;
    type Parameters = Parameters;
    type Communicator = Communicator;

    fn parameter_bytes(&self) -> usize {
        match self.format {
            Format::F32 => size_of::<f32>(),
            format => size_of::<f32>() + format.bytes(),
        }
    }

    fn parameters(&self, len: usize) -> Result<Parameters, BackendError> {
        let rounded = (self.format != Format::F32)
            .then(|| Memory::zeroed(&self.device, len * self.format.bytes()))
            .transpose()?;
        Ok(Parameters { values: self.allocate(len)?, rounded })
    }

    fn values<'a>(&self, parameters: Params<'a, Self>) -> In<'a, Self> {
        View::new(&parameters.buffer.values, parameters.range)
    }

    fn write_values<R>(
        &self,
        parameters: ViewMut<'_, Parameters>,
        work: impl FnOnce(Out<'_, Self>) -> R,
    ) -> R {
        let ViewMut { buffer, range } = parameters;
        let result = work(ViewMut::new(&mut buffer.values, range.clone()));
        if let Some(rounded) = &buffer.rounded {
            let values = View::new(&buffer.values, range.clone()).address();
            let rounded = rounded.address().add(range.start * self.format.bytes());
            let vector = self.vector(&[range.len()], &[values, rounded]);
            let blocks = line(range.len().div_ceil(THREADS * vector));
            launch!(self, Program::Optimizer, vector, "round_values", blocks, line(THREADS), 0;
                rounded, values, range.len() as i64);
        }
        result
    }

    fn on_host<T: Element, R>(&self, buffer: Out<'_, Self, T>, work: impl FnOnce(&mut [T]) -> R) -> R {
        let mut host = vec![T::zeroed(); buffer.len()];
        self.device.download(buffer.address(), &mut host);
        let result = work(&mut host);
        self.device.upload(buffer.address(), &host);
        result
    }

    fn begin_copy(&self, from: In<'_, Self>) -> Box<dyn HostCopy> {
        let (address, len) = (from.address(), from.len());
        if let Some(copy) = self.copies.begin(address, len) {
            return Box::new(copy);
        }
        // Without page-locked memory the copy is slower, and the host waits for it.
        let mut copy = vec![0.0; len];
        self.device.download(address, &mut copy);
        Box::new(copy)
    }

    fn finish_copies(&self) {
        self.copies.finish();
    }

    fn communicates(&self) -> Result<bool, CommunicatorError> {
        nccl::available().map(|()| true)
    }

    fn communicator_id(&self) -> Result<CommunicatorId, CommunicatorError> {
        nccl::unique_id()
    }

    fn communicator(
        &self,
        id: &CommunicatorId,
        rank: usize,
        size: usize,
        give_up: GiveUp<'_>,
    ) -> Result<Communicator, CommunicatorError> {
        Communicator::new(self, id, rank, size, give_up)
    }

    fn begin_reduce_scatter(
        &self,
        communicator: &mut Communicator,
        data: Out<'_, Self, i64>,
        give_up: GiveUp<'_>,
    ) -> Result<(), CommunicatorError> {
        communicator.begin_reduce_scatter(data, give_up)
    }

    fn finish_reductions(
        &self,
        communicator: &mut Communicator,
        give_up: GiveUp<'_>,
    ) -> Result<(), CommunicatorError> {
        communicator.finish(give_up)
    }

    fn all_gather(
        &self,
        communicator: &mut Communicator,
        data: Out<'_, Self>,
        parts: &[Range<usize>],
        give_up: GiveUp<'_>,
    ) -> Result<(), CommunicatorError> {
        communicator.all_gather(data, parts, give_up)
    }

    fn broadcast(
        &self,
        communicator: &mut Communicator,
        root: usize,
        data: Out<'_, Self>,
        give_up: GiveUp<'_>,
    ) -> Result<(), CommunicatorError> {
        communicator.broadcast(root, data, give_up)
    }

    fn serialize_kernels(&self) -> bool {
        self.device.serialize();
        true
    }

    fn choose_algorithms<R>(
        &self,
        known: Option<&str>,
        work: impl FnOnce() -> R,
    ) -> Result<(R, Option<String>), BackendError> {
        let begun = self.device.matmul().begin_choosing(known);
        begun.map_err(|error| BackendError::Algorithms(error.to_string()))?;
        let result = work();
        Ok((result, Some(self.device.matmul().end_choosing())))
    }

    fn embed(&self, out: ActsMut<'_, Self>, table: Params<'_, Self>, ids: In<'_, Self, u32>, width: usize) {
        let _kernel = self.kernel(trace_span!("embed"));
        let (out, table) = (out.address(), operand(&table, width));
        let vector = self.vector(&[width], &[out, table.address]);
        let program = Program::Embed { table: table.format };
        launch!(self, program, vector, "embed", line(ids.len()), line(128), 0;
            out, table.address, ids.address(), width as i32);
    }

    fn embed_backward(
        &self,
        table_gradient: Out<'_, Self>,
        gradient: Acts<'_, Self>,
        ids: In<'_, Self, u32>,
        width: usize,
        accumulate: bool,
    ) {
        let _kernel = self.kernel(trace_span!("embed"));
        if !accumulate {
            self.device.fill_zero(table_gradient.address(), table_gradient.len() * size_of::<f32>());
        }
        let (into, gradient) = (table_gradient.address(), gradient.address());
        let vector = self.vector(&[width], &[into, gradient]);
        let program = Program::Embed { table: self.format };
        launch!(self, program, vector, "embed_backward", line(ids.len()), line(128), 0;
            into, gradient, ids.address(), ids.len() as i32, width as i32);
    }

    fn linear(
        &self,
        out: ActsMut<'_, Self>,
        x: Acts<'_, Self>,
        weight: Params<'_, Self>,
        shape: LinearShape,
        accumulate: bool,
    ) {
        let _kernel = self.kernel(trace_span!("linear"));
        let LinearShape { rows, inputs, outputs } = shape;
        let operands = [self.operand(x.address(), inputs), operand(&weight, inputs)];
        let out = self.operand(out.address(), outputs);
        self.device.matmul().multiply(Form::ByRows, [rows, outputs, inputs], operands, out, accumulate);
    }

    fn linear_backward_weight(
        &self,
        weight_gradient: Out<'_, Self>,
        gradient: Acts<'_, Self>,
        x: Acts<'_, Self>,
        shape: LinearShape,
    ) {
        let _kernel = self.kernel(trace_span!("linear"));
        let LinearShape { rows, inputs, outputs } = shape;
        let operands = [self.operand(gradient.address(), outputs), self.operand(x.address(), inputs)];
        let out = Operand { address: weight_gradient.address(), format: Format::F32, stride: inputs };
        self.device.matmul().multiply(Form::ByColumns, [outputs, inputs, rows], operands, out, false);
    }

    fn linear_backward_input(
        &self,
        x_gradient: ActsMut<'_, Self>,
        gradient: Acts<'_, Self>,
        weight: Params<'_, Self>,
        shape: LinearShape,
        accumulate: bool,
    ) {
        let _kernel = self.kernel(trace_span!("linear"));
        let LinearShape { rows, inputs, outputs } = shape;
        let operands = [self.operand(gradient.address(), outputs), operand(&weight, inputs)];
        let out = self.operand(x_gradient.address(), inputs);
        self.device.matmul().multiply(Form::Plain, [rows, inputs, outputs], operands, out, accumulate);
    }

    fn scale(&self, x: ActsMut<'_, Self>, factor: f32) {
        let _kernel = self.kernel(trace_span!("adapter"));
        let (len, x) = (x.len(), x.address());
        let vector = self.vector(&[len], &[x]);
        launch!(self, Program::Adapter, vector, "scale", line(len.div_ceil(THREADS * vector)), line(THREADS), 0;
            x, factor, len as i64);
    }

    fn scatter(&self, out: ActsMut<'_, Self>, x: Acts<'_, Self>, rows: In<'_, Self, u32>, width: usize) {
        let _kernel = self.kernel(trace_span!("gather"));
        self.device.fill_zero(out.address(), out.len() * self.format.bytes());
        let (count, out, x) = (rows.len(), out.address(), x.address());
        let vector = self.vector(&[width], &[out, x]);
        launch!(self, Program::Adapter, vector, "scatter", columns(count, width, vector), line(THREADS), 0;
            out, x, rows.address(), width as i32);
    }

    fn gather_add(&self, out: ActsMut<'_, Self>, x: Acts<'_, Self>, rows: In<'_, Self, u32>, width: usize) {
        let _kernel = self.kernel(trace_span!("gather"));
        let (count, out, x) = (rows.len(), out.address(), x.address());
        let vector = self.vector(&[width], &[out, x]);
        launch!(self, Program::Adapter, vector, "gather_add", columns(count, width, vector), line(THREADS), 0;
            out, x, rows.address(), width as i32);
    }

    fn dropout(
        &self,
        out: ActsMut<'_, Self>,
        x: Acts<'_, Self>,
        dropout: Dropout<'_, Self>,
        width: usize,
        part: DropoutPart,
        accumulate: bool,
    ) {
        let _kernel = self.kernel(trace_span!("adapter"));
        let Dropout { sequences, length, positions, key, rate } = dropout;
        let (threshold, factor) = dropout_threshold(rate);
        let (kept, left_out) = match part {
            DropoutPart::Kept => (factor, 0.0_f32),
            DropoutPart::Rest => (1.0 - factor, 1.0_f32),
        };
        let (rows, out, x) = (x.len() / width, out.address(), x.address());
        let vector = self.vector(&[width], &[out, x]);
        launch!(self, Program::Adapter, vector, "dropout", columns(rows, width, vector), line(THREADS), 0;
            out, x, sequences.address(), length as i32, positions.address(), key.cast_signed(), threshold.cast_signed(),
            kept, left_out, width as i32, i32::from(accumulate));
    }

    fn gains(
        &self,
        gains: Out<'_, Self>,
        magnitude: Params<'_, Self>,
        squares: In<'_, Self>,
        matrix: LowRank<'_, Self>,
        scratch: Out<'_, Self>,
    ) {
        let _kernel = self.kernel(trace_span!("adapter"));
        let (inputs, outputs, rank) = (matrix.inputs, matrix.outputs(), matrix.rank());
        let f32_at = |address: Address, stride: usize| Operand { address, format: Format::F32, stride };
        let values = |parameters: Params<'_, Self>| self.values(parameters).address();
        let across = scratch.address();
        let among = across.add(outputs * rank * size_of::<f32>());
        let squared = among.add(outputs * rank * size_of::<f32>());
        let (a, b) = (f32_at(values(matrix.a), inputs), f32_at(values(matrix.b), rank));
        let weight = f32_at(values(matrix.weight), inputs);
        let mut matmul = self.device.matmul();
        let mut product = |size, operands, out| {
            matmul.multiply(Form::ByRows, size, operands, f32_at(out, rank), false);
        };
        product([outputs, rank, inputs], [weight, a], across);
        product([rank, rank, inputs], [a, a], squared);
        // The product of A with itself is symmetric.
        product([outputs, rank, rank], [b, f32_at(squared, rank)], among);
        drop(matmul);
        launch!(self, Program::Adapter, 1, "gains", line(outputs.div_ceil(THREADS)), line(THREADS), 0;
            gains.address(), values(magnitude), squares.address(), b.address, across, among, matrix.scale,
            outputs as i32, rank as i32);
    }

    fn scale_columns(
        &self,
        out: ActsMut<'_, Self>,
        x: Acts<'_, Self>,
        gains: In<'_, Self>,
        accumulate: bool,
    ) {
        let _kernel = self.kernel(trace_span!("adapter"));
        let width = gains.len();
        let (rows, out, x, gains) = (x.len() / width, out.address(), x.address(), gains.address());
        let vector = self.vector(&[width], &[out, x, gains]);
        launch!(self, Program::Adapter, vector, "scale_columns", columns(rows, width, vector), line(THREADS), 0;
            out, x, gains, width as i32, i32::from(accumulate));
    }

    fn scale_columns_backward(
        &self,
        x_gradient: ActsMut<'_, Self>,
        magnitude_gradient: Out<'_, Self>,
        gradient: Acts<'_, Self>,
        x: Acts<'_, Self>,
        gains: In<'_, Self>,
    ) {
        let width = magnitude_gradient.len();
        let View { buffer, range } = gains;
        let of_columns = View::new(buffer, range.start..range.start + width);
        self.scale_columns(x_gradient, gradient.clone(), of_columns, false);
        let _kernel = self.kernel(trace_span!("adapter"));
        let rows = x.len() / width;
        let blocks = rows.div_ceil(ROW_BLOCK);
        let partial = self.device.scratch(blocks * width * size_of::<f32>());
        let inverse = View::new(buffer, range.start + width..range.end).address();
        launch!(self, Program::Adapter, 1, "column_products", columns(blocks, width, 1), line(THREADS), 0;
            partial, gradient.address(), x.address(), inverse, rows as i32, width as i32, ROW_BLOCK as i32);
        self.sum_rows(magnitude_gradient.address(), partial, blocks, width);
    }

    fn norm_backward(
        &self,
        x_gradient: ActsMut<'_, Self>,
        weight_gradient: Option<Out<'_, Self>>,
        gradient: Acts<'_, Self>,
        x: Acts<'_, Self>,
        norm: Norm<'_, Buffer<f32>>,
        accumulate: bool,
    ) {
        let _kernel = self.kernel(trace_span!("norm"));
        self.norm_rows_backward(
            x_gradient.address(),
            weight_gradient.map(|into| into.address()),
            [gradient.address(), x.address()],
            x.len(),
            &norm,
            accumulate,
        );
    }

    fn qk_norm_rope_backward(
        &self,
        packed: ActsMut<'_, Self>,
        weights_gradient: Option<Out<'_, Self>>,
        gradient: Acts<'_, Self>,
        norm: Norm<'_, Buffer<f32>>,
        rope: Rope<'_, Self>,
        heads: Heads,
    ) {
        let _kernel = self.kernel(trace_span!("qk_norm_rope"));
        let rows = gradient.len() / heads.packed_width();
        self.norm_heads_backward(
            packed.address(),
            weights_gradient.map(|into| into.address()),
            gradient.address(),
            rows,
            &norm,
            &rope,
            heads,
        );
    }

    fn attention(
        &self,
        out: ActsMut<'_, Self>,
        lse: Out<'_, Self>,
        packed: Acts<'_, Self>,
        doc_starts: In<'_, Self, u32>,
        shape: AttentionShape,
    ) {
        let _kernel = self.kernel(trace_span!("attention"));
        let AttentionShape { sequences, length, heads } = shape;
        let [queries, keys, values] = packed_heads(packed.address(), heads, length, self.format);
        let pass = AttentionPass {
            out: query_heads(out.address(), heads, length),
            lse: lse.address(),
            queries,
            keys,
            values,
            cached: self.format,
            doc_starts: doc_starts.address(),
            sequences: Address::NULL,
            first: Address::NULL,
            spans: sequences,
            length,
            heads,
        };
        self.attention_pass(&pass);
    }

    fn attention_backward(
        &self,
        packed_gradient: ActsMut<'_, Self>,
        gradient: Acts<'_, Self>,
        out: Acts<'_, Self>,
        lse: In<'_, Self>,
        packed: Acts<'_, Self>,
        doc_starts: In<'_, Self, u32>,
        shape: AttentionShape,
    ) {
        let _kernel = self.kernel(trace_span!("attention"));
        let AttentionShape { sequences, length, heads } = shape;
        let [queries, keys, values] = packed_heads(packed.address(), heads, length, self.format);
        let [query_gradient, key_gradient, value_gradient] =
            packed_heads(packed_gradient.address(), heads, length, self.format);
        let (out, gradient) =
            (query_heads(out.address(), heads, length), query_heads(gradient.address(), heads, length));
        let delta = self.device.scratch(sequences * length * heads.query * size_of::<f32>());
        let (lse, doc_starts, scale) = (lse.address(), doc_starts.address(), score_scale(heads));
        let (length_, group) = (length as i32, heads.group() as i32);
        let grid = |rows: usize, heads: usize| [length.div_ceil(rows), heads, sequences];
        if let Some(tilings) = self.tiled(heads, &[queries, out, gradient, query_gradient]) {
            let of = |tiling: Tiling| {
                let program = Program::Attention { head: heads.width, tiling };
                (program, line(tiling.warps * 32), tiling.shared(heads.width, 2))
            };
            let (program, threads, shared) = of(tilings.queries);
            let (blocks, each) = (length.div_ceil(tilings.queries.rows()), tilings.queries.warps * 4);
            launch!(self, program, 8, "attention_delta", grid(each, heads.query), threads, 0;
                delta, out, gradient, length_);
            let all = [heads.query, blocks, sequences];
            launch!(self, program, 8, "attention_backward_queries", all, threads, shared;
                query_gradient, gradient, lse, delta, queries, keys, values, doc_starts, length_, group, scale);
            let (program, threads, shared) = of(tilings.keys);
            let all = [heads.key_value, sequences, length.div_ceil(tilings.keys.rows())];
            launch!(self, program, 8, "attention_backward_keys", all, threads, shared;
                key_gradient, value_gradient, gradient, lse, delta, queries, keys, values, doc_starts, length_,
                group, scale);
        } else {
            let program = Program::AttentionAny { head: heads.width, cached: self.format };
            let threads = line(ANY_ROWS * 32);
            launch!(self, program, 1, "attention_backward_queries", grid(ANY_ROWS, heads.query), threads, 0;
                query_gradient, delta, out, gradient, lse, queries, keys, values, doc_starts, length_, group, scale);
            launch!(self, program, 1, "attention_backward_keys", grid(ANY_ROWS, heads.key_value), threads, 0;
                key_gradient, value_gradient, delta, gradient, lse, queries, keys, values, doc_starts, length_,
                group, scale);
        }
    }

    fn swiglu_backward(&self, x: ActsMut<'_, Self>, gradient: ActsMut<'_, Self>, width: usize) {
        let _kernel = self.kernel(trace_span!("swiglu"));
        let rows = gradient.len() / width;
        let (x, gradient) = (x.address(), gradient.address());
        let vector = self.vector(&[width], &[x, gradient]);
        let blocks = [rows, width.div_ceil(THREADS * vector), 1];
        launch!(self, Program::Swiglu, vector, "swiglu_backward", blocks, line(THREADS), 0;
            x, gradient, width as i32);
    }

    fn head_loss(
        &self,
        cross_entropy: Out<'_, Self>,
        lse: Out<'_, Self>,
        gradients: Option<HeadGradients<'_, Self>>,
        hidden: Acts<'_, Self>,
        table: Params<'_, Self>,
        targets: In<'_, Self, u32>,
        logits: Out<'_, Self>,
        shape: LinearShape,
    ) {
        let _kernel = self.kernel(trace_span!("head_loss"));
        let LinearShape { rows, inputs, outputs } = shape;
        let chunk = logits.len() / outputs;
        let table = operand(&table, inputs);
        let logits = Operand { address: logits.address(), format: Format::F32, stride: outputs };
        let gradients = gradients.map(|g| {
            let table = g.table.map(|table| table.address());
            let weights = g.row_weights.map(|weights| weights.address());
            (g.hidden.address(), table, weights, g.z_loss)
        });
        for start in (0..rows).step_by(chunk) {
            let rows = chunk.min(rows - start);
            let of_activations = |address: Address| address.add(start * inputs * self.format.bytes());
            let of_rows = |address: Address| address.add(start * size_of::<f32>());
            let hidden = self.operand(of_activations(hidden.address()), inputs);
            let (losses, lse) = (of_rows(cross_entropy.address()), of_rows(lse.address()));
            let targets = of_rows(targets.address());
            self.device.matmul().multiply(
                Form::ByRows,
                [rows, outputs, inputs],
                [hidden, table],
                logits,
                false,
            );
            let Some((hidden_gradient, table_gradient, weights, z_loss)) = gradients else {
                self.loss_of_rows(losses, lse, logits.address, targets, rows, outputs);
                continue;
            };
            let weights = weights.map_or(Address::NULL, of_rows);
            let vector = if outputs.is_multiple_of(4) { 4 } else { 1 };
            launch!(self, Program::Loss, vector, "loss_backward", line(rows), line(512), 0;
                losses, lse, logits.address, targets, weights, outputs as i32, z_loss);
            // Rows of gradients replace rows of logits, so they have the same distance in bytes.
            let stride = outputs * size_of::<f32>() / self.format.bytes();
            let slopes = self.operand(logits.address, stride);
            let hidden_gradient = self.operand(of_activations(hidden_gradient), inputs);
            let mut matmul = self.device.matmul();
            matmul.multiply(Form::Plain, [rows, inputs, outputs], [slopes, table], hidden_gradient, false);
            let Some(address) = table_gradient else { continue };
            let into = Operand { address, format: Format::F32, stride: inputs };
            let size = [outputs, inputs, rows];
            matmul.multiply(Form::ByColumns, size, [slopes, hidden], into, start > 0);
        }
    }

    fn adamw(
        &self,
        weights: ViewMut<'_, Parameters>,
        first: Out<'_, Self>,
        second: Out<'_, Self>,
        gradient: In<'_, Self>,
        step: AdamW,
    ) {
        let _kernel = self.kernel(trace_span!("adamw"));
        let ViewMut { buffer, range } = weights;
        let len = range.len();
        let values = View::new(&buffer.values, range.clone()).address();
        let rounded = buffer
            .rounded
            .as_ref()
            .map_or(Address::NULL, |rounded| rounded.address().add(range.start * self.format.bytes()));
        let (first, second, gradient) = (first.address(), second.address(), gradient.address());
        // Most of the data is f32, even if activations are bfloat16.
        let vector = self.vector(&[len], &[values, rounded, first, second, gradient]).min(4);
        let AdamW { gradient_scale, decay, first_share, beta2, second_share, .. } = step;
        let AdamW { step_size, second_correction, epsilon, .. } = step;
        let step = AdamWStep {
            gradient_scale,
            decay,
            first_share,
            beta2,
            second_share,
            step_size,
            second_correction,
            epsilon,
        };
        let blocks = line(len.div_ceil(THREADS * vector));
        launch!(self, Program::Optimizer, vector, "adamw", blocks, line(THREADS), 0;
            values, rounded, first, second, gradient, len as i64, step);
    }

    fn block_squares(&self, sums: &mut [f64], x: In<'_, Self>) {
        let _kernel = self.kernel(trace_span!("block_squares"));
        let on_device = self.device.scratch(size_of_val(sums));
        launch!(self, Program::Optimizer, 1, "block_squares", line(sums.len()), line(THREADS), 0;
            on_device, x.address(), x.len() as i64, BLOCK as i32);
        self.device.download(on_device, sums);
    }

    fn quantise(
        &self,
        sums: Out<'_, Self, i64>,
        outside: Out<'_, Self, u32>,
        gradient: In<'_, Self>,
        quantum: &Quantum,
        accumulate: bool,
    ) {
        let _kernel = self.kernel(trace_span!("quantise"));
        let (len, blocks) = (gradient.len() as i64, line(gradient.len().div_ceil(THREADS * OWN)));
        launch!(self, Program::Optimizer, 1, "quantise", blocks, line(THREADS), 0;
            sums.address(), outside.address(), gradient.address(), len, 1.0 / quantum.value(), quantum.limit(),
            i32::from(accumulate));
    }

    fn quantise_mean(
        &self,
        gradient: Out<'_, Self>,
        outside: Out<'_, Self, u32>,
        quantum: &Quantum,
        scale: f64,
    ) {
        let _kernel = self.kernel(trace_span!("quantise"));
        let (len, blocks) = (gradient.len() as i64, line(gradient.len().div_ceil(THREADS * OWN)));
        launch!(self, Program::Optimizer, 1, "quantise_mean", blocks, line(THREADS), 0;
            gradient.address(), outside.address(), len, 1.0 / quantum.value(), quantum.limit(), scale);
    }

    fn dequantise(&self, mean: Out<'_, Self>, sums: In<'_, Self, i64>, scale: f64) {
        let _kernel = self.kernel(trace_span!("quantise"));
        let (len, blocks) = (sums.len() as i64, line(sums.len().div_ceil(THREADS * OWN)));
        launch!(self, Program::Optimizer, 1, "dequantise", blocks, line(THREADS), 0;
            mean.address(), sums.address(), len, scale);
    }
}
