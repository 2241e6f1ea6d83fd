//! Opens the sources of a plan, and reads documents by the manifest.

use serde::Serialize;
use ulmus_plan::{DataConfig, Format, SourceConfig};
use ulmus_run::paths;
use ulmus_storage::FileInfo;
use ulmus_types::{ErrorKind, Problems};

use crate::address::RUN;
use crate::error::DataError;
use crate::format::{self, Content, Document, Segments, UnitReader};
use crate::manifest::{self, Manifest, SourceManifest};
use crate::order::Mixture;
use crate::store::{Folder, Stores, Traffic};
use crate::tokens::Vocabulary;
use crate::unit::Unit;

/// How often the reading of a bad unit is retried.
pub(crate) const RETRIES: usize = 2;

/// The sources of a plan, as the manifest lists them.
#[derive(Debug)]
pub struct Sources(Vec<Source>);

#[derive(Debug)]
struct Source {
    folder: Folder,
    listed: SourceManifest,
    reader: UnitReader,
}

impl Sources {
    /// Opens every source. `run` is the run's own folder.
    ///
    /// # Errors
    /// When a folder cannot be opened, or the manifest belongs to other sources.
    pub fn open(config: &DataConfig, manifest: &Manifest, run: Option<&Folder>) -> Result<Self, DataError> {
        if !config
            .source
            .iter()
            .map(|source| &source.name)
            .eq(manifest.sources.iter().map(|source| &source.name))
        {
            return Err(DataError::OtherSources {
                manifest: manifest.sources.iter().map(|source| source.name.clone()).collect(),
                plan: config.source.iter().map(|source| source.name.clone()).collect(),
            });
        }
        let stores = Stores::new(config, run)?;
        let open = |(source, listed): (&SourceConfig, &SourceManifest)| {
            Ok(Source {
                folder: stores.open(listed.url.as_deref().unwrap_or(&source.url))?,
                listed: listed.clone(),
                reader: reader(source, listed.format, config),
            })
        };
        Ok(Self(config.source.iter().zip(&manifest.sources).map(open).collect::<Result<_, DataError>>()?))
    }

    /// Sets the vocabulary of sources that hold token ids.
    #[must_use]
    pub(crate) fn with_vocabulary(mut self, vocabulary: Vocabulary) -> Self {
        self.0.iter_mut().for_each(|source| source.reader.vocabulary = Some(vocabulary));
        self
    }

    /// Whether a source holds token ids instead of text.
    pub(crate) fn holds_tokens(&self, source: usize) -> bool {
        self.0[source].listed.format.holds_tokens()
    }

    /// Opens a unit at the beginning of `segment`. `again` bypasses the cache, whose contents may be damaged. Opening
    /// and reading block.
    ///
    /// # Errors
    /// When the unit's file is missing, has changed, is damaged, or is not what the plan says.
    pub(crate) fn open_unit(
        &self,
        source: usize,
        unit: usize,
        segment: u64,
        again: bool,
    ) -> Result<Segments, DataError> {
        let Source { folder, listed, reader } = &self.0[source];
        let folder = if again { &folder.afresh() } else { folder };
        reader.open(folder, &listed.files, listed.units[unit], segment)
    }

    /// The documents of a unit, one segment at a time, beginning with segment `from`. After each segment, `passed` is
    /// called with the number of bytes in it (as the manifest counts them), so that the sum is the size of the unit.
    /// Blocks.
    pub(crate) fn segments(
        &self,
        source: usize,
        unit: usize,
        from: u64,
        passed: impl Fn(u64),
    ) -> impl Iterator<Item = Result<Vec<Document>, DataError>> {
        let (mut opened, mut number) = (None, from);
        let mut left = self.0[source].listed.units[unit].bytes;
        let mut next = move |again: bool| {
            let mut reading = match opened.take().filter(|_| !again) {
                Some(reading) => reading,
                None => self.open_unit(source, unit, number, again)?,
            };
            let documents = reading.next()?;
            number = reading.position();
            let whole = self.0[source].listed.units[unit].bytes;
            let rest = if documents.is_some() { whole.saturating_sub(reading.passed()) } else { 0 };
            passed(left.saturating_sub(rest));
            left = left.min(rest);
            opened = Some(reading);
            Ok::<_, DataError>(documents)
        };
        std::iter::from_fn(move || {
            // A unit that cannot be read may have been damaged in transit.
            let mut read = next(false);
            for _ in 0..RETRIES {
                if read.as_ref().is_err_and(DataError::is_of_unit) {
                    read = next(true);
                }
            }
            read.map_err(|error| error.of_unit(self.name(source), unit)).transpose()
        })
    }

    /// The texts of a unit, one segment at a time. Blocks.
    fn texts(&self, source: usize, unit: usize) -> impl Iterator<Item = Result<Vec<String>, DataError>> {
        let text = move |document: Document| match document.content {
            Content::Text(text) => Ok(text),
            Content::Tokens(_) => Err(DataError::Tokens { name: self.name(source).to_owned() }),
        };
        self.segments(source, unit, 0, |_| ())
            .map(move |documents| documents?.into_iter().map(text).collect())
    }

    /// Every document of every source, in the order of the manifest. Blocks.
    pub fn all_documents(&self) -> impl Iterator<Item = Result<Vec<String>, DataError>> {
        self.units().flat_map(|(source, unit, _)| self.texts(source, unit))
    }

    /// Documents with about `bytes` of text, from units spread evenly over all sources. Blocks.
    ///
    /// # Errors
    /// When a unit cannot be read, or holds token ids.
    pub fn sample(&self, bytes: u64) -> Result<Vec<String>, DataError> {
        let total: u64 = self.units().map(|(_, _, unit)| unit.bytes).sum();
        let mut sample = Vec::new();
        let (mut passed, mut taken) = (0_u128, 0);
        for (source, index, unit) in self.units() {
            passed += u128::from(unit.bytes);
            // Segments are read as long as the sample is behind its share of the units so far.
            let mut segments = self.texts(source, index);
            while u128::from(taken) * u128::from(total) < passed * u128::from(bytes) {
                let Some(documents) = segments.next() else { break };
                let documents = documents?;
                taken += documents.iter().map(|document| document.len() as u64).sum::<u64>();
                sample.extend(documents);
            }
        }
        Ok(sample)
    }

    /// All units, source by source: the indices of the source and of the unit in it, and the unit.
    pub(crate) fn units(&self) -> impl Iterator<Item = (usize, usize, Unit)> {
        self.0.iter().enumerate().flat_map(|(source, s)| {
            s.listed.units.iter().enumerate().map(move |(index, unit)| (source, index, *unit))
        })
    }

    /// Indices of source and unit, taking the sources in turn: the first unit of each, then the second of each, …
    pub(crate) fn units_in_turn(&self) -> Vec<(usize, usize)> {
        let mut units: Vec<(usize, usize)> = self.units().map(|(source, index, _)| (source, index)).collect();
        units.sort_by_key(|(source, index)| (*index, *source));
        units
    }

    /// Bytes of text of each unit of a source.
    pub(crate) fn unit_sizes(&self, source: usize) -> Vec<u64> {
        self.0[source].listed.units.iter().map(|unit| unit.bytes).collect()
    }

    /// Traffic caused by a source so far.
    pub(crate) fn traffic(&self, source: usize) -> Traffic {
        self.0[source].folder.traffic()
    }

    /// URL of a file of a source, for messages.
    pub(crate) fn place(&self, source: usize, file: usize) -> String {
        let Source { folder, listed, .. } = &self.0[source];
        folder.place(&listed.files[file].path)
    }

    /// Name of a file of a source, relative to the source's `url`.
    pub(crate) fn file(&self, source: usize, file: usize) -> &str {
        &self.0[source].listed.files[file].path
    }

    /// Name of a source.
    pub(crate) fn name(&self, source: usize) -> &str {
        &self.0[source].listed.name
    }
}

/// Checks that each of the `lanes` lanes that read a source has at least one of its `units`. The plan has `all_lanes`.
pub(crate) fn enough_units(
    name: &str,
    units: usize,
    lanes: usize,
    all_lanes: usize,
) -> Result<(), DataError> {
    if units >= lanes {
        return Ok(());
    }
    let most = (all_lanes * units / lanes).max(1);
    Err(DataError::FewUnits { name: name.to_owned(), units, lanes, most })
}

/// What was found in a source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SourceReport {
    /// Name of the source.
    pub name: String,
    /// Number of files.
    pub files: usize,
    /// Total size of the stored files in bytes.
    pub bytes: u64,
    /// Number of rows in the first file, if its format states it.
    pub rows: Option<u64>,
    /// Columns of the first file and their types.
    pub schema: String,
    /// The beginning of the first text, or the first token ids.
    pub sample: String,
}

/// Number of characters in a sample of text.
const SAMPLE_CHARACTERS: usize = 60;
/// Number of ids in a sample of token ids.
const SAMPLE_TOKENS: usize = 12;

/// What was found in all sources.
#[derive(Debug, Default)]
pub struct Inspection {
    /// Reports on the sources that can be read.
    pub reports: Vec<SourceReport>,
    /// Problems with the other sources.
    pub problems: Problems,
    /// Kind of the first problem.
    pub kind: Option<ErrorKind>,
}

/// Makes sure that the shards that a run prepares will have a unit for every lane that reads them, when they have that many.
///
/// # Errors
/// When they will not.
pub fn check_prepared(config: &DataConfig, units: usize) -> Result<(), DataError> {
    let mixture = mixture(config);
    let own = format!("{RUN}{}", paths::SHARDS);
    for (index, source) in config.source.iter().enumerate().filter(|(_, source)| source.url == own) {
        let lanes = mixture.ends_of_source(index).len() - 1;
        enough_units(&source.name, units, lanes, mixture.lanes())?;
    }
    Ok(())
}

fn mixture(config: &DataConfig) -> Mixture {
    let weights: Vec<u64> = config.source.iter().map(|source| source.tokens.unwrap_or(1)).collect();
    Mixture::new(config.lanes, &weights)
}

/// Opens every source, lists its files and reads it up to its first document. Without `run`, the run's own folder, its
/// sources are passed by: they are not there yet. Blocks.
pub fn inspect(config: &DataConfig, run: Option<&Folder>) -> Inspection {
    let mut inspection = Inspection::default();
    let mixture = mixture(config);
    for (index, source) in config.source.iter().enumerate() {
        if run.is_none() && source.url.starts_with(RUN) {
            continue;
        }
        let lanes = mixture.ends_of_source(index).len() - 1;
        match report(source, lanes, mixture.lanes(), config, run) {
            Ok(report) => inspection.reports.push(report),
            Err(error) => {
                inspection.kind.get_or_insert(error.kind());
                inspection.problems.add(
                    format!("data.source.{index}"),
                    format!("{:?}", source.name),
                    "the source cannot be used",
                    error.to_string(),
                );
            }
        }
    }
    inspection
}

fn report(
    source: &SourceConfig,
    lanes: usize,
    all_lanes: usize,
    config: &DataConfig,
    run: Option<&Folder>,
) -> Result<SourceReport, DataError> {
    let stores = Stores::new(config, run)?;
    let folder = stores.open(&source.url)?;
    let files = manifest::list(source, &folder, &stores)?;
    let format = manifest::format_of(source, &folder, &files)?;
    if !folder.can_list() {
        manifest::check_ranges(&folder, &files)?;
    }
    let reader = reader(source, format, config);
    let first = first_document(&reader, &folder, &files)?;
    let first = first.ok_or_else(|| DataError::Empty { name: source.name.clone() })?;
    // Each file that is not empty has at least one unit, so units are counted only where there are few files.
    if files.iter().filter(|file| file.size > 0).count() < lanes {
        enough_units(&source.name, reader.units(&folder, &files)?.len(), lanes, all_lanes)?;
    }
    let sample = match &first {
        Content::Text(text) => text.chars().take(SAMPLE_CHARACTERS).collect(),
        Content::Tokens(ids) => format!("{:?}", &ids[..ids.len().min(SAMPLE_TOKENS)]),
    };
    Ok(SourceReport {
        name: source.name.clone(),
        files: files.len(),
        bytes: files.iter().map(|file| file.size).sum(),
        rows: format::rows(&folder, &files[0], format)?,
        schema: format::schema(&folder, &files[0], format)?,
        sample,
    })
}

/// The first document of a source that is not empty. Distributed writers leave files without rows and rows without
/// text.
fn first_document(
    reader: &UnitReader,
    folder: &Folder,
    files: &[FileInfo],
) -> Result<Option<Content>, DataError> {
    for file in files {
        let file = std::slice::from_ref(file);
        for unit in reader.units(folder, file)? {
            let mut segments = reader.open(folder, file, unit, 0)?;
            while let Some(documents) = segments.next()? {
                let says = |content: &Content| match content {
                    Content::Text(text) => !text.trim().is_empty(),
                    Content::Tokens(ids) => !ids.is_empty(),
                };
                let found = documents.into_iter().map(|document| document.content).find(says);
                if found.is_some() {
                    return Ok(found);
                }
            }
        }
    }
    Ok(None)
}

/// The reader for the units of a source, as far as it is known without a tokenizer.
fn reader(source: &SourceConfig, format: Format, config: &DataConfig) -> UnitReader {
    UnitReader { format, text: source.text.clone(), limit: config.unit.get(), vocabulary: None }
}
