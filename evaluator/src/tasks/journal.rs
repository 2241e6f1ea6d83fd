//! Remembers answered requests in a file, so that an evaluation that was killed goes on where it was.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
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
}

/// The first line: whose answers these are.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Header {
    evaluator: String,
    model: Digest,
    device: String,
    dtype: String,
}

#[derive(Debug, Serialize, Deserialize)]
struct Line {
    request: Digest,
    log_likelihood: f64,
    greedy: bool,
}

impl Journal {
    /// A journal in a file. If `resume`, answers of the same model on the same kind of device are taken from it, and a last
    /// line that was not written whole is dropped; otherwise it begins anew.
    ///
    /// # Errors
    /// [`EvaluatorError::Journal`] if the file cannot be read or written, or is of another model, device or dtype.
    pub fn open(
        path: &Path,
        model: Digest,
        device: &str,
        dtype: &str,
        resume: bool,
    ) -> Result<Self, EvaluatorError> {
        let wrong = |problem: String| EvaluatorError::Journal { path: path.to_owned(), problem };
        let failed = |error| EvaluatorError::Write { path: path.to_owned(), error };
        let header = Header {
            evaluator: env!("CARGO_PKG_VERSION").to_owned(),
            model,
            device: device.to_owned(),
            dtype: dtype.to_owned(),
        };
        let mut answers = BTreeMap::new();
        if resume && path.is_file() {
            let mut lines =
                BufReader::new(File::open(path).map_err(|error| wrong(error.to_string()))?).lines();
            let first = lines.next().and_then(Result::ok).unwrap_or_default();
            let found: Header = serde_json::from_str(&first).map_err(|_| {
                wrong("its first line cannot be read; leave out --resume to begin anew".to_owned())
            })?;
            if found != header {
                return Err(wrong(format!(
                    "it is of model {} ({}, {}, evaluator {}), not of {} ({}, {}, evaluator {}); name another --output, or leave \
                     out --resume",
                    found.model.short(),
                    found.dtype,
                    found.device,
                    found.evaluator,
                    header.model.short(),
                    header.dtype,
                    header.device,
                    header.evaluator,
                )));
            }
            for line in lines.map_while(Result::ok) {
                let Ok(Line { request, log_likelihood, greedy }) = serde_json::from_str(&line) else { break };
                answers.insert(request, Likelihood { log_likelihood, greedy });
            }
        }
        // What is kept replaces the old file only when it is whole.
        let kept = answers.iter().map(|(request, answer)| line(*request, *answer)).collect::<String>();
        let header = serde_json::to_string(&header).expect("plain data is valid JSON");
        let part = path.with_extension(format!("part-{}", std::process::id()));
        std::fs::write(&part, format!("{header}\n{kept}")).map_err(failed)?;
        std::fs::rename(&part, path).map_err(failed)?;
        let file = File::options().append(true).open(path).map_err(failed)?;
        Ok(Self { answers, file: Some((path.to_owned(), file)) })
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

fn line(request: Digest, Likelihood { log_likelihood, greedy }: Likelihood) -> String {
    let line = Line { request, log_likelihood, greedy };
    serde_json::to_string(&line).expect("finite numbers are valid JSON") + "\n"
}

/// What was asked: ids, and how many of them are scored.
fn key(request: &Request) -> Digest {
    let mut words = request.ids.clone();
    words.push(request.scored as u32);
    Digest::of(bytemuck::cast_slice(&words))
}
