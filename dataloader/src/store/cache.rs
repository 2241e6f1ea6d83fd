//! A folder on a local disk that keeps what was read from remote stores, up to a limit.
//!
//! An entry is one range of one version of one file, so nothing in it grows stale. Several processes may share the
//! folder: entries appear whole, by renaming, and a process that has written a sixteenth of the limit removes those that
//! were used longest ago. So the folder may exceed its limit by a sixteenth per process. An entry that does not have
//! its checksum counts as missing. Trouble with the disk costs speed, not the run.

use std::fs::{self, File};
use std::io::{self, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use bytes::Bytes;
use tempfile::NamedTempFile;

use ulmus_storage::FileInfo;

/// Bytes of the checksum before the contents.
const SUM: usize = blake3::OUT_LEN;
const SUFFIX: &str = "range";

/// The cache of one process.
#[derive(Debug)]
pub(super) struct Cache {
    folder: PathBuf,
    limit: u64,
    /// Bytes written since the last eviction.
    written: AtomicU64,
}

impl Cache {
    /// Opens a folder, which is made if it is not there, and brings it under the limit.
    pub(super) fn open(folder: &Path, limit: u64) -> io::Result<Self> {
        fs::create_dir_all(folder)?;
        let cache = Self { folder: folder.to_owned(), limit, written: AtomicU64::new(0) };
        cache.evict()?;
        Ok(cache)
    }

    /// The bytes of a range, if they are here and whole.
    pub(super) fn get(&self, url: &str, file: &FileInfo, range: &Range<u64>) -> Option<Bytes> {
        let path = self.entry(url, file, range);
        let contents = fs::read(&path).ok()?;
        let (sum, bytes) = contents.split_at_checked(SUM)?;
        if bytes.len() as u64 != range.end - range.start || sum != blake3::hash(bytes).as_bytes() {
            tracing::warn!(path = %path.display(), "an entry of the cache is damaged; it is read again");
            return None;
        }
        // If that cannot be noted, the entry is merely removed earlier.
        let _not_noted = used_now(&path);
        Some(Bytes::from(contents).slice(SUM..))
    }

    /// Keeps the bytes of a range.
    pub(super) fn put(&self, url: &str, file: &FileInfo, range: &Range<u64>, bytes: &[u8]) {
        let written = self.write(&self.entry(url, file, range), bytes);
        if let Err(error) = written {
            tracing::warn!(folder = %self.folder.display(), %error, "the cache cannot be written");
        }
    }

    fn write(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let mut entry = NamedTempFile::new_in(&self.folder)?;
        entry.write_all(blake3::hash(bytes).as_bytes())?;
        entry.write_all(bytes)?;
        entry.persist(path)?;
        let size = (SUM + bytes.len()) as u64;
        if self.written.fetch_add(size, Ordering::Relaxed) + size > self.limit / 16 {
            self.written.store(0, Ordering::Relaxed);
            self.evict()?;
        }
        Ok(())
    }

    /// Removes the entries that were used longest ago until the folder is within its limit.
    fn evict(&self) -> io::Result<()> {
        let mut entries = Vec::new();
        for entry in fs::read_dir(&self.folder)? {
            let entry = entry?;
            // Another process may have removed it in the meantime.
            let Ok(metadata) = entry.metadata() else { continue };
            if entry.path().extension().is_some_and(|suffix| suffix == SUFFIX) {
                entries.push((metadata.modified()?, metadata.len(), entry.path()));
            }
        }
        entries.sort();
        let mut size: u64 = entries.iter().map(|(_, size, _)| size).sum();
        for (_, bytes, path) in entries {
            if size <= self.limit {
                break;
            }
            let _gone_already = fs::remove_file(path);
            size -= bytes;
        }
        Ok(())
    }

    fn entry(&self, url: &str, file: &FileInfo, range: &Range<u64>) -> PathBuf {
        let FileInfo { path, size, version } = file;
        let key = format!("{url}\n{path}\n{size}\n{version:?}\n{range:?}");
        self.folder.join(format!("{}.{SUFFIX}", blake3::hash(key.as_bytes()).to_hex()))
    }
}

#[expect(clippy::disallowed_methods, reason = "the time decides nothing but which entry is removed first")]
fn used_now(path: &Path) -> io::Result<()> {
    File::options().write(true).open(path)?.set_modified(SystemTime::now())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn file(version: &str) -> FileInfo {
        FileInfo { path: "a".to_owned(), size: 9000, version: Some(version.to_owned()) }
    }

    #[test]
    fn entries_are_of_one_version_and_whole() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::open(folder.path(), 1 << 20).unwrap();
        cache.put("s3://b", &file("1"), &(0..3), b"abc");
        assert_eq!(cache.get("s3://b", &file("1"), &(0..3)).unwrap(), "abc");
        assert_eq!(cache.get("s3://b", &file("2"), &(0..3)), None);
        assert_eq!(cache.get("s3://b", &file("1"), &(0..4)), None);
        assert_eq!(cache.get("s3://c", &file("1"), &(0..3)), None);

        let entry = cache.entry("s3://b", &file("1"), &(0..3));
        let mut contents = fs::read(&entry).unwrap();
        *contents.last_mut().unwrap() ^= 1;
        fs::write(&entry, contents).unwrap();
        assert_eq!(cache.get("s3://b", &file("1"), &(0..3)), None);
        fs::write(&entry, b"short").unwrap();
        assert_eq!(cache.get("s3://b", &file("1"), &(0..3)), None);
    }

    #[test]
    fn what_was_used_longest_ago_leaves() {
        const LIMIT: u64 = 16 << 10;
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::open(folder.path(), LIMIT).unwrap();
        let range = |n: u64| n * 1000..(n + 1) * 1000;
        let age = |n: u64, seconds| {
            let entry = File::options().write(true).open(cache.entry("u", &file("1"), &range(n))).unwrap();
            let written = entry.metadata().unwrap().modified().unwrap();
            entry.set_modified(written - Duration::from_secs(seconds)).unwrap();
        };
        for n in 0..9 {
            cache.put("u", &file("1"), &range(n), &[n as u8; 1000]);
            age(n, 100 - n);
        }
        assert!(cache.get("u", &file("1"), &range(0)).is_some(), "used just now");
        for n in 9..30 {
            cache.put("u", &file("1"), &range(n), &[n as u8; 1000]);
            age(n, 80 - n);
        }
        assert!(cache.get("u", &file("1"), &range(0)).is_some());
        assert!(cache.get("u", &file("1"), &range(1)).is_none());
        assert!(cache.get("u", &file("1"), &range(29)).is_some());
        let size: u64 =
            fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().metadata().unwrap().len()).sum();
        assert!((LIMIT / 2..=LIMIT + LIMIT / 16).contains(&size), "{size}");
        // A smaller limit holds from the start.
        drop(Cache::open(folder.path(), 3000).unwrap());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
    }
}
