//! Finds where a text can be cut without changing its pieces: between two characters that are not adjacent in any
//! piece, because no merge can cross that point.

use std::collections::HashSet;

use super::vocabulary::{SPACE_MARK, Vocabulary};

/// The pairs of characters that are adjacent in some piece.
#[derive(Debug, Clone)]
pub(super) struct SplitTable {
    /// For each left character, one bit per right character.
    ascii: Box<[u128; 128]>,
    /// One bit per hash of all other pairs. A collision only makes a chunk longer than necessary.
    others: Box<[u64]>,
    escapes: bool,
}

/// [`SplitTable::others`] has `1 << BITS` bits.
const BITS: u32 = 18;

impl SplitTable {
    /// The table of a vocabulary. With `escapes`, a space counts as [`SPACE_MARK`].
    pub(super) fn new(vocabulary: &Vocabulary, escapes: bool) -> Self {
        let mut boundaries =
            Self { ascii: Box::new([0; 128]), others: vec![0; 1 << (BITS - 6)].into(), escapes };
        let pairs: HashSet<(char, char)> = vocabulary
            .of_texts()
            .flat_map(|(_, piece)| piece.text.chars().zip(piece.text.chars().skip(1)))
            .collect();
        for (left, right) in pairs {
            let (left, right) = (boundaries.fold(left), boundaries.fold(right));
            if left < 128 && right < 128 {
                boundaries.ascii[left as usize] |= 1 << right;
            } else {
                let bit = hash(left, right);
                boundaries.others[bit >> 6] |= 1 << (bit & 63);
            }
        }
        boundaries
    }

    /// The code point of a character, with both forms of a space folded into one.
    #[inline]
    fn fold(&self, c: char) -> u32 {
        if c == SPACE_MARK && self.escapes { u32::from(b' ') } else { c as u32 }
    }

    #[inline]
    fn join(&self, left: u32, right: u32) -> bool {
        if left < 128 && right < 128 {
            self.ascii[left as usize] >> right & 1 == 1
        } else {
            let bit = hash(left, right);
            self.others[bit >> 6] >> (bit & 63) & 1 == 1
        }
    }

    /// The end of the first chunk of `text`, given that `before` precedes the text.
    pub(super) fn first_end(&self, before: char, text: &str) -> usize {
        let mut previous = self.fold(before);
        for (at, c) in text.char_indices() {
            let code = self.fold(c);
            if !self.join(previous, code) {
                return at;
            }
            previous = code;
        }
        text.len()
    }

    /// Calls `emit` with each chunk of `text`. No chunk is empty.
    #[inline]
    pub(super) fn cut<'t>(&self, text: &'t str, mut emit: impl FnMut(&'t str)) {
        let Some(first) = text.chars().next() else { return };
        let bytes = text.as_bytes();
        let (mut start, mut at, mut previous) = (0, first.len_utf8(), self.fold(first));
        while at < bytes.len() {
            let byte = bytes[at];
            let (code, width) = if byte < 128 {
                (u32::from(byte), 1)
            } else {
                let c = text[at..].chars().next().expect("`at` is before the end of the text");
                (self.fold(c), c.len_utf8())
            };
            if !self.join(previous, code) {
                emit(&text[start..at]);
                start = at;
            }
            previous = code;
            at += width;
        }
        emit(&text[start..]);
    }
}

#[inline]
fn hash(left: u32, right: u32) -> usize {
    let mixed = left.wrapping_mul(0x9E37_79B1) ^ right.wrapping_mul(0x85EB_CA6B);
    (mixed.wrapping_mul(0xC2B2_AE35) >> (u32::BITS - BITS)) as usize
}
