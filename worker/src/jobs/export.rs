//! Exports a model in Hugging Face layout: weights, config, the model's code for transformers, tokenizer, and a card.

use std::collections::BTreeMap;

use serde_json::json;
use ulmus_checkpoint::{CheckpointError, read_file, read_manifest};
use ulmus_dataloader::{CHAT_TEMPLATE, Manifest, SourceSummary};
use ulmus_model::hf::{MODELING, SpecialTokens, config_json, generation_config_json};
use ulmus_model::{
    AdapterShape, CardData, Layout, ModelCard, peft, weights_to_safetensors, weights_to_safetensors_as,
};
use ulmus_plan::{AdapterKind, Method, ModelConfig, Plan, PreferenceLoss, TuneConfig, WeightType};
use ulmus_run::results::{self, Average, Exported};
use ulmus_run::{TrainState, paths};
use ulmus_tokenizer::Tokenizer;
use ulmus_types::{CheckpointId, Digest, FileEntry, Job, Of, StageName, Subject, counted};

use super::average::average_file;
use super::base::Base;
use super::prepare::tokenizer_files;
use super::subject::{shape_of, weights_of};
use crate::WorkerError;
use crate::examples::{made_by, result};
use crate::run::Run;
use crate::snapshot::weights;

/// A model that is exported.
pub(super) struct Export<'a> {
    /// Its shape.
    pub(super) config: &'a ModelConfig,
    /// Its weights, as a safetensors file.
    pub(super) weights: Vec<u8>,
    /// Their type.
    pub(super) dtype: WeightType,
    /// Its tokenizer.
    pub(super) tokenizer: &'a Tokenizer,
    /// The chat template, in Jinja, of a model that chats.
    pub(super) chat_template: Option<&'a str>,
    /// What its card says.
    pub(super) card: ModelCard<'a>,
}

impl Export<'_> {
    /// The files of the folder, by name.
    pub(super) fn files(self) -> BTreeMap<&'static str, Vec<u8>> {
        let Self { config, weights, dtype, tokenizer, chat_template, card } = self;
        let tokens = SpecialTokens { bos: tokenizer.bos(), eos: tokenizer.eos() };
        let (module, code) = MODELING;
        let mut files = tokenizer_files(tokenizer);
        let has_json = files.contains_key(paths::TOKENIZER_JSON);
        let (bos, eos) = tokenizer.special_names();
        let mut tokenizer_config = json!({
            "tokenizer_class": if has_json { "PreTrainedTokenizerFast" } else { "LlamaTokenizer" },
            "bos_token": bos,
            "eos_token": eos,
            "add_bos_token": true,
            "clean_up_tokenization_spaces": false,
            "model_max_length": config.max_context_length,
        });
        if let Some(template) = chat_template {
            tokenizer_config["chat_template"] = template.into();
        }
        files.extend([
            ("config.json", config_json(config, tokens, dtype).into_bytes()),
            ("generation_config.json", generation_config_json(tokens).into_bytes()),
            (paths::WEIGHTS, weights),
            (module, code.as_bytes().to_vec()),
            ("tokenizer_config.json", results::to_json(&tokenizer_config)),
            (paths::CARD, card.to_markdown().into_bytes()),
        ]);
        files
    }
}

/// What is told of a model.
struct About {
    /// What it began from.
    base: Option<String>,
    training: Vec<String>,
    data: Vec<CardData>,
}

impl About {
    fn card<'a>(&'a self, name: &'a str, config: &'a ModelConfig, chats: bool) -> ModelCard<'a> {
        ModelCard {
            name,
            config,
            base: self.base.as_deref(),
            licence: None,
            training: self.training.clone(),
            data: self.data.clone(),
            chats,
        }
    }
}

/// Writes models in Hugging Face layout: of a stage that the plan adds the one that it names, of a tuning stage its own, and
/// otherwise the average.
pub(super) fn export(run: &Run, job: &Job) -> Result<Exported, WorkerError> {
    if let Some(config) = run.plan.export.iter().find(|config| config.name == job.stage().as_str()) {
        return named(run, job, config.dtype);
    }
    let graph = run.plan.graph();
    let tuning = graph.trainings().find(|stage| stage.name.export() == *job.stage());
    let tuning = tuning.and_then(|stage| Some((stage.name, run.plan.tuning(stage.name)?)));
    if let Some((name, config)) = tuning {
        return tuned(run, job, name, config);
    }
    let config = &run.plan.model;
    let weights = average_file(run)?;
    let about = of_text(run, averaged(run)?)?;
    let export = Export {
        config,
        weights,
        dtype: WeightType::F32,
        tokenizer: &run.tokenizer()?,
        chat_template: None,
        card: about.card(run.plan.run.name.as_str(), config, false),
    };
    write(run, paths::EXPORT, export)
}

/// Writes a model that a stage of the plan names.
fn named(run: &Run, job: &Job, dtype: WeightType) -> Result<Exported, WorkerError> {
    let subject = job.subject();
    let place = match subject {
        Subject::Base => run.plan.base.as_ref().map(|base| &base.model[..]),
        Subject::Model(place) => Some(&place[..]),
        _ => None,
    };
    let base = place.map(|place| Base::read(run, place)).transpose()?;
    let tokenizer = match (&base, subject) {
        (Some(base), Subject::Model(_)) => base.tokenizer(None)?.0,
        _ => run.tokenizer()?,
    };
    let (mut about, template) = match subject {
        Subject::Tuned(name) => {
            let config = run.plan.tuning(*name).ok_or_else(|| super::no_stage(job))?;
            (of_tuning(run, *name, config)?, Some(super::examples::chat_template(run, config)?))
        }
        Subject::Last(checkpoint) | Subject::Milestone(checkpoint) => {
            (of_text(run, after_steps(run, &[*checkpoint])?)?, None)
        }
        Subject::Base | Subject::Model(_) => {
            let template = base.as_ref().map(|base| base.chat_template(&tokenizer)).transpose()?.flatten();
            let training = vec!["Its weights are those of the base.".to_owned()];
            (About { base: place.map(str::to_owned), training, data: Vec::new() }, template)
        }
        Subject::Average | Subject::Stage(_) => (of_text(run, averaged(run)?)?, None),
    };
    if dtype != WeightType::F32 {
        let stored = "Its weights are rounded from float32, with which its results were measured.";
        about.training.push(stored.to_owned());
    }
    let (shape, weights) = match base {
        Some(base) => (base.model.config, base.model.weights),
        None => (shape_of(run, subject), weights_of(run, subject)?),
    };
    let model = job.name().model().unwrap_or_default().to_owned();
    let title = format!("{}-{model}", run.plan.run.name);
    let export = Export {
        config: &shape,
        weights: weights_to_safetensors_as(&Layout::new(&shape), &weights, dtype)?,
        dtype,
        tokenizer: &tokenizer,
        chat_template: template.as_deref(),
        card: about.card(&title, &shape, template.is_some()),
    };
    write(run, &paths::exported(&job.name()), export)
}

/// Writes a folder that is a model.
fn write(run: &Run, folder: &str, export: Export<'_>) -> Result<Exported, WorkerError> {
    let mut files = BTreeMap::new();
    for (name, contents) in export.files() {
        // The card gets the results of the run when that ends.
        if name != paths::CARD {
            files.insert(name.to_owned(), FileEntry::of(&contents));
        }
        run.write(&format!("{folder}/{name}"), contents)?;
    }
    Ok(Exported { folder: folder.to_owned(), files })
}

/// Which model a tuning stage began from, for people.
fn begun_at(plan: &Plan, of: &Of) -> String {
    match (of, &plan.base) {
        (Of::Base, Some(base)) => base.model.clone(),
        (Of::Model(place), _) => place.clone(),
        _ => format!("{}/{of}", plan.run.name),
    }
}

/// The model that PEFT is to load for an adapter: a folder, where there is one.
fn base_of_adapter(plan: &Plan, of: &Of) -> String {
    let folder = match of {
        Of::Tuned(name) => paths::tuned(*name),
        Of::Average => paths::EXPORT.to_owned(),
        _ => return begun_at(plan, of),
    };
    format!("{}/{}/{folder}", plan.store.url.trim_end_matches('/'), plan.run.name)
}

/// Writes the model that a tuning stage has made, with its adapter merged, and the adapter in PEFT's layout.
fn tuned(run: &Run, job: &Job, name: StageName, config: &TuneConfig) -> Result<Exported, WorkerError> {
    let [checkpoint, origin @ ..] = job.checkpoints() else { return Err(super::no_stage(job)) };
    let model = run.plan.shape_of(&config.of);
    let (shape, merged) = match &config.adapter {
        None => {
            let layout = Layout::new(&model);
            let weights = run.wait(weights(&run.store, *checkpoint, &layout))?;
            (model, weights)
        }
        Some(adapter) => {
            let shape = AdapterShape::new(&model, adapter)?;
            let adapter = run.wait(weights(&run.store, *checkpoint, shape.layout()))?;
            let folder = paths::adapter(name);
            let described = peft::config_json(&shape, &base_of_adapter(&run.plan, &config.of));
            run.write(&format!("{folder}/{}", peft::CONFIG), described.into_bytes())?;
            let template = super::examples::chat_template(run, config)?;
            run.write(&format!("{folder}/{CHAT_TEMPLATE}"), template.into_bytes())?;
            let base = weights_of(run, &begun_from(&config.of, origin))?;
            let tensors =
                peft::to_safetensors(&shape, &adapter, Some(Digest::of(bytemuck::cast_slice(&base))))?;
            run.write(&format!("{folder}/{}", peft::WEIGHTS), tensors)?;
            (shape.merged_config(&model), shape.merge(&model, base, &adapter)?)
        }
    };
    let tokenizer = run.tokenizer()?;
    let template = super::examples::chat_template(run, config)?;
    let title = format!("{}-{name}", run.plan.run.name);
    let mut about = of_tuning(run, name, config)?;
    about.training.extend(
        tokens(run, *checkpoint)?.map(|tokens| format!("It has learned from {tokens} tokens of them.")),
    );
    let export = Export {
        config: &shape,
        weights: weights_to_safetensors(&Layout::new(&shape), &merged)?,
        dtype: WeightType::F32,
        tokenizer: &tokenizer,
        chat_template: Some(&template),
        card: about.card(&title, &shape, true),
    };
    write(run, &paths::tuned(name), export)
}

/// What is told of the model that a tuning stage has made: how the model came to be that it began from, and what it added.
fn of_tuning(run: &Run, name: StageName, config: &TuneConfig) -> Result<About, WorkerError> {
    let earlier = match &config.of {
        Of::Tuned(earlier) => run.plan.tuning(*earlier).map(|config| (*earlier, config)),
        _ => None,
    };
    let About { base, mut training, mut data } = match (earlier, &config.of) {
        (Some((earlier, config)), _) => of_tuning(run, earlier, config)?,
        (None, Of::Average | Of::Milestones) => of_text(run, averaged(run)?)?,
        (None, Of::Last) => of_text(run, Vec::new())?,
        (None, of) => About { base: Some(begun_at(&run.plan, of)), training: Vec::new(), data: Vec::new() },
    };
    let made: results::Examples = result(run, &made_by(run, name))?;
    training.push(tuning_facts(config, &made));
    let files = made.files.iter().map(|file| CardData {
        // Where a file lay on some machine is nobody's business.
        address: if file.file.contains("://") { file.file.clone() } else { name_of(&file.file).to_owned() },
        amount: counted(file.rows, "row"),
        hash: format!("BLAKE3: {}", file.hash),
    });
    for file in files {
        // Stages may learn from the same rows.
        if !data.contains(&file) {
            data.push(file);
        }
    }
    Ok(About { base, training, data })
}

fn name_of(file: &str) -> &str {
    file.rsplit('/').next().unwrap_or(file)
}

/// How a model was tuned.
fn tuning_facts(config: &TuneConfig, made: &results::Examples) -> String {
    let how = match (config.method, config.loss) {
        (Method::Sft, _) => "to imitate answers".to_owned(),
        (Method::Dpo, loss) if config.rso.is_some() => {
            let loss = format!("{loss:?}").to_lowercase();
            format!(
                "by preferences among answers that the model had sampled (RSO, {loss} loss, beta {})",
                config.beta
            )
        }
        (Method::Dpo, PreferenceLoss::Sigmoid) => format!("by preferences (DPO, beta {})", config.beta),
        (Method::Dpo, PreferenceLoss::Hinge) => format!("by preferences (hinge loss, beta {})", config.beta),
        (Method::Dpo, PreferenceLoss::Ipo) => format!("by preferences (IPO, beta {})", config.beta),
    };
    let which = match &config.adapter {
        None => "All weights were trained",
        Some(adapter) if adapter.kind == AdapterKind::Dora => "A DoRA adapter was trained",
        Some(_) => "A LoRA adapter was trained",
    };
    let from = config.adapter.as_ref().and_then(|adapter| adapter.from.as_deref());
    let from = from.map(|from| format!(" from {}", name_of(from.trim_end_matches('/')))).unwrap_or_default();
    let rows = if config.rso.is_some() { "pair" } else { "row" };
    format!(
        "{which}{from} {how}, for {} of {} out of {}.",
        counted(made.updates, "update"),
        counted(config.batch.min(made.kept), "example"),
        counted(made.kept, rows)
    )
}

/// The model that a stage began from; of the last milestone, the job names the checkpoint.
fn begun_from(of: &Of, origin: &[CheckpointId]) -> Subject {
    match (of, origin) {
        (Of::Last | Of::Milestones, [checkpoint, ..]) => Subject::Last(*checkpoint),
        (Of::Base, _) => Subject::Base,
        (Of::Tuned(name), _) => Subject::Tuned(*name),
        (Of::Model(place), _) => Subject::Model(place.clone()),
        (Of::Average | Of::Last | Of::Milestones, _) => Subject::Average,
    }
}

/// What is told of a model that was trained on text; `weights` says which of its weights these are.
fn of_text(run: &Run, weights: Vec<String>) -> Result<About, WorkerError> {
    let Plan { train, base, .. } = &*run.plan;
    let base = base.as_ref().map(|base| base.model.clone());
    let begun = match &base {
        Some(base) => format!("the weights of {base}"),
        None => format!("random weights (seed {})", run.plan.run.seed),
    };
    let mut training = vec![format!(
        "It was trained from {begun} for {} steps of {} sequences of up to {} tokens.",
        train.iterations,
        train.sequences,
        run.plan.sequence_length()
    )];
    training.extend(weights);
    Ok(About { base, training, data: data(run)? })
}

/// Which weights the average has.
fn averaged(run: &Run) -> Result<Vec<String>, WorkerError> {
    // Of an average without a manifest, the weights could not have been read.
    let average: Option<Average> = serde_json::from_slice(&run.read(paths::AVERAGE_MANIFEST)?).ok();
    after_steps(run, &average.map(|average| average.checkpoints).unwrap_or_default())
}

/// Which weights a model has that is the mean of these checkpoints.
fn after_steps(run: &Run, checkpoints: &[CheckpointId]) -> Result<Vec<String>, WorkerError> {
    let Some(last) = checkpoints.last() else { return Ok(Vec::new()) };
    let steps: Vec<String> = checkpoints.iter().map(|id| id.step().to_string()).collect();
    let which = match &steps[..] {
        [only] => format!("Its weights are those after step {only}."),
        _ => format!("Its weights are the mean of those after steps {}.", steps.join(", ")),
    };
    let which_tokens =
        if steps.len() > 1 { "The last of them has been trained" } else { "It has been trained" };
    let tokens = tokens(run, *last)?.map(|tokens| format!("{which_tokens} on {tokens} tokens."));
    Ok(std::iter::once(which).chain(tokens).collect())
}

/// The number of tokens that a checkpoint has been trained on, if it is still there.
fn tokens(run: &Run, checkpoint: CheckpointId) -> Result<Option<u64>, WorkerError> {
    let read = async {
        let manifest = read_manifest(&run.store, checkpoint).await?;
        read_file(&run.store, &manifest, paths::STATE).await
    };
    match run.wait(read) {
        Ok(state) => Ok(TrainState::from_json(&state).ok().map(|state| state.tokens)),
        Err(CheckpointError::NoManifest(_)) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// What the run has read.
fn data(run: &Run) -> Result<Vec<CardData>, WorkerError> {
    let manifest = Manifest::from_json(&run.read(paths::DATA_MANIFEST)?)?;
    let of_source = |source: SourceSummary| CardData {
        // Folders of this machine are nobody else's business.
        address: if source.address.contains("://") { source.address } else { source.name },
        amount: format!("{} files, {} bytes", source.files, source.bytes),
        hash: format!("BLAKE3 of names, sizes and units: {}", source.digest),
    };
    Ok(manifest.summary(&run.plan.data).into_iter().map(of_source).collect())
}
