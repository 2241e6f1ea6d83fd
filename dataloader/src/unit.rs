//! What is read and shuffled as a whole: a unit of a source.

use serde::{Deserialize, Serialize};

/// Bytes that are read beyond the end of a unit to find the end of its last document: in the first step and, doubling
/// from there, in the largest.
pub(crate) const TAIL_STEPS: [u64; 2] = [64 << 10, 8 << 20];

/// A part of a source that is read and shuffled as a whole: as much as fits into `data.unit`, but at least one row
/// group, line or file. Large row groups and compressed files are read in segments. Stored as `[file, first, end,
/// bytes]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "(u32, u64, u64, u64)", into = "(u32, u64, u64, u64)")]
pub(crate) struct Unit {
    /// Index of its (first) file in the source.
    pub(crate) file: u32,
    /// Where the unit begins: a row group (parquet), a file (text), or a byte (jsonl and token ids, from the first line
    /// or document that begins there or later). A unit of a compressed file is the whole file, in stored bytes.
    pub(crate) first: u64,
    /// Where the unit ends (exclusive), in the same measure.
    pub(crate) end: u64,
    /// Bytes of text, as far as they are known without decoding: for compressed files the stored bytes.
    pub(crate) bytes: u64,
}

impl From<(u32, u64, u64, u64)> for Unit {
    fn from((file, first, end, bytes): (u32, u64, u64, u64)) -> Self {
        Self { file, first, end, bytes }
    }
}

impl From<Unit> for (u32, u64, u64, u64) {
    fn from(unit: Unit) -> Self {
        (unit.file, unit.first, unit.end, unit.bytes)
    }
}
