//! `count`: what a plan's corpora hold, and what its filters leave.

use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use comfy_table::{CellAlignment, Table, presets};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use ulmus_dataloader::{Corpus, Counts, Folder, Manifest, Sources, Traffic};
use ulmus_plan::{DataConfig, Plan, SourceConfig};
use ulmus_process::{Failure, print};
use ulmus_tokenizer::Tokenizer;

use super::run::Run;

#[derive(Debug, Args)]
pub(crate) struct Count {
    /// Plan whose sources are counted.
    #[arg(long, value_name = "FILE")]
    plan: PathBuf,
    /// Override a key of the plan, such as data.threads=8.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    overrides: Vec<String>,
    /// A `tokenizer.model` or `tokenizer.json`; the plan's tokenizer.file if not given.
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,
    /// Count these sources only.
    #[arg(long = "source", value_name = "NAME")]
    sources: Vec<String>,
    /// Print JSON instead of a table.
    #[arg(long)]
    json: bool,
}

/// What was found in one source.
#[derive(Debug, Serialize)]
struct Counted {
    source: String,
    files: usize,
    #[serde(flatten)]
    counts: Counts,
    #[serde(flatten)]
    traffic: Traffic,
    seconds: f64,
    tokens_per_second: f64,
}

impl Count {
    pub(super) fn run(&self) -> Result<(), Failure> {
        let plan = super::load(&self.plan, &self.overrides)?;
        let mut data = plan.data.clone();
        super::choose(&mut data, &self.sources)?;
        let run = Run::find_for(&plan, &data)?;
        if let Some(not_made) = run.as_ref().map(|run| run.not_made(&self.plan, &data)).transpose()?.flatten()
        {
            return Err(super::wrong(not_made));
        }
        let tokenizer = match &run {
            Some(run) if self.tokenizer.is_none() && plan.tokenizer.file.is_none() => {
                run.tokenizer(&plan.tokenizer)?
            }
            _ => super::tokens::of_plan(&plan, self.tokenizer.as_deref())?,
        };
        let folder = run.as_ref().and_then(Run::folder);
        let counted = data
            .source
            .iter()
            .map(|source| count(&plan, source, folder, tokenizer.clone()))
            .collect::<Result<Vec<_>, Failure>>()?;
        if self.json {
            return print(&serde_json::to_string(&counted).expect("counts can be written as JSON"));
        }
        let weight = |Counted { source, counts, .. }: &Counted| {
            format!("  {source}: tokens = {}, tokens_from = \"dataloader count\"", counts.tokens)
        };
        let mut lines =
            vec![table(&counted).to_string(), "as weights in the mixture, write in the plan:".to_owned()];
        lines.extend(counted.iter().map(weight));
        print(&lines.join("\n"))
    }
}

fn count(
    plan: &Plan,
    source: &SourceConfig,
    run: Option<&Folder>,
    tokenizer: Tokenizer,
) -> Result<Counted, Failure> {
    // One lane, which has units in any case.
    let config = DataConfig { lanes: 1, source: vec![source.clone()], ..plan.data.clone() };
    let failure = |error| super::failure(&error);
    let manifest = Manifest::freeze(&config, run).map_err(failure)?;
    let sources = Sources::open(&config, &manifest, run).map_err(failure)?;
    let corpus = Corpus::new(&config, plan.run.seed, sources, tokenizer).map_err(failure)?;
    let style = "{prefix} {wide_bar} {bytes}/{total_bytes}, {bytes_per_sec}, {eta} left";
    let style = ProgressStyle::with_template(style).expect("the template is right");
    let bar = ProgressBar::new(manifest.bytes()).with_style(style).with_prefix(source.name.clone());
    let begun = Instant::now();
    let counts = corpus.count_all(|bytes| bar.inc(bytes)).map_err(failure)?.remove(0);
    let seconds = begun.elapsed().as_secs_f64();
    bar.finish_and_clear();
    Ok(Counted {
        source: source.name.clone(),
        files: manifest.files(),
        tokens_per_second: counts.tokens as f64 / seconds,
        traffic: corpus.traffic()[0],
        counts,
        seconds,
    })
}

fn table(counted: &[Counted]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_BORDERS_ONLY).set_header([
        "source",
        "files",
        "documents",
        "characters",
        "bytes",
        "short (characters)",
        "short (tokens)",
        "held out",
        "tokens",
        "tokens/s",
    ]);
    for Counted { source, files, counts, tokens_per_second, .. } in counted {
        table.add_row([
            source.clone(),
            files.to_string(),
            counts.documents.to_string(),
            counts.characters.to_string(),
            counts.bytes.to_string(),
            counts.short_characters.to_string(),
            counts.short_tokens.to_string(),
            counts.held_out.to_string(),
            counts.tokens.to_string(),
            format!("{tokens_per_second:.0}"),
        ]);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}
