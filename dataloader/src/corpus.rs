//! A corpus: open sources, the rules for documents, and a tokenizer. The content of a unit is a pure function of them:
//! decode, normalise, filter, tokenize, pack.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use serde::Serialize;
use ulmus_plan::{DataConfig, Pack};
use ulmus_types::{BadUnit, LaneId};

use crate::cursors::Cursors;
use crate::document::{Rules, Verdict};
use crate::error::DataError;
use crate::format::{Content, Document};
use crate::order::Mixture;
use crate::pack::{Packed, Sequence};
use crate::sources::{Sources, enough_units};
use crate::store::Traffic;
use crate::tokens::Vocabulary;
use ulmus_tokenizer::{Encoder, Tokenizer};

/// Everything that decides what is read, except the cursors of the lanes. Threads share it.
#[derive(Debug)]
pub struct Corpus {
    pub(crate) sources: Sources,
    pub(crate) mixture: Mixture,
    pub(crate) seed: u64,
    pub(crate) window: u64,
    pub(crate) threads: usize,
    pub(crate) max_epochs: Vec<Option<u64>>,
    /// Indices of source and unit of everything that is left out.
    quarantine: BTreeSet<(usize, usize)>,
    rules: Rules,
    tokenizer: Tokenizer,
    /// What fills the end of short sequences. It is never a target, and no position that has one sees it.
    pub(crate) pad: u32,
    /// One per source.
    counters: Vec<Counters>,
}

/// The verdict on a document, or on a piece of it.
pub(crate) enum Judged {
    FewCharacters,
    FewTokens,
    /// Used for evaluation only: the normalised text, and its tokens with BOS and EOS.
    HeldOut(String, Vec<u32>),
    /// Used for training: the tokens with BOS and EOS.
    Kept(Vec<u32>),
}

/// What has been read of a source since the corpus was opened, including read-ahead. Each epoch counts anew.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Documents that were decoded.
    pub documents: u64,
    /// Code points of their text; 0 for sources of token ids.
    pub characters: u64,
    /// Bytes of their text; 0 for sources of token ids.
    pub bytes: u64,
    /// Documents dropped because they have too few characters.
    pub short_characters: u64,
    /// Documents dropped because they have too few tokens.
    pub short_tokens: u64,
    /// Documents that are held out from training.
    pub held_out: u64,
    /// Tokens of the remaining documents, including BOS and EOS.
    pub tokens: u64,
}

#[derive(Debug, Default)]
struct Counters {
    documents: AtomicU64,
    characters: AtomicU64,
    bytes: AtomicU64,
    short_characters: AtomicU64,
    short_tokens: AtomicU64,
    held_out: AtomicU64,
    tokens: AtomicU64,
}

impl Counters {
    fn read(&self) -> Counts {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counts {
            documents: read(&self.documents),
            characters: read(&self.characters),
            bytes: read(&self.bytes),
            short_characters: read(&self.short_characters),
            short_tokens: read(&self.short_tokens),
            held_out: read(&self.held_out),
            tokens: read(&self.tokens),
        }
    }
}

/// Documents that are never trained on, in the fixed order in which they are evaluated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeldOut {
    /// The normalised texts, or the decoded ones where token ids are read.
    pub texts: Vec<String>,
    /// The same documents as sequences.
    pub sequences: Vec<Sequence>,
}

impl Corpus {
    /// Combines a plan's data section with the sources of its manifest.
    ///
    /// # Errors
    /// When more lanes read a source than it has units, or when token ids would have to be cut into words.
    pub fn new(
        config: &DataConfig,
        seed: u64,
        sources: Sources,
        tokenizer: Tokenizer,
    ) -> Result<Self, DataError> {
        let weights: Vec<u64> = config.source.iter().map(|source| source.tokens.unwrap_or(1)).collect();
        let mixture = Mixture::new(config.lanes, &weights);
        for source in 0..weights.len() {
            let (units, lanes) = (sources.unit_sizes(source).len(), mixture.ends_of_source(source).len() - 1);
            enough_units(sources.name(source), units, lanes, mixture.lanes())?;
            if sources.holds_tokens(source) && config.pack == Pack::Corenet {
                return Err(DataError::Words { name: sources.name(source).to_owned() });
            }
        }
        let ends = [tokenizer.bos(), tokenizer.eos()];
        let vocabulary = Vocabulary { ends, pieces: tokenizer.pieces() as u32 };
        Ok(Self {
            sources: sources.with_vocabulary(vocabulary),
            mixture,
            seed,
            window: config.window,
            threads: config.threads.max(1) as usize,
            max_epochs: config.source.iter().map(|source| source.max_epochs).collect(),
            quarantine: BTreeSet::new(),
            rules: Rules::new(config, seed),
            pad: tokenizer.pad(),
            tokenizer,
            counters: weights.iter().map(|_| Counters::default()).collect(),
        })
    }

    /// The same corpus with another id at the end of short sequences, for a model that has no row for the usual one.
    #[must_use]
    pub fn padded_with(self, pad: u32) -> Self {
        Self { pad, ..self }
    }

    /// The same corpus without `units`, which cannot be read.
    #[must_use]
    pub fn without<'u>(mut self, units: impl IntoIterator<Item = &'u BadUnit>) -> Self {
        for BadUnit { source: name, unit } in units {
            let source = (0..self.max_epochs.len()).find(|source| self.sources.name(*source) == name);
            self.quarantine.extend(source.map(|source| (source, *unit as usize)));
        }
        self
    }

    /// Whether a unit is left out.
    pub(crate) fn leaves_out(&self, source: usize, unit: usize) -> bool {
        self.quarantine.contains(&(source, unit))
    }

    /// Number of units of a source that are left out.
    pub(crate) fn left_out_of(&self, source: usize) -> usize {
        self.quarantine.iter().filter(|(of, _)| *of == source).count()
    }

    /// Whether no unit of any source is left out.
    pub(crate) fn is_whole(&self) -> bool {
        self.quarantine.is_empty()
    }

    /// The rules for documents.
    pub(crate) const fn rules(&self) -> &Rules {
        &self.rules
    }

    /// All lanes of the plan.
    pub fn lanes(&self) -> impl Iterator<Item = LaneId> {
        (0..self.mixture.lanes() as u32).map(LaneId::new)
    }

    /// The tokenizer that all documents are encoded with.
    pub const fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// Cursors at the very beginning of all lanes.
    pub fn start(&self) -> Cursors {
        Cursors::start(self.mixture.streams().len())
    }

    /// What has been read of each source so far, in the order of the plan.
    pub fn counts(&self) -> Vec<Counts> {
        self.counters.iter().map(Counters::read).collect()
    }

    /// Traffic caused by each source so far, in the order of the plan.
    pub fn traffic(&self) -> Vec<Traffic> {
        let sources = 0..self.max_epochs.len();
        sources.map(|source| self.sources.traffic(source)).collect()
    }

    /// Reads every unit once, on `data.threads` threads, and returns what was counted. `done` is called with the number
    /// of bytes (as the manifest counts them) that have just been read. Blocks.
    ///
    /// # Errors
    /// When a unit cannot be read.
    pub fn count_all(&self, done: impl Fn(u64) + Sync) -> Result<Vec<Counts>, DataError> {
        let (units, next) = (self.sources.units().collect::<Vec<_>>(), AtomicUsize::new(0));
        let read = || {
            let mut encoder = self.tokenizer.encoder();
            // After an error, no thread begins another unit.
            let failed = |error| {
                next.store(units.len(), Ordering::Relaxed);
                error
            };
            while let Some((source, unit, _)) = units.get(next.fetch_add(1, Ordering::Relaxed)) {
                for documents in self.sources.segments(*source, *unit, 0, &done) {
                    let documents = documents.map_err(failed)?;
                    self.pack(*source, &mut encoder, documents.into_iter().map(|document| document.content));
                }
            }
            Ok(())
        };
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..self.threads).map(|_| scope.spawn(read)).collect();
            threads.into_iter().try_for_each(|thread| thread.join().unwrap_or(Err(DataError::Stopped)))
        })?;
        Ok(self.counts())
    }

    /// Packs those of `documents` that are for training.
    pub(crate) fn pack(
        &self,
        source: usize,
        encoder: &mut Encoder,
        documents: impl IntoIterator<Item = Content>,
    ) -> Packed {
        let mut packed = Packed::new(self.rules.pack);
        let counters = &self.counters[source];
        let count = |counter: &AtomicU64, by: usize| {
            counter.fetch_add(by as u64, Ordering::Relaxed);
        };
        for document in documents {
            count(&counters.documents, 1);
            if let Content::Text(text) = &document {
                count(&counters.characters, text.chars().count());
                count(&counters.bytes, text.len());
            }
            for judged in self.judge(encoder, document) {
                match judged {
                    Judged::FewCharacters => count(&counters.short_characters, 1),
                    Judged::FewTokens => count(&counters.short_tokens, 1),
                    Judged::HeldOut(..) => count(&counters.held_out, 1),
                    Judged::Kept(tokens) => packed.push(tokens),
                }
            }
        }
        count(&counters.tokens, packed.tokens());
        packed
    }

    /// Judges a document, or each of its pieces.
    pub(crate) fn judge(&self, encoder: &mut Encoder, document: Content) -> Vec<Judged> {
        let (bos, eos) = (self.tokenizer.bos(), self.tokenizer.eos());
        let long_enough = |tokens: &Vec<u32>| tokens.len() as u64 >= self.rules.min_tokens;
        let mut of_text = |text: &str| {
            let mut tokens = vec![bos];
            encoder.encode(text, &mut tokens);
            tokens.push(eos);
            Some(tokens).filter(long_enough)
        };
        match document {
            Content::Text(text) => {
                let judged = |verdict| match verdict {
                    Verdict::Short => Judged::FewCharacters,
                    Verdict::HeldOut(text) => match of_text(&text) {
                        Some(tokens) => Judged::HeldOut(text.into_owned(), tokens),
                        None => Judged::FewTokens,
                    },
                    Verdict::Kept(text) => of_text(&text).map_or(Judged::FewTokens, Judged::Kept),
                };
                self.rules.judge(&text).into_iter().map(judged).collect()
            }
            Content::Tokens(ids) => {
                let tokens: Vec<u32> = [bos].into_iter().chain(ids.iter().copied()).chain([eos]).collect();
                vec![if !long_enough(&tokens) {
                    Judged::FewTokens
                } else if self.rules.holds_out(&ids) {
                    Judged::HeldOut(self.tokenizer.decode(&ids), tokens)
                } else {
                    Judged::Kept(tokens)
                }]
            }
        }
    }

    /// Whether any document is held out. Searches units in the order of [`Self::held_out`], until it finds one or has
    /// read
    /// `most` bytes (as the manifest counts them); then the answer is `None`. Units that cannot be read are skipped: an
    /// error is reported where a unit is needed. Blocks.
    ///
    /// # Errors
    /// When a store cannot be read.
    pub fn holds_out_any(&self, most: u64) -> Result<Option<bool>, DataError> {
        if self.rules.holds_out_none() {
            return Ok(Some(false));
        }
        let mut encoder = self.tokenizer.encoder();
        let mut bytes = 0;
        for (source, unit) in self.sources.units_in_turn() {
            if bytes >= most {
                return Ok(None);
            }
            bytes += self.sources.unit_sizes(source)[unit];
            for documents in self.sources.segments(source, unit, 0, |_| ()) {
                let documents = match documents {
                    Err(DataError::BadUnit { .. }) => break,
                    documents => documents?,
                };
                for Document { content, .. } in documents {
                    // Only a document that passes this cheap test is tokenized.
                    let chosen = match &content {
                        Content::Text(text) => self
                            .rules
                            .judge(text)
                            .iter()
                            .any(|verdict| matches!(verdict, Verdict::HeldOut(_))),
                        Content::Tokens(ids) => self.rules.holds_out(ids),
                    };
                    if chosen
                        && self
                            .judge(&mut encoder, content)
                            .iter()
                            .any(|judged| matches!(judged, Judged::HeldOut(..)))
                    {
                        return Ok(Some(true));
                    }
                }
            }
        }
        Ok(Some(false))
    }

    /// The first `sequences` held-out sequences of `length` tokens, or all if there are fewer. Sources take turns unit
    /// by unit, so that each is represented; the order is fixed by the manifest. Blocks.
    ///
    /// # Errors
    /// When a unit cannot be read.
    pub fn held_out(&self, length: usize, sequences: usize) -> Result<HeldOut, DataError> {
        let mut texts = Vec::new();
        let mut encoder = self.tokenizer.encoder();
        let mut packed = Packed::new(self.rules.pack);
        let mut units = self.sources.units_in_turn();
        if self.rules.holds_out_none() {
            units.clear();
        }
        units.retain(|(source, unit)| !self.leaves_out(*source, *unit));
        for documents in
            units.iter().flat_map(|(source, unit)| self.sources.segments(*source, *unit, 0, |_| ()))
        {
            for document in documents? {
                for judged in self.judge(&mut encoder, document.content) {
                    if let Judged::HeldOut(text, tokens) = judged
                        && !packed.fills(sequences, length)
                    {
                        texts.push(text);
                        packed.push(tokens);
                    }
                }
            }
            if packed.fills(sequences, length) {
                break;
            }
        }
        let count = packed.sequences(length).min(sequences);
        let pad = self.pad;
        Ok(HeldOut {
            texts,
            sequences: (0..count).map(|index| packed.sequence(index, length, pad)).collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use safetensors::SafeTensors;
    use ulmus_plan::{Normalize, Pack, SourceConfig};

    use super::*;
    use crate::Manifest;
    use crate::pack::IGNORE;

    const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/a/data");

    /// A tokenizer that gives `3 + byte` for each byte of a text: a `tokenizer.model` written by hand.
    fn bytes_only() -> Tokenizer {
        let field = |tag: u8, content: &[u8]| [&[tag, content.len() as u8], content].concat();
        let piece =
            |text: &str, kind: u8| field(0x0a, &[field(0x0a, text.as_bytes()), vec![0x18, kind]].concat());
        let special = [("<unk>", 2), ("<s>", 3), ("</s>", 3)].map(|(text, kind)| piece(text, kind)).concat();
        let bytes: Vec<u8> = (0..=u8::MAX).flat_map(|byte| piece(&format!("<0x{byte:02X}>"), 6)).collect();
        // BPE with byte fallback that prepends nothing and leaves spaces as they are.
        let (trainer, normalizer) = ([0x18, 2, 0x98, 0x02, 1], [0x18, 0, 0x20, 0, 0x28, 0]);
        let file = [special, bytes, field(0x12, &trainer), field(0x1a, &normalizer)].concat();
        Tokenizer::read(&file, "test", None, None).unwrap()
    }

    /// The reference has made its sequences from the same files, in the order of the files.
    #[test]
    fn the_published_packing_agrees_with_the_reference() {
        let read = |name: &str| std::fs::read(format!("{GOLDEN}/{name}")).unwrap();
        let expected: serde_json::Value = serde_json::from_slice(&read("expected.json")).unwrap();
        let tensors = read("expected.safetensors");
        let tensors = SafeTensors::deserialize(&tensors).unwrap();
        let setting = |name: &str| expected["settings"][name].as_u64().unwrap();
        let length = setting("sequence_length") as usize;
        for (case, files, text) in [
            ("jsonl", "corpus-{:05}-00003.jsonl", "text"),
            ("parquet", "web-{:05}-of-00001.parquet", "content"),
            ("json_gz", "books-{:04}.json.gz", "text"),
        ] {
            let config = DataConfig {
                lanes: 1,
                holdout: 0.0,
                min_characters: setting("min_characters_per_text"),
                min_tokens: setting("min_tokens_per_text"),
                normalize: Normalize::None,
                pack: Pack::Corenet,
                piece_words: setting("document_split_size"),
                source: vec![SourceConfig {
                    name: case.to_owned(),
                    url: GOLDEN.to_owned(),
                    files: vec![files.to_owned()],
                    range: Some([0, expected["cases"][case]["file_id_range"][1].as_u64().unwrap()]),
                    text: text.to_owned(),
                    ..SourceConfig::default()
                }],
                ..DataConfig::default()
            };
            let manifest = Manifest::freeze(&config, None).unwrap();
            let sources = Sources::open(&config, &manifest, None).unwrap();
            let corpus = Corpus::new(&config, 0, sources, bytes_only()).unwrap();
            let mut encoder = corpus.tokenizer().encoder();
            let mut sequences = Vec::new();
            for documents in corpus.sources.all_documents() {
                let documents = documents.unwrap();
                let packed = corpus.pack(0, &mut encoder, documents.into_iter().map(Content::Text));
                sequences
                    .extend((0..packed.sequences(length)).map(|index| packed.sequence(index, length, 300)));
            }
            let tensor = |name: &str| -> Vec<u32> {
                let tensor = tensors.tensor(&format!("{case}.{name}")).unwrap();
                let (ids, _) = tensor.data().as_chunks();
                ids.iter().map(|id| i64::from_le_bytes(*id) as u32).collect()
            };
            let inputs: Vec<u32> = sequences.iter().flat_map(|sequence| sequence.inputs.clone()).collect();
            let targets = sequences.iter().flat_map(|sequence| sequence.targets.clone());
            // The reference writes its pad id for positions without a target.
            let targets: Vec<u32> = targets.map(|id| if id == IGNORE { 300 } else { id }).collect();
            assert_eq!(inputs, tensor("samples"), "{case}");
            assert_eq!(targets, tensor("targets"), "{case}");
        }
    }

    #[test]
    fn progress_within_a_file_adds_up_to_its_size() {
        let place = tempfile::tempdir().unwrap();
        let text = |number: u32| blake3::hash(&number.to_le_bytes()).to_hex().repeat(40);
        let texts: Vec<Vec<String>> = (0..800).map(|number| vec![text(number)]).collect();
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        for line in texts.iter().map(|text| serde_json::json!({ "text": text[0] })) {
            std::io::Write::write_all(&mut encoder, format!("{line}\n").as_bytes()).unwrap();
        }
        std::fs::write(place.path().join("a.json.gz"), encoder.finish().unwrap()).unwrap();
        std::fs::write(place.path().join("a.parquet"), crate::parquet::write(&["text"], &[texts])).unwrap();
        for file in ["a.json.gz", "a.parquet"] {
            let config = DataConfig {
                lanes: 1,
                unit: ulmus_plan::Bytes::new(64 << 10),
                source: vec![SourceConfig {
                    name: "one".to_owned(),
                    url: place.path().display().to_string(),
                    files: vec![file.to_owned()],
                    text: "text".to_owned(),
                    ..SourceConfig::default()
                }],
                ..DataConfig::default()
            };
            let manifest = Manifest::freeze(&config, None).unwrap();
            let sources = Sources::open(&config, &manifest, None).unwrap();
            let corpus = Corpus::new(&config, 0, sources, bytes_only()).unwrap();
            let steps = std::sync::Mutex::new(Vec::new());
            corpus.count_all(|bytes| steps.lock().unwrap().push(bytes)).unwrap();
            let steps = steps.into_inner().unwrap();
            assert_eq!(steps.iter().sum::<u64>(), manifest.bytes(), "{file}");
            assert!(steps.iter().filter(|bytes| **bytes > 0).count() > 2, "{file}: {steps:?}");
        }
    }
}
