//! `mirror`: copies a plan's sources to another store.

use std::path::PathBuf;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use ulmus_dataloader::mirror;
use ulmus_plan::Bytes;
use ulmus_process::{Failure, print};

#[derive(Debug, Args)]
pub(crate) struct Mirror {
    /// Plan whose sources to copy.
    #[arg(long, value_name = "FILE")]
    plan: PathBuf,
    /// Override a key of the plan, such as data.threads=8.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    overrides: Vec<String>,
    /// Folder for the copies: a path, s3://, gs:// or az://. Each source gets a folder of its name there.
    #[arg(long, value_name = "URL")]
    to: String,
    /// Maximum number of bytes to copy per second, such as 200MB.
    #[arg(long, value_name = "BYTES")]
    rate: Option<Bytes>,
    /// Copy only these sources.
    #[arg(long = "source", value_name = "NAME")]
    sources: Vec<String>,
}

impl Mirror {
    pub(super) fn run(&self) -> Result<(), Failure> {
        let mut data = super::load(&self.plan, &self.overrides)?.data;
        super::choose(&mut data, &self.sources)?;
        super::refuse_own(&data)?;
        let style = "{bytes} {bytes_per_sec} {elapsed}";
        let bar = ProgressBar::new_spinner()
            .with_style(ProgressStyle::with_template(style).expect("the template is valid"));
        let mirrored = mirror(&data, &self.to, self.rate.map(Bytes::get), |bytes| bar.inc(bytes))
            .map_err(|error| super::failure(&error))?;
        bar.finish_and_clear();
        let mut lines = vec![format!(
            "copied {} files, {} bytes; {} existed already",
            mirrored.files, mirrored.bytes, mirrored.skipped
        )];
        let to = self.to.trim_end_matches('/');
        lines.push("to read the copies, put this in the plan:".to_owned());
        lines.extend(data.source.iter().map(|source| {
            let name = &source.name;
            let list = source.list.as_ref().map(|_| format!(", list = \"{to}/{name}.list\""));
            format!("  {name}: url = \"{to}/{name}\"{}", list.unwrap_or_default())
        }));
        print(&lines.join("\n"))
    }
}
