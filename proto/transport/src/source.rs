//! Where a token comes from.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use crate::runtime::{RuntimeError, published};
use crate::token::{JoinToken, MalformedToken};

/// What to do about a token that is not there, for every message of the kind.
const ADVICE: &str =
    "pass the coordinator's join.token with --token-file FILE, or what it says in ULMUS_TOKEN";

/// Where a program was told to find its token.
#[derive(Debug, Clone, Default)]
pub enum TokenSource {
    /// In this file.
    File(PathBuf),
    /// This is it.
    Text(String),
    /// It was told nothing: a coordinator makes one, and a worker looks into the user's runtime folder.
    #[default]
    Unsaid,
}

/// Why a worker has no token.
#[derive(Debug, thiserror::Error)]
pub enum LookupError {
    /// Nobody gave it one.
    #[error(
        "no join token: neither --token-file, ULMUS_TOKEN_FILE nor ULMUS_TOKEN is given, and {0}; {ADVICE}"
    )]
    None(String),
    /// The file that was named is not there.
    #[error("no join token: {0} does not exist; {ADVICE}")]
    Missing(PathBuf),
    /// The file that was named cannot be read.
    #[error("no join token: {0}: {1}; {ADVICE}")]
    Unreadable(PathBuf, io::Error),
    /// What was found is no token.
    #[error("{0} holds no join token: {1}")]
    Malformed(String, MalformedToken),
}

/// A token, and where it was found, for people.
#[derive(Debug, Clone)]
pub(crate) struct Found {
    pub(crate) token: JoinToken,
    pub(crate) origin: String,
}

impl TokenSource {
    /// What a program was told by its command line and, if that says nothing, by the variable `ULMUS_TOKEN`. The
    /// token itself is no argument: everybody on a machine can read those.
    pub fn told(file: Option<PathBuf>) -> Self {
        let text = || std::env::var("ULMUS_TOKEN").ok().filter(|text| !text.trim().is_empty());
        match file.filter(|file| !file.as_os_str().is_empty()) {
            Some(file) => Self::File(file),
            None => text().map_or(Self::Unsaid, Self::Text),
        }
    }

    /// What can be found without knowing where the coordinator is.
    pub(crate) fn look_up(&self) -> Result<Option<Found>, LookupError> {
        match self {
            Self::Unsaid => Ok(None),
            Self::Text(text) => found(text, "ULMUS_TOKEN".to_owned()).map(Some),
            Self::File(path) => match read_token(path) {
                Ok(text) => found(&text, path.display().to_string()).map(Some),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    Err(LookupError::Missing(path.clone()))
                }
                Err(error) => Err(LookupError::Unreadable(path.clone(), error)),
            },
        }
    }
}

/// Looks into the runtime folder for the token of the coordinator at `port` of this machine, if it is this machine.
pub(crate) fn in_runtime_folder(port: u16, is_here: bool) -> Result<Found, LookupError> {
    if !is_here {
        return Err(LookupError::None("the coordinator is on another machine".to_owned()));
    }
    match published(port) {
        (path, Ok(Some(text))) => found(&text, path.display().to_string()),
        (path, Ok(None)) => Err(LookupError::None(format!("{} does not exist", path.display()))),
        (_, Err(RuntimeError::NotPrivate(folder))) => {
            let folder = folder.display();
            Err(LookupError::None(format!("{folder} is not a folder that you alone can use")))
        }
        (_, Err(error)) => Err(LookupError::None(error.to_string())),
    }
}

fn found(text: &str, origin: String) -> Result<Found, LookupError> {
    match text.parse() {
        Ok(token) => Ok(Found { token, origin }),
        Err(error) => Err(LookupError::Malformed(origin, error)),
    }
}
/// Most bytes of a file that may hold a token, with all that people write around one.
const LONGEST: u64 = 64 << 10;

/// The text of a file that should hold a token, and not that of a device without an end.
pub(crate) fn read_token(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    let read = File::open(path)?.take(LONGEST + 1).read_to_string(&mut text)? as u64;
    if read > LONGEST {
        let reason = format!("it has more than {LONGEST} bytes, and a token about a hundred");
        return Err(io::Error::new(io::ErrorKind::InvalidData, reason));
    }
    Ok(text)
}
