//! Writes the documents of a plan's sources to shards of even size: [`pack`] to parquet files of text, which can be
//! entered anywhere and shuffled, [`tokenize`] to files of token ids.
//!
//! Units are put together to jobs of about a shard's size; a chain, which can be of any size, makes several shards. What
//! a shard holds depends on the manifest alone, so any number of threads write the same bytes. A note of what is written
//! lies beside the shards, so that work that was interrupted goes on after the last whole shard.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use serde_json::json;
use ulmus_plan::{DataConfig, Format, Pack};
use ulmus_types::Digest;

use crate::corpus::{Corpus, Judged};
use crate::error::DataError;
use crate::format::{Content, Document, runs};
use crate::manifest::Manifest;
use crate::parquet;
use crate::sources::Sources;
use crate::store::{Folder, Stores};
use crate::tokenizer::{Encoder, Tokenizer};
use crate::tokens;

/// What has been written, in the folder of the shards.
const NOTE: &str = ".shards.json";

/// What was written, now and before.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Written {
    /// Shards.
    pub shards: u64,
    /// Documents that were read for them.
    pub documents: u64,
    /// Shards that were there already.
    pub skipped: u64,
}

/// How far each job is.
#[derive(Debug, Serialize, Deserialize)]
struct Note {
    /// Hash of what decides the shards.
    of: Digest,
    jobs: BTreeMap<String, Progress>,
}

#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
struct Progress {
    shards: u64,
    documents: u64,
    /// Unit and segment that come next; none when the job is done.
    next: Option<(usize, u64)>,
}

/// A shard in memory.
trait Shard {
    fn add(&mut self, document: Document) -> Result<(), DataError>;
    fn is_empty(&self) -> bool;
    fn into_file(self) -> Vec<u8>;
}

/// Writes the texts of every source, as they are, to `<to>/<source>/part-….parquet`: about `shard` bytes of text in a
/// file, and row groups that are units. Column `text` has the text, `origin` file and place of each. `done` hears of
/// bytes as the manifest has them. Blocks.
///
/// # Errors
/// When a source cannot be read, or the folder cannot be written or holds other shards.
pub fn pack(
    config: &DataConfig,
    to: &str,
    shard: u64,
    done: impl Fn(u64) + Sync,
) -> Result<Written, DataError> {
    let (manifest, sources) = open(config)?;
    let unit = config.unit.get();
    let of = json!([manifest.digest(), "texts"]);
    let begin = |source| Texts { sources: &sources, source, unit, groups: Vec::new(), last: 0 };
    let job = Work { config, sources: &sources, shard, suffix: "parquet", of };
    job.write(to, begin, done)
}

/// Writes the documents of every source that pass the plan's filters, normalised and tokenized, to
/// `<to>/<source>/part-….npy`, or `.bin` without a header: from about `shard` bytes of text a file. Each document ends
/// with EOS. Ids have two bytes where all fit into them, else four. What a plan holds out is not left out: that is for
/// the plan that reads the shards. Blocks.
///
/// # Errors
/// As for [`pack`], and when the plan cuts documents into pieces.
pub fn tokenize(
    config: &DataConfig,
    tokenizer: Tokenizer,
    to: &str,
    shard: u64,
    header: bool,
    done: impl Fn(u64) + Sync,
) -> Result<Written, DataError> {
    if let (Pack::Corenet, Some(source)) = (config.pack, config.source.first()) {
        return Err(DataError::Words { name: source.name.clone() });
    }
    let (manifest, sources) = open(config)?;
    let format = if tokenizer.pieces() <= 1 << 16 { Format::U16 } else { Format::U32 };
    let DataConfig { normalize, min_characters, min_tokens, .. } = config;
    let of = json!([manifest.digest(), tokenizer.digest(), header, normalize, min_characters, min_tokens]);
    // One lane, which has units in any case.
    let corpus = Corpus::new(&DataConfig { lanes: 1, ..config.clone() }, 0, sources, tokenizer)?;
    let begin = |source| TokenIds {
        corpus: &corpus,
        source,
        encoder: corpus.tokenizer().encoder(),
        ids: tokens::Writer::new(format, header),
    };
    let suffix = if header { "npy" } else { "bin" };
    let work = Work { config, sources: &corpus.sources, shard, suffix, of };
    work.write(to, begin, done)
}

fn open(config: &DataConfig) -> Result<(Manifest, Sources), DataError> {
    let manifest = Manifest::freeze(config, None)?;
    let sources = Sources::open(config, &manifest, None)?;
    Ok((manifest, sources))
}

/// Texts, and where they come from.
struct Texts<'a> {
    sources: &'a Sources,
    source: usize,
    unit: u64,
    groups: Vec<Vec<Vec<String>>>,
    /// Bytes of text in the last group.
    last: u64,
}

impl Shard for Texts<'_> {
    fn add(&mut self, document: Document) -> Result<(), DataError> {
        let Document { file, at, content } = document;
        let Content::Text(text) = content else {
            return Err(DataError::Tokens { name: self.sources.name(self.source).to_owned() });
        };
        let bytes = text.len() as u64;
        if self.groups.is_empty() || self.last + bytes > self.unit {
            self.groups.push(Vec::new());
            self.last = 0;
        }
        self.last += bytes;
        let origin = format!("{}#{at}", self.sources.file(self.source, file as usize));
        self.groups.last_mut().expect("one was just put there").push(vec![text, origin]);
        Ok(())
    }

    fn is_empty(&self) -> bool {
        self.groups.is_empty()
    }

    fn into_file(self) -> Vec<u8> {
        parquet::write(&["text", "origin"], &self.groups)
    }
}

/// Token ids.
struct TokenIds<'a> {
    corpus: &'a Corpus,
    source: usize,
    encoder: Encoder,
    ids: tokens::Writer,
}

impl Shard for TokenIds<'_> {
    fn add(&mut self, document: Document) -> Result<(), DataError> {
        if let Content::Tokens(_) = document.content {
            return Err(DataError::Tokens { name: self.corpus.sources.name(self.source).to_owned() });
        }
        for judged in self.corpus.judge(&mut self.encoder, document.content) {
            if let Judged::HeldOut(_, tokens) | Judged::Kept(tokens) = judged {
                // Without BOS: one token between two documents is what others expect.
                self.ids.push(&tokens[1..]);
            }
        }
        Ok(())
    }

    fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    fn into_file(self) -> Vec<u8> {
        self.ids.finish()
    }
}

/// What is written.
struct Work<'a> {
    config: &'a DataConfig,
    sources: &'a Sources,
    /// Bytes of text that make a shard.
    shard: u64,
    suffix: &'static str,
    /// What decides them, besides their size and that of units.
    of: serde_json::Value,
}

/// Units of a source that become shards of their own.
struct Job {
    source: usize,
    name: String,
    units: Range<usize>,
}

impl Work<'_> {
    fn write<S: Shard>(
        &self,
        to: &str,
        begin: impl Fn(usize) -> S + Sync,
        done: impl Fn(u64) + Sync,
    ) -> Result<Written, DataError> {
        let target = Stores::new(self.config, None)?.make(to)?;
        let of = Digest::of(json!([self.of, self.shard, self.config.unit.get()]).to_string().as_bytes());
        let note = match target.stat(vec![NOTE.to_owned()]) {
            Err(DataError::Missing { .. }) => Note { of, jobs: BTreeMap::new() },
            known => serde_json::from_slice(&target.read_all(&known?[0])?).map_err(|error| {
                let reason = error.to_string();
                DataError::Format { file: target.place(NOTE), format: "a note of shards", reason }
            })?,
        };
        if note.of != of {
            let reason =
                "it has shards of other files, or made in another way; name another folder, or empty it";
            return Err(DataError::Url { url: to.to_owned(), reason: reason.to_owned() });
        }
        let before: u64 = note.jobs.values().map(|progress| progress.shards).sum();
        let (jobs, next, note) = (self.jobs(), AtomicUsize::new(0), Mutex::new(note));
        let write = || {
            while let Some(job) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
                self.write_job(job, &target, &note, &begin, &done)?;
            }
            Ok(())
        };
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..self.config.threads.max(1)).map(|_| scope.spawn(write)).collect();
            threads.into_iter().try_for_each(|thread| thread.join().unwrap_or(Err(DataError::Stopped)))
        })?;
        let note = note.into_inner().unwrap_or_else(PoisonError::into_inner);
        let sum = |count: fn(&Progress) -> u64| note.jobs.values().map(count).sum();
        Ok(Written {
            shards: sum(|progress| progress.shards),
            documents: sum(|progress| progress.documents),
            skipped: before,
        })
    }

    fn jobs(&self) -> Vec<Job> {
        let jobs = (0..self.config.source.len()).flat_map(|source| {
            let sizes = self.sources.unit_sizes(source);
            let runs: Vec<_> = runs(&sizes, self.shard).collect();
            (0..).zip(runs).map(move |(number, (first, end, _))| Job {
                source,
                name: format!("{}/part-{number:05}", self.sources.name(source)),
                units: first as usize..end as usize,
            })
        });
        jobs.collect()
    }

    fn write_job<S: Shard>(
        &self,
        job: &Job,
        target: &Folder,
        note: &Mutex<Note>,
        begin: impl Fn(usize) -> S,
        done: impl Fn(u64),
    ) -> Result<(), DataError> {
        let locked = || note.lock().unwrap_or_else(PoisonError::into_inner);
        let sizes = self.sources.unit_sizes(job.source);
        let known = locked().jobs.get(&job.name).copied();
        let mut progress =
            known.unwrap_or(Progress { next: Some((job.units.start, 0)), ..Progress::default() });
        let first = progress.next.map_or(job.units.end, |(unit, _)| unit);
        done(sizes[job.units.start..first].iter().sum());
        let (mut shard, mut bytes) = (begin(job.source), 0);
        while let Some((unit, mut segment)) = progress.next {
            for documents in self.sources.segments(job.source, unit, segment) {
                segment += 1;
                for document in documents? {
                    progress.documents += 1;
                    bytes += match &document.content {
                        Content::Text(text) => text.len() as u64,
                        Content::Tokens(_) => 0,
                    };
                    shard.add(document)?;
                }
                if bytes >= self.shard {
                    progress.next = Some((unit, segment));
                    let full = std::mem::replace(&mut shard, begin(job.source));
                    self.put(job, target, note, &mut progress, full)?;
                    bytes = 0;
                }
            }
            done(sizes[unit]);
            progress.next = (unit + 1 < job.units.end).then_some((unit + 1, 0));
        }
        if known.is_none_or(|known| known.next.is_some()) {
            self.put(job, target, note, &mut progress, shard)?;
        }
        Ok(())
    }

    /// Writes a shard, then the note that says so.
    fn put<S: Shard>(
        &self,
        job: &Job,
        target: &Folder,
        note: &Mutex<Note>,
        progress: &mut Progress,
        shard: S,
    ) -> Result<(), DataError> {
        if !shard.is_empty() {
            let name = format!("{}-{:03}.{}", job.name, progress.shards, self.suffix);
            target.write(&name, shard.into_file())?;
            progress.shards += 1;
        }
        let mut note = note.lock().unwrap_or_else(PoisonError::into_inner);
        note.jobs.insert(job.name.clone(), *progress);
        target.write(NOTE, serde_json::to_vec(&*note).expect("a note can be written as JSON"))
    }
}
