//! `examples`: what a tuning stage learns from each row.

use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use clap::Args;
use ulmus_chat::{Preprocessor, Rules, TokenizerConfig};
use ulmus_dataloader::{ExampleFiles, Folder, RowLine, read_forbidden, read_template};
use ulmus_plan::Plan;
use ulmus_process::{Failure, finish_output};
use ulmus_run::paths;
use ulmus_tokenizer::Tokenizer;

use super::run::{Run, read};
use super::{failure, unreadable, wrong};

/// Number of rows that are shown if not all are.
const SHOWN: usize = 3;
/// What a tokenizer says about itself.
const CONFIG: &str = "tokenizer_config.json";

#[derive(Debug, Args)]
pub(crate) struct Examples {
    /// Plan with the stage.
    #[arg(long, value_name = "FILE")]
    plan: PathBuf,
    /// Name of the tuning stage.
    #[arg(long, value_name = "NAME")]
    stage: String,
    /// Override a key of the plan.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    overrides: Vec<String>,
    /// Show all rows, also those that are left out, instead of the first three that are kept.
    #[arg(long)]
    all: bool,
}

impl Examples {
    pub(super) fn run(&self) -> Result<(), Failure> {
        let plan = super::load(&self.plan, &self.overrides)?;
        let config = plan.tune.iter().find(|config| config.name == self.stage).ok_or_else(|| {
            let names: Vec<&str> = plan.tune.iter().map(|config| config.name.as_str()).collect();
            wrong(format!("the plan has no tuning stage {:?}; use one of {names:?}", self.stage))
        })?;
        let run = Run::find(&plan)?;
        let (tokenizer, beside) = tokenizer(&plan, &run)?;
        // Training knows no time, so that what is learned does not depend on the day.
        let chat = read_template(&config.template, &beside, &tokenizer, Some(SystemTime::UNIX_EPOCH))
            .map_err(|error| failure(&error))?;
        let forbidden = config.decontaminate.as_deref().map(read_forbidden).transpose();
        let forbidden = forbidden.map_err(|error| failure(&error))?;
        let preprocessor =
            Preprocessor::new(Rules::from(config), chat.template, &tokenizer, chat.adds_bos, forbidden);
        let files =
            ExampleFiles::find(&config.data, &plan.data, run.folder()).map_err(|error| failure(&error))?;
        let mut out = BufWriter::new(io::stdout().lock());
        let mut written = Ok(());
        let mut kept = 0;
        let read = files.each_row(&preprocessor, |outcome| {
            let line = RowLine::from(&outcome);
            kept += usize::from(line.kept);
            if written.is_ok() && (self.all || line.kept && kept <= SHOWN) {
                written = serde_json::to_writer(&mut out, &line)
                    .map_err(io::Error::from)
                    .and_then(|()| out.write_all(b"\n"));
            }
        });
        finish_output(written.and_then(|()| out.flush()))?;
        read.map(drop).map_err(|error| failure(&error))
    }
}

/// The tokenizer of a plan, and the folder with what belongs to it: that of the run if it has one already, the file that the plan
/// names, or that of its base.
fn tokenizer(plan: &Plan, run: &Run) -> Result<(Tokenizer, Folder), Failure> {
    let in_run = [paths::TOKENIZER_MODEL, paths::TOKENIZER_JSON].map(|name| read(run.folder(), name));
    if let (Some(folder), [Ok(model), Ok(json)]) = (run.folder(), &in_run)
        && (model.is_some() || json.is_some())
    {
        return Ok((run.tokenizer(&plan.tokenizer)?, folder.clone()));
    }
    if let Some(file) = &plan.tokenizer.file {
        let beside = Path::new(file).parent().filter(|folder| *folder != "").unwrap_or(Path::new("."));
        let folder = Folder::open(&beside.display().to_string());
        let names = (plan.tokenizer.bos.as_deref(), plan.tokenizer.eos.as_deref());
        let tokenizer = super::tokens::open(file.as_ref(), names.0, names.1)?;
        return Ok((tokenizer, folder.map_err(|error| failure(&error))?));
    }
    let Some(base) = plan.base.as_ref().filter(|base| !base.model.starts_with("run:")) else {
        return Err(wrong(format!(
            "{} has no tokenizer yet; start the run first, or name a tokenizer with --set tokenizer.file=FILE",
            run.url()
        )));
    };
    let is_on_hub = base.model.starts_with("hf://");
    let folder = if is_on_hub { Folder::open_model(&base.model) } else { Folder::open(&base.model) };
    let folder = folder.map_err(|error| failure(&error))?;
    let config = match read(Some(&folder), CONFIG)? {
        Some(bytes) => TokenizerConfig::read(&bytes, CONFIG).map_err(|error| unreadable(&error))?,
        None => TokenizerConfig::default(),
    };
    let [bos, eos] = ["bos_token", "eos_token"].map(|name| config.tokens.get(name).map(String::as_str));
    for name in [paths::TOKENIZER_MODEL, paths::TOKENIZER_JSON] {
        if let Some(bytes) = read(Some(&folder), name)? {
            let tokenizer = Tokenizer::read(&bytes, &format!("{}/{name}", base.model), bos, eos);
            return Ok((tokenizer.map_err(|error| failure(&error.into()))?, folder));
        }
    }
    Err(wrong(format!("{} has no tokenizer; name one with --set tokenizer.file=FILE", base.model)))
}
