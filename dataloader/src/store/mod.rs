//! The folders of corpora, on top of the storage client: behind a path, `file://`, an object store (`s3://`, `gs://`, `az://`),
//! a dataset on the Hugging Face hub (`hf://datasets/`), a web server (`http(s)://`), or `run:` for the run's own folder.
//!
//! What is added to the client is what only corpora need: names and patterns of files that people have made, a cache on disk,
//! ranges that are read ahead, and the hub. Requests, retries and errors are the client's (`ulmus_storage`).
//!
//! Calls block, and are for plain threads: they must not be made from async code. The I/O itself runs on one
//! small runtime for the whole process, so that pooled connections live as long as the process does.
//!
//! Web servers have no listing: files below `http(s)://` are named, counted by a pattern with `{:05}`, or listed
//! elsewhere (`list` of a source).

mod cache;
mod folder;
#[cfg(feature = "http")]
mod hub;
mod list;
mod open;
mod read;
mod runtime;
mod steps;

pub use self::folder::{Folder, Traffic};
pub use self::list::files_below;
pub(crate) use self::list::of_walk;
pub(crate) use self::open::Stores;
pub(crate) use self::runtime::wait_for;
pub(crate) use self::steps::Steps;

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::Arc;

    use object_store::memory::InMemory;
    use object_store::path::Path;
    use ulmus_plan::DataConfig;
    use ulmus_storage::{FileInfo, Store};

    use super::*;
    use crate::error::DataError;

    /// An empty folder in memory.
    pub(crate) fn memory() -> Folder {
        Folder::of_run(Store::from_objects(Arc::new(InMemory::new()), Path::default(), "memory"))
    }

    /// What the folder knows of one file.
    pub(crate) fn stat(folder: &Folder, path: &str) -> FileInfo {
        folder.stat(vec![path.to_owned()]).unwrap().remove(0)
    }

    #[test]
    fn local_files_are_listed_read_and_watched() {
        let place = tempfile::tempdir().unwrap();
        std::fs::create_dir(place.path().join("b")).unwrap();
        std::fs::write(place.path().join("b/two words.txt"), "two").unwrap();
        std::fs::write(place.path().join("a.txt"), "one").unwrap();
        let stores = Stores::new(&DataConfig::default(), None).unwrap();
        let folder = stores.open(place.path().to_str().unwrap()).unwrap();
        let files = folder.list().unwrap();
        assert_eq!(
            files.iter().map(|file| file.path.as_str()).collect::<Vec<_>>(),
            ["a.txt", "b/two words.txt"]
        );
        assert_eq!(folder.read_all(&files[1]).unwrap(), "two");
        assert_eq!(folder.read_range(&files[0], 1..3).unwrap(), "ne");

        std::fs::write(place.path().join("a.txt"), "longer").unwrap();
        let message = folder.read_all(&files[0]).unwrap_err().to_string();
        assert!(message.contains("a.txt has changed since the run began: size was 3, now 6"), "{message}");
        std::fs::remove_file(place.path().join("a.txt")).unwrap();
        assert!(matches!(folder.read_all(&files[0]), Err(DataError::Missing { .. })));
    }

    #[test]
    fn addresses_that_lead_nowhere_are_refused() {
        let stores = Stores::new(&DataConfig::default(), None).unwrap();
        for (url, word) in [
            ("/no/such/folder", "not a folder on this machine"),
            ("ftp://host/x", "ftp:// is not known"),
            ("run:shards", "no run folder"),
        ] {
            let message = stores.open(url).unwrap_err().to_string();
            assert!(message.contains(word) && message.contains(url), "{message}");
        }
    }

    #[test]
    fn a_run_folder_has_folders() {
        let run = memory();
        let stores = Stores::new(&DataConfig::default(), Some(&run)).unwrap();
        let shards = stores.open("run:shards").unwrap();
        shards.write("a.txt", b"x".to_vec()).unwrap();
        assert_eq!(run.list().unwrap()[0].path, "shards/a.txt");
        assert_eq!(shards.list().unwrap()[0], FileInfo { path: "a.txt".to_owned(), size: 1, version: None });
        assert_eq!(shards.place("a.txt"), "run:shards/a.txt");
    }
}
