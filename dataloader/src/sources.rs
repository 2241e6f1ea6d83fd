//! Sources that are open: from the manifest to documents.

use serde::Serialize;
use ulmus_plan::{DataConfig, Format, SourceConfig};
use ulmus_run::paths;
use ulmus_storage::FileInfo;
use ulmus_types::{ErrorKind, Problems};

use crate::address::RUN;
use crate::error::DataError;
use crate::format::{self, Content, Document, Layout, Segments, Unit};
use crate::manifest::{self, Manifest, SourceManifest};
use crate::order::Mixture;
use crate::store::{Folder, Stores, Traffic};
use crate::tokens::Vocabulary;

/// How often a unit that cannot be read is read again.
pub(crate) const AGAIN: usize = 2;

/// The sources of a plan, as the manifest lists them.
#[derive(Debug)]
pub struct Sources(Vec<Source>);

#[derive(Debug)]
struct Source {
    folder: Folder,
    listed: SourceManifest,
    layout: Layout,
}

impl Sources {
    /// Opens every source; `run` is the run's own folder.
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
                layout: layout(source, listed.format, config),
            })
        };
        Ok(Self(config.source.iter().zip(&manifest.sources).map(open).collect::<Result<_, DataError>>()?))
    }

    /// Says what the ids mean that some sources hold.
    #[must_use]
    pub(crate) fn of_tokens(mut self, vocabulary: Vocabulary) -> Self {
        self.0.iter_mut().for_each(|source| source.layout.vocabulary = Some(vocabulary));
        self
    }

    /// Whether a source holds token ids instead of text.
    pub(crate) fn holds_tokens(&self, source: usize) -> bool {
        self.0[source].listed.format.holds_tokens()
    }

    /// Opens a unit at a segment; `again` passes by the cache, when what was read before is in doubt. Blocks, as
    /// reading it does.
    ///
    /// # Errors
    /// When the unit's file is gone, has changed, is damaged, or is not what the plan says.
    pub(crate) fn open_unit(
        &self,
        source: usize,
        unit: usize,
        segment: u64,
        again: bool,
    ) -> Result<Segments, DataError> {
        let Source { folder, listed, layout } = &self.0[source];
        let folder = if again { &folder.afresh() } else { folder };
        layout.open(folder, &listed.files, listed.units[unit], segment)
    }

    /// The documents of a unit, a segment at a time, from one of them on; `passed` hears how many of the unit's bytes, as
    /// the manifest has them, are behind each, and in the end of all that are left. Blocks.
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
            // What cannot be read may have been damaged on its way.
            let mut read = next(false);
            for _ in 0..AGAIN {
                if read.as_ref().is_err_and(DataError::is_of_unit) {
                    read = next(true);
                }
            }
            read.map_err(|error| error.of_unit(self.name(source), unit)).transpose()
        })
    }

    /// The texts of a unit, a segment at a time. Blocks.
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

    /// Whole documents that hold about `bytes` of text, from units spread evenly over all sources. Blocks.
    ///
    /// # Errors
    /// As for reading a unit.
    pub fn sample(&self, bytes: u64) -> Result<Vec<String>, DataError> {
        let total: u64 = self.units().map(|(_, _, unit)| unit.bytes).sum();
        let mut sample = Vec::new();
        let (mut passed, mut taken) = (0_u128, 0);
        for (source, index, unit) in self.units() {
            passed += u128::from(unit.bytes);
            // Segments are read while the sample lags behind its share of what has been passed.
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

    /// All units, source by source.
    pub(crate) fn units(&self) -> impl Iterator<Item = (usize, usize, Unit)> {
        self.0.iter().enumerate().flat_map(|(source, s)| {
            s.listed.units.iter().enumerate().map(move |(index, unit)| (source, index, *unit))
        })
    }

    /// Unit numbers in turn over the sources: the first unit of each, the second of each, …
    pub(crate) fn units_in_turn(&self) -> Vec<(usize, usize)> {
        let mut units: Vec<(usize, usize)> = self.units().map(|(source, index, _)| (source, index)).collect();
        units.sort_by_key(|(source, index)| (*index, *source));
        units
    }

    /// Bytes of text of each unit of a source.
    pub(crate) fn unit_sizes(&self, source: usize) -> Vec<u64> {
        self.0[source].listed.units.iter().map(|unit| unit.bytes).collect()
    }

    /// What reading a source has cost so far.
    pub(crate) fn traffic(&self, source: usize) -> Traffic {
        self.0[source].folder.traffic()
    }

    /// Where a file of a source lies, for messages.
    pub(crate) fn place(&self, source: usize, file: usize) -> String {
        let Source { folder, listed, .. } = &self.0[source];
        folder.place(&listed.files[file].path)
    }

    /// Name of a file of a source, below its `url`.
    pub(crate) fn file(&self, source: usize, file: usize) -> &str {
        &self.0[source].listed.files[file].path
    }

    /// Name of a source.
    pub(crate) fn name(&self, source: usize) -> &str {
        &self.0[source].listed.name
    }
}

/// Makes sure that every lane which reads a source has a unit of it; `all_lanes` are those of the plan.
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

/// What `--check sources` found in one source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SourceReport {
    /// Name of the source.
    pub name: String,
    /// How many files it has.
    pub files: usize,
    /// Their size in bytes, as stored.
    pub bytes: u64,
    /// Rows of the first file, if it tells them.
    pub rows: Option<u64>,
    /// Columns and types of the first file.
    pub schema: String,
    /// The beginning of its first text, or its first token ids.
    pub sample: String,
}

/// Characters of a text that are shown as a sample.
const SAMPLE_CHARACTERS: usize = 60;
/// Ids, where there is no text.
const SAMPLE_TOKENS: usize = 12;

/// What was found in all sources.
#[derive(Debug, Default)]
pub struct Inspection {
    /// Of the sources that can be read.
    pub reports: Vec<SourceReport>,
    /// Of the others.
    pub problems: Problems,
    /// What can be done about the first of those.
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
        manifest::must_give_ranges(&folder, &files)?;
    }
    let layout = layout(source, format, config);
    let first = first_document(&layout, &folder, &files)?;
    let first = first.ok_or_else(|| DataError::Empty { name: source.name.clone() })?;
    // A file that is not empty has one unit at least, so that all are looked at only where there are few.
    if files.iter().filter(|file| file.size > 0).count() < lanes {
        enough_units(&source.name, layout.units(&folder, &files)?.len(), lanes, all_lanes)?;
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

/// The first document of a source that says anything. Writers that share work leave files of no rows, and rows of no text.
fn first_document(
    layout: &Layout,
    folder: &Folder,
    files: &[FileInfo],
) -> Result<Option<Content>, DataError> {
    for file in files {
        let file = std::slice::from_ref(file);
        for unit in layout.units(folder, file)? {
            let mut segments = layout.open(folder, file, unit, 0)?;
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

/// How a source is read, as far as that is known without a tokenizer.
fn layout(source: &SourceConfig, format: Format, config: &DataConfig) -> Layout {
    Layout { format, text: source.text.clone(), limit: config.unit.get(), vocabulary: None }
}
