//! A corpus file of arbitrary bytes gives documents or an error, and the documents do not depend on how it is cut into
//! units.

#![no_main]

use std::sync::{Arc, LazyLock};

use libfuzzer_sys::fuzz_target;
use object_store::ObjectStoreExt;
use object_store::memory::InMemory;
use tokio::runtime::Runtime;
use ulmus_dataloader::{Corpus, Counts, DataError, Folder, Manifest, Sources};
use ulmus_tokenizer::Tokenizer;
use ulmus_storage::Store;
use ulmus_plan::{Bytes, DataConfig, Format, SourceConfig};

const MODEL: &[u8] = include_bytes!("../../../tests/golden/tiny/tokenizer.model");

static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| {
    tokio::runtime::Builder::new_current_thread().build().expect("a runtime can be made")
});
static TOKENIZER: LazyLock<Tokenizer> =
    LazyLock::new(|| Tokenizer::read(MODEL, "tokenizer.model", None, None).expect("the model is a tokenizer"));

fuzz_target!(|bytes: &[u8]| {
    let Some((first, file)) = bytes.split_first() else { return };
    let formats = [Format::U16, Format::U32];
    let format =
        Format::TEXT.into_iter().chain(formats).cycle().nth(usize::from(*first)).expect("a cycle is endless");
    let store = Arc::new(InMemory::new());
    RUNTIME.block_on(store.put(&"file".into(), file.to_vec().into())).expect("memory takes a file");
    let read = |unit| count(&folder(&store), format, unit);
    // Token ids are cut into units of 4096 bytes at least.
    if let (Ok(small), Ok(large)) = (read(64), read(1 << 20)) {
        assert_eq!(small, large);
    }
});

fn folder(store: &Arc<InMemory>) -> Folder {
    Folder::of_run(Store::from_objects(Arc::clone(store) as _, object_store::path::Path::default(), "memory"))
}

fn count(run: &Folder, format: Format, unit: u64) -> Result<Vec<Counts>, DataError> {
    let source = SourceConfig {
        name: "file".to_owned(),
        url: "run:".to_owned(),
        files: vec!["file".to_owned()],
        format: Some(format),
        text: "text".to_owned(),
        ..SourceConfig::default()
    };
    let config = DataConfig {
        lanes: 1,
        threads: 1,
        unit: Bytes::new(unit),
        min_characters: 0,
        min_tokens: 0,
        source: vec![source],
        ..DataConfig::default()
    };
    let manifest = Manifest::freeze(&config, Some(run))?;
    let sources = Sources::open(&config, &manifest, Some(run))?;
    Corpus::new(&config, 0, sources, TOKENIZER.clone())?.count_all(|_| ())
}
