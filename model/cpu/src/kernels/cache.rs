//! The key/value cache, and attention over it. The keys and values of each head are kept as right panels.
//!
//! The bits of a query's result depend on its own position and the cache, but not on the queries beside it: keys that
//! the query must not see get the probability 0.

use half::{bf16, f16};
use rayon::prelude::*;
use ulmus_backend::{BackendError, CacheFormat, Heads};

use super::aligned::Line;
use super::attention::{Block, HeadPanels, KeysValues, block_positions, with_scratch};
use super::dispatch::by_kernel;
use super::huge_pages::Pages;
use super::panel::{Kernel, LANES, place_of};
use super::view::{Matrix, Shared};

/// With fewer rows than this, storing is not worth waking other threads.
const SERIAL_ROWS: usize = 64;

/// The slices of [`ulmus_backend::Spans`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct Spans<'a> {
    pub sequences: &'a [u32],
    pub first: &'a [u32],
    pub length: usize,
}

impl Spans<'_> {
    /// The sequence, position and row index of the first row of each span.
    fn iter(&self) -> impl Iterator<Item = (usize, usize, usize)> {
        let pairs = self.sequences.iter().zip(self.first);
        pairs.enumerate().map(|(index, (s, first))| (*s as usize, *first as usize, index * self.length))
    }
}

/// The keys and values of one layer, for several sequences.
#[derive(Debug)]
pub struct Cache {
    heads: Heads,
    format: CacheFormat,
    panels: HeadPanels,
    /// For each sequence and head, all keys and then all values.
    lines: Pages,
}

impl Cache {
    pub(crate) fn new(
        sequences: usize,
        capacity: usize,
        heads: Heads,
        format: CacheFormat,
    ) -> Result<Self, BackendError> {
        let panels = HeadPanels {
            format: format.into(),
            positions: capacity.next_multiple_of(LANES),
            width: heads.width,
        };
        let head = panels.all_by_position() + panels.all_by_element();
        Ok(Self { heads, format, panels, lines: Pages::zeroed(sequences * heads.key_value * head)? })
    }

    fn head_lines(&self) -> usize {
        self.panels.all_by_position() + self.panels.all_by_element()
    }

    /// Stores the keys and values of the packed rows of all spans, and computes the attention of their queries.
    pub(crate) fn attend(&mut self, out: &mut [f32], packed: &[f32], spans: Spans<'_>) {
        let width = self.heads.packed_width();
        let packed = Matrix::new(packed, packed.len() / width, width, width);
        self.store(packed, spans);
        by_kernel!(match self.format, CacheFormat { F32, F16, Bf16 }, kernel => self.attend_by(kernel, out, packed, spans));
    }

    /// Copies the first `positions[i]` keys and values of the sequence `from[i]` to `to[i]`, for all i. No sequence is
    /// written twice, or both read and written.
    pub(crate) fn fork(&mut self, from: &[u32], to: &[u32], positions: &[u32]) {
        let (panels, head_lines) = (self.panels, self.head_lines());
        let mut sequences: Vec<_> =
            self.lines.chunks_exact_mut(self.heads.key_value * head_lines).map(Some).collect();
        let to: Vec<_> =
            to.iter().map(|to| sequences[*to as usize].take().expect("it is written once")).collect();
        let from: Vec<_> = from
            .iter()
            .map(|from| sequences[*from as usize].as_deref().expect("what is read is not written"))
            .collect();
        to.into_par_iter().zip(from).zip(positions).for_each(|((to, from), positions)| {
            let positions = *positions as usize;
            let (by_position, by_element) =
                (panels.first_by_position(positions), panels.first_by_element(positions));
            for (to, from) in to.chunks_exact_mut(head_lines).zip(from.chunks_exact(head_lines)) {
                to[..by_position].copy_from_slice(&from[..by_position]);
                let (_, to) = to.split_at_mut(panels.all_by_position());
                let (_, from) = from.split_at(panels.all_by_position());
                let panels_of = from.chunks_exact(panels.by_element());
                for (to, from) in to.chunks_exact_mut(panels.by_element()).zip(panels_of) {
                    to[..by_element].copy_from_slice(&from[..by_element]);
                }
            }
        });
    }

    fn store(&mut self, packed: Matrix<'_>, spans: Spans<'_>) {
        let (heads, format, panels, head_lines) = (self.heads, self.format, self.panels, self.head_lines());
        let store = |(index, lines): (usize, &mut [Line])| {
            let (sequence, head) = (index / heads.key_value, index % heads.key_value);
            for (own, first, row) in spans.iter() {
                if own == sequence {
                    for (row, position) in (row..row + spans.length).zip(first..) {
                        let key = &packed.row(row)[(heads.query + head) * heads.width..];
                        let pair = [&key[..heads.width], &key[heads.key_value_width()..][..heads.width]];
                        match format {
                            CacheFormat::F32 => put::<1, f32>(panels, lines, position, pair, |x| x),
                            CacheFormat::F16 => {
                                put::<1, u16>(panels, lines, position, pair, |x| f16::from_f32(x).to_bits());
                            }
                            CacheFormat::Bf16 => {
                                put::<2, u16>(panels, lines, position, pair, |x| bf16::from_f32(x).to_bits());
                            }
                        }
                    }
                }
            }
        };
        if packed.rows() < SERIAL_ROWS {
            self.lines.chunks_exact_mut(head_lines).enumerate().for_each(store);
        } else {
            self.lines.par_chunks_exact_mut(head_lines).enumerate().for_each(store);
        }
    }

    fn attend_by<K: Kernel>(&self, kernel: K, out: &mut [f32], packed: Matrix<'_>, spans: Spans<'_>) {
        let Heads { key_value, width, .. } = self.heads;
        let (most, group) = (block_positions(self.heads), self.heads.group());
        let stride = self.heads.query_width();
        let out = Shared::new(out);
        let per_span = spans.length.div_ceil(most);
        let blocks = spans.sequences.len() * per_span;
        let work = |index: usize| {
            let (block, head) = (index / key_value, index % key_value);
            let (span, skip) = (block / per_span, block % per_span * most);
            let (sequence, row) = (spans.sequences[span] as usize, span * spans.length + skip);
            let first = spans.first[span] as usize + skip;
            let positions = most.min(spans.length - skip);
            let block = Block { first, positions, group, first_key: 0 };
            let lines = &self.lines[(sequence * key_value + head) * self.head_lines()..][..self.head_lines()];
            let (keys, values) = lines.split_at(self.panels.all_by_position());
            let head_panels = KeysValues { panels: self.panels, keys, values };
            let column = head * group * width;
            // SAFETY: a task is one pair of block of rows and key/value head. The columns of its query heads in these
            // rows belong to no other task.
            let mut out = unsafe { out.block(row * stride + column, positions, group * width, stride) };
            with_scratch(|scratch| {
                let queries = packed.rows_of(row..row + positions);
                let rows = scratch.block_rows(block.rows(), width);
                block.gather(rows, queries, block.first, column, width);
                let visible = |row: usize| 0..block.first + row % positions + 1;
                scratch.attend(kernel, head_panels, block, visible, |_, _| ());
                block.scatter(scratch.block_rows(block.rows(), width), &mut out, block.first, 0, width);
            });
        };
        if rayon::current_num_threads() == 1 {
            (0..blocks * key_value).for_each(work);
        } else {
            (0..blocks * key_value).into_par_iter().for_each(work);
        }
    }
}

/// Stores the key and the value of one position in a head's panels, which have steps of `STEP` depths.
fn put<const STEP: usize, T: bytemuck::Pod>(
    panels: HeadPanels,
    lines: &mut [Line],
    position: usize,
    [key, value]: [&[f32]; 2],
    convert: impl Fn(f32) -> T,
) {
    let elements = |lines: usize| lines * size_of::<Line>() / size_of::<T>();
    let (keys, values) =
        bytemuck::cast_slice_mut::<Line, T>(lines).split_at_mut(elements(panels.all_by_position()));
    let keys = &mut keys[position / LANES * elements(panels.by_position())..];
    for (element, x) in key.iter().enumerate() {
        keys[place_of::<STEP>(LANES, position % LANES, element)] = convert(*x);
    }
    for (panel, value) in values.chunks_exact_mut(elements(panels.by_element())).zip(value.chunks(LANES)) {
        for (lane, x) in value.iter().enumerate() {
            let at = place_of::<STEP>(LANES, lane, position);
            panel[at] = convert(*x);
            if position.is_multiple_of(STEP) {
                // The later positions in this step have no values yet, or those of an old text.
                panel[at + 1..at + STEP].fill(T::zeroed());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADS: Heads = Heads { query: 2, key_value: 1, width: 6 };

    #[test]
    fn sixteen_bits_take_half_the_memory() {
        let lines = |format| Cache::new(2, 100, HEADS, format).unwrap().lines.len();
        for format in [CacheFormat::F16, CacheFormat::Bf16] {
            assert_eq!(2 * lines(format), lines(CacheFormat::F32), "{format:?}");
        }
    }

    /// The old text consists of NaN, which would show even when multiplied by the probability 0.
    #[test]
    fn nothing_of_an_old_text_is_read() {
        let packed = [0.5; 4 * 6];
        for format in [CacheFormat::F32, CacheFormat::F16, CacheFormat::Bf16] {
            let mut cache = Cache::new(1, 40, HEADS, format).unwrap();
            cache.lines.fill(Line([u32::MAX; 16]));
            for position in 0..37 {
                let mut out = [f32::NAN; 2 * 6];
                cache.attend(&mut out, &packed, Spans { sequences: &[0], first: &[position], length: 1 });
                assert!(out.iter().all(|x| (x - 0.5).abs() < 0.01), "{format:?} at {position}: {out:?}");
            }
        }
    }
}
