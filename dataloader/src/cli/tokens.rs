//! `encode`, `decode` and `normalize`: filters from standard input to standard output.

use std::io::{self, BufRead, BufWriter, Write};
use std::path::{Path, PathBuf};

use clap::Args;
use serde::de::{DeserializeOwned, IntoDeserializer, value};
use serde::{Deserialize, Serialize};
use ulmus_dataloader::{normalized, without_lone_surrogates};
use ulmus_plan::{Plan, TokenizerConfig};
use ulmus_process::{Failure, finish_output};
use ulmus_tokenizer::Tokenizer;
use ulmus_types::without_mark;
use ulmus_types::{ErrorKind, ExitStatus};

/// Arguments that name a tokenizer.
#[derive(Debug, Args)]
pub(crate) struct TokenizerFile {
    /// A SentencePiece `tokenizer.model` or a Hugging Face `tokenizer.json`.
    #[arg(long, value_name = "FILE")]
    tokenizer: PathBuf,
    /// Name of the token that begins documents, if the file does not name it.
    #[arg(long, value_name = "NAME", allow_hyphen_values = true)]
    bos: Option<String>,
    /// Name of the token that ends documents, if the file does not name it.
    #[arg(long, value_name = "NAME", allow_hyphen_values = true)]
    eos: Option<String>,
}

impl TokenizerFile {
    fn open(&self) -> Result<Tokenizer, Failure> {
        open(&self.tokenizer, self.bos.as_deref(), self.eos.as_deref())
    }
}

#[derive(Debug, Args)]
pub(crate) struct Encode {
    #[command(flatten)]
    tokenizer: TokenizerFile,
    /// Leave out the token that begins a document.
    #[arg(long)]
    no_bos: bool,
    /// Leave out the token that ends a document.
    #[arg(long)]
    no_eos: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Decode {
    #[command(flatten)]
    tokenizer: TokenizerFile,
}

impl Encode {
    pub(super) fn run(&self) -> Result<(), Failure> {
        let tokenizer = self.tokenizer.open()?;
        let bos = (!self.no_bos).then(|| tokenizer.bos());
        let eos = (!self.no_eos).then(|| tokenizer.eos());
        let mut encoder = tokenizer.encoder();
        let mut ids = Vec::new();
        filter("a JSON string", |text: String, out: &mut dyn Write| {
            ids.clear();
            ids.extend(bos);
            encoder.encode(&text, &mut ids);
            ids.extend(eos);
            Ok(write_json(out, &ids)?)
        })
    }
}

impl Decode {
    pub(super) fn run(&self) -> Result<(), Failure> {
        let tokenizer = self.tokenizer.open()?;
        let pieces = tokenizer.pieces();
        filter("a JSON list of token ids", |ids: Vec<u32>, out: &mut dyn Write| {
            match ids.iter().find(|id| !tokenizer.has(**id)) {
                Some(id) => Err(Answer::Wrong(format!(
                    "token {id} does not exist: the tokenizer has {pieces} pieces"
                ))),
                None => Ok(write_json(out, &tokenizer.decode(&ids))?),
            }
        })
    }
}

#[derive(Debug, Args)]
pub(crate) struct Normalize {
    /// The normalisation: nfc, ftfy or none, as for data.normalize in a plan.
    #[arg(long = "as", value_name = "NAME")]
    form: String,
}

impl Normalize {
    pub(super) fn run(&self) -> Result<(), Failure> {
        let form = self.form.as_str().into_deserializer();
        let form = ulmus_plan::Normalize::deserialize(form)
            .map_err(|error: value::Error| Failure::new(ExitStatus::InvalidInput, format!("--as {error}")))?;
        filter("a JSON string", |text: String, out: &mut dyn Write| {
            Ok(write_json(out, &normalized(&text, form))?)
        })
    }
}

/// The tokenizer in `file`, or else the one that the plan names.
pub(super) fn of_plan(plan: &Plan, file: Option<&Path>) -> Result<Tokenizer, Failure> {
    let TokenizerConfig { file: of_plan, bos, eos, .. } = &plan.tokenizer;
    let file = file.or_else(|| of_plan.as_deref().map(Path::new)).ok_or_else(|| {
        let message =
            "the plan has no tokenizer.file; give --tokenizer with a tokenizer.model or tokenizer.json";
        Failure::new(ExitStatus::InvalidInput, message.to_owned())
    })?;
    open(file, bos.as_deref(), eos.as_deref())
}

/// Reads a tokenizer, with the names of BOS and EOS if its file does not name them.
pub(super) fn open(path: &Path, bos: Option<&str>, eos: Option<&str>) -> Result<Tokenizer, Failure> {
    let name = path.display().to_string();
    let bytes = std::fs::read(path).map_err(|error| {
        Failure::new(
            ExitStatus::InvalidInput,
            format!("{name} cannot be read: {error}; give a tokenizer.model or tokenizer.json"),
        )
    })?;
    Tokenizer::read(&bytes, &name, bos, eos).map_err(|error| super::failure(&error.into()))
}

/// Why a line cannot be answered.
enum Answer {
    /// The line is wrong, for this reason.
    Wrong(String),
    Output(io::Error),
}

impl From<io::Error> for Answer {
    fn from(error: io::Error) -> Self {
        Self::Output(error)
    }
}

/// Calls `answer` for each line of input, to write a line of output.
fn filter<T: DeserializeOwned>(
    expected: &str,
    mut answer: impl FnMut(T, &mut dyn Write) -> Result<(), Answer>,
) -> Result<(), Failure> {
    let mut input = io::stdin().lock();
    let mut out = BufWriter::new(io::stdout().lock());
    let mut line = Vec::new();
    for number in 1_u64.. {
        line.clear();
        let read = input.read_until(b'\n', &mut line);
        if read.map_err(|error| Failure::of(ErrorKind::Internal, &error))? == 0 {
            break;
        }
        let wrong = |reason: String| {
            let message = format!("line {number} of the input is not {expected}: {reason}");
            Failure::new(ExitStatus::InvalidInput, message)
        };
        // Some editors write a byte order mark at the beginning of a file.
        let line = if number == 1 { without_mark(&line) } else { &line };
        let value = serde_json::from_slice(line).or_else(|error| {
            // Lone surrogates are replaced, as when a source is read.
            let mended = without_lone_surrogates(line).ok_or(error)?;
            serde_json::from_slice(&mended)
        });
        let value = value.map_err(|error| wrong(error.to_string()))?;
        match answer(value, &mut out) {
            Ok(()) => (),
            Err(Answer::Wrong(reason)) => return Err(wrong(reason)),
            Err(Answer::Output(error)) => return finish_output(Err(error)),
        }
    }
    finish_output(out.flush())
}

fn write_json(out: &mut dyn Write, value: &impl Serialize) -> io::Result<()> {
    serde_json::to_writer(&mut *out, value)?;
    out.write_all(b"\n")
}
