//! The client on stores that work: a disk, and an object store in memory.

#![expect(clippy::unwrap_used, reason = "a test stops at what it does not expect")]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use object_store::memory::InMemory;
use object_store::path::Path;
use tempfile::TempDir;
use ulmus_storage::{FileInfo, RateLimiter, Store, StoreError};
use ulmus_types::{Digest, ErrorKind};

/// More than one piece.
const LARGE: usize = (16 << 20) + 5;

fn large() -> Vec<u8> {
    (0..LARGE).map(|at| (at / 1000) as u8).collect()
}

fn on_disk() -> (TempDir, Store) {
    let home = tempfile::tempdir().unwrap();
    let store = Store::create(home.path().join("runs/a b").to_str().unwrap()).unwrap();
    (home, store)
}

fn in_memory() -> Store {
    Store::from_objects(Arc::new(InMemory::new()), Path::from("run"), "mem://run")
}

fn paths(files: &[FileInfo]) -> Vec<(&str, u64)> {
    files.iter().map(|file| (file.path.as_str(), file.size)).collect()
}

#[tokio::test]
async fn files_are_written_listed_read_and_deleted_in_their_folder() {
    let (_home, disk) = on_disk();
    for store in [&disk, &in_memory()] {
        let shards = store.folder("shards");
        shards.put("x/1.bin", vec![1, 2, 3]).await.unwrap();
        shards.put("x/0.bin", large()).await.unwrap();
        shards.put("x/empty", Bytes::new()).await.unwrap();

        let files = store.list("shards").await.unwrap();
        let expected = [("shards/x/0.bin", LARGE as u64), ("shards/x/1.bin", 3), ("shards/x/empty", 0)];
        assert_eq!(paths(&files), expected);
        assert_eq!(shards.list("").await.unwrap()[1].path, "x/1.bin");
        assert_eq!(store.list_folders("").await.unwrap(), ["shards"]);
        assert!(store.list("nothing").await.unwrap().is_empty());

        assert_eq!(&store.get("shards/x/1.bin").await.unwrap()[..], [1, 2, 3]);
        assert!(store.get("shards/x/0.bin").await.unwrap() == large());
        assert!(store.get("shards/x/empty").await.unwrap().is_empty());
        let begin = store.get_range(&files[0], 5000..9_000_000).await.unwrap();
        assert!(begin == large()[5000..9_000_000]);
        let mut read = Vec::new();
        store.get_pieces("shards/x/0.bin", |step| read.extend_from_slice(step)).await.unwrap();
        assert!(read == large());
        assert!(store.counters().fetched_bytes() >= 3 * LARGE as u64 - 10_000_000);

        shards.delete("x/1.bin").await.unwrap();
        shards.delete("x/1.bin").await.unwrap();
        assert!(shards.stat("x/0.bin").await.is_ok());
        assert!(matches!(shards.stat("x/1.bin").await, Err(StoreError::NotFound { .. })));
        let error = shards.get("x/1.bin").await.unwrap_err();
        assert!(matches!(error, StoreError::NotFound { .. }), "{error}");
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
    }
    assert!(disk.directory().unwrap().join("shards/x/0.bin").is_file());
}

#[tokio::test]
async fn a_file_is_made_once() {
    let (_home, disk) = on_disk();
    for store in [&disk, &in_memory()] {
        assert!(store.put_new("a", "first").await.unwrap());
        assert!(!store.put_new("a", "second").await.unwrap());
        assert_eq!(store.get("a").await.unwrap(), "first");
        store.put("a", "third").await.unwrap();
        assert_eq!(store.get("a").await.unwrap(), "third");
    }
}

/// Two versions of a file are never mixed, and one that became shorter is not waited for.
#[tokio::test]
async fn a_file_that_changes_is_told() {
    let (_home, store) = on_disk();
    store.put("a", "first").await.unwrap();
    let then = store.stat("a").await.unwrap();
    assert!(store.is_still(&then).await.unwrap());
    for (now, what) in [("longer than it was", "size"), ("no", "size"), ("", "size")] {
        store.put("a", now).await.unwrap();
        let error = store.get_range(&then, 0..5).await.unwrap_err();
        assert!(matches!(&error, StoreError::Changed { what: found, .. } if *found == what), "{error}");
        let error = store.get_range(&then, 3..5).await.unwrap_err();
        assert!(matches!(error, StoreError::Changed { .. }), "{error}");
        assert_eq!(error.kind(), ErrorKind::Corrupt);
    }
    let path = store.directory().unwrap().join("a");
    std::fs::write(&path, "other").unwrap();
    let later = std::time::UNIX_EPOCH + std::time::Duration::from_secs(7);
    std::fs::File::options().write(true).open(&path).unwrap().set_modified(later).unwrap();
    let error = store.get_range(&then, 0..5).await.unwrap_err();
    assert!(error.to_string().contains("has changed: version was"), "{error}");
    assert!(!store.is_still(&then).await.unwrap());
    // Without a mark the size alone tells.
    let unmarked = FileInfo { version: None, ..then };
    assert_eq!(store.get_range(&unmarked, 0..5).await.unwrap(), "other");
    store.delete("a").await.unwrap();
    assert!(!store.is_still(&unmarked).await.unwrap());
}

#[tokio::test]
async fn a_copy_is_what_was_read() {
    let ((_home, from), to) = (on_disk(), in_memory());
    for contents in [large(), b"small".to_vec(), Vec::new()] {
        from.put("x/a b", contents.clone()).await.unwrap();
        let file = from.stat("x/a b").await.unwrap();
        let passed = AtomicU64::new(0);
        let done = |bytes| {
            passed.fetch_add(bytes, Ordering::Relaxed);
        };
        let digest = from.copy(&file, &to, &RateLimiter::new(None), done).await.unwrap();
        assert_eq!(digest, Digest::of(&contents));
        assert_eq!(passed.into_inner(), contents.len() as u64);
        assert!(to.get("x/a b").await.unwrap() == contents);
        from.put("x/a b", "another").await.unwrap();
        let error = from.copy(&file, &to, &RateLimiter::new(None), |_| ()).await.unwrap_err();
        assert!(matches!(error, StoreError::Changed { .. }), "{error}");
    }
}

#[tokio::test]
async fn a_stream_of_another_length_is_not_written() {
    let store = in_memory();
    let pieces = |count: usize| move || futures::stream::iter(vec![Ok(Bytes::from(vec![1; 6 << 20])); count]);
    for (count, size) in [(1, 5 << 20), (3, 17 << 20)] {
        let error = store.put_stream("a", size, pieces(count)).await.unwrap_err();
        assert!(matches!(error, StoreError::Damaged { .. }), "{error}");
        assert!(matches!(store.stat("a").await, Err(StoreError::NotFound { .. })));
        store.put_stream("b", (6 * count as u64) << 20, pieces(count)).await.unwrap();
        assert_eq!(store.stat("b").await.unwrap().size, (6 * count as u64) << 20);
    }
}

/// A program that was killed leaves `name#1` on a disk.
#[tokio::test]
async fn what_was_begun_is_removed_and_not_listed() {
    let (_home, store) = on_disk();
    let folder = store.folder("x");
    folder.put("a", "whole").await.unwrap();
    let place = folder.directory().unwrap();
    for left in ["a#1", "a#2", "b#1"] {
        std::fs::write(place.join(left), "half").unwrap();
    }
    assert_eq!(paths(&store.list("").await.unwrap()), [("x/a", 5)]);
    folder.remove_unfinished("a");
    let mut left: Vec<_> =
        std::fs::read_dir(place).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["a", "b#1"]);
    in_memory().remove_unfinished("a");
}
