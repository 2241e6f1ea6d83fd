//! Where a token comes from.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use crate::runtime::{RuntimeError, published};
use crate::token::{JoinToken, MalformedToken};

/// What to do about a missing token.
const ADVICE: &str =
    "pass the coordinator's join.token with --token-file FILE, or its content in ULMUS_TOKEN";

/// Where a program finds its token.
#[derive(Debug, Clone, Default)]
pub enum TokenSource {
    /// In this file.
    File(PathBuf),
    /// This is the token.
    Text(String),
    /// Nothing was specified: a coordinator makes a token, and a worker looks into the user's runtime folder.
    #[default]
    Unspecified,
}

/// Why a worker has no token.
#[derive(Debug, thiserror::Error)]
pub enum LookupError {
    /// It was given none, and found none.
    #[error(
        "no join token: neither --token-file, ULMUS_TOKEN_FILE nor ULMUS_TOKEN is given, and {0}; {ADVICE}"
    )]
    None(String),
    /// The given file does not exist.
    #[error("no join token: {0} does not exist; {ADVICE}")]
    Missing(PathBuf),
    /// The given file cannot be read.
    #[error("no join token: {0}: {1}; {ADVICE}")]
    Unreadable(PathBuf, io::Error),
    /// What was found is not a token.
    #[error("{0} does not hold a join token: {1}")]
    Malformed(String, MalformedToken),
}

/// A token, and where it was found, for messages.
#[derive(Debug, Clone)]
pub(crate) struct Found {
    pub(crate) token: JoinToken,
    pub(crate) origin: String,
}

impl TokenSource {
    /// The source given by a command line or, if that gives none, by the variable `ULMUS_TOKEN`. The token itself is
    /// never an argument, because all users of a machine can read arguments.
    pub fn given(file: Option<PathBuf>) -> Self {
        let text = || std::env::var("ULMUS_TOKEN").ok().filter(|text| !text.trim().is_empty());
        match file.filter(|file| !file.as_os_str().is_empty()) {
            Some(file) => Self::File(file),
            None => text().map_or(Self::Unspecified, Self::Text),
        }
    }

    /// The token, if it can be found without knowing where the coordinator is.
    pub(crate) fn look_up(&self) -> Result<Option<Found>, LookupError> {
        match self {
            Self::Unspecified => Ok(None),
            Self::Text(text) => parse(text, "ULMUS_TOKEN".to_owned()).map(Some),
            Self::File(path) => match read_token(path) {
                Ok(text) => parse(&text, path.display().to_string()).map(Some),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    Err(LookupError::Missing(path.clone()))
                }
                Err(error) => Err(LookupError::Unreadable(path.clone(), error)),
            },
        }
    }
}

/// Looks in the runtime folder for the token of the coordinator at `port`, provided it runs on this machine.
pub(crate) fn in_runtime_folder(port: u16, is_here: bool) -> Result<Found, LookupError> {
    if !is_here {
        return Err(LookupError::None("the coordinator is on another machine".to_owned()));
    }
    match published(port) {
        (path, Ok(Some(text))) => parse(&text, path.display().to_string()),
        (path, Ok(None)) => Err(LookupError::None(format!("{} does not exist", path.display()))),
        (_, Err(RuntimeError::NotPrivate(folder))) => {
            let folder = folder.display();
            Err(LookupError::None(format!("{folder} is not a folder that only you can use")))
        }
        (_, Err(error)) => Err(LookupError::None(error.to_string())),
    }
}

fn parse(text: &str, origin: String) -> Result<Found, LookupError> {
    match text.parse() {
        Ok(token) => Ok(Found { token, origin }),
        Err(error) => Err(LookupError::Malformed(origin, error)),
    }
}

/// Maximum size of a token file, in bytes. It allows for white space around the token, but not for an endless device.
const FILE_LIMIT: u64 = 64 << 10;

/// The text of a file that should hold a token.
pub(crate) fn read_token(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    let read = File::open(path)?.take(FILE_LIMIT + 1).read_to_string(&mut text)? as u64;
    if read > FILE_LIMIT {
        let reason = format!("it has more than {FILE_LIMIT} bytes, and a token has about a hundred");
        return Err(io::Error::new(io::ErrorKind::InvalidData, reason));
    }
    Ok(text)
}
