//! `pack` and `tokenize`: write shards of even size, of texts or of token ids.

use std::path::PathBuf;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use ulmus_dataloader::{DataError, Written, pack, tokenize};
use ulmus_plan::{Bytes, DataConfig, Plan};
use ulmus_process::{Failure, print};

/// Arguments that both commands have.
#[derive(Debug, Args)]
struct Shards {
    /// Plan whose sources to read.
    #[arg(long, value_name = "FILE")]
    plan: PathBuf,
    /// Override a key of the plan, such as data.threads=8.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    overrides: Vec<String>,
    /// Folder for the shards: a path, s3://, gs:// or az://. Each source gets a folder of its name there.
    #[arg(long, value_name = "URL")]
    to: String,
    /// Bytes of text per shard. Each thread holds one shard in memory.
    #[arg(long, value_name = "BYTES", default_value = "256MiB")]
    shard: Bytes,
    /// Write only these sources.
    #[arg(long = "source", value_name = "NAME")]
    sources: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct PackShards {
    #[command(flatten)]
    shards: Shards,
}

#[derive(Debug, Args)]
pub(crate) struct Tokenize {
    #[command(flatten)]
    shards: Shards,
    /// A `tokenizer.model` or `tokenizer.json` [default: the plan's tokenizer.file].
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,
    /// Write plain ids, as nanoGPT and OLMo read them, without the header of a `.npy` file.
    #[arg(long)]
    raw: bool,
}

impl PackShards {
    pub(super) fn run(&self) -> Result<(), Failure> {
        let Shards { to, shard, .. } = &self.shards;
        let (_, data) = self.shards.load()?;
        let written = shown(|done| pack(&data, to, shard.get(), done))?;
        self.shards.report(&data, written, "*.parquet\"], text = \"text\"")
    }
}

impl Tokenize {
    pub(super) fn run(&self) -> Result<(), Failure> {
        let Shards { to, shard, .. } = &self.shards;
        let (plan, data) = self.shards.load()?;
        let tokenizer = super::tokens::of_plan(&plan, self.tokenizer.as_deref())?;
        let two_bytes = tokenizer.pieces() <= 1 << 16;
        let written = shown(|done| tokenize(&data, tokenizer.clone(), to, shard.get(), !self.raw, done))?;
        let files = match (self.raw, two_bytes) {
            (false, _) => "*.npy\"]",
            (true, true) => "*.bin\"], format = \"u16\"",
            (true, false) => "*.bin\"], format = \"u32\"",
        };
        self.shards.report(&data, written, files)
    }
}

/// Runs `work` with a progress bar.
fn shown(
    write: impl FnOnce(&(dyn Fn(u64, u64) + Sync)) -> Result<Written, DataError>,
) -> Result<Written, Failure> {
    let style = "{wide_bar} {bytes}/{total_bytes}, {bytes_per_sec}, {eta} left";
    let style = ProgressStyle::with_template(style).expect("the template is valid");
    let bar = ProgressBar::no_length().with_style(style);
    let written = write(&|bytes, total| {
        bar.set_length(total);
        bar.inc(bytes);
    });
    bar.finish_and_clear();
    written.map_err(|error| super::failure(&error))
}

impl Shards {
    fn load(&self) -> Result<(Plan, DataConfig), Failure> {
        let plan = super::load(&self.plan, &self.overrides)?;
        let mut data = plan.data.clone();
        super::choose(&mut data, &self.sources)?;
        super::refuse_own(&data)?;
        Ok((plan, data))
    }

    fn report(&self, data: &DataConfig, written: Written, files: &str) -> Result<(), Failure> {
        let Written { shards, documents, skipped } = written;
        let to = self.to.trim_end_matches('/');
        let mut lines = vec![format!("{shards} shards of {documents} documents; {skipped} existed already")];
        lines.push("to read the shards, put this in the plan:".to_owned());
        lines.extend(
            data.source
                .iter()
                .map(|source| format!("  {0}: url = \"{to}/{0}\", files = [\"{files}", source.name)),
        );
        print(&lines.join("\n"))
    }
}
