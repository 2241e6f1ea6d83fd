//! Norms of rows and of heads, by fused kernels or, for the naive norm, by the operations of an eager framework.

use ulmus_backend::{Heads, Norm, Rope};
use ulmus_plan::{NormKind, ROW_BLOCK};

use super::arguments::ColumnRows;
use super::handle::Address;
use super::program::{Program, Variant};
use super::{Buffer, Cuda, DeviceView as _, THREADS, launch, line};

/// Number of threads per row in norm.cu.
const ROW_THREADS: usize = 128;
/// Number of rows that a block of norm.cu processes at a time in the backward pass.
const GROUPS: usize = 4;
/// Number of threads per block in heads.cu.
const HEAD_THREADS: usize = 256;

fn is_centred(norm: &Norm<'_, Buffer<f32>>) -> bool {
    norm.kind == NormKind::Layer
}

fn width(norm: &Norm<'_, Buffer<f32>>) -> usize {
    norm.weight.len()
}

/// Number of lanes per head: as many as there are vectors in half a head, rounded up to a power of two, but at most a
/// warp.
pub(super) fn head_lanes(half: usize, vector: usize) -> usize {
    half.div_ceil(vector).next_power_of_two().min(32)
}

impl Cuda {
    fn fused(&self, norm: &Norm<'_, Buffer<f32>>, addresses: &[Address]) -> (Program, usize) {
        let program = Program::Norm { width: width(norm), centred: is_centred(norm) };
        (program, self.vector(&[width(norm)], addresses))
    }

    pub(super) fn norm_rows(&self, out: Address, x: Address, len: usize, norm: &Norm<'_, Buffer<f32>>) {
        if norm.kind == NormKind::NaiveRms {
            return self.naive(norm, len).forward_rows(out, x);
        }
        let (weight, rows) = (norm.weight.address(), len / width(norm));
        let (program, vector) = self.fused(norm, &[out, x, weight]);
        launch!(self, program, vector, "norm_rows", line(rows), line(ROW_THREADS), 0; out, x, weight);
    }

    pub(super) fn add_norm_rows(
        &self,
        [sum, out]: [Address; 2],
        [x, delta]: [Address; 2],
        len: usize,
        norm: &Norm<'_, Buffer<f32>>,
    ) {
        if norm.kind == NormKind::NaiveRms {
            launch!(self, Program::Naive, 1, "add", line(len.div_ceil(THREADS)), line(THREADS), 0;
                sum, x, delta, len as i64);
            return self.naive(norm, len).forward_rows(out, sum);
        }
        let (weight, rows) = (norm.weight.address(), len / width(norm));
        let (program, vector) = self.fused(norm, &[sum, out, x, delta, weight]);
        launch!(self, program, vector, "add_norm", line(rows), line(ROW_THREADS), 0; sum, out, x, delta, weight);
    }

    pub(super) fn norm_rows_backward(
        &self,
        x_gradient: Address,
        weight_gradient: Option<Address>,
        [gradient, x]: [Address; 2],
        len: usize,
        norm: &Norm<'_, Buffer<f32>>,
        accumulate: bool,
    ) {
        if norm.kind == NormKind::NaiveRms {
            let naive = self.naive(norm, len);
            return naive.backward_rows(x_gradient, weight_gradient, gradient, x, accumulate);
        }
        let (weight, partial) = (norm.weight.address(), norm.scratch.address());
        let (rows, width) = (len / width(norm), width(norm));
        let blocks = rows.div_ceil(ROW_BLOCK);
        let (program, vector) = self.fused(norm, &[x_gradient, gradient, x, weight, partial]);
        launch!(self, program, vector, "norm_backward", line(blocks), line(ROW_THREADS * GROUPS), 0;
            x_gradient, partial, gradient, x, weight, rows as i32, ROW_BLOCK as i32, i32::from(accumulate));
        if let Some(weight_gradient) = weight_gradient {
            self.sum_rows(weight_gradient, partial, blocks, width);
        }
    }

    fn fused_heads(
        &self,
        norm: &Norm<'_, Buffer<f32>>,
        heads: Heads,
        addresses: &[Address],
    ) -> (Program, usize, usize) {
        let half = heads.width / 2;
        let vector = self.vector(&[half], addresses);
        let lanes = head_lanes(half, vector);
        (Program::Heads { half, lanes, centred: is_centred(norm) }, vector, lanes)
    }

    pub(super) fn norm_heads(
        &self,
        out: Address,
        packed: Address,
        rows: usize,
        norm: &Norm<'_, Buffer<f32>>,
        rope: &Rope<'_, Self>,
        heads: Heads,
    ) {
        if norm.kind == NormKind::NaiveRms {
            return self.naive_heads(out, packed, rows, norm, rope, heads);
        }
        let (weights, cos, sin) = (norm.weight.address(), rope.cos.address(), rope.sin.address());
        let (program, vector, lanes) = self.fused_heads(norm, heads, &[out, packed, weights, cos, sin]);
        let blocks = (rows * (heads.query + 2 * heads.key_value)).div_ceil(HEAD_THREADS / lanes);
        launch!(self, program, vector, "qk_norm_rope", line(blocks), line(HEAD_THREADS), 0;
            out, packed, weights, cos, sin, rope.first.address(), rope.length as i32, rows as i32,
            heads.query as i32, heads.key_value as i32);
    }

    pub(super) fn norm_heads_backward(
        &self,
        packed: Address,
        weights_gradient: Option<Address>,
        gradient: Address,
        rows: usize,
        norm: &Norm<'_, Buffer<f32>>,
        rope: &Rope<'_, Self>,
        heads: Heads,
    ) {
        if norm.kind == NormKind::NaiveRms {
            return self.naive_heads_backward(packed, weights_gradient, gradient, rows, norm, rope, heads);
        }
        let (weights, cos, sin) = (norm.weight.address(), rope.cos.address(), rope.sin.address());
        let partial = norm.scratch.address();
        let (program, vector, _) = self.fused_heads(norm, heads, &[packed, gradient, weights, cos, sin]);
        let blocks = rows.div_ceil(ROW_BLOCK);
        launch!(self, program, vector, "qk_norm_rope_backward", line(blocks), line(HEAD_THREADS), 0;
            packed, partial, gradient, weights, cos, sin, rope.first.address(), rope.length as i32, rows as i32,
            ROW_BLOCK as i32, heads.query as i32, heads.key_value as i32);
        if let Some(weights_gradient) = weights_gradient {
            self.sum_rows(weights_gradient, partial, blocks, 2 * heads.width);
        }
    }
}

/// The naive norm of rows, as single operations, and its intermediate results.
struct Naive<'a> {
    cuda: &'a Cuda,
    rows: usize,
    width: usize,
    weight: Address,
    /// This and the next two are `[R, D]`: temporary results, and rows times their scale.
    terms: Address,
    other: Address,
    normed: Address,
    /// This and the next one are `[R]`: means of squares or their gradients, and inverse roots.
    mean: Address,
    scale: Address,
    /// Sums over blocks of rows, `[blocks, D]`.
    partial: Address,
}

impl<'a> Naive<'a> {
    /// Splits a buffer of [`NormKind::row_scratch`] elements.
    fn new(cuda: &'a Cuda, weight: Address, scratch: Address, rows: usize, width: usize) -> Self {
        let tensor = rows * width * size_of::<f32>();
        let vector = rows * size_of::<f32>();
        let other = scratch.add(tensor);
        let normed = other.add(tensor);
        let mean = normed.add(tensor);
        let scale = mean.add(vector);
        Self {
            cuda,
            rows,
            width,
            weight,
            terms: scratch,
            other,
            normed,
            mean,
            scale,
            partial: scale.add(vector),
        }
    }

    fn len(&self) -> usize {
        self.rows * self.width
    }

    fn rows_at(&self, base: Address) -> ColumnRows {
        ColumnRows { base, stride: self.width as i32 }
    }

    fn blocks(len: usize) -> [usize; 3] {
        line(len.div_ceil(THREADS))
    }

    /// `out = norm(x)` for rows of activations, which are widened before they are squared, as autocast does.
    fn forward_rows(&self, out: Address, x: Address) {
        self.widen(self.other, self.rows_at(x));
        self.forward();
        self.narrow(self.rows_at(out), self.terms, false);
    }

    /// Computes the norm of `other` into `terms`.
    fn forward(&self) {
        let (len, rows) = (self.len(), self.rows);
        self.multiply(self.terms, self.other, self.other);
        self.mean_of_rows(self.mean, self.terms);
        launch!(self.cuda, Program::Naive, 1, "inverse_root", Self::blocks(rows), line(THREADS), 0;
            self.scale, self.mean, rows as i64);
        self.multiply_rows(self.normed, self.other);
        launch!(self.cuda, Program::Naive, 1, "multiply_columns", Self::blocks(len), line(THREADS), 0;
            self.terms, self.normed, self.weight, self.width as i32, len as i64);
    }

    fn backward_rows(
        &self,
        x_gradient: Address,
        weight_gradient: Option<Address>,
        gradient: Address,
        x: Address,
        accumulate: bool,
    ) {
        self.widen(self.other, self.rows_at(gradient));
        self.backward_to_normed(weight_gradient);
        self.widen(self.other, self.rows_at(x));
        self.backward_to_x();
        self.narrow(self.rows_at(x_gradient), self.terms, accumulate);
    }

    /// Computes the gradient of `normed`, in `terms`, from the gradient of the output, in `other`. `normed` must hold
    /// the result of the forward pass.
    fn backward_to_normed(&self, weight_gradient: Option<Address>) {
        let (len, width) = (self.len(), self.width);
        if let Some(weight_gradient) = weight_gradient {
            self.multiply(self.terms, self.other, self.normed);
            let blocks = self.rows.div_ceil(ROW_BLOCK);
            launch!(self.cuda, Program::Naive, 1, "sum_blocks", [blocks, width.div_ceil(THREADS), 1], line(THREADS), 0;
                self.partial, self.terms, width as i32, self.rows as i32, ROW_BLOCK as i32);
            self.cuda.sum_rows(weight_gradient, self.partial, blocks, width);
        }
        launch!(self.cuda, Program::Naive, 1, "multiply_columns", Self::blocks(len), line(THREADS), 0;
            self.terms, self.other, self.weight, width as i32, len as i64);
    }

    /// Computes the gradient of `x`, in `terms`, from the gradient of `normed`, in `terms`, and `x`, in `other`.
    fn backward_to_x(&self) {
        let len = self.len();
        self.multiply(self.normed, self.terms, self.other);
        self.mean_of_rows(self.mean, self.normed);
        launch!(self.cuda, Program::Naive, 1, "inverse_root_backward", Self::blocks(self.rows), line(THREADS), 0;
            self.mean, self.scale, self.rows as i64);
        self.multiply_rows(self.normed, self.terms);
        launch!(self.cuda, Program::Naive, 1, "square_backward", Self::blocks(len), line(THREADS), 0;
            self.terms, self.other, self.mean, self.width as i32, len as i64);
        launch!(self.cuda, Program::Naive, 1, "sum", Self::blocks(len), line(THREADS), 0;
            self.terms, self.normed, self.terms, len as i64);
    }

    fn widen(&self, to: Address, from: ColumnRows) {
        let len = self.len();
        launch!(self.cuda, Program::Naive, 1, "widen", Self::blocks(len), line(THREADS), 0;
            to, from, self.width as i32, len as i64);
    }

    fn narrow(&self, to: ColumnRows, from: Address, accumulate: bool) {
        let len = self.len();
        launch!(self.cuda, Program::Naive, 1, "narrow", Self::blocks(len), line(THREADS), 0;
            to, from, self.width as i32, len as i64, i32::from(accumulate));
    }

    fn multiply(&self, out: Address, a: Address, b: Address) {
        let len = self.len();
        launch!(self.cuda, Program::Naive, 1, "multiply", Self::blocks(len), line(THREADS), 0;
            out, a, b, len as i64);
    }

    fn multiply_rows(&self, out: Address, x: Address) {
        let len = self.len();
        launch!(self.cuda, Program::Naive, 1, "multiply_rows", Self::blocks(len), line(THREADS), 0;
            out, x, self.scale, self.width as i32, len as i64);
    }

    fn mean_of_rows(&self, means: Address, x: Address) {
        let blocks = line(self.rows.div_ceil(THREADS / 32));
        launch!(self.cuda, Program::Naive, 1, "mean_of_rows", blocks, line(THREADS), 0;
            means, x, self.width as i32, self.rows as i32);
    }
}

/// The queries or the keys, in their own tensor for the naive norm.
struct Side<'a> {
    norm: Naive<'a>,
    /// Index of the first of these heads in a packed row.
    first: usize,
    /// Number of these heads.
    count: usize,
    /// The heads, `[R · count, H]`.
    x: Address,
    /// The gradients of the heads before the rotation, `[R · count, H]`.
    turned: Address,
}

impl Cuda {
    fn naive(&self, norm: &Norm<'_, Buffer<f32>>, len: usize) -> Naive<'_> {
        Naive::new(self, norm.weight.address(), norm.scratch.address(), len / width(norm), width(norm))
    }

    /// Splits a buffer of [`NormKind::head_scratch`] elements into queries and keys.
    fn sides(&self, norm: &Norm<'_, Buffer<f32>>, rows: usize, heads: Heads) -> [Side<'_>; 2] {
        let (width, weights, scratch) = (heads.width, norm.weight.address(), norm.scratch.address());
        let side = |first: usize, count: usize, weight: Address, scratch: Address| {
            let tensor = rows * count * width * size_of::<f32>();
            let turned = scratch.add(tensor);
            let norm = Naive::new(self, weight, turned.add(tensor), rows * count, width);
            Side { norm, first, count, x: scratch, turned }
        };
        let of_queries = NormKind::NaiveRms.side_scratch(rows * heads.query, width) * size_of::<f32>();
        [
            side(0, heads.query, weights, scratch),
            side(
                heads.query,
                heads.key_value,
                weights.add(width * size_of::<f32>()),
                scratch.add(of_queries),
            ),
        ]
    }

    fn naive_heads(
        &self,
        out: Address,
        packed: Address,
        rows: usize,
        norm: &Norm<'_, Buffer<f32>>,
        rope: &Rope<'_, Self>,
        heads: Heads,
    ) {
        for Side { norm, first, count, x, .. } in self.sides(norm, rows, heads) {
            let half = heads.width / 2;
            self.widen_side(x, packed, first, count, rows, heads);
            norm.copy_from(x);
            norm.forward();
            let pairs = rows * count * half;
            launch!(self, Program::Naive, 1, "rotate", Naive::blocks(pairs), line(THREADS), 0;
                self.columns(out, first, heads), norm.terms, rope.cos.address(), rope.sin.address(),
                rope.first.address(), rope.length as i32, count as i32, half as i32, pairs as i64);
        }
        self.copy_values(out, packed, rows, heads);
    }

    fn naive_heads_backward(
        &self,
        packed: Address,
        weights_gradient: Option<Address>,
        gradient: Address,
        rows: usize,
        norm: &Norm<'_, Buffer<f32>>,
        rope: &Rope<'_, Self>,
        heads: Heads,
    ) {
        for (index, side) in self.sides(norm, rows, heads).into_iter().enumerate() {
            let Side { norm, first, count, x, turned } = side;
            let half = heads.width / 2;
            let pairs = rows * count * half;
            launch!(self, Program::Naive, 1, "rotate_back", Naive::blocks(pairs), line(THREADS), 0;
                turned, self.columns(gradient, first, heads), rope.cos.address(), rope.sin.address(),
                rope.first.address(), rope.length as i32, count as i32, half as i32, pairs as i64);
            norm.copy_from(turned);
            let offset = index * heads.width * size_of::<f32>();
            norm.backward_to_normed(weights_gradient.map(|gradients| gradients.add(offset)));
            norm.copy_from(x);
            norm.backward_to_x();
            let len = rows * count * heads.width;
            launch!(self, Program::Naive, 1, "narrow", Naive::blocks(len), line(THREADS), 0;
                self.columns(packed, first, heads), norm.terms, (count * heads.width) as i32, len as i64, 0_i32);
        }
        self.copy_values(packed, gradient, rows, heads);
    }

    /// The columns of packed rows from head number `first` on.
    fn columns(&self, packed: Address, first: usize, heads: Heads) -> ColumnRows {
        let base = packed.add(first * heads.width * self.format.bytes());
        ColumnRows { base, stride: heads.packed_width() as i32 }
    }

    fn widen_side(
        &self,
        to: Address,
        packed: Address,
        first: usize,
        count: usize,
        rows: usize,
        heads: Heads,
    ) {
        let len = rows * count * heads.width;
        launch!(self, Program::Naive, 1, "widen", Naive::blocks(len), line(THREADS), 0;
            to, self.columns(packed, first, heads), (count * heads.width) as i32, len as i64);
    }

    fn copy_values(&self, to: Address, from: Address, rows: usize, heads: Heads) {
        let (first, width) = (heads.query + heads.key_value, heads.key_value_width());
        let len = rows * width;
        launch!(self, Program::Naive, 1, "copy", Naive::blocks(len), line(THREADS), 0;
            self.columns(to, first, heads), self.columns(from, first, heads), width as i32, len as i64);
    }
}

impl Naive<'_> {
    /// `other = from`, as a framework copies a tensor for the next operation.
    fn copy_from(&self, from: Address) {
        let len = self.len();
        launch!(self.cuda, Program::Naive, 1, "copy_wide", Self::blocks(len), line(THREADS), 0;
            self.other, from, len as i64);
    }
}
