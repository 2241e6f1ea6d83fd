//! Fine-tuning stages: conversations or preferences to learn from, what is minimised, and which weights change.

use serde::{Deserialize, Serialize};
use ulmus_types::{LONGEST_TUNING_NAME, Of, Problems, StageName, Tuning};

use crate::adapter::{AdaptedModule, AdapterConfig, AdapterMistake};
use crate::data::{Format, refuse_secret};
use crate::model::ModelConfig;
use crate::rso::RsoConfig;
use crate::rules::{range, range_or, sound};
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
    /// As chat models are trained today: the generation prompt belongs to the prompt. A text begins with BOS once and ends with one
    /// EOS; a conversation has those that its template writes.
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

/// A stage that tunes a model. A plan may have several.
#[expect(clippy::struct_excessive_bools, reason = "each is a key of its own")]
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct TuneConfig {
    /// Name of the stage, and of its folder.
    pub name: String,
    /// The model to begin from: `base`, `average`, `last`, an earlier tuning stage, or where a model is: a folder, or
    /// `hf://ORG/NAME[@REVISION]`.
    pub of: Of,
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
    /// The chat template: `auto` (that of the stage or the folder `of`, or else the tokenizer's own, or else the recipe's), `recipe`, or
    /// a file. Rows that are texts or instructions have none.
    pub template: String,
    /// Longest example in tokens.
    pub max_length: u64,
    /// Longest prompt of an example that is too long; for `tokenization = "recipe"`. With `rso`, prompts that are longer are left out.
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
    /// Learn from answers that the model samples, in place of those in `data`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rso: Option<RsoConfig>,
}

impl Default for TuneConfig {
    fn default() -> Self {
        Self {
            name: String::new(),
            of: Of::Model(String::new()),
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

/// What a preference stage measures, by the names of TRL.
const PREFERENCE_MEASURES: [&str; 6] = [
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
];

impl TuneConfig {
    /// The stage that it is, if its name is one.
    pub(crate) fn tuning(&self) -> Option<Tuning> {
        let name = self.name.parse().ok().filter(|_| self.name.len() <= LONGEST_TUNING_NAME)?;
        let rewards = self.rso.as_ref().map(RsoConfig::rewards);
        Some(Tuning { name, of: self.of.clone(), compares: self.method == Method::Dpo, rewards })
    }

    /// Fills in what follows from other keys and from the stages `before` it.
    pub(crate) fn complete(&mut self, before: &[Self]) {
        self.micro_batch = self.micro_batch.min(self.batch.max(1));
        // Who goes on from a tuned model speaks as that does.
        if let Of::Tuned(name) = &self.of
            && self.template == "auto"
            && let Some(tuned) = before.iter().find(|tuned| tuned.name == name.as_str())
        {
            self.template.clone_from(&tuned.template);
        }
    }

    /// The key of the model that the stage begins from.
    pub const OF: &str = "of";
    /// The key of the adapter that the stage goes on from.
    pub const ADAPTER_FROM: &str = "adapter.from";

    /// The keys that name weights from elsewhere with which the stage begins, sorted.
    pub fn elsewhere(&self) -> Vec<&'static str> {
        let from = self.adapter.as_ref().and_then(|adapter| adapter.from.as_ref());
        let model = matches!(self.of, Of::Model(_));
        from.map(|_| Self::ADAPTER_FROM).into_iter().chain(model.then_some(Self::OF)).collect()
    }

    /// Micro-batches of a whole update.
    pub fn micro_batches(&self) -> u64 {
        self.batch.div_ceil(self.micro_batch.max(1))
    }

    /// Sequences of an example: a pair has two.
    pub const fn sequences_per_example(&self) -> u64 {
        match self.method {
            Method::Sft => 1,
            Method::Dpo => 2,
        }
    }

    /// Positions of the longest example. Its last token predicts nothing.
    pub fn positions(&self) -> usize {
        (self.max_length as usize).saturating_sub(1).max(1)
    }

    /// The most tokens of an update.
    pub fn tokens_per_step(&self) -> u64 {
        self.batch.saturating_mul(self.max_length).saturating_mul(self.sequences_per_example())
    }

    /// Updates of an epoch of so many rows.
    pub fn updates_per_epoch(&self, kept: u64) -> u64 {
        kept.div_ceil(self.batch.max(1))
    }

    /// Updates of the stage if so many rows are kept.
    pub fn updates(&self, kept: u64) -> u64 {
        let in_epochs = || self.updates_per_epoch(kept).saturating_mul(self.epochs.unwrap_or(1));
        self.steps.unwrap_or_else(in_epochs)
    }

    /// The number of parameters of a model of this shape that the stage trains.
    pub fn trainable(&self, model: &ModelConfig) -> u64 {
        match &self.adapter {
            None => model.parameters(),
            // A plan whose adapter is not sound does not run.
            Some(adapter) => adapter
                .modules(model)
                .map_or(0, |modules| modules.iter().map(AdaptedModule::parameters).sum()),
        }
    }

    /// Names of what an update measures beside its loss, in the order of the columns of `metrics.csv`.
    pub fn measures(&self) -> Vec<String> {
        let of_method = match self.method {
            Method::Sft => &[][..],
            Method::Dpo => &PREFERENCE_MEASURES[..],
        };
        let z_loss = (self.z_loss > 0.0).then_some("z_loss");
        let plain = || of_method.iter().copied().chain(z_loss);
        let evaluated = std::iter::once("loss").chain(of_method.iter().copied());
        let evaluated = evaluated.map(|name| format!("eval_{name}")).filter(|_| !self.eval.is_empty());
        plain().map(str::to_owned).chain(evaluated).collect()
    }

    /// The learning rate of update number `step` (0 for the first) of `updates`: linear warm-up, then the schedule. Not rounded.
    pub fn learning_rate(&self, step: u64, updates: u64) -> f64 {
        if !self.lrs.is_empty() {
            let last = self.lrs.len() - 1;
            return self.lrs[last.min(step as usize)];
        }
        let warmup = self.warmup.unwrap_or((self.warmup_ratio * updates as f64).ceil() as u64);
        if step < warmup {
            let rise = self.max_lr - self.warmup_init_lr;
            return self.warmup_init_lr + rise * step as f64 / warmup as f64;
        }
        let progress = (step - warmup) as f64 / updates.saturating_sub(warmup).max(1) as f64;
        let left = match self.schedule {
            Schedule::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
            Schedule::Linear => 1.0 - progress,
            Schedule::Constant => 1.0,
        };
        self.min_lr + (self.max_lr - self.min_lr) * left
    }

    /// Reports every rule that is broken; `at` is the key of the stage, and `models` are the models of the run that it may begin
    /// from.
    fn check(&self, at: &str, model: &ModelConfig, models: &[&str], problems: &mut Problems) {
        let key = |name: &str| format!("{at}.{name}");
        self.check_of(&key("of"), models, problems);
        problems.check(
            !self.data.is_empty(),
            key("data"),
            "missing",
            "a stage learns from examples",
            "add [[tune.data]] with the url of a folder or file",
        );
        for (kind, sources) in [("data", &self.data), ("eval", &self.eval)] {
            for (index, source) in sources.iter().enumerate() {
                source.check(&key(&format!("{kind}.{index}")), problems);
            }
        }
        range(problems, key("batch"), self.batch, 1..=1 << 24);
        range(problems, key("micro_batch"), self.micro_batch, 1..=1 << 16);
        if sound(problems, &["model"]) {
            range(problems, key("max_length"), self.max_length, 2..=model.max_context_length as u64);
        }
        let limits_prompt = self.tokenization == Tokenization::Recipe || self.rso.is_some();
        if limits_prompt && sound(problems, &[&key("max_length")]) {
            range(problems, key("max_prompt"), self.max_prompt, 1..self.max_length);
        }
        problems.check(
            !self.template.is_empty(),
            key("template"),
            "\"\"",
            "conversations need a template",
            "write \"auto\", \"recipe\", or the path of a file",
        );
        problems.check(
            !(self.pack && self.method == Method::Dpo),
            key("pack"),
            self.pack,
            "pairs are not packed",
            "leave it out",
        );
        self.check_length(at, problems);
        self.check_optimizer(at, problems);
        if sound(problems, &[&key("method"), &key("loss")]) {
            self.check_preferences(at, problems);
        }
        if let Some(rso) = &self.rso {
            rso.check(&key("rso"), problems);
            problems.check(
                self.adapter.as_ref().is_none_or(|adapter| adapter.from.is_none()),
                key("adapter.from"),
                "set",
                "answers are sampled from the model that of names, without an adapter",
                "merge the adapter with evaluator merge, and begin from that folder",
            );
            problems.check(
                self.tokenization == Tokenization::Chat,
                key("tokenization"),
                "\"recipe\"",
                "answers are sampled after a generation prompt, which the recipe does not have",
                "leave it out with [tune.rso]",
            );
        }
        if let Some(adapter) = &self.adapter {
            let modules = if sound(problems, &["model"]) { adapter.modules(model).map(drop) } else { Ok(()) };
            if let Err(AdapterMistake { key: wrong, problem }) = modules {
                let (rule, advice) = problem.split_once("; ").unwrap_or((&problem, "correct it"));
                problems.add(key(&format!("adapter.{wrong}")), "", rule, advice);
            }
            if let Some(from) = &adapter.from {
                refuse_secret(problems, key("adapter.from"), from);
            }
        }
    }

    /// What the stage begins from.
    fn check_of(&self, key: &str, models: &[&str], problems: &mut Problems) {
        let of = self.of.to_string();
        match &self.of {
            Of::Model(place) if place.is_empty() => {
                let advice = format!("write of = {:?}", models.last().unwrap_or(&"base"));
                problems.add(key, "missing", "a stage begins from a model", advice);
            }
            Of::Model(place) => {
                if !refuse_secret(problems, key.to_owned(), place) {
                    problems.check(
                        (!place.contains("://") || place.starts_with("hf://"))
                            && (place.contains('/') || place.starts_with('.')),
                        key,
                        format!("{place:?}"),
                        "models are read from folders and from hf://",
                        "copy it to a folder that the workers reach",
                    );
                }
            }
            _ => problems.check(
                models.contains(&&of[..]),
                key,
                format!("{of:?}"),
                "a stage begins from a model that the run has by then",
                match models {
                    [] => "write base, and where the base is in [base] model".to_owned(),
                    some => format!("name one of {}, or a folder as \"./{of}\"", some.join(", ")),
                },
            ),
        }
    }

    /// How long the stage trains, and at which rates.
    fn check_length(&self, at: &str, problems: &mut Problems) {
        let key = |name: &str| format!("{at}.{name}");
        if let Some(epochs) = self.epochs {
            range(problems, key("epochs"), epochs, 1..=1_000_000);
            problems.check(
                self.steps.is_none(),
                key("steps"),
                self.steps.unwrap_or_default(),
                "the stage has epochs already",
                "leave one of them out",
            );
        }
        if let Some(steps) = self.steps {
            range(problems, key("steps"), steps, 1..=1 << 40);
        }
        if let Some(wrong) = self.lrs.iter().find(|lr| !(0.0..=1.0).contains(*lr)) {
            problems.add(key("lrs"), wrong, "each must be from 0.0 to 1.0", "correct it");
        }
        if let Some(steps) = self.steps.filter(|_| !self.lrs.is_empty()) {
            problems.check(
                self.lrs.len() as u64 == steps,
                key("lrs"),
                format!("{} rates", self.lrs.len()),
                format!("there is one for each of steps = {steps}"),
                "write as many, or leave it out for a schedule",
            );
        }
        range_or(problems, key("max_lr"), self.max_lr, 0.0..=1.0, "set it to 5e-5");
        let peak = if sound(problems, &[&key("max_lr")]) { self.max_lr } else { 1.0 };
        range(problems, key("min_lr"), self.min_lr, 0.0..=peak);
        range(problems, key("warmup_init_lr"), self.warmup_init_lr, 0.0..=peak);
        range(problems, key("warmup_ratio"), self.warmup_ratio, 0.0..=1.0);
        if let (Some(warmup), Some(steps)) = (self.warmup, self.steps) {
            range(problems, key("warmup"), warmup, ..=steps);
        }
    }

    fn check_optimizer(&self, at: &str, problems: &mut Problems) {
        for (name, value, least, most, usual) in [
            ("beta1", self.beta1, 0.0, 0.999_999, 0.9),
            ("beta2", self.beta2, 0.0, 0.999_999_999, 0.999),
            ("epsilon", self.epsilon, 1e-15, 1.0, 1e-8),
            ("clip", self.clip, 1e-6, 1e6, 1.0),
        ] {
            range_or(problems, format!("{at}.{name}"), value, least..=most, format!("set it to {usual:?}"));
        }
        range(problems, format!("{at}.weight_decay"), self.weight_decay, 0.0..=10.0);
        range(problems, format!("{at}.z_loss"), self.z_loss, 0.0..=1.0);
    }

    /// The keys of preferences.
    fn check_preferences(&self, at: &str, problems: &mut Problems) {
        let key = |name: &str| format!("{at}.{name}");
        if self.method == Method::Sft {
            for (name, is_set) in [
                ("loss", self.loss != PreferenceLoss::default()),
                ("label_smoothing", self.label_smoothing != 0.0),
                ("length_normalised", self.length_normalised),
                ("rso", self.rso.is_some()),
            ] {
                let advice = "leave it out, or write method = \"dpo\"";
                problems.check(!is_set, key(name), "set", "only preferences have it", advice);
            }
            return;
        }
        range_or(problems, key("beta"), self.beta, 1e-6..=1e3, "set it to 0.01, as in the published recipe");
        range(problems, key("label_smoothing"), self.label_smoothing, 0.0..=0.5);
        problems.check(
            self.label_smoothing == 0.0 || self.loss == PreferenceLoss::Sigmoid,
            key("label_smoothing"),
            self.label_smoothing,
            "only the sigmoid loss has it",
            "leave it out, or write loss = \"sigmoid\"",
        );
        problems.check(
            !self.length_normalised || self.loss != PreferenceLoss::Ipo,
            key("length_normalised"),
            self.length_normalised,
            "the loss of IPO is normalised by length already",
            "leave it out",
        );
    }
}

impl ExamplesConfig {
    /// The files at an address, if there is one.
    pub fn at(url: Option<&str>) -> Vec<Self> {
        url.map(|url| Self { url: url.to_owned(), ..Self::default() }).into_iter().collect()
    }

    fn check(&self, at: &str, problems: &mut Problems) {
        let key = format!("{at}.url");
        problems.check(
            !self.url.is_empty(),
            &key,
            "missing",
            "examples must be somewhere",
            "write the path of a folder or file, or hf://datasets/ORG/NAME",
        );
        refuse_secret(problems, key, &self.url);
        problems.check(
            self.format.is_none_or(|format| !format.holds_tokens()),
            format!("{at}.format"),
            "of token ids",
            "examples have columns",
            "write \"parquet\", \"jsonl\", \"json\" or \"arrow\"",
        );
    }
}

/// The tuning stages of a plan.
pub(crate) fn tunings(tune: &[TuneConfig]) -> Vec<Tuning> {
    tune.iter().filter_map(TuneConfig::tuning).collect()
}

/// Reports what is wrong with tuning stages. `models` are those that the run has before the first of them.
pub(crate) fn check(tune: &[TuneConfig], model: &ModelConfig, models: &[&str], problems: &mut Problems) {
    let mut models = models.to_vec();
    for (index, stage) in tune.iter().enumerate() {
        let at = format!("tune.{index}");
        let key = format!("{at}.name");
        let is_name = stage.name.parse::<StageName>().is_ok() && stage.name.len() <= LONGEST_TUNING_NAME;
        problems.check(
            is_name,
            &key,
            format!("{:?}", stage.name),
            format!("every stage needs a name: 1 to {LONGEST_TUNING_NAME} letters, digits, '-' and '_', beginning with a letter"),
            "write for instance name = \"dpo\"",
        );
        let is_taken = StageName::IMPLIED.contains(&&stage.name[..])
            || ["base", "last", "milestones"].contains(&&stage.name[..])
            || has_name_of_another(tune, index);
        problems.check(
            !is_taken,
            &key,
            format!("{:?}", stage.name),
            "the run has a stage or a model of this name",
            "choose another",
        );
        stage.check(&at, model, &models, problems);
        models.push(&stage.name);
    }
}

/// Whether another tuning stage, or a stage that belongs to one, has the name of this one.
fn has_name_of_another(tune: &[TuneConfig], index: usize) -> bool {
    let Some(Tuning { name, .. }) = tune[index].tuning() else { return false };
    let others = tune.iter().enumerate().filter(|(other, _)| *other != index);
    let mut names = others.filter_map(|(other, config)| Some((other, config.tuning()?.name)));
    // Of two with one name, the second is told.
    names.any(|(other, of)| (of == name && other < index) || of.of_tuning().contains(&name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schedules_meet_their_corner_values() {
        let tune = TuneConfig { max_lr: 1.0, warmup_ratio: 0.1, ..TuneConfig::default() };
        let of = |tune: &TuneConfig| [0, 1, 2, 11, 19].map(|step| tune.learning_rate(step, 20));
        let cosine = of(&tune);
        assert_eq!(cosine[..3], [0.0, 0.5, 1.0]);
        assert!((cosine[3] - 0.5).abs() < 1e-12 && cosine[4] > 0.0 && cosine[4] < 0.01, "{cosine:?}");
        let linear = TuneConfig { schedule: Schedule::Linear, min_lr: 0.2, ..tune.clone() };
        let linear = of(&linear);
        assert!((linear[3] - 0.6).abs() < 1e-12, "{linear:?}");
        let constant = TuneConfig { schedule: Schedule::Constant, warmup: Some(0), ..tune.clone() };
        assert_eq!(of(&constant), [1.0; 5]);
        let listed = TuneConfig { lrs: vec![0.3, 0.1], ..tune };
        assert_eq!(of(&listed), [0.3, 0.1, 0.1, 0.1, 0.1]);
    }

    #[test]
    fn an_epoch_s_last_update_takes_what_is_left() {
        let tune = TuneConfig { batch: 8, micro_batch: 3, epochs: Some(3), ..TuneConfig::default() };
        assert_eq!((tune.micro_batches(), tune.updates(17)), (3, 9));
        assert_eq!(TuneConfig { steps: Some(5), epochs: None, ..tune }.updates(17), 5);
    }

    #[test]
    fn measures_have_the_names_of_trl() {
        let dpo = TuneConfig {
            method: Method::Dpo,
            eval: vec![ExamplesConfig::default()],
            ..TuneConfig::default()
        };
        let measures = dpo.measures();
        assert_eq!(measures[..3], ["rewards/chosen", "rewards/rejected", "rewards/margins"]);
        assert_eq!(measures[6..8], ["eval_loss", "eval_rewards/chosen"]);
        assert!(TuneConfig::default().measures().is_empty());
    }
}
