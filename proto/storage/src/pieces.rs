//! How larger files are cut into requests.

use std::ops::Range;

/// Most bytes of one request, so that its deadline is one for a known amount.
pub(crate) const PIECE: u64 = 8 << 20;
/// Requests of one file that are under way at once.
pub(crate) const IN_FLIGHT: usize = 4;

/// A range in pieces.
pub(crate) fn in_pieces(range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let starts = (range.start..range.end).step_by(PIECE as usize);
    starts.map(move |start| start..(start + PIECE).min(range.end))
}
