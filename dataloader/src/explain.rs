//! Finds the exact documents in a sequence.

use std::ops::Range;

use serde::Serialize;

use crate::corpus::{Corpus, Judged};
use crate::error::DataError;
use crate::format::Document;
use crate::loader::Origin;
use crate::pack::Packed;

/// Where a sequence comes from, and what is in it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Explanation {
    /// Name of the source.
    pub source: String,
    /// Number of complete passes over the source before this one.
    pub epoch: u64,
    /// Index of the unit in the manifest.
    pub unit: u32,
    /// Index of the segment in the unit.
    pub segment: u32,
    /// Index of the sequence in the segment.
    pub sequence: u32,
    /// The documents that are at least partly in the sequence, in order.
    pub documents: Vec<Excerpt>,
}

/// The part of a document that is in a sequence.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Excerpt {
    /// URL of the document's file.
    pub file: String,
    /// The document's row (parquet), or the offset of its line or ids in the decompressed file; 0 for plain text.
    pub at: u64,
    /// Number of tokens in the document (or in a piece of it), including BOS and EOS.
    pub tokens: usize,
    /// The range of these tokens that is in the sequence.
    pub part: Range<usize>,
    /// The decoded text of this range.
    pub text: String,
}

impl Corpus {
    /// Finds the documents in a sequence of `length` tokens, by reading its unit again. Blocks.
    ///
    /// # Errors
    /// When the unit cannot be read.
    pub fn explain(&self, origin: Origin, length: usize) -> Result<Explanation, DataError> {
        let Origin { source, epoch, unit, segment, index } = origin;
        let mut reading = self.sources.open_unit(source, unit as usize, u64::from(segment), false)?;
        let mut encoder = self.tokenizer().encoder();
        let mut packed = Packed::new(self.rules().pack);
        let mut pieces = Vec::new();
        for document in reading.next()?.unwrap_or_default() {
            let Document { file, at, content } = document;
            for judged in self.judge(&mut encoder, content) {
                if let Judged::Kept(tokens) = judged {
                    pieces.push((file, at, tokens.clone()));
                    packed.push(tokens);
                }
            }
        }
        let range = packed.range(index as usize, length);
        let mut documents = Vec::new();
        let mut begin = 0;
        for (file, at, tokens) in pieces {
            let part = range.start.clamp(begin, begin + tokens.len()) - begin
                ..range.end.clamp(begin, begin + tokens.len()) - begin;
            begin += tokens.len();
            if !part.is_empty() {
                documents.push(Excerpt {
                    file: self.sources.place(source, file as usize),
                    at,
                    tokens: tokens.len(),
                    text: self.tokenizer().decode(&tokens[part.clone()]),
                    part,
                });
            }
        }
        let source = self.sources.name(source).to_owned();
        Ok(Explanation { source, epoch, unit, segment, sequence: index, documents })
    }
}
