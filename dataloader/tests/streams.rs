//! Tests the promises of the loader on real files: the same sequences for any number of workers, every document exactly
//! once per epoch, and an identical rest of the stream after a resume at any point.

#![expect(clippy::unwrap_used, reason = "a test fails at the first error")]

use std::collections::BTreeMap;
use std::io::Write;
use std::sync::Arc;

use arrow_array::{ArrayRef, RecordBatch, StringArray};
use arrow_ipc::writer::StreamWriter;
use object_store::ObjectStoreExt;
use object_store::memory::InMemory;
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::errors::Result as ParquetResult;
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use proptest::prelude::*;
use serde_json::json;
use ulmus_dataloader::{Corpus, Cursors, DataError, Folder, IGNORE, Loader, Manifest, Sequence, Sources};
use ulmus_plan::{Bytes, DataConfig, Format, Pack, SourceConfig};
use ulmus_storage::Store;
use ulmus_tokenizer::{Tokenizer, train};
use ulmus_types::LaneId;

const LENGTH: usize = 32;

/// A source of `documents` short documents, each with a number that occurs nowhere else.
#[derive(Debug, Clone)]
struct Text {
    documents: usize,
    tokens: u64,
    max_epochs: Option<u64>,
    format: Format,
}

fn text(source: usize, document: usize) -> String {
    format!("doc {source} {document} : {}", "lorem ipsum dolor ".repeat(1 + (document * 7 + source) % 5))
}

fn tokenizer() -> Tokenizer {
    let sample: Vec<String> = (0..50).map(|document| text(document % 3, document)).collect();
    train(&sample, 285).unwrap()
}

/// The contents of a file that holds `texts` in this format: lines, gzip in two members, rows of one group, batches, or ids.
fn stored(texts: &[String], format: Format) -> Vec<u8> {
    let lines: String = texts.iter().map(|text| json!({ "text": text }).to_string() + "\n").collect();
    let lines = lines.as_bytes();
    let gzip = |part: &[u8]| {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        encoder.write_all(part).unwrap();
        encoder.finish().unwrap()
    };
    match format {
        Format::JsonGz => {
            let (first, second) = lines.split_at(lines.len() / 3);
            [gzip(first), gzip(second)].concat()
        }
        Format::JsonZst => zstd::encode_all(lines, 0).unwrap(),
        Format::Parquet => rows(texts).unwrap(),
        Format::Arrow => batches(texts).unwrap(),
        Format::U16 => {
            let tokenizer = tokenizer();
            let ids = texts.iter().flat_map(|text| [tokenizer.encode(text), vec![tokenizer.eos()]].concat());
            ids.flat_map(|id| (id as u16).to_le_bytes()).collect()
        }
        _ => lines.to_vec(),
    }
}

/// An Arrow stream in batches of two rows.
fn batches(texts: &[String]) -> Result<Vec<u8>, arrow_schema::ArrowError> {
    let batch = |texts: &[String]| {
        let column: ArrayRef = Arc::new(StringArray::from(texts.to_vec()));
        RecordBatch::try_from_iter([("text", column)])
    };
    let mut stream = StreamWriter::try_new(Vec::new(), &batch(&[])?.schema())?;
    texts.chunks(2).try_for_each(|texts| stream.write(&batch(texts)?))?;
    stream.into_inner()
}

/// A parquet file with a page for every row, so that its one group has several segments.
fn rows(texts: &[String]) -> ParquetResult<Vec<u8>> {
    let schema = Arc::new(parse_message_type("message schema { required binary text (UTF8); }")?);
    let properties = WriterProperties::builder().set_data_page_row_count_limit(1).set_write_batch_size(1);
    let properties = properties.set_dictionary_enabled(false).build();
    let mut writer = SerializedFileWriter::new(Vec::new(), schema, Arc::new(properties))?;
    let mut group = writer.next_row_group()?;
    let mut column = group.next_column()?.unwrap();
    let texts: Vec<ByteArray> = texts.iter().map(|text| ByteArray::from(text.as_str())).collect();
    column.typed::<ByteArrayType>().write_batch(&texts, None, None)?;
    column.close()?;
    group.close()?;
    writer.into_inner()
}

/// Writes the sources into a run folder and opens them.
fn corpus(texts: &[Text], lanes: u64, config: &DataConfig) -> Result<Corpus, DataError> {
    let store = Arc::new(InMemory::new());
    let put = |path: String, bytes: Vec<u8>| {
        let put = async { store.put(&path.into(), bytes.into()).await };
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(put).unwrap();
    };
    let mut sources = Vec::new();
    for (source, spec) in texts.iter().enumerate() {
        // A compressed file belongs to a single lane, so there have to be more files.
        let (suffix, per_file) = match spec.format {
            Format::JsonGz => ("json.gz", 5),
            Format::JsonZst => ("json.zst", 5),
            Format::Parquet => ("parquet", 7),
            Format::Arrow => ("arrow", 5),
            Format::U16 => ("bin", 6),
            _ => ("jsonl", 25),
        };
        for (file, documents) in (0..spec.documents).collect::<Vec<_>>().chunks(per_file).enumerate() {
            let texts: Vec<String> = documents.iter().map(|document| text(source, *document)).collect();
            put(format!("{source}/{file:03}.{suffix}"), stored(&texts, spec.format));
        }
        sources.push(SourceConfig {
            name: format!("source-{source}"),
            url: format!("run:{source}"),
            files: vec![format!("*.{suffix}")],
            format: Some(spec.format),
            text: "text".to_owned(),
            tokens: Some(spec.tokens),
            max_epochs: spec.max_epochs,
            ..SourceConfig::default()
        });
    }
    let config = DataConfig { lanes, source: sources, ..config.clone() };
    let run = Folder::of_run(Store::from_objects(store, object_store::path::Path::default(), "memory"));
    let manifest = Manifest::freeze(&config, Some(&run))?;
    Corpus::new(&config, 11, Sources::open(&config, &manifest, Some(&run))?, tokenizer())
}

/// A plan with small units and without filters.
fn window(sequences: u64) -> DataConfig {
    DataConfig {
        window: sequences,
        unit: Bytes::new(250),
        min_characters: 0,
        min_tokens: 0,
        holdout: 0.0,
        ..DataConfig::default()
    }
}

/// The sequences and cursors of `steps` steps in which one worker reads all lanes.
fn alone(corpus: &Arc<Corpus>, steps: usize, per_lane: usize) -> (Vec<Vec<Sequence>>, Vec<Cursors>) {
    let lanes: Vec<LaneId> = corpus.lanes().collect();
    let mut loader = Loader::open(Arc::clone(corpus), LENGTH, &lanes, &corpus.start()).unwrap();
    let mut cursors = vec![loader.cursors()];
    let taken = (0..steps).map(|_| {
        let taken = loader.take(&lanes, per_lane).unwrap();
        cursors.push(loader.cursors());
        taken
    });
    (taken.collect(), cursors)
}

fn sum(cursors: &[Cursors]) -> Cursors {
    let mut words = cursors[0].numbers().to_vec();
    for other in &cursors[1..] {
        words.iter_mut().zip(other.numbers()).for_each(|(word, more)| *word += more);
    }
    Cursors::from_numbers(words)
}

/// How often each document begins in `sequences`, by its number.
fn beginnings(tokenizer: &Tokenizer, sequences: &[Sequence]) -> BTreeMap<String, usize> {
    let mut found = BTreeMap::new();
    for sequence in sequences {
        // A document that begins near the end of a sequence continues elsewhere; only its number is needed.
        for (at, _) in sequence.inputs.iter().enumerate().filter(|(_, token)| **token == tokenizer.bos()) {
            let end = (at + 1..LENGTH).find(|p| sequence.targets[*p] == IGNORE).unwrap_or(LENGTH);
            let text = tokenizer.decode(&sequence.inputs[at..end]);
            if let Some((number, _)) = text.split_once(':') {
                *found.entry(number.to_owned()).or_default() += 1;
            }
        }
    }
    found
}

fn plans() -> impl Strategy<Value = (Vec<Text>, u64, u64)> {
    let format = prop_oneof![
        Just(Format::Jsonl),
        Just(Format::JsonGz),
        Just(Format::JsonZst),
        Just(Format::Parquet),
        Just(Format::Arrow),
        Just(Format::U16)
    ];
    let documents = prop_oneof![60_usize..80, 60_usize..150, 300_usize..600];
    let source = (documents, 1_u64..20, format).prop_map(|(documents, tokens, format)| Text {
        documents,
        tokens,
        max_epochs: None,
        format,
    });
    (prop::collection::vec(source, 1..4), 1_u64..9, 1_u64..30)
}

/// The explanation of a sequence contains exactly the sequence's tokens.
#[test]
fn every_sequence_is_explained() {
    let texts = [Format::Jsonl, Format::JsonGz].map(|format| Text {
        documents: 80,
        tokens: 1,
        max_epochs: None,
        format,
    });
    for pack in [Pack::Concat, Pack::Corenet] {
        let config = DataConfig { pack, piece_words: 5, ..window(6) };
        let corpus = Arc::new(corpus(&texts, 2, &config).unwrap());
        let lanes: Vec<LaneId> = corpus.lanes().collect();
        let open = || Loader::open(Arc::clone(&corpus), LENGTH, &lanes, &corpus.start()).unwrap();
        let (mut taking, mut passing) = (open(), open());
        for number in 0..120 {
            let lane = lanes[number % lanes.len()];
            let sequence = taking.take(&[lane], 1).unwrap().remove(0);
            let explanation = corpus.explain(passing.pass(lane).unwrap(), LENGTH).unwrap();
            let pad = corpus.tokenizer().pad();
            let filled: Vec<u32> = sequence.inputs.into_iter().filter(|id| *id != pad).collect();
            let lengths: usize = explanation.documents.iter().map(|document| document.part.len()).sum();
            assert_eq!(lengths, filled.len());
            let told: String = explanation.documents.iter().map(|document| document.text.as_str()).collect();
            // Each part is decoded by itself, which drops its leading space.
            let bare = |text: String| text.replace(' ', "");
            assert_eq!(bare(told), bare(corpus.tokenizer().decode(&filled)));
            assert!(
                explanation
                    .documents
                    .iter()
                    .all(|document| document.file.ends_with("jsonl") == (explanation.source == "source-0"))
            );
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Lanes move between 1 to 8 workers at every step, and some workers are killed within a step, which others then
    /// repeat. The sequences stay the same.
    #[test]
    fn workers_do_not_change_the_stream(
        (texts, lanes, window_size) in plans(),
        moves in prop::collection::vec((1_usize..9, any::<u64>(), prop::option::of(0_usize..8)), 1..6),
        threads in 1_u64..4,
    ) {
        let config = DataConfig { threads, ..window(window_size) };
        let corpus = Arc::new(corpus(&texts, lanes, &config).unwrap());
        let (expected, cursors) = alone(&corpus, moves.len(), 2);
        let lanes: Vec<LaneId> = corpus.lanes().collect();
        let mut loaders: Vec<Loader> = Vec::new();
        let mut hosting: Vec<Vec<LaneId>> = Vec::new();
        let mut at = corpus.start();
        for (step, (workers, assignment, killed)) in moves.iter().enumerate() {
            let host = |lane: &LaneId| (assignment.rotate_left(lane.get() * 7) % *workers as u64) as usize;
            let hosted = |worker: usize| lanes.iter().copied().filter(|lane| host(lane) == worker).collect::<Vec<_>>();
            if let Some(killed) = killed.filter(|killed| *killed < loaders.len()) {
                // All workers are somewhere within the step when one of them dies.
                for (loader, hosted) in loaders.iter_mut().zip(&hosting) {
                    loader.take(&hosted[..hosted.len().min(killed + 1)], 1).unwrap();
                }
                drop(loaders.remove(killed));
            }
            loaders.truncate(*workers);
            hosting = (0..*workers).map(hosted).collect();
            for (worker, loader) in loaders.iter_mut().enumerate() {
                loader.host(&hosting[worker], &at).unwrap();
            }
            for hosted in hosting.iter().skip(loaders.len()) {
                loaders.push(Loader::open(Arc::clone(&corpus), LENGTH, hosted, &at).unwrap());
            }
            for lane in &lanes {
                let taken = loaders[host(lane)].take(&[*lane], 2).unwrap();
                prop_assert_eq!(&taken[..], &expected[step][2 * lane.index()..2 * lane.index() + 2]);
            }
            at = sum(&loaders.iter().map(Loader::cursors).collect::<Vec<_>>());
            prop_assert_eq!(&at, &cursors[step + 1]);
        }
    }

    /// A new process continues with the same sequences, given only the cursors.
    #[test]
    fn a_resumed_stream_is_the_rest_of_the_stream((texts, lanes, window_size) in plans(), stop in 0_usize..12, steps in 1_usize..12) {
        let corpus = Arc::new(corpus(&texts, lanes, &window(window_size)).unwrap());
        let (expected, cursors) = alone(&corpus, stop + steps, 1);
        let lanes: Vec<LaneId> = corpus.lanes().collect();
        let words = cursors[stop].numbers().to_vec();
        let mut resumed = Loader::open(Arc::clone(&corpus), LENGTH, &lanes, &Cursors::from_numbers(words)).unwrap();
        for expected in &expected[stop..] {
            prop_assert_eq!(&resumed.take(&lanes, 1).unwrap(), expected);
        }
        // A repeated step gives the same sequences.
        resumed.host(&lanes, &cursors[stop]).unwrap();
        prop_assert_eq!(&resumed.take(&lanes, 1).unwrap(), &expected[stop]);
    }

    /// At the end of every epoch, each document has begun exactly once per epoch.
    #[test]
    fn every_document_once_per_epoch((texts, lanes, window_size) in plans(), epochs in 1_u64..3) {
        let texts: Vec<Text> = texts.into_iter().map(|text| Text { max_epochs: Some(epochs), ..text }).collect();
        // Streams end at different times, so each source is read by itself.
        for (source, text) in texts.iter().enumerate() {
            let corpus = Arc::new(corpus(std::slice::from_ref(text), lanes, &window(window_size)).unwrap());
            let lanes: Vec<LaneId> = corpus.lanes().collect();
            let mut loader = Loader::open(Arc::clone(&corpus), LENGTH, &lanes, &corpus.start()).unwrap();
            let mut sequences = Vec::new();
            for lane in &lanes {
                let end = loop {
                    match loader.take(&[*lane], 1) {
                        Ok(taken) => sequences.extend(taken),
                        Err(error) => break error,
                    }
                };
                prop_assert!(matches!(end, DataError::Exhausted { .. }), "{end}");
            }
            let targets = sequences.iter().flat_map(|s| &s.targets).filter(|target| **target != IGNORE).count() as u64;
            let counts = corpus.counts().remove(0);
            prop_assert_eq!(counts.documents, epochs * text.documents as u64);
            prop_assert_eq!(targets, counts.tokens - counts.documents);
            let found = beginnings(corpus.tokenizer(), &sequences);
            prop_assert!(found.values().all(|count| *count == epochs as usize), "{source}: {found:?}");
            prop_assert!(found.len() > text.documents / 2);
        }
    }
}

#[test]
fn threads_do_not_change_the_stream() {
    let texts = [
        Text { documents: 200, tokens: 3, max_epochs: None, format: Format::Jsonl },
        Text { documents: 90, tokens: 1, max_epochs: None, format: Format::Jsonl },
    ];
    let read = |threads| {
        let config = DataConfig { threads, ..window(10) };
        alone(&Arc::new(corpus(&texts, 4, &config).unwrap()), 40, 2)
    };
    assert_eq!(read(1), read(7));
}

#[test]
fn the_mixture_follows_the_token_counts() {
    let texts = [
        Text { documents: 100, tokens: 5, max_epochs: None, format: Format::Jsonl },
        Text { documents: 100, tokens: 3, max_epochs: None, format: Format::Jsonl },
    ];
    let corpus = Arc::new(corpus(&texts, 3, &window(8)).unwrap());
    let (_, cursors) = alone(&corpus, 80, 1);
    // The first words of the four streams: lane 0 and most of lane 1 read source 0.
    let emitted: Vec<i64> = cursors[80].numbers().iter().step_by(4).copied().collect();
    assert_eq!(emitted.iter().sum::<i64>(), 240);
    assert_eq!((emitted[0], emitted[3]), (80, 80));
    assert_eq!(emitted[1] + emitted[0], 150);
}

#[test]
fn too_few_units_for_the_lanes_is_an_error_with_a_remedy() {
    let texts = [Text { documents: 30, tokens: 1, max_epochs: None, format: Format::Jsonl }];
    let message = corpus(&texts, 64, &window(8)).unwrap_err().to_string();
    assert!(
        message.contains("use data.lanes of at most") && message.contains("smaller data.unit"),
        "{message}"
    );
}

#[test]
fn a_corpus_that_the_filters_empty_says_so() {
    let texts = [Text { documents: 60, tokens: 1, max_epochs: None, format: Format::Jsonl }];
    let corpus = Arc::new(corpus(&texts, 2, &DataConfig { min_tokens: 10_000, ..window(8) }).unwrap());
    let lanes: Vec<LaneId> = corpus.lanes().collect();
    let mut loader = Loader::open(Arc::clone(&corpus), LENGTH, &lanes, &corpus.start()).unwrap();
    let message = loader.take(&lanes, 1).unwrap_err().to_string();
    assert!(message.contains("no document of source \"source-0\" is left to train on"), "{message}");
    // The reader of the other lane continues to count until it is stopped.
    drop(loader);
    assert_eq!(corpus.counts()[0].short_tokens, corpus.counts()[0].documents);
}

#[test]
fn a_corpus_without_held_out_documents_is_recognised() {
    let texts = [Text { documents: 300, tokens: 1, max_epochs: None, format: Format::Jsonl }];
    for holdout in [0.0, 1e-12] {
        let corpus = corpus(&texts, 2, &DataConfig { holdout, ..window(8) }).unwrap();
        assert_eq!(corpus.holds_out_any(u64::MAX).unwrap(), Some(false));
        assert!(corpus.held_out(LENGTH, 5).unwrap().texts.is_empty());
    }
}

#[test]
fn held_out_documents_are_fixed_and_never_trained_on() {
    let texts = [Text { documents: 300, tokens: 1, max_epochs: Some(1), format: Format::Jsonl }];
    let corpus = Arc::new(corpus(&texts, 2, &DataConfig { holdout: 0.2, ..window(8) }).unwrap());
    let held_out = corpus.held_out(LENGTH, 1000).unwrap();
    assert!((30..90).contains(&held_out.texts.len()), "{}", held_out.texts.len());
    assert_eq!(corpus.holds_out_any(u64::MAX).unwrap(), Some(true));
    assert_eq!(corpus.holds_out_any(0).unwrap(), None);
    let few = corpus.held_out(LENGTH, 5).unwrap();
    assert_eq!(few.sequences, held_out.sequences[..5]);
    assert_eq!(few.texts, held_out.texts[..few.texts.len()]);

    let numbers = |text: &String| text.split_once(':').unwrap().0.to_owned();
    let expected: BTreeMap<String, usize> = held_out.texts.iter().map(|text| (numbers(text), 1)).collect();
    let lanes: Vec<LaneId> = corpus.lanes().collect();
    let mut loader = Loader::open(Arc::clone(&corpus), LENGTH, &lanes, &corpus.start()).unwrap();
    for lane in &lanes {
        while let Ok(taken) = loader.take(&[*lane], 1) {
            let trained = beginnings(corpus.tokenizer(), &taken);
            assert!(trained.keys().all(|number| !expected.contains_key(number)), "{trained:?}");
        }
    }
    assert_eq!(corpus.counts()[0].held_out, held_out.texts.len() as u64);
}
