//! Attention over a cache of keys and values that is kept as the panels of a product.
//!
//! The keys of a head are panels whose lanes are positions and whose steps are the head's elements; its values are
//! panels whose lanes are the head's elements and whose steps are positions. So queries times keys, and probabilities
//! times values, read the cache as it is. A query's bits depend on its own position and what is cached, and not on
//! the queries beside it: keys that it must not see get the probability 0.

use std::cell::RefCell;
use std::ops::Range;

use rayon::prelude::*;

use super::lines::{Line, room};
use super::matrix::{Matrix, MatrixMut, SharedMatrix};
use super::pages::Pages;
use super::rows;
#[cfg(target_arch = "x86_64")]
use super::rows_avx512;
use super::simd::{exp, max, sum, vectorised};
use super::weights::{Activations, Kernel, LANES, Product};
use crate::backend::{Heads, Span};
use crate::error::ModelError;

/// Lines of a step: [`LANES`] floats.
const STEP: usize = LANES / 16;
/// Queries of a task, over all heads that share keys: their scores stay in the second-level cache.
const TASK_QUERIES: usize = 56;

/// Keys and values of one layer, for several sequences.
#[derive(Debug)]
pub struct Cache {
    heads: Heads,
    /// Positions, rounded up to whole panels.
    capacity: usize,
    lines: Pages,
}

impl Cache {
    pub(crate) fn new(sequences: usize, capacity: usize, heads: Heads) -> Result<Self, ModelError> {
        let mut cache = Self { heads, capacity: capacity.next_multiple_of(LANES), lines: Pages::zeroed(0)? };
        cache.lines = Pages::zeroed(sequences * heads.key_value * cache.head_lines())?;
        Ok(cache)
    }

    /// Lines of all keys of a head.
    fn key_lines(&self) -> usize {
        self.capacity * self.heads.width / 16
    }

    /// Lines of a panel of values.
    fn value_panel(&self) -> usize {
        self.capacity * STEP
    }

    /// Lines of a head.
    fn head_lines(&self) -> usize {
        self.key_lines() + self.heads.width.div_ceil(LANES) * self.value_panel()
    }

    fn head(&self, sequence: usize, head: usize) -> Range<usize> {
        let start = (sequence * self.heads.key_value + head) * self.head_lines();
        start..start + self.head_lines()
    }

    /// Keeps the keys and values of a packed row.
    fn store(&mut self, sequence: usize, position: usize, row: &[f32]) {
        let Heads { query, key_value, width } = self.heads;
        let (key_lines, value_panel) = (self.key_lines(), self.value_panel());
        for head in 0..key_value {
            let range = self.head(sequence, head);
            let (keys, values) = self.lines[range].split_at_mut(key_lines);
            let keys: &mut [f32] = &mut bytemuck::cast_slice_mut(keys)[position / LANES * LANES * width..];
            for (key, element) in row[(query + head) * width..][..width].iter().enumerate() {
                keys[key * LANES + position % LANES] = *element;
            }
            let value = row[(query + key_value + head) * width..][..width].chunks(LANES);
            for (panel, value) in values.chunks_exact_mut(value_panel).zip(value) {
                let panel: &mut [f32] = bytemuck::cast_slice_mut(panel);
                panel[position * LANES..][..value.len()].copy_from_slice(value);
            }
        }
    }

    /// Keeps keys and values of the packed rows of all spans, and lets their queries attend to what they may see.
    pub(crate) fn attend(&mut self, out: &mut [f32], packed: &[f32], spans: &[Span]) {
        let width = self.heads.packed_width();
        let mut rows = packed.chunks_exact(width);
        for span in spans {
            for (row, position) in rows.by_ref().take(span.rows).zip(span.position..) {
                self.store(span.sequence, position, row);
            }
        }
        #[cfg(target_arch = "x86_64")]
        if let Some(kernel) = rows_avx512::F32::detect() {
            return self.attend_by(kernel, out, packed, spans);
        }
        self.attend_by(rows::F32, out, packed, spans);
    }

    fn attend_by<K: Kernel>(&self, kernel: K, out: &mut [f32], packed: &[f32], spans: &[Span]) {
        let Heads { query, key_value, .. } = self.heads;
        let most = (TASK_QUERIES / (query / key_value)).max(1);
        let (rows, width) = (spans.iter().map(|span| span.rows).sum(), self.heads.query_width());
        let mut out = MatrixMut::new(out, rows, width, width);
        let out = out.shared();
        let blocks: usize = spans.iter().map(|span| span.rows.div_ceil(most)).sum();
        let work = |index: usize| {
            let (mut block, mut row) = (index / key_value, 0);
            for span in spans {
                let own = span.rows.div_ceil(most);
                if block >= own {
                    (block, row) = (block - own, row + span.rows);
                    continue;
                }
                let skip = block * most;
                let (position, rows) = (span.position + skip, most.min(span.rows - skip));
                let part = Span { sequence: span.sequence, position, rows };
                self.attend_head(kernel, &out, packed, row + skip, index % key_value, &part);
                return;
            }
        };
        if rayon::current_num_threads() == 1 {
            (0..blocks * key_value).for_each(work);
        } else {
            (0..blocks * key_value).into_par_iter().for_each(work);
        }
    }

    /// Some queries of one sequence, the first in row `first`, for all heads that share one key head.
    fn attend_head<K: Kernel>(
        &self,
        kernel: K,
        out: &SharedMatrix<'_>,
        packed: &[f32],
        first: usize,
        head: usize,
        span: &Span,
    ) {
        let Heads { query, key_value, width } = self.heads;
        let (group, keys) = (query / key_value, span.position + span.rows);
        let (queries, stride) = (group * span.rows, keys.next_multiple_of(LANES));
        let (key_lines, value_lines) = self.lines[self.head(span.sequence, head)].split_at(self.key_lines());
        let by_key = Activations::new(kernel, queries, width);
        let by_value = Activations::new(kernel, queries, keys);

        let mut scratch = SCRATCH.take();
        let [queries_at, scores_at, packed_at] = &mut scratch;
        // As large as the cache can ask for, so that a text grows without allocating.
        let most = Activations::new(kernel, queries, self.capacity.max(width)).words();
        let products = room(packed_at, most);
        let scores: &mut [f32] = bytemuck::cast_slice_mut(room(scores_at, queries * self.capacity));
        let rows: &mut [f32] = bytemuck::cast_slice_mut(room(queries_at, queries * width));

        for (index, to) in rows.chunks_exact_mut(width).enumerate() {
            let (row, head) = (first + index % span.rows, head * group + index / span.rows);
            to.copy_from_slice(&packed[row * self.heads.packed_width() + head * width..][..width]);
        }
        let by_key_words = &mut products[..by_key.words()];
        by_key.pack(kernel, by_key_words, Matrix::new(rows, queries, width, width));
        let product = Product {
            right: key_lines,
            distance: width * STEP,
            step_lines: STEP,
            columns: keys,
            part: width,
            activations: by_key,
            packed: by_key_words,
        };
        let mut view = MatrixMut::new(scores, queries, keys, stride);
        product.sum(kernel, &view.shared(), 0..keys.div_ceil(LANES));

        let scale = 1.0 / (width as f32).sqrt();
        for (index, scores) in scores.chunks_exact_mut(stride).take(queries).enumerate() {
            softmax(&mut scores[..keys], span.position + index % span.rows + 1, scale);
        }
        let by_value_words = &mut products[..by_value.words()];
        by_value.pack(kernel, by_value_words, Matrix::new(scores, queries, keys, stride));
        let product = Product {
            right: value_lines,
            distance: self.value_panel(),
            step_lines: STEP,
            columns: width,
            part: keys,
            activations: by_value,
            packed: by_value_words,
        };
        let mut view = MatrixMut::new(rows, queries, width, width);
        product.sum(kernel, &view.shared(), 0..width.div_ceil(LANES));

        for (index, from) in rows.chunks_exact(width).enumerate() {
            let (row, head) = (first + index % span.rows, head * group + index / span.rows);
            let (to, _) = out.part(row, head * width, 1, width);
            // SAFETY: `part` checked that these elements lie in the result; no other task has this row and head.
            unsafe { std::slice::from_raw_parts_mut(to, width) }.copy_from_slice(from);
        }
        SCRATCH.set(scratch);
    }
}

thread_local! {
    /// Queries and then results, scores, and packed operands.
    static SCRATCH: RefCell<[Vec<Line>; 3]> = const { RefCell::new([Vec::new(), Vec::new(), Vec::new()]) };
}

vectorised! {
    /// Probabilities of the first `visible` keys from their scores; 0 for the rest.
    fn softmax(scores: &mut [f32], visible: usize, scale: f32) {
        let (seen, hidden) = scores.split_at_mut(visible);
        let most = max(seen);
        for score in seen.iter_mut() {
            *score = exp((*score - most) * scale);
        }
        let inverse = 1.0 / sum(seen);
        for probability in seen.iter_mut() {
            *probability *= inverse;
        }
        hidden.fill(0.0);
    }
}
