//! Writes the documents of a plan's sources to shards of even size: [`pack`] to parquet files of text, which can be
//! entered anywhere and shuffled, and [`tokenize`] to files of token ids.
//!
//! Units are grouped into jobs of about the size of a shard; a large unit makes several shards. The contents of a shard
//! depend on the manifest alone, so any number of threads write the same bytes. A note beside the shards records what
//! has been written, so that interrupted work continues after the last complete shard.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use serde_json::json;
use ulmus_plan::{DataConfig, Format, Pack};
use ulmus_storage::FileInfo;
use ulmus_types::Digest;

use crate::corpus::{Corpus, Judged};
use crate::error::DataError;
use crate::format::{Content, Document, runs};
use crate::manifest::Manifest;
use crate::parquet;
use crate::sources::Sources;
use crate::store::{Folder, Stores};
use crate::tokens;
use ulmus_tokenizer::{Encoder, Tokenizer};

/// The file that records what has been written, in the folder of a source's shards.
const NOTE: &str = ".shards.json";

/// Counts of what has been written, now and before.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Written {
    /// Number of shards.
    pub shards: u64,
    /// Documents that were read for them.
    pub documents: u64,
    /// Shards that existed already.
    pub skipped: u64,
}

/// The progress of each job of a source.
#[derive(Debug, Serialize, Deserialize)]
struct Note {
    /// Hash of everything that decides the shards.
    of: Digest,
    /// Progress by number of the job.
    jobs: BTreeMap<usize, Progress>,
}

#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
struct Progress {
    shards: u64,
    documents: u64,
    /// The next unit and segment, or `None` when the job is done.
    next: Option<(usize, u64)>,
}

/// A shard that is being built in memory.
trait Shard {
    fn add(&mut self, document: Document) -> Result<(), DataError>;
    fn is_empty(&self) -> bool;
    fn into_file(self) -> Vec<u8>;
}

/// Writes the unchanged texts of every source to `<to>/<source>/part-….parquet`, with about `shard` bytes of text per
/// file and a unit per row group. The column `text` holds the text, `origin` its file and position. `done` is called
/// with the number of bytes (as the manifest counts them) that have just been read, and their total. Blocks.
///
/// # Errors
/// When a source cannot be read, or the folder cannot be written to or holds other files.
pub fn pack(
    config: &DataConfig,
    to: &str,
    shard: u64,
    done: impl Fn(u64, u64) + Sync,
) -> Result<Written, DataError> {
    let (manifest, sources) = open(config)?;
    let unit = config.unit.get();
    let of = json!("texts");
    let begin = |source| Texts { sources: &sources, source, unit, groups: Vec::new(), last: 0 };
    let work = Work { config, manifest: &manifest, sources: &sources, shard, suffix: "parquet", of };
    work.write(to, begin, done)
}

/// Writes the documents of every source that pass the plan's filters, normalised and tokenized, to
/// `<to>/<source>/part-….npy` (with `header`) or `.bin`, from about `shard` bytes of text per file. Each document ends with
/// EOS. Ids have two bytes if all fit, and else four. Held-out documents are included: holding out is up to the plan
/// that reads the shards. Blocks.
///
/// # Errors
/// The same as for [`pack`], and when the plan cuts documents into pieces.
pub fn tokenize(
    config: &DataConfig,
    tokenizer: Tokenizer,
    to: &str,
    shard: u64,
    header: bool,
    done: impl Fn(u64, u64) + Sync,
) -> Result<Written, DataError> {
    if config.pack == Pack::Corenet {
        return Err(DataError::Pieces);
    }
    let (manifest, sources) = open(config)?;
    let format = if tokenizer.pieces() <= 1 << 16 { Format::U16 } else { Format::U32 };
    let DataConfig { normalize, min_characters, min_tokens, .. } = config;
    let ends = [tokenizer.bos(), tokenizer.eos()];
    let of = json!([tokenizer.digest(), ends, header, normalize, min_characters, min_tokens]);
    // With a single lane, any number of units is enough.
    let corpus = Corpus::new(&DataConfig { lanes: 1, ..config.clone() }, 0, sources, tokenizer)?;
    let begin = |source| TokenIds {
        corpus: &corpus,
        source,
        encoder: corpus.tokenizer().encoder(),
        ids: tokens::Writer::new(format, header),
    };
    let suffix = if header { "npy" } else { "bin" };
    let work = Work { config, manifest: &manifest, sources: &corpus.sources, shard, suffix, of };
    work.write(to, begin, done)
}

fn open(config: &DataConfig) -> Result<(Manifest, Sources), DataError> {
    let manifest = Manifest::freeze(config, None)?;
    let sources = Sources::open(config, &manifest, None)?;
    Ok((manifest, sources))
}

/// A shard of texts and their origins.
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
        self.groups.last_mut().expect("there is a group").push(vec![text, origin]);
        Ok(())
    }

    fn is_empty(&self) -> bool {
        self.groups.is_empty()
    }

    fn into_file(self) -> Vec<u8> {
        parquet::write(&["text", "origin"], &self.groups)
    }
}

/// A shard of token ids.
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
                // BOS is left out, because readers expect one token between documents. An empty document is left out,
                // too.
                if tokens.len() > 2 {
                    self.ids.push(&tokens[1..]);
                }
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

/// Everything that the shards of all sources are made from.
struct Work<'a> {
    config: &'a DataConfig,
    manifest: &'a Manifest,
    sources: &'a Sources,
    /// Bytes of text per shard.
    shard: u64,
    suffix: &'static str,
    /// Everything that decides the shards, except the source and the sizes of shards and units.
    of: serde_json::Value,
}

/// The folder for the shards of a source.
struct Target {
    folder: Folder,
    note: Mutex<Note>,
}

/// Consecutive units of a source that are written to shards of their own.
struct ShardJob<'a> {
    source: usize,
    target: &'a Target,
    number: usize,
    units: Range<usize>,
}

impl Work<'_> {
    fn write<S: Shard>(
        &self,
        to: &str,
        begin: impl Fn(usize) -> S + Sync,
        done: impl Fn(u64, u64) + Sync,
    ) -> Result<Written, DataError> {
        let root = Stores::new(self.config, None)?.make_apart(to, &self.config.source)?;
        let targets = (0..self.config.source.len()).map(|source| self.target(&root, source));
        let targets: Vec<Target> = targets.collect::<Result<_, _>>()?;
        let before = sum(&targets, |progress| progress.shards);
        let done = |bytes| done(bytes, self.manifest.bytes());
        let (jobs, next) = (self.jobs(&targets), AtomicUsize::new(0));
        let write = || {
            while let Some(job) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
                if let Err(error) = self.write_job(job, &begin, done) {
                    // No thread begins another job.
                    next.store(jobs.len(), Ordering::Relaxed);
                    return Err(error);
                }
            }
            Ok(())
        };
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..self.config.threads.max(1)).map(|_| scope.spawn(write)).collect();
            threads.into_iter().try_for_each(|thread| thread.join().unwrap_or(Err(DataError::Stopped)))
        })?;
        Ok(Written {
            shards: sum(&targets, |progress| progress.shards),
            documents: sum(&targets, |progress| progress.documents),
            skipped: before,
        })
    }

    /// Opens the folder for a source's shards, and checks what is there already.
    fn target(&self, root: &Folder, source: usize) -> Result<Target, DataError> {
        let name = self.sources.name(source);
        let folder = root.child(name);
        let refuse = |reason: String| DataError::Target { folder: root.place(name), reason };
        let there: BTreeMap<String, FileInfo> =
            folder.list()?.into_iter().map(|file| (file.path.clone(), file)).collect();
        let (listed, text) = (&self.manifest.sources[source], &self.config.source[source].text);
        let of = json!([listed, text, self.of, self.shard, self.config.unit.get()]);
        let of = Digest::of(of.to_string().as_bytes());
        let mut note = match there.get(NOTE) {
            None => match there.keys().next() {
                None => Note { of, jobs: BTreeMap::new() },
                Some(other) => return Err(refuse(format!("it has other files, such as {other:?}"))),
            },
            Some(known) => serde_json::from_slice(&folder.read_all(known)?)
                .map_err(|_| refuse(format!("its {NOTE} is damaged")))?,
        };
        if note.of != of {
            let reason =
                "it has shards of other files, or made with another --shard, data.unit, filter or tokenizer";
            return Err(refuse(reason.to_owned()));
        }
        // If a shard is missing, all shards of its job are written again.
        let is_there = |name: String| there.get(&name).is_some_and(|file| file.size > 0);
        note.jobs.retain(|job, progress| (0..progress.shards).all(|part| is_there(self.file(*job, part))));
        let target = Target { folder, note: Mutex::new(note) };
        // The note is written first, so that there is never a shard without it.
        target.save(&target.note())?;
        Ok(target)
    }

    fn file(&self, job: usize, part: u64) -> String {
        format!("part-{job:05}-{part:03}.{}", self.suffix)
    }

    fn jobs<'t>(&self, targets: &'t [Target]) -> Vec<ShardJob<'t>> {
        let jobs = targets.iter().enumerate().flat_map(|(source, target)| {
            let sizes = self.sources.unit_sizes(source);
            let runs: Vec<_> = runs(&sizes, self.shard).collect();
            runs.into_iter().enumerate().map(move |(number, (first, end, _))| ShardJob {
                source,
                target,
                number,
                units: first as usize..end as usize,
            })
        });
        jobs.collect()
    }

    fn write_job<S: Shard>(
        &self,
        job: &ShardJob<'_>,
        begin: impl Fn(usize) -> S,
        done: impl Fn(u64),
    ) -> Result<(), DataError> {
        let sizes = self.sources.unit_sizes(job.source);
        let known = job.target.note().jobs.get(&job.number).copied();
        let mut progress =
            known.unwrap_or(Progress { next: Some((job.units.start, 0)), ..Progress::default() });
        let first = progress.next.map_or(job.units.end, |(unit, _)| unit);
        done(sizes[job.units.start..first].iter().sum());
        let (mut shard, mut bytes) = (begin(job.source), 0);
        while let Some((unit, mut segment)) = progress.next {
            for documents in self.sources.segments(job.source, unit, segment, &done) {
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
                    self.put(job, &mut progress, full)?;
                    bytes = 0;
                }
            }
            progress.next = (unit + 1 < job.units.end).then_some((unit + 1, 0));
        }
        if known.is_none_or(|known| known.next.is_some()) {
            self.put(job, &mut progress, shard)?;
        }
        Ok(())
    }

    /// Writes a shard, and then records it in the note.
    fn put<S: Shard>(&self, job: &ShardJob<'_>, progress: &mut Progress, shard: S) -> Result<(), DataError> {
        if !shard.is_empty() {
            job.target.folder.write(&self.file(job.number, progress.shards), shard.into_file())?;
            progress.shards += 1;
        }
        let mut note = job.target.note();
        note.jobs.insert(job.number, *progress);
        job.target.save(&note)
    }
}

impl Target {
    fn note(&self) -> MutexGuard<'_, Note> {
        // A thread that panicked cannot have left half an entry.
        self.note.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn save(&self, note: &Note) -> Result<(), DataError> {
        self.folder.write(NOTE, serde_json::to_vec(note).expect("a note can be written as JSON"))
    }
}

/// Sums a count over all jobs.
fn sum(targets: &[Target], count: fn(&Progress) -> u64) -> u64 {
    targets.iter().map(|target| target.note().jobs.values().map(count).sum::<u64>()).sum()
}
