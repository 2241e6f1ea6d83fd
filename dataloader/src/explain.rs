//! The exact documents of a sequence.

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
    /// How often the source was passed before.
    pub epoch: u64,
    /// Number of the unit in the manifest.
    pub unit: u32,
    /// Segment of the unit.
    pub segment: u32,
    /// Number among the sequences of the segment.
    pub sequence: u32,
    /// The documents that it holds something of, in their order.
    pub documents: Vec<Excerpt>,
}

/// A part of a document.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Excerpt {
    /// Its file.
    pub file: String,
    /// Row (parquet), or byte of the decompressed file at which its line or its ids begin; 0 for plain text.
    pub at: u64,
    /// Tokens of the document, or of the piece of it, BOS and EOS included.
    pub tokens: usize,
    /// Which of them are in the sequence.
    pub part: Range<usize>,
    /// What those tokens say.
    pub text: String,
}

impl Corpus {
    /// Tells what is in a sequence of `length` tokens. Reads its unit again. Blocks.
    ///
    /// # Errors
    /// As for reading any unit.
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
