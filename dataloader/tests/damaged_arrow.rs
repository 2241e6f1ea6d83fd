//! An Arrow file of which any byte is wrong has as many rows as before, or is refused by name, and takes no more memory than a
//! whole one. The allocations of the whole process are measured, so there is a single test.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![expect(unsafe_code, reason = "an allocator that measures")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::io::Cursor;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use arrow_array::RecordBatch;
use arrow_ipc::reader::{FileReader, StreamReader};
use arrow_ipc::writer::{FileWriter, StreamWriter};
use arrow_schema::SchemaRef;
use object_store::ObjectStoreExt;
use object_store::memory::InMemory;
use tokio::runtime::Runtime;
use ulmus_dataloader::{DataError, Folder, read_rows};
use ulmus_storage::Store;

struct Measuring;

/// The largest piece of memory that was asked for.
static LARGEST: AtomicUsize = AtomicUsize::new(0);

// SAFETY: all is left to the system's allocator.
unsafe impl GlobalAlloc for Measuring {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LARGEST.fetch_max(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller keeps `GlobalAlloc`'s contract, which `System` has as well.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps `GlobalAlloc`'s contract, which `System` has as well.
        unsafe { System.dealloc(memory, layout) };
    }
}

#[global_allocator]
static MEASURING: Measuring = Measuring;

/// The files of the test have a few KB.
const MOST: usize = 256 << 10;

/// A file that pyarrow has written.
fn golden(name: &str) -> Vec<u8> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/tune/arrow");
    std::fs::read(Path::new(folder).join(name)).unwrap()
}

/// The same batches as a stream and as a file.
fn written(schema: &SchemaRef, batches: &[RecordBatch]) -> [Vec<u8>; 2] {
    let mut stream = StreamWriter::try_new(Vec::new(), schema).unwrap();
    let mut file = FileWriter::try_new(Vec::new(), schema).unwrap();
    for batch in batches {
        stream.write(batch).unwrap();
        file.write(batch).unwrap();
    }
    [stream.into_inner().unwrap(), file.into_inner().unwrap()]
}

#[test]
fn any_wrong_byte_costs_an_error_and_neither_rows_nor_memory() {
    let runtime = Runtime::new().unwrap();
    let objects = Arc::new(InMemory::new());
    let store = Store::from_objects(Arc::clone(&objects) as _, object_store::path::Path::default(), "memory");
    let folder = Folder::of_run(store);
    let count = |bytes: Vec<u8>| -> Result<usize, DataError> {
        runtime.block_on(objects.put(&"a.arrow".into(), bytes.into())).unwrap();
        // What a panic inside of the decoder prints takes memory, too.
        let hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(|_| ()));
        LARGEST.store(0, Ordering::Relaxed);
        let rows = read_rows(&folder, "a.arrow");
        let largest = LARGEST.load(Ordering::Relaxed);
        std::panic::set_hook(hook);
        assert!(largest < MOST, "{largest} bytes at once");
        Ok(rows?.len())
    };
    let kinds = FileReader::try_new(Cursor::new(golden("kinds.arrow")), None).unwrap();
    let kinds = (kinds.schema(), kinds.map(Result::unwrap).collect::<Vec<_>>());
    let preferences = StreamReader::try_new(Cursor::new(golden("train_prefs.arrow")), None).unwrap();
    let preferences = (preferences.schema(), preferences.map(Result::unwrap).collect::<Vec<_>>());
    let whole = [written(&kinds.0, &kinds.1), written(&preferences.0, &preferences.1)].concat();
    for (bytes, rows) in whole.iter().zip([4, 4, 8, 8]) {
        assert_eq!(count(bytes.clone()).unwrap(), rows);
    }
    let compressed = [("lz4.arrow", "LZ4_FRAME"), ("zstd.arrow", "ZSTD")];
    for (name, codec) in compressed {
        let error = count(golden(name)).unwrap_err().to_string();
        assert!(error.contains(&format!("run:a.arrow are compressed with {codec}")), "{error}");
    }
    let compressed = compressed.map(|(name, _)| golden(name));
    for bytes in whole.iter().chain(&compressed) {
        let rows = count(bytes.clone()).unwrap_or_default();
        let mut refused = 0;
        for at in 0..bytes.len() {
            for change in [1 << (at % 8), 0xff] {
                let mut damaged = bytes.clone();
                damaged[at] ^= change;
                match count(damaged) {
                    Ok(found) => assert_eq!(found, rows, "byte {at} ^ {change}"),
                    Err(error) => {
                        refused += 1;
                        assert!(error.to_string().contains("run:a.arrow"), "byte {at} ^ {change}: {error}");
                    }
                }
            }
        }
        assert!(refused > bytes.len() / 10, "{refused} of {}", bytes.len());
        for end in 0..bytes.len() {
            let cut = count(bytes[..end].to_vec());
            // Of a stream, any batch may be the last.
            let may_end = !bytes.starts_with(b"ARROW1");
            assert!(cut.is_err() || may_end && cut.is_ok_and(|found| found <= rows), "{end} bytes");
        }
    }
}
