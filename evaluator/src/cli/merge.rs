//! `evaluator merge`: a model with its adapter, as a model of its own.

use std::path::PathBuf;

use clap::Args;
use ulmus_dataloader::CHAT_TEMPLATE;
use ulmus_evaluator::{EvaluatorError, model_folder, tokenizer_place};
use ulmus_model::hf::{self, HfModel};
use ulmus_process::{Failure, print};
use ulmus_types::ExitStatus;

use super::{adapted, failure};

/// Files beside a model that say how it is used, and that merging leaves as they are.
const BESIDE: [&str; 5] =
    ["tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", CHAT_TEMPLATE];

#[derive(Debug, Args)]
pub(super) struct Merge {
    /// Model folder, a checkpoint of CoreNet (`.pt`), or a model on the hub: `hf://ORG/NAME[@REVISION]`.
    #[arg(long, value_name = "DIR")]
    model: String,
    /// Folder with an adapter of that model in PEFT's layout.
    #[arg(long, value_name = "DIR")]
    adapter: PathBuf,
    /// The folder to write; it must not hold a model.
    #[arg(long, value_name = "DIR")]
    to: PathBuf,
}

impl Merge {
    pub(super) fn run(&self) -> Result<(), Failure> {
        if self.to.join("config.json").exists() {
            let message =
                format!("{} holds a model already; name another folder with --to", self.to.display());
            return Err(Failure::new(ExitStatus::InvalidInput, message));
        }
        let model = model_folder(&self.model).map_err(failure)?;
        let HfModel { config, weights, tokens } = adapted(&model, Some(&self.adapter))?;
        let wrong = weights.iter().filter(|weight| !weight.is_finite()).count();
        if wrong > 0 {
            let message =
                format!("{wrong} of {} merged weights are not finite; get the adapter again", weights.len());
            return Err(Failure::new(ExitStatus::InvalidInput, message));
        }
        hf::write(&self.to, &config, &weights, tokens).map_err(failure)?;
        let folder = tokenizer_place(&model);
        let beside = BESIDE.iter().map(|name| (folder, *name));
        // What was learned with an adapter is said in its own words.
        for (folder, name) in beside.chain([(&*self.adapter, CHAT_TEMPLATE)]) {
            let (from, to) = (folder.join(name), self.to.join(name));
            match std::fs::copy(&from, &to) {
                Ok(_) => {}
                Err(error) if error.kind() == std::io::ErrorKind::NotFound && !from.exists() => {}
                Err(error) => return Err(failure(EvaluatorError::Write { path: to, error })),
            }
        }
        let head = if config.share_input_output_layers { "" } else { ", whose head has weights of its own" };
        print(&format!("{}: a model of {} parameters{head}", self.to.display(), weights.len()))
    }
}
