//! Remembers answered requests in a file, so that an evaluation that was killed goes on where it was.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File, TryLockError};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use ulmus_types::Digest;

use super::scorer::Likelihood;
use super::tokens::Request;
use crate::error::EvaluatorError;

/// Answered requests, by what was asked.
#[derive(Debug, Default)]
pub struct Journal {
    answers: BTreeMap<Digest, Likelihood>,
    file: Option<(PathBuf, File)>,
    kept: Option<PathBuf>,
}

/// The version of the file.
const FORMAT_VERSION: u32 = 2;

/// The first line: whose answers these are.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Header {
    format_version: u32,
    evaluator: String,
    model: Digest,
    device: String,
    dtype: String,
}

impl Header {
    fn new(model: Digest, device: &str, dtype: &str) -> Self {
        let evaluator = env!("CARGO_PKG_VERSION").to_owned();
        Self {
            format_version: FORMAT_VERSION,
            evaluator,
            model,
            device: device.to_owned(),
            dtype: dtype.to_owned(),
        }
    }

    /// Whether a file of these bytes may be a journal whose first line was not written whole.
    fn begins_like(&self, bytes: &[u8]) -> bool {
        serde_json::to_vec(self).is_ok_and(|whole| whole.starts_with(bytes))
    }
}

impl fmt::Display for Header {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { evaluator, model, device, dtype, .. } = self;
        write!(f, "model {} ({dtype}, {device}, evaluator {evaluator})", model.short())
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct Line {
    request: Digest,
    log_likelihood: f64,
    greedy: bool,
    /// Of the other fields, so that a damaged line is no other answer.
    checksum: String,
}

impl Line {
    fn new(request: Digest, Likelihood { log_likelihood, greedy }: Likelihood) -> Self {
        let mut bytes = request.to_string().into_bytes();
        bytes.extend(log_likelihood.to_le_bytes());
        bytes.push(u8::from(greedy));
        Self { request, log_likelihood, greedy, checksum: Digest::of(&bytes).short() }
    }

    fn read(text: &str) -> Option<(Digest, Likelihood)> {
        let Self { request, log_likelihood, greedy, checksum } = serde_json::from_str(text).ok()?;
        let likelihood = Likelihood { log_likelihood, greedy };
        (Self::new(request, likelihood).checksum == checksum).then_some((request, likelihood))
    }
}

impl Journal {
    /// A journal in a file. If `resume`, answers of the same model on the same kind of device are taken from it, and a last
    /// line that was not written whole is dropped; otherwise it begins anew, and answers that are there go to a file of the same
    /// name with `.old-1`, `.old-2`, …
    ///
    /// # Errors
    /// [`EvaluatorError::Journal`] if another process writes there, or the file is no journal, or of another model, device,
    /// dtype or version; [`EvaluatorError::DamagedJournal`]; [`EvaluatorError::Write`].
    pub fn open(
        path: &Path,
        model: Digest,
        device: &str,
        dtype: &str,
        resume: bool,
    ) -> Result<Self, EvaluatorError> {
        let wrong = |problem: String| EvaluatorError::Journal { path: path.to_owned(), problem };
        let failed = |error| EvaluatorError::Write { path: path.to_owned(), error };
        let header = Header::new(model, device, dtype);
        let mut file = File::options().read(true).append(true).create(true).open(path).map_err(failed)?;
        // The lock ends with the process, however that ends.
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(wrong("another evaluator writes there; name another --output".to_owned()));
            }
            Err(TryLockError::Error(error)) => return Err(failed(error)),
        }
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(failed)?;
        // What was being written when the program ended has no end of line.
        let whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
        let text = String::from_utf8_lossy(&bytes[..whole]);
        let mut lines = text.lines();
        let found = lines.next().map(serde_json::from_str::<Header>);
        if !bytes.is_empty() && !matches!(found, Some(Ok(_))) && !header.begins_like(&bytes) {
            return Err(wrong(
                "it is no journal of an evaluation by this version; name another --output, or remove it"
                    .to_owned(),
            ));
        }
        // It may be all that is left of days of work.
        let kept = (!resume && lines.clone().next().is_some()).then(|| unused(path));
        if let Some(kept) = &kept {
            let copy = || fs::copy(path, kept).and_then(|_| File::open(kept)?.sync_all());
            copy().map_err(|error| EvaluatorError::Write { path: kept.clone(), error })?;
        }
        let Some(Ok(found)) = found.filter(|_| resume) else {
            file.set_len(0).map_err(failed)?;
            let first = serde_json::to_string(&header).expect("plain data is valid JSON") + "\n";
            file.write_all(first.as_bytes()).map_err(failed)?;
            return Ok(Self { answers: BTreeMap::new(), file: Some((path.to_owned(), file)), kept });
        };
        if found != header {
            return Err(wrong(format!(
                "it is of {found}, not of {header}; name another --output, or leave out --resume"
            )));
        }
        let answer = |(index, line)| {
            let path = path.to_owned();
            Line::read(line).ok_or(EvaluatorError::DamagedJournal { path, line: index + 2 })
        };
        let answers = lines.enumerate().map(answer).collect::<Result<_, EvaluatorError>>()?;
        file.set_len(whole as u64).map_err(failed)?;
        Ok(Self { answers, file: Some((path.to_owned(), file)), kept })
    }

    /// Reads the answers of a part of an evaluation of this model on this kind of device.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn read(&mut self, text: &str, model: Digest, device: &str, dtype: &str) -> Result<(), String> {
        let mut lines = text.lines();
        let found: Header =
            serde_json::from_str(lines.next().unwrap_or_default()).map_err(|error| error.to_string())?;
        let header = Header::new(model, device, dtype);
        if found != header {
            return Err(format!("it is of {found}, not of {header}"));
        }
        let answer = |(index, line)| Line::read(line).ok_or_else(|| format!("line {} is damaged", index + 2));
        // All of them, or none of a file that was cut off.
        self.answers.extend(lines.enumerate().map(answer).collect::<Result<Vec<_>, _>>()?);
        Ok(())
    }

    /// Where the answers of an earlier evaluation are kept that this one did not resume.
    pub fn kept(&self) -> Option<&Path> {
        self.kept.as_deref()
    }

    /// Whether no answer is known.
    pub fn is_empty(&self) -> bool {
        self.answers.is_empty()
    }

    /// The answer to a request, if it is known.
    pub(crate) fn get(&self, request: &Request) -> Option<Likelihood> {
        if self.answers.is_empty() { None } else { self.answers.get(&key(request)).copied() }
    }

    /// Remembers answers.
    pub(crate) fn add<'a>(
        &mut self,
        answers: impl Iterator<Item = (&'a Request, Likelihood)>,
    ) -> Result<(), EvaluatorError> {
        let Some((path, file)) = &mut self.file else { return Ok(()) };
        let lines: String = answers.map(|(request, answer)| line(key(request), answer)).collect();
        file.write_all(lines.as_bytes()).map_err(|error| EvaluatorError::Write { path: path.clone(), error })
    }
}

/// The name of a file beside a journal that is not there yet.
fn unused(path: &Path) -> PathBuf {
    let mut names = (1_u32..).map(|number| path.with_extension(format!("journal.old-{number}")));
    names.find(|path| !path.exists()).unwrap_or_default()
}

fn line(request: Digest, likelihood: Likelihood) -> String {
    serde_json::to_string(&Line::new(request, likelihood)).expect("finite numbers are valid JSON") + "\n"
}

/// What was asked: ids, and how many of them are scored.
fn key(request: &Request) -> Digest {
    let mut words = request.ids.clone();
    words.push(request.scored as u32);
    Digest::of(bytemuck::cast_slice(&words))
}
