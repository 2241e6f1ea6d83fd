//! Exports a model in Hugging Face layout: weights, config, the model's code for transformers, tokenizer, and a card.

use std::collections::BTreeMap;

use serde_json::json;
use ulmus_checkpoint::{CheckpointError, read_file, read_manifest};
use ulmus_dataloader::{Manifest, SourceSummary};
use ulmus_model::hf::{MODELING, SpecialTokens, config_json, generation_config_json};
use ulmus_model::{AdapterShape, CardData, Layout, ModelCard, peft, weights_to_safetensors};
use ulmus_plan::{AdapterKind, Method, ModelConfig, Plan, PreferenceLoss, TuneConfig};
use ulmus_run::results::{self, Average, Exported};
use ulmus_run::{TrainState, paths};
use ulmus_tokenizer::Tokenizer;
use ulmus_types::{CheckpointId, FileEntry, Job, Of, StageName, Subject, counted};

use super::average::average_file;
use super::prepare::tokenizer_files;
use super::subject::weights_of;
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
        let Self { config, weights, tokenizer, chat_template, card } = self;
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
            ("config.json", config_json(config, tokens).into_bytes()),
            ("generation_config.json", generation_config_json(tokens).into_bytes()),
            (paths::WEIGHTS, weights),
            (module, code.as_bytes().to_vec()),
            ("tokenizer_config.json", results::to_json(&tokenizer_config)),
            ("README.md", card.to_markdown().into_bytes()),
        ]);
        files
    }
}

/// Writes a model in Hugging Face layout: of a tuning stage its own, and otherwise the average.
pub(super) fn export(run: &Run, job: &Job) -> Result<Exported, WorkerError> {
    let graph = run.plan.graph();
    let tuning = graph.trainings().find(|stage| stage.name.export() == *job.stage());
    let tuning = tuning.and_then(|stage| Some((stage.name, run.plan.tuning(stage.name)?)));
    if let Some((name, config)) = tuning {
        return tuned(run, job, name, config);
    }
    let plan = &run.plan;
    let tokenizer = run.tokenizer()?;
    let weights = average_file(run)?;
    let card = ModelCard {
        name: plan.run.name.as_str(),
        config: &plan.model,
        base: plan.base.as_ref().map(|base| &base.model[..]),
        licence: None,
        training: training(run)?,
        data: data(run)?,
        results: Vec::new(),
        chats: false,
    };
    let export = Export { config: &plan.model, weights, tokenizer: &tokenizer, chat_template: None, card };
    write(run, paths::EXPORT, export)
}

/// Writes a folder that is a model.
fn write(run: &Run, folder: &str, export: Export<'_>) -> Result<Exported, WorkerError> {
    let mut files = BTreeMap::new();
    for (name, contents) in export.files() {
        files.insert(name.to_owned(), FileEntry::of(&contents));
        run.write(&format!("{folder}/{name}"), contents)?;
    }
    Ok(Exported { folder: folder.to_owned(), files })
}

/// Where the model is that a tuning stage began from, for people and for PEFT.
fn begun_at(plan: &Plan, of: &Of) -> String {
    match (of, &plan.base) {
        (Of::Base, Some(base)) => base.model.clone(),
        (Of::Model(place), _) => place.clone(),
        _ => format!("{}/{of}", plan.run.name),
    }
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
            let described = peft::config_json(&shape, &begun_at(&run.plan, &config.of));
            run.write(&format!("{folder}/{}", peft::CONFIG), described.into_bytes())?;
            run.write(&format!("{folder}/{}", peft::WEIGHTS), peft::to_safetensors(&shape, &adapter)?)?;
            let base = weights_of(run, &begun_from(&config.of, origin))?;
            (shape.merged_config(&model), shape.merge(&model, base, &adapter)?)
        }
    };
    let tokenizer = run.tokenizer()?;
    let template = super::examples::chat_template(run, config, &tokenizer)?;
    let title = format!("{}-{name}", run.plan.run.name);
    let base = begun_at(&run.plan, &config.of);
    let made = result(run, &made_by(run, name))?;
    let card = ModelCard {
        name: &title,
        config: &shape,
        base: Some(&base),
        licence: None,
        training: vec![tuning_facts(config, &made)],
        data: made
            .files
            .iter()
            .map(|file| CardData {
                address: if file.file.contains("://") { file.file.clone() } else { "a file".to_owned() },
                amount: counted(file.rows, "row"),
                hash: format!("BLAKE3: {}", file.hash),
            })
            .collect(),
        results: Vec::new(),
        chats: true,
    };
    let export = Export {
        config: &shape,
        weights: weights_to_safetensors(&Layout::new(&shape), &merged)?,
        tokenizer: &tokenizer,
        chat_template: Some(&template),
        card,
    };
    write(run, &paths::tuned(name), export)
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
    format!(
        "{which} {how}, for {} of {} out of {}.",
        counted(made.updates, "update"),
        counted(config.batch.min(made.kept), "example"),
        counted(made.kept, "row")
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

/// How the average was trained.
fn training(run: &Run) -> Result<Vec<String>, WorkerError> {
    let train = &run.plan.train;
    let mut facts = vec![format!(
        "It was trained from random weights (seed {}) for {} steps of {} sequences of up to {} tokens.",
        run.plan.run.seed,
        train.iterations,
        train.sequences,
        run.plan.sequence_length()
    )];
    // Of an average without a manifest, the weights could not have been read.
    let average: Option<Average> = serde_json::from_slice(&run.read(paths::AVERAGE_MANIFEST)?).ok();
    let checkpoints = average.map(|average| average.checkpoints).unwrap_or_default();
    if let Some(last) = checkpoints.last() {
        let steps: Vec<String> = checkpoints.iter().map(|id| id.step().to_string()).collect();
        facts.push(match &steps[..] {
            [only] => format!("Its weights are those after step {only}."),
            _ => format!("Its weights are the mean of those after steps {}.", steps.join(", ")),
        });
        facts.extend(
            tokens(run, *last)?
                .map(|tokens| format!("The last of them has been trained on {tokens} tokens.")),
        );
    }
    Ok(facts)
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
