//! Causal attention with grouped queries and document starts.
//!
//! The keys and values of a head are packed as right panels once. Queries are processed in *blocks*: a few adjacent
//! positions of all heads that share these keys, stacked head by head, whose scores are computed, normalised and used
//! while they are in the cache. Keys before the earliest document start in a block are skipped, so packed documents
//! cost only what they need. The work is parallel over key/value heads; the backward pass sums their gradients in the
//! order of the blocks.

use std::cell::RefCell;
use std::ops::Range;

use rayon::prelude::*;
use ulmus_backend::{AttentionShape, Heads, WeightFormat};
use ulmus_plan::Precision;

use super::aligned::{Line, room, room_lines};
use super::dispatch::{by_kernel, pack_right};
use super::panel::{Kernel, LANES, Lanes, LeftPanels, step};
use super::product::{Product, pack_left};
use super::simd::{dot, exp, max, sum, vectorised};
use super::view::{Matrix, MatrixMut, Output, Shared, Threads};

/// Number of rows in a block over all of its heads, such that their scores stay in the second-level cache.
const BLOCK_ROWS: usize = 56;

/// Number of positions in a block.
pub(super) fn block_positions(heads: Heads) -> usize {
    (BLOCK_ROWS / heads.group()).max(1)
}

/// The layout of the rows of one head, one per position, as right panels.
#[derive(Debug, Clone, Copy)]
pub(super) struct HeadPanels {
    pub format: WeightFormat,
    /// Maximum number of positions, a multiple of [`LANES`].
    pub positions: usize,
    pub width: usize,
}

impl HeadPanels {
    /// Number of lines in a panel whose lanes are positions.
    pub(super) fn by_position(&self) -> usize {
        let (depths, lines) = step(self.format);
        self.width.div_ceil(depths) * lines
    }

    /// Number of lines in all panels whose lanes are positions.
    pub(super) fn all_by_position(&self) -> usize {
        self.positions / LANES * self.by_position()
    }

    /// Number of lines in a panel whose lanes are elements.
    pub(super) fn by_element(&self) -> usize {
        self.before(self.positions)
    }

    /// Number of lines in all panels whose lanes are elements.
    pub(super) fn all_by_element(&self) -> usize {
        self.width.div_ceil(LANES) * self.by_element()
    }

    /// Number of lines before `position`, which begins a step, in a panel whose lanes are elements.
    fn before(&self, position: usize) -> usize {
        let (depths, lines) = step(self.format);
        position / depths * lines
    }

    /// Number of lines that have the first positions, in all panels whose lanes are positions.
    pub(super) fn first_by_position(&self, positions: usize) -> usize {
        positions.div_ceil(LANES) * self.by_position()
    }

    /// Number of lines that have the first positions, in a panel whose lanes are elements.
    pub(super) fn first_by_element(&self, positions: usize) -> usize {
        self.before(positions.next_multiple_of(step(self.format).0))
    }

    fn pack_by_position(&self, to: &mut [Line], rows: Matrix<'_>) {
        for (index, to) in to.chunks_exact_mut(self.by_position()).enumerate() {
            let lanes = (index * LANES).min(rows.rows())..((index + 1) * LANES).min(rows.rows());
            pack_right(self.format, to, Lanes::new(rows, lanes, 0..self.width));
        }
    }

    fn pack_by_element(&self, to: &mut [Line], rows: Matrix<'_>) {
        let own = self.first_by_element(rows.rows());
        for (index, to) in to.chunks_exact_mut(self.by_element()).enumerate() {
            let lanes = index * LANES..((index + 1) * LANES).min(self.width);
            pack_right(self.format, &mut to[..own], Lanes::new(rows.transposed(), lanes, 0..rows.rows()));
        }
    }
}

/// The keys of one head in panels by position, and its values in panels by element.
#[derive(Clone, Copy)]
pub(super) struct KeysValues<'a> {
    pub panels: HeadPanels,
    pub keys: &'a [Line],
    pub values: &'a [Line],
}

/// The memory of a task. It grows to the needs of the largest task of its thread, and is reused.
#[derive(Default)]
pub(super) struct Scratch {
    /// The keys and values of a head.
    panels: [Vec<Line>; 3],
    /// The rows of a block: its queries or results, and their gradients.
    rows: [Vec<Line>; 2],
    /// The scores or probabilities of a block, and their gradients.
    scores: [Vec<Line>; 2],
    left: Vec<Line>,
    right: Vec<Line>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Lends the thread's scratch to `work`.
pub(super) fn with_scratch(work: impl FnOnce(&mut Scratch)) {
    // The scratch is taken out and put back, so that nothing is borrowed while the work runs.
    let mut scratch = SCRATCH.take();
    work(&mut scratch);
    SCRATCH.set(scratch);
}

/// Adjacent positions of all heads that share a key/value head. Row r belongs to head `r / positions` of the group and
/// position `first + r % positions`.
#[derive(Clone, Copy)]
pub(super) struct Block {
    pub first: usize,
    pub positions: usize,
    pub group: usize,
    /// The first of the keys that rows may see, a multiple of [`LANES`]. The last position's key is the last of them.
    pub first_key: usize,
}

impl Block {
    pub(super) fn rows(&self) -> usize {
        self.positions * self.group
    }

    /// Number of keys from `first_key` on.
    fn keys(&self) -> usize {
        self.first + self.positions - self.first_key
    }

    fn position(&self, row: usize) -> usize {
        self.first + row % self.positions
    }

    /// Stacks the columns of `packed` from `column` on, `width` for each head. The first row of `packed` has the
    /// position
    /// `origin`.
    pub(super) fn gather(
        &self,
        to: &mut [f32],
        packed: Matrix<'_>,
        origin: usize,
        column: usize,
        width: usize,
    ) {
        for (row, to) in to.chunks_exact_mut(width).take(self.rows()).enumerate() {
            let from = packed.row(self.position(row) - origin);
            to.copy_from_slice(&from[column + row / self.positions * width..][..width]);
        }
    }

    /// Writes stacked rows back to the columns that [`Self::gather`] has read.
    pub(super) fn scatter(
        &self,
        from: &[f32],
        packed: &mut MatrixMut<'_>,
        origin: usize,
        column: usize,
        width: usize,
    ) {
        for (row, from) in from.chunks_exact(width).take(self.rows()).enumerate() {
            let to = packed.row_mut(self.position(row) - origin);
            to[column + row / self.positions * width..][..width].copy_from_slice(from);
        }
    }
}

impl Scratch {
    /// Memory for the queries of a block, which become its results.
    pub(super) fn block_rows(&mut self, rows: usize, width: usize) -> &mut [f32] {
        bytemuck::cast_slice_mut(room(&mut self.rows[0], rows * width))
    }

    /// Replaces the stacked queries of a block by the results of attention, and calls `lse` with the logsumexp of each
    /// row.
    /// `visible` returns the positions of the keys that a row sees.
    pub(super) fn attend<K: Kernel>(
        &mut self,
        kernel: K,
        head: KeysValues<'_>,
        block: Block,
        visible: impl Fn(usize) -> Range<usize>,
        mut lse: impl FnMut(usize, f32),
    ) {
        let KeysValues { panels, keys: key_lines, values } = head;
        let (rows, width, keys) = (block.rows(), panels.width, block.keys());
        // The buffers are sized for full panels, so that a growing text does not allocate.
        let scores: &mut [f32] = bytemuck::cast_slice_mut(room(&mut self.scores[0], rows * panels.positions));
        let most = LeftPanels::new(kernel, rows, panels.positions.max(width)).words();
        let left_words = room(&mut self.left, most);
        let results: &mut [f32] = bytemuck::cast_slice_mut(room(&mut self.rows[0], rows * width));

        let stride = keys.next_multiple_of(LANES);
        let queries = Matrix::new(results, rows, width, width);
        let right = &key_lines[block.first_key / LANES * panels.by_position()..];
        let mut out = MatrixMut::new(scores, rows, keys, stride);
        multiply(kernel, &mut out, queries, left_words, right, panels.by_position(), Output::Overwrite);

        let scale = 1.0 / (width as f32).sqrt();
        for (row, scores) in scores.chunks_exact_mut(stride).take(rows).enumerate() {
            let visible = visible(row);
            let (from, to) = (visible.start - block.first_key, visible.end - block.first_key);
            lse(row, softmax(&mut scores[..keys], from, to, scale));
        }

        let probabilities = Matrix::new(scores, rows, keys, stride);
        let right = &values[panels.before(block.first_key)..];
        let mut out = MatrixMut::new(results, rows, width, width);
        multiply(kernel, &mut out, probabilities, left_words, right, panels.by_element(), Output::Overwrite);
    }
}

/// `out = a · right` or `out += a · right`, depending on `output`, on this thread alone.
fn multiply<K: Kernel>(
    kernel: K,
    out: &mut MatrixMut<'_>,
    a: Matrix<'_>,
    words: &mut [u32],
    right: &[Line],
    distance: usize,
    output: Output,
) {
    let left = LeftPanels::new(kernel, a.rows(), a.columns());
    let words = &mut words[..left.words()];
    pack_left(kernel, left, words, a, 0..a.rows(), 0..a.columns(), Threads::One);
    let product = Product { left, left_words: words, right, distance, columns: out.columns() };
    product.compute(kernel, out, output, Threads::One);
}

vectorised! {
    /// Softmax of `scale · scores` over `from..to`, with zeros elsewhere. Returns the logsumexp.
    fn softmax(scores: &mut [f32], from: usize, to: usize, scale: f32) -> f32 {
        scores[..from].fill(0.0);
        scores[to..].fill(0.0);
        let visible = &mut scores[from..to];
        let most = max(visible);
        for score in visible.iter_mut() {
            *score = exp((*score - most) * scale);
        }
        let total = sum(visible);
        let inverse = 1.0 / total;
        for score in visible.iter_mut() {
            *score *= inverse;
        }
        most * scale + total.ln()
    }
}

/// One key/value head of one sequence, in training.
struct Head<'a> {
    heads: Heads,
    panels: HeadPanels,
    key_value: usize,
    /// The packed rows of the sequence.
    packed: Matrix<'a>,
    doc_starts: &'a [u32],
}

impl<'a> Head<'a> {
    fn new(
        format: WeightFormat,
        packed: &'a [f32],
        doc_starts: &'a [u32],
        shape: AttentionShape,
        task: usize,
    ) -> Self {
        let AttentionShape { length, heads, .. } = shape;
        let (sequence, key_value) = (task / heads.key_value, task % heads.key_value);
        let width = heads.packed_width();
        Self {
            heads,
            panels: HeadPanels { format, positions: length.next_multiple_of(LANES), width: heads.width },
            key_value,
            packed: Matrix::new(&packed[sequence * length * width..], length, width, width),
            doc_starts: &doc_starts[sequence * length..][..length],
        }
    }

    /// The first column of the queries that share this head.
    fn query_column(&self) -> usize {
        self.key_value * self.heads.group() * self.heads.width
    }

    fn key_column(&self) -> usize {
        (self.heads.query + self.key_value) * self.heads.width
    }

    fn value_column(&self) -> usize {
        self.key_column() + self.heads.key_value_width()
    }

    fn columns(&self, first: usize) -> Matrix<'a> {
        self.packed.columns_of(first..first + self.heads.width)
    }

    fn blocks(&self) -> impl Iterator<Item = Block> {
        let (length, positions) = (self.doc_starts.len(), block_positions(self.heads));
        (0..length).step_by(positions).map(move |first| {
            let positions = positions.min(length - first);
            let starts = &self.doc_starts[first..first + positions];
            let first_key = starts.iter().min().map_or(0, |start| *start as usize) / LANES * LANES;
            Block { first, positions, group: self.heads.group(), first_key }
        })
    }

    /// The positions of the keys that a row of a block sees.
    fn visible(&self, block: Block, row: usize) -> Range<usize> {
        let position = block.position(row);
        self.doc_starts[position] as usize..position + 1
    }
}

/// See [`ulmus_backend::TrainingBackend::attention`].
pub(crate) fn attention(
    out: &mut [f32],
    lse: &mut [f32],
    packed: &[f32],
    doc_starts: &[u32],
    shape: AttentionShape,
    precision: Precision,
) {
    by_kernel!(match precision, Precision { F32, Bf16 }, kernel => attention_by(kernel, out, lse, packed, doc_starts, shape));
}

fn attention_by<K: Kernel>(
    kernel: K,
    out: &mut [f32],
    lse: &mut [f32],
    packed: &[f32],
    doc_starts: &[u32],
    shape: AttentionShape,
) {
    let AttentionShape { sequences, length, heads } = shape;
    let (stride, group) = (heads.query_width(), heads.group());
    let (out, lse) = (Shared::new(out), Shared::new(lse));
    (0..sequences * heads.key_value).into_par_iter().for_each(|task| {
        let (sequence, own) = (task / heads.key_value, group * heads.width);
        let head = Head::new(K::FORMAT, packed, doc_starts, shape, task);
        // SAFETY: a task is one pair of sequence and key/value head. The columns of its query heads in the sequence's
        // rows of `out`, and their part of `lse`, belong to no other task.
        let (mut out, lse) = unsafe {
            (
                out.block(sequence * length * stride + head.query_column(), length, own, stride),
                lse.slice(task * group * length, group * length),
            )
        };
        with_scratch(|scratch| {
            let mut panels = std::mem::take(&mut scratch.panels);
            let [keys, values, _] = &mut panels;
            let (keys, values) = (
                room_lines(keys, head.panels.all_by_position()),
                room_lines(values, head.panels.all_by_element()),
            );
            head.panels.pack_by_position(keys, head.columns(head.key_column()));
            head.panels.pack_by_element(values, head.columns(head.value_column()));
            let keys_values = KeysValues { panels: head.panels, keys, values };
            for block in head.blocks() {
                let rows = scratch.block_rows(block.rows(), heads.width);
                block.gather(rows, head.packed, 0, head.query_column(), heads.width);
                scratch.attend(
                    kernel,
                    keys_values,
                    block,
                    |row| head.visible(block, row),
                    |row, value| {
                        lse[row / block.positions * length + block.position(row)] = value;
                    },
                );
                block.scatter(scratch.block_rows(block.rows(), heads.width), &mut out, 0, 0, heads.width);
            }
            scratch.panels = panels;
        });
    });
}

/// What the backward pass of attention reads.
#[derive(Clone, Copy)]
pub(crate) struct Upstream<'a> {
    /// Gradient of the output.
    pub gradient: &'a [f32],
    pub out: &'a [f32],
    pub lse: &'a [f32],
}

/// See [`ulmus_backend::TrainingBackend::attention_backward`].
pub(crate) fn attention_backward(
    packed_gradient: &mut [f32],
    upstream: Upstream<'_>,
    packed: &[f32],
    doc_starts: &[u32],
    shape: AttentionShape,
    precision: Precision,
) {
    by_kernel!(match precision, Precision { F32, Bf16 }, kernel => backward_by(kernel, packed_gradient, upstream, packed, doc_starts, shape));
}

fn backward_by<K: Kernel>(
    kernel: K,
    packed_gradient: &mut [f32],
    upstream: Upstream<'_>,
    packed: &[f32],
    doc_starts: &[u32],
    shape: AttentionShape,
) {
    let AttentionShape { sequences, length, heads } = shape;
    let (stride, own) = (heads.packed_width(), heads.group() * heads.width);
    let packed_gradient = Shared::new(packed_gradient);
    (0..sequences * heads.key_value).into_par_iter().for_each(|task| {
        let sequence = task / heads.key_value;
        let head = Head::new(K::FORMAT, packed, doc_starts, shape, task);
        // SAFETY: a task is one pair of sequence and key/value head. It takes the columns of that key head, of that
        // value head and of the query heads that read them, which no other task takes and which do not overlap.
        let columns = |first: usize, width: usize| unsafe {
            packed_gradient.block(sequence * length * stride + first, length, width, stride)
        };
        let gradients = [
            columns(head.query_column(), own),
            columns(head.key_column(), heads.width),
            columns(head.value_column(), heads.width),
        ];
        with_scratch(|scratch| scratch.backward(kernel, &head, upstream, sequence, gradients));
    });
}

impl Scratch {
    fn backward<K: Kernel>(
        &mut self,
        kernel: K,
        head: &Head<'_>,
        upstream: Upstream<'_>,
        sequence: usize,
        gradients: [MatrixMut<'_>; 3],
    ) {
        let Head { heads, panels, .. } = *head;
        let (width, length, stride) = (heads.width, head.doc_starts.len(), heads.query_width());
        let [mut query_gradient, mut key_gradient, mut value_gradient] = gradients;
        key_gradient.clear();
        value_gradient.clear();
        let [keys, values, keys_by_element] = &mut self.panels;
        let keys = room_lines(keys, panels.all_by_position());
        let values = room_lines(values, panels.all_by_position());
        let keys_by_element = room_lines(keys_by_element, panels.all_by_element());
        panels.pack_by_position(keys, head.columns(head.key_column()));
        panels.pack_by_position(values, head.columns(head.value_column()));
        panels.pack_by_element(keys_by_element, head.columns(head.key_column()));
        let [gradient, attended] = [upstream.gradient, upstream.out]
            .map(|rows| Matrix::new(&rows[sequence * length * stride..], length, stride, stride));
        let first_head = head.key_value * heads.group();
        let scale = 1.0 / (width as f32).sqrt();

        for block in head.blocks() {
            let (rows, keys_seen, first_key) = (block.rows(), block.keys(), block.first_key);
            let scores_stride = keys_seen.next_multiple_of(LANES);
            let [queries, upstream_rows] = &mut self.rows;
            let queries: &mut [f32] = bytemuck::cast_slice_mut(room(queries, rows * width));
            let upstream_rows: &mut [f32] = bytemuck::cast_slice_mut(room(upstream_rows, rows * width));
            let [scores, score_gradients] = &mut self.scores;
            let scores: &mut [f32] = bytemuck::cast_slice_mut(room(scores, rows * scores_stride));
            let score_gradients: &mut [f32] =
                bytemuck::cast_slice_mut(room(score_gradients, rows * scores_stride));
            let words = [(rows, width), (rows, keys_seen), (keys_seen, rows)]
                .map(|(rows, depths)| LeftPanels::new(kernel, rows, depths).words());
            let left = room(&mut self.left, words.into_iter().max().unwrap_or(0));

            block.gather(queries, head.packed, 0, head.query_column(), width);
            block.gather(upstream_rows, gradient, 0, head.query_column(), width);
            let from_position = first_key / LANES * panels.by_position();
            for (to, rows_of, right) in
                [(&mut *scores, &*queries, &*keys), (&mut *score_gradients, &*upstream_rows, &*values)]
            {
                let mut to = MatrixMut::new(to, rows, keys_seen, scores_stride);
                let from = Matrix::new(rows_of, rows, width, width);
                let right = &right[from_position..];
                multiply(kernel, &mut to, from, left, right, panels.by_position(), Output::Overwrite);
            }
            for row in 0..rows {
                let (position, query_head) = (block.position(row), first_head + row / block.positions);
                let visible = head.visible(block, row);
                let at = row * scores_stride..row * scores_stride + keys_seen;
                softmax_backward(
                    &mut scores[at.clone()],
                    &mut score_gradients[at],
                    visible.start - first_key,
                    visible.end - first_key,
                    scale,
                    upstream.lse[(sequence * heads.query + query_head) * length + position],
                    &attended.row(position)[query_head * width..][..width],
                    &upstream_rows[row * width..][..width],
                );
            }

            let own = HeadPanels { positions: rows.next_multiple_of(LANES), ..panels };
            for (to, left_of, right_of) in [
                (&mut key_gradient, &*score_gradients, &*queries),
                (&mut value_gradient, &*scores, &*upstream_rows),
            ] {
                let right = room_lines(&mut self.right, own.all_by_element());
                own.pack_by_element(right, Matrix::new(right_of, rows, width, width));
                let mut to = to.part_mut(first_key..first_key + keys_seen, 0..width);
                let from = Matrix::new(left_of, rows, keys_seen, scores_stride).transposed();
                multiply(kernel, &mut to, from, left, right, own.by_element(), Output::Accumulate);
            }
            let mut to = MatrixMut::new(queries, rows, width, width);
            let from = Matrix::new(score_gradients, rows, keys_seen, scores_stride);
            let right = &keys_by_element[panels.before(first_key)..];
            multiply(kernel, &mut to, from, left, right, panels.by_element(), Output::Overwrite);
            block.scatter(queries, &mut query_gradient, 0, 0, width);
        }
    }
}

vectorised! {
    /// Replaces scores by probabilities p, and the gradients g of the probabilities by `scale · p · (g −
    /// out·out_gradient)`, the gradients of the unscaled scores. Both become zero where keys are not visible.
    fn softmax_backward(
        scores: &mut [f32],
        gradients: &mut [f32],
        from: usize,
        to: usize,
        scale: f32,
        lse: f32,
        out: &[f32],
        out_gradient: &[f32],
    ) {
        let mean = dot(out, out_gradient);
        for (score, gradient) in scores[from..to].iter_mut().zip(&mut gradients[from..to]) {
            *score = exp(score.mul_add(scale, -lse));
            *gradient = *score * (*gradient - mean) * scale;
        }
        for outside in [0..from, to..scores.len()] {
            scores[outside.clone()].fill(0.0);
            gradients[outside].fill(0.0);
        }
    }
}
