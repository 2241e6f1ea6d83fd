//! Causal attention with grouped queries and document starts, in blocks of query rows.
//!
//! A block of scores `[rows, keys]` is made, normalised and used while it is in cache. Keys before the earliest
//! document start of the block are never touched, so packed documents cost what they weigh.
//! The forward is parallel over blocks; the backward over key/value heads, whose gradients it sums in the order of
//! the query heads and blocks.

use std::cell::RefCell;

use rayon::prelude::*;
use ulmus_plan::Precision;

use super::matrix::{How, Matrix, MatrixMut, Output, Shared, Threads, multiply};
use super::simd::{dot, exp, max, sum, vectorised};
use crate::backend::{AttentionShape, Heads};

/// Query rows per block.
const QUERY_BLOCK: usize = 64;

thread_local! {
    /// Scores of one block and their gradients; grows to the longest sequence seen and is then reused.
    static SCORES: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

fn with_scratch<R>(len: usize, work: impl FnOnce(&mut [f32]) -> R) -> R {
    SCORES.with_borrow_mut(|scratch| {
        if scratch.len() < len {
            scratch.resize(len, 0.0);
        }
        work(&mut scratch[..len])
    })
}

/// Columns `column..` of rows `stride` apart.
#[derive(Clone, Copy)]
pub(crate) struct Strided<'a> {
    pub data: &'a [f32],
    pub stride: usize,
    pub column: usize,
}

impl<'a> Strided<'a> {
    /// Rows `start..start + rows` of head `head`.
    fn head(&self, head: usize, width: usize, start: usize, rows: usize) -> Matrix<'a> {
        let from = start * self.stride + self.column + head * width;
        Matrix::new(&self.data[from..], rows, width, self.stride)
    }
}

/// One block of query rows of one sequence: which keys it sees.
struct Block<'a> {
    /// First query row within its sequence.
    start: usize,
    rows: usize,
    /// First key that any row of the block sees.
    first_key: usize,
    /// Keys from `first_key` to the last that any row sees.
    keys: usize,
    /// Key position of the first row.
    position: usize,
    /// Per row of the block, if documents are packed.
    doc_starts: Option<&'a [u32]>,
}

impl<'a> Block<'a> {
    fn new(shape: &AttentionShape, doc_starts: Option<&'a [u32]>, sequence: usize, start: usize) -> Self {
        let rows = QUERY_BLOCK.min(shape.queries - start);
        let position = shape.keys - shape.queries + start;
        let doc_starts = doc_starts.map(|starts| &starts[sequence * shape.queries + start..][..rows]);
        let first_key = doc_starts.and_then(|starts| starts.iter().min()).map_or(0, |first| *first as usize);
        Self { start, rows, first_key, keys: position + rows - first_key, position, doc_starts }
    }

    /// Keys of `row`, counted from `first_key`.
    fn visible(&self, row: usize) -> (usize, usize) {
        let from = self.doc_starts.map_or(0, |starts| starts[row] as usize - self.first_key);
        (from, self.position + row + 1 - self.first_key)
    }
}

/// See [`crate::Backend::attention`].
pub(crate) fn attention(
    out: &mut [f32],
    lse: &mut [f32],
    query: Strided<'_>,
    key: Strided<'_>,
    value: Strided<'_>,
    doc_starts: Option<&[u32]>,
    shape: AttentionShape,
    precision: Precision,
) {
    let how = How { precision, scale: 1.0, output: Output::Overwrite, threads: Threads::One };
    let AttentionShape { sequences, queries, keys, heads } = shape;
    let (width, out_stride) = (heads.width, heads.query_width());
    let blocks = queries.div_ceil(QUERY_BLOCK);
    let scale = 1.0 / (width as f32).sqrt();
    let (out, lse) = (Shared::new(out), Shared::new(lse));
    (0..sequences * heads.query * blocks).into_par_iter().for_each(|task| {
        let (sequence, head, block) =
            (task / blocks / heads.query, task / blocks % heads.query, task % blocks);
        let block = Block::new(&shape, doc_starts, sequence, block * QUERY_BLOCK);
        let kv_head = head / (heads.query / heads.key_value);
        let first_key = sequence * keys + block.first_key;
        let queries_here = query.head(head, width, sequence * queries + block.start, block.rows);
        let keys_here = key.head(kv_head, width, first_key, block.keys);
        let values_here = value.head(kv_head, width, first_key, block.keys);
        // SAFETY: a task is one (sequence, head, block): its rows and columns of `out`, and its part of `lse`,
        // belong to no other task.
        let (mut out, lse) = unsafe {
            let row = sequence * queries + block.start;
            (
                out.block(row * out_stride + head * width, block.rows, width, out_stride),
                lse.slice((sequence * heads.query + head) * queries + block.start, block.rows),
            )
        };
        with_scratch(block.rows * block.keys, |scores| {
            let mut product = MatrixMut::new(scores, block.rows, block.keys, block.keys);
            multiply(&mut product, queries_here, keys_here.transposed(), How { scale, ..how });
            for (row, (scores, lse)) in scores.chunks_exact_mut(block.keys).zip(lse).enumerate() {
                let (from, to) = block.visible(row);
                *lse = softmax(scores, from, to);
            }
            let scores = Matrix::new(scores, block.rows, block.keys, block.keys);
            multiply(&mut out, scores, values_here, how);
        });
    });
}

vectorised! {
    /// Softmax over `from..to`, zeros elsewhere; gives the logsumexp.
    fn softmax(scores: &mut [f32], from: usize, to: usize) -> f32 {
        scores[..from].fill(0.0);
        scores[to..].fill(0.0);
        let visible = &mut scores[from..to];
        let most = max(visible);
        for score in visible.iter_mut() {
            *score = exp(*score - most);
        }
        let total = sum(visible);
        let scale = 1.0 / total;
        for score in visible.iter_mut() {
            *score *= scale;
        }
        most + total.ln()
    }
}

/// See [`crate::Backend::attention_backward`].
pub(crate) fn attention_backward(
    packed_gradient: &mut [f32],
    gradient: &[f32],
    out: &[f32],
    lse: &[f32],
    packed: &[f32],
    doc_starts: &[u32],
    shape: AttentionShape,
    precision: Precision,
) {
    let heads = shape.heads;
    let packed_gradient = Shared::new(packed_gradient);
    (0..shape.sequences * heads.key_value).into_par_iter().for_each(|task| {
        let (sequence, kv_head) = (task / heads.key_value, task % heads.key_value);
        let rows = Rows { shape, precision, sequence, packed, gradient, out, lse };
        let first_row = sequence * shape.queries * heads.packed_width();
        // SAFETY: a task is one (sequence, key/value head). It takes the columns of that key head, of that value
        // head and, one after the other, of the query heads that read them: no other task's.
        let columns = |head: usize| unsafe {
            packed_gradient.block(
                first_row + head * heads.width,
                shape.queries,
                heads.width,
                heads.packed_width(),
            )
        };
        let mut key_gradient = columns(heads.query + kv_head);
        let mut value_gradient = columns(heads.query + heads.key_value + kv_head);
        key_gradient.clear();
        value_gradient.clear();
        let group = heads.query / heads.key_value;
        for head in kv_head * group..(kv_head + 1) * group {
            let mut query_gradient = columns(head);
            for start in (0..shape.queries).step_by(QUERY_BLOCK) {
                let block = Block::new(&shape, Some(doc_starts), sequence, start);
                rows.backward(
                    &block,
                    head,
                    kv_head,
                    &mut query_gradient,
                    &mut key_gradient,
                    &mut value_gradient,
                );
            }
        }
    });
}

/// What the backward of one sequence reads.
struct Rows<'a> {
    shape: AttentionShape,
    precision: Precision,
    sequence: usize,
    packed: &'a [f32],
    gradient: &'a [f32],
    out: &'a [f32],
    lse: &'a [f32],
}

impl Rows<'_> {
    /// One block of query rows of one head: writes its query gradient, adds to the gradients of keys and values.
    fn backward(
        &self,
        block: &Block<'_>,
        head: usize,
        kv_head: usize,
        query_gradient: &mut MatrixMut<'_>,
        key_gradient: &mut MatrixMut<'_>,
        value_gradient: &mut MatrixMut<'_>,
    ) {
        let AttentionShape { queries, heads, .. } = self.shape;
        let Heads { width, .. } = heads;
        let scale = 1.0 / (width as f32).sqrt();
        let first_row = self.sequence * queries;
        let (packed_width, out_stride) = (heads.packed_width(), heads.query_width());
        let packed = Strided { data: self.packed, stride: packed_width, column: 0 };
        let upstream = Strided { data: self.gradient, stride: out_stride, column: 0 };
        let query = packed.head(head, width, first_row + block.start, block.rows);
        let key = packed.head(heads.query + kv_head, width, first_row + block.first_key, block.keys);
        let value = packed.head(
            heads.query + heads.key_value + kv_head,
            width,
            first_row + block.first_key,
            block.keys,
        );
        let upstream = upstream.head(head, width, first_row + block.start, block.rows);
        let size = block.rows * block.keys;
        let how =
            How { precision: self.precision, scale: 1.0, output: Output::Overwrite, threads: Threads::One };
        let add = How { output: Output::Accumulate, ..how };
        with_scratch(2 * size, |scratch| {
            let (scores, score_gradients) = scratch.split_at_mut(size);
            let view = |data| MatrixMut::new(data, block.rows, block.keys, block.keys);
            multiply(&mut view(scores), query, key.transposed(), How { scale, ..how });
            multiply(&mut view(score_gradients), upstream, value.transposed(), how);
            for (row, (scores, gradients)) in scores
                .chunks_exact_mut(block.keys)
                .zip(score_gradients.chunks_exact_mut(block.keys))
                .enumerate()
            {
                let at = (first_row + block.start + row) * out_stride + head * width;
                let (out, gradient) = (&self.out[at..at + width], &self.gradient[at..at + width]);
                let lse = self.lse[(self.sequence * heads.query + head) * queries + block.start + row];
                let (from, to) = block.visible(row);
                softmax_backward(scores, gradients, from, to, lse, out, gradient);
            }
            let probabilities = Matrix::new(scores, block.rows, block.keys, block.keys);
            let score_gradients = Matrix::new(score_gradients, block.rows, block.keys, block.keys);
            let mut query_gradient = query_gradient.rows_from(block.start);
            let mut query_gradient = query_gradient.first_rows(block.rows);
            multiply(&mut query_gradient, score_gradients, key, How { scale, ..how });
            let mut key_gradient = key_gradient.rows_from(block.first_key);
            let mut key_gradient = key_gradient.first_rows(block.keys);
            multiply(&mut key_gradient, score_gradients.transposed(), query, How { scale, ..add });
            let mut value_gradient = value_gradient.rows_from(block.first_key);
            let mut value_gradient = value_gradient.first_rows(block.keys);
            multiply(&mut value_gradient, probabilities.transposed(), upstream, add);
        });
    }
}

vectorised! {
    /// Scores become probabilities p; their gradients g become `p · (g − out·gradient)`; zeros where invisible.
    fn softmax_backward(
        scores: &mut [f32],
        gradients: &mut [f32],
        from: usize,
        to: usize,
        lse: f32,
        out: &[f32],
        out_gradient: &[f32],
    ) {
        let mean = dot(out, out_gradient);
        for (score, gradient) in scores[from..to].iter_mut().zip(&mut gradients[from..to]) {
            *score = exp(*score - lse);
            *gradient = *score * (*gradient - mean);
        }
        for outside in [0..from, to..scores.len()] {
            scores[outside.clone()].fill(0.0);
            gradients[outside].fill(0.0);
        }
    }
}
