//! Which files a split of a data set has, by their names: those that the hub gives them, and those that the library `datasets`
//! gives them on disk.

use std::collections::{BTreeMap, BTreeSet};

/// The suffixes of files of rows, the best first.
const SUFFIXES: [&str; 8] =
    [".parquet", ".arrow", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst", ".json"];

/// The files of a split among some paths, of which only those below `root` count, in the best format that there is.
///
/// # Errors
/// Which files of the split are there in two ways, or are missing.
pub fn files_of_split(
    paths: &[String],
    root: &str,
    config: Option<&str>,
    split: &str,
) -> Result<Vec<String>, String> {
    for format in SUFFIXES {
        // By how they are named, since rows would be counted twice if two ways were read.
        let mut found: BTreeMap<Naming<'_>, BTreeMap<(usize, &str), &String>> = BTreeMap::new();
        for path in paths {
            let below = path.strip_prefix(root).and_then(|path| path.strip_suffix(format));
            if let Some((naming, shard)) = below.and_then(|path| Naming::of(path, config, split)) {
                found.entry(naming).or_default().insert((shard, path), path);
            }
        }
        let mut ways = found.into_iter();
        let Some((naming, files)) = ways.next() else { continue };
        let first =
            |files: &BTreeMap<_, &String>| files.values().next().map(ToString::to_string).unwrap_or_default();
        if let Some((_, others)) = ways.next() {
            let (one, other) = (first(&files), first(&others));
            return Err(format!("both {one} and {other} look like split {split}; leave one of them there"));
        }
        if let Some(shards) = naming.shards {
            let there: BTreeSet<usize> = files.keys().map(|(shard, _)| *shard).collect();
            let beside = first(&files);
            if let Some(missing) = (0..shards).find(|shard| !there.contains(shard)) {
                return Err(format!(
                    "shard {missing:05} of {shards:05} is missing beside {beside}; get it again"
                ));
            }
            if files.len() != shards {
                return Err(format!(
                    "there are {} files of {shards} beside {beside}; get all again",
                    files.len()
                ));
            }
        }
        return Ok(files.into_values().cloned().collect());
    }
    Ok(Vec::new())
}

/// How the files of a split are named below a data set's folder: `[data/][CONFIG/][data/]` and then `SPLIT`, `SPLIT/*`,
/// `SPLIT.*`, `SPLIT-0*` or `SPLIT-00000-of-00002*`.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Naming<'a> {
    folder: &'a str,
    separator: Option<char>,
    /// How many files there must be.
    shards: Option<usize>,
}

impl<'a> Naming<'a> {
    /// How a file is named, if it is of the split, and which shard it is. `path` has no suffix.
    fn of(path: &'a str, config: Option<&str>, split: &str) -> Option<(Self, usize)> {
        let inner = path.strip_prefix("data/").unwrap_or(path);
        let name = match config {
            Some(config) => inner.strip_prefix(config)?.strip_prefix('/')?,
            None => inner.strip_prefix("default/").unwrap_or(inner),
        };
        let name = name.strip_prefix("data/").unwrap_or(name);
        let folder = &path[..path.len() - name.len()];
        let rest = name.strip_prefix(split)?;
        let separator = rest.chars().next();
        let numbers = rest.get(1..).unwrap_or_default();
        let is_of_split = match separator {
            None => true,
            Some('/' | '.') => !numbers.contains('/'),
            Some('-' | '_') => {
                numbers.starts_with(|first: char| first.is_ascii_digit()) && !numbers.contains('/')
            }
            Some(_) => false,
        };
        let shard = numbers.split_once("-of-").and_then(|(number, count)| {
            // Some writers add a hash.
            let count = count.split('-').next().unwrap_or_default();
            Some((number.parse().ok()?, count.parse().ok()?))
        });
        let (number, shards) = shard.map_or((0, None), |(number, shards)| (number, Some(shards)));
        is_of_split.then_some((Self { folder, separator, shards }, number))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_a_split_have_the_hub_s_names() {
        let all = |config: Option<&str>, path: &str| {
            path.strip_suffix(".parquet").is_some_and(|path| Naming::of(path, config, "test").is_some())
        };
        for path in [
            "test-00000-of-00001.parquet",
            "data/test-0.parquet",
            "test.parquet",
            "test/0000.parquet",
            "default/test-0.parquet",
        ] {
            assert!(all(None, path), "{path}");
        }
        for path in ["x/test-0.parquet", "x/test/0.parquet", "data/x/test.parquet", "x/data/test-0.parquet"] {
            assert!(all(Some("x"), path) && !all(None, path), "{path}");
        }
        for path in ["tests.parquet", "test-0.jsonl", "test/a/0.parquet", "train-test.parquet"] {
            assert!(!all(None, path), "{path}");
        }
    }

    #[test]
    fn files_of_one_naming_are_read_and_all_of_them() {
        let files = |paths: &[&str]| {
            let paths: Vec<String> = paths.iter().map(|path| format!("own/{path}")).collect();
            files_of_split(&paths, "own/", None, "test").map(|files| files.len())
        };
        assert_eq!(
            files(&["test-00000-of-00002.parquet", "test-00001-of-00002.parquet", "test.jsonl"]),
            Ok(2)
        );
        assert_eq!(
            files(&["test-00000-of-00001.parquet", "test_unlabelled.parquet", "test-a.parquet"]),
            Ok(1)
        );
        assert_eq!(files(&["test-00000-of-00001-5ab3.parquet"]), Ok(1));
        let twice = files(&["test-00000-of-00001-5ab3.parquet", "test-00000-of-00001-6bc4.parquet"]);
        assert!(twice.unwrap_err().starts_with("there are 2 files of 1"));
        assert_eq!(files(&["train.parquet"]), Ok(0));
        for twice in ["test.parquet", "data/test-00000-of-00001.parquet", "test-00001-of-00002.parquet"] {
            let error = files(&["test-00000-of-00001.parquet", twice]).unwrap_err();
            assert!(error.contains(twice) && error.contains("look like split test"), "{error}");
        }
        for missing in [
            &["test-00000-of-00003.parquet", "test-00002-of-00003.parquet"][..],
            &["test-00000-of-00002-5ab3.parquet"],
        ] {
            let error = files(missing).unwrap_err();
            assert!(error.starts_with("shard 00001 of 0000"), "{error}");
        }
    }
}
