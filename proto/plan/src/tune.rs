//! Fine-tuning stages: conversations or preferences to learn from, what is minimised, and which weights change.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::data::Format;
use crate::train::Precision;

/// What a tuning stage learns from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// Supervised fine-tuning: answers to imitate.
    #[default]
    Sft,
    /// Preferences: pairs of answers, of which one is better (direct preference optimisation).
    Dpo,
}

/// The loss of a pair of answers, as a function of `h = (π_chosen − π_rejected) − (ρ_chosen − ρ_rejected)`, in which π are the
/// log-probabilities of the answers under the model that is trained, and ρ those before the stage.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PreferenceLoss {
    /// `−log σ(β·h)`.
    #[default]
    Sigmoid,
    /// `max(0, 1 − β·h)`, the loss of statistical rejection sampling optimisation (RSO).
    Hinge,
    /// `(h − 1/(2β))²`, with the means over the tokens of an answer in place of the sums.
    Ipo,
}

/// How rendered conversations become token ids.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Tokenization {
    /// As chat models are trained today: the generation prompt belongs to the prompt, BOS is there once, and an answer ends with
    /// one EOS.
    #[default]
    Chat,
    /// As the published recipe did it (TRL 0.8.2): BOS before the prompt, EOS behind the rendered answer.
    Recipe,
}

/// Which end of a prompt, or of an example, is kept when it is too long.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Truncation {
    /// The last tokens stay.
    #[default]
    KeepEnd,
    /// The first tokens stay.
    KeepStart,
}

/// What to do with rows that teach nothing: equal or empty answers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnUseless {
    /// Count them by reason, and leave them out.
    #[default]
    Drop,
    /// Train on them, as the published recipe did.
    Keep,
}

/// How the learning rate falls after the warm-up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Schedule {
    /// Half a cosine.
    #[default]
    Cosine,
    /// A straight line.
    Linear,
    /// It does not fall.
    Constant,
}

/// A kind of adapter.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AdapterKind {
    /// Low-rank adaptation (arXiv 2106.09685): `W + s·B·A`.
    #[default]
    Lora,
    /// Weight-decomposed low-rank adaptation (arXiv 2402.09353): a trained norm for each row of `W + s·B·A`.
    Dora,
}

/// Small matrices that are trained in place of the weights. The defaults are those of OpenELM's published adapters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct AdapterConfig {
    /// The kind of adapter.
    pub kind: AdapterKind,
    /// Rank of the matrices.
    pub rank: u64,
    /// Scale of the update: it counts `alpha / rank` times.
    pub alpha: f64,
    /// Probability with which each input of an adapter is left out of a training step; the others count for more.
    pub dropout: f64,
    /// The matrices that get an adapter: names of modules as Hugging Face or CoreNet call them, such as `qkv_proj`, each of which
    /// stands for all modules whose name ends in it; `all-linear`; or one regular expression that matches whole names. By default
    /// `qkv_proj`, `out_proj`, `proj_1` and `proj_2`.
    pub targets: Vec<String>,
    /// Ranks of modules whose names end in, or are matched by, these keys.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub rank_pattern: BTreeMap<String, u64>,
    /// Alphas of such modules.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub alpha_pattern: BTreeMap<String, f64>,
    /// Rank-stabilised scaling: the update counts `alpha / √rank` times.
    pub rank_stabilised: bool,
    /// A folder with an adapter in PEFT's layout to go on from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
}

impl Default for AdapterConfig {
    fn default() -> Self {
        Self {
            kind: AdapterKind::Lora,
            rank: 32,
            alpha: 32.0,
            dropout: 0.0,
            targets: ["qkv_proj", "out_proj", "proj_1", "proj_2"].map(str::to_owned).to_vec(),
            rank_pattern: BTreeMap::new(),
            alpha_pattern: BTreeMap::new(),
            rank_stabilised: false,
            from: None,
        }
    }
}

/// Files of conversations, preferences or instructions.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ExamplesConfig {
    /// Folder of the files, as for a source of text.
    pub url: String,
    /// Files below `url`: names and globs. By default all files of the split.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<String>,
    /// Name of the split, if the folder has several, as `train_prefs`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub split: Option<String>,
    /// Format of the files; by default that of their suffix.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format: Option<Format>,
}

/// Statistical rejection sampling (arXiv 2309.06657): answers are sampled from the model, and pairs made of those that a
/// reward accepts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct RsoConfig {
    /// Answers to sample for each prompt.
    pub candidates: u64,
    /// Temperature of the sampling.
    pub temperature: f64,
    /// How many of the likeliest tokens are sampled from.
    pub top_k: u64,
    /// Answers to accept for each prompt.
    pub accept: u64,
    /// Temperature of the acceptance: 0 accepts the best, a large value any.
    pub beta: f64,
    /// File with a score of each candidate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scores: Option<String>,
    /// Preferences to train a reward head on, instead of scores.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reward_head: Option<String>,
    /// Seed of the sampling and of the acceptance.
    pub seed: u64,
}

impl Default for RsoConfig {
    fn default() -> Self {
        Self {
            candidates: 64,
            temperature: 0.7,
            top_k: 40,
            accept: 8,
            beta: 0.5,
            scores: None,
            reward_head: None,
            seed: 0,
        }
    }
}

/// A stage that tunes a model. A plan may have several.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct TuneConfig {
    /// Name of the stage, and of its folder.
    pub name: String,
    /// The model to begin from: `base`, `average`, `last`, or an earlier stage.
    pub of: String,
    /// What the stage learns from.
    pub method: Method,
    /// The loss of a pair, for preferences.
    pub loss: PreferenceLoss,
    /// How much log-probabilities count in the loss of a pair.
    pub beta: f64,
    /// Share of pairs that are assumed to be labelled the wrong way round.
    pub label_smoothing: f64,
    /// Whether the loss of a pair takes means over tokens in place of sums.
    pub length_normalised: bool,
    /// How conversations become tokens.
    pub tokenization: Tokenization,
    /// The chat template: `auto` (the tokenizer's own, or else the recipe's), `recipe`, or a file.
    pub template: String,
    /// Longest example in tokens.
    pub max_length: u64,
    /// Longest prompt of an example that is too long; for `tokenization = "recipe"`.
    pub max_prompt: u64,
    /// Which end of what is too long stays.
    pub truncation: Truncation,
    /// Whether only answers are trained on.
    pub mask_prompt: bool,
    /// Whether several examples share a sequence; they do not see each other.
    pub pack: bool,
    /// What to do with rows that teach nothing.
    pub on_useless: OnUseless,
    /// A file of texts that no row may contain, as a JSON list or one per line.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decontaminate: Option<String>,
    /// Passes over the rows; 1 if neither this nor `steps` is set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub epochs: Option<u64>,
    /// Number of optimizer steps, instead of `epochs`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub steps: Option<u64>,
    /// Examples, or pairs, of an update, over all workers. The last update of an epoch takes what is left.
    pub batch: u64,
    /// Examples, or pairs, that go through the model at once.
    pub micro_batch: u64,
    /// Whether each epoch has another order; otherwise rows come as they are in the files.
    pub shuffle: bool,
    /// Peak learning rate.
    pub max_lr: f64,
    /// How it falls.
    pub schedule: Schedule,
    /// Share of the steps that are warm-up.
    pub warmup_ratio: f64,
    /// Steps of warm-up, instead of `warmup_ratio`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub warmup: Option<u64>,
    /// Learning rate of the first step, if there is a warm-up.
    pub warmup_init_lr: f64,
    /// Learning rate at the end of the schedule.
    pub min_lr: f64,
    /// The learning rate of each update, instead of a schedule.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub lrs: Vec<f64>,
    /// AdamW: decay of the first moment.
    pub beta1: f64,
    /// AdamW: decay of the second moment.
    pub beta2: f64,
    /// AdamW: added to the root of the second moment.
    pub epsilon: f64,
    /// AdamW: decoupled weight decay of every tensor with two dimensions.
    pub weight_decay: f64,
    /// Gradient clipping: maximum L2 norm of the whole gradient.
    pub clip: f64,
    /// Weight of the z-loss.
    pub z_loss: f64,
    /// Precision of the operands of matrix products.
    pub precision: Precision,
    /// Recompute layers in the backward pass instead of keeping their activations.
    pub recompute: bool,
    /// Random seed of the order, of dropout and of new adapters; by default the run's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// Steps between two milestones, which are kept; 0 for the last state alone.
    pub checkpoint_every: u64,
    /// Steps between two evaluations on `eval`; 0 for none but at the end.
    pub eval_every: u64,
    /// What to learn from.
    pub data: Vec<ExamplesConfig>,
    /// What to evaluate on.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub eval: Vec<ExamplesConfig>,
    /// Small matrices to train in place of the weights.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adapter: Option<AdapterConfig>,
    /// Pairs are made of sampled answers, instead of those in the files.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rso: Option<RsoConfig>,
}

impl Default for TuneConfig {
    fn default() -> Self {
        Self {
            name: String::new(),
            of: String::new(),
            method: Method::default(),
            loss: PreferenceLoss::default(),
            beta: 0.01,
            label_smoothing: 0.0,
            length_normalised: false,
            tokenization: Tokenization::default(),
            template: "auto".to_owned(),
            max_length: 1024,
            max_prompt: 512,
            truncation: Truncation::default(),
            mask_prompt: true,
            pack: false,
            on_useless: OnUseless::default(),
            decontaminate: None,
            epochs: None,
            steps: None,
            batch: 128,
            micro_batch: 8,
            shuffle: true,
            max_lr: 5e-5,
            schedule: Schedule::default(),
            warmup_ratio: 0.1,
            warmup: None,
            warmup_init_lr: 0.0,
            min_lr: 0.0,
            lrs: Vec::new(),
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.0,
            clip: 1.0,
            z_loss: 0.0,
            precision: Precision::F32,
            recompute: false,
            seed: None,
            checkpoint_every: 0,
            eval_every: 0,
            data: Vec::new(),
            eval: Vec::new(),
            adapter: None,
            rso: None,
        }
    }
}
