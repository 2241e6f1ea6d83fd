//! File patterns as in shells and `rsync`: `*` stays within a folder, `**` does not, and hidden files and folders match
//! only a pattern that spells out the dot.

use globset::{GlobBuilder, GlobMatcher};

use crate::error::DataError;

/// A pattern for paths below a folder.
#[derive(Debug, Clone)]
pub(crate) struct FileGlob {
    whole: GlobMatcher,
    /// A matcher for each part of the pattern that begins with a dot, and `None` for the others.
    dotted: Vec<Option<GlobMatcher>>,
    /// Whether the pattern contains `**`, so that it reaches into folders that it does not name.
    is_deep: bool,
}

impl FileGlob {
    pub(crate) fn new(pattern: &str) -> Result<Self, DataError> {
        let pattern = pattern.trim_start_matches("./");
        let compile = |part: &str| {
            let glob = GlobBuilder::new(part).literal_separator(true).build();
            glob.map(|glob| glob.compile_matcher()).map_err(|error| DataError::Pattern {
                pattern: pattern.to_owned(),
                reason: error.kind().to_string(),
            })
        };
        let dotted = pattern.split('/').map(|part| is_hidden(part).then(|| compile(part)).transpose());
        Ok(Self {
            whole: compile(pattern)?,
            dotted: dotted.collect::<Result<_, _>>()?,
            is_deep: pattern.contains("**"),
        })
    }

    /// Whether the pattern matches a path, hidden or not.
    pub(crate) fn fits(&self, path: &str) -> bool {
        self.whole.is_match(path)
    }

    /// Whether the pattern matches a path, and spells out the dot of each hidden part.
    pub(crate) fn matches(&self, path: &str) -> bool {
        // Without `**`, each part of the pattern matches one part of the path.
        let names = |(at, part): (usize, &str)| {
            let named = if self.is_deep { &self.dotted[..] } else { &self.dotted[at..=at] };
            !is_hidden(part) || named.iter().flatten().any(|dotted| dotted.is_match(part))
        };
        self.fits(path) && path.split('/').enumerate().all(names)
    }

    /// Whether the pattern spells out the dot of any hidden part.
    pub(crate) fn names_hidden(&self) -> bool {
        self.dotted.iter().any(Option::is_some)
    }

    /// Whether the pattern reaches into folders that it does not name.
    pub(crate) const fn is_deep(&self) -> bool {
        self.is_deep
    }
}

/// Whether a part of a path is hidden.
fn is_hidden(part: &str) -> bool {
    part.starts_with('.')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hidden_files_match_only_with_their_dot() {
        for (pattern, path, expected) in [
            ("*.jsonl", "a.jsonl", true),
            ("*.jsonl", "._a.jsonl", false),
            ("*.jsonl", "x/a.jsonl", false),
            ("**/*.jsonl", "a.jsonl", true),
            ("**/*.jsonl", ".ipynb_checkpoints/a.jsonl", false),
            ("**/*.jsonl", "x/.y/a.jsonl", false),
            ("**/*", ".shards.json", false),
            (".*/*.jsonl", ".x/a.jsonl", true),
            (".*/*.jsonl", ".x/.a.jsonl", false),
            ("**/.x/*", "a/.x/b", true),
            ("._*.jsonl", "._a.jsonl", true),
            ("[.]a", ".a", false),
            ("./x/*.md", "x/a.md", true),
        ] {
            assert_eq!(FileGlob::new(pattern).unwrap().matches(path), expected, "{pattern} {path}");
        }
    }
}
