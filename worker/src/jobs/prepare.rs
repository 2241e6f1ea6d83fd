//! Prepares what the first step needs: shards, the tokenizer, and the frozen manifest of all data.

use std::collections::BTreeMap;
use std::sync::Arc;

use ulmus_dataloader::{Corpus, Manifest, cargo_home, template_files, tokenizer_folder};
use ulmus_plan::Plan;
use ulmus_run::paths;
use ulmus_run::results::{Prepared, Shards};
use ulmus_tokenizer::Tokenizer;
use ulmus_types::Digest;

use super::base::Base;
use super::subject::must_be;
use crate::WorkerError;
use crate::run::Run;

/// How much text is searched for a held-out document before training, in bytes. With the published share, one document
/// in 2,000 is held out.
const LOOK_FOR_HELD_OUT: u64 = 1 << 30;

/// Makes shards and tokenizer if the plan asks for them, and the frozen manifest of all data. Of a run that begins from a base
/// model and reads no text, only the tokenizer.
pub(super) fn prepare(run: &Run, say: &dyn Fn(String)) -> Result<Prepared, WorkerError> {
    let plan = &run.plan;
    let base = plan.base.as_ref().map(|base| Base::read(run, &base.model)).transpose()?;
    if let (Some(config), Some(base)) = (&plan.base, &base) {
        must_be(&plan.model, &base.model.config, &config.model)?;
    }
    // What says how the tokenizer is used stays beside it.
    for (name, contents) in tokenizer_folder(plan)?.as_ref().map_or(Ok(Vec::new()), template_files)? {
        run.write(name, contents)?;
    }
    let weights = base.as_ref().map(|base| Digest::of(bytemuck::cast_slice(&base.model.weights)));
    if !plan.pretrains() {
        let tokenizer = tokenizer(run, base.as_ref(), None)?;
        must_fit(&tokenizer, plan)?;
        keep_tokenizer(run, &tokenizer)?;
        return Ok(Prepared {
            prepared: None,
            files: 0,
            bytes: 0,
            manifest: Digest::of(b""),
            pieces: tokenizer.pieces(),
            tokenizer: tokenizer.digest(),
            base: weights,
            held_out: None,
        });
    }
    let shards = match &plan.prepare {
        Some(config) => {
            let shards = run.folder().child(paths::SHARDS);
            let prepared = ulmus_dataloader::prepare(config, &cargo_home(), plan.data.unit.get(), &shards)?;
            Some(Shards {
                summary: prepared.summary(),
                shards: prepared.shards,
                documents: prepared.documents,
                bytes: prepared.bytes,
                digest: prepared.digest,
                found: prepared.found,
                taken: prepared.documents,
                passed_by: prepared.passed_by,
            })
        }
        None => None,
    };
    let manifest = Manifest::freeze(&plan.data, Some(&run.folder()))?;
    let tokenizer = tokenizer(run, base.as_ref(), Some(&manifest))?;
    let manifest = manifest.with_tokenizer(&tokenizer);
    must_fit(&tokenizer, plan)?;
    keep_tokenizer(run, &tokenizer)?;
    run.write(paths::DATA_MANIFEST, manifest.to_json())?;
    let (pieces, tokenizer_digest) = (tokenizer.pieces(), tokenizer.digest());
    let corpus = Arc::new(run.corpus_of(&manifest, tokenizer)?);
    must_hold_text(run, &corpus)?;
    let held_out = corpus.holds_out_any(LOOK_FOR_HELD_OUT)?;
    if held_out == Some(false) {
        say(nothing_to_measure(plan));
    }
    Ok(Prepared {
        prepared: shards,
        files: manifest.files(),
        bytes: manifest.bytes(),
        manifest: manifest.digest(),
        pieces,
        tokenizer: tokenizer_digest,
        base: weights,
        held_out,
    })
}

/// Checks that the model's vocabulary has room for the tokenizer, so that the exported model can be loaded. A base may have no row
/// beside those of the pieces: OpenELM's published weights have none.
fn must_fit(tokenizer: &Tokenizer, plan: &Plan) -> Result<(), WorkerError> {
    let (pieces, rows) = (tokenizer.pieces(), plan.model.vocab_size);
    let needed = rows_needed(plan, pieces);
    if needed <= rows {
        return Ok(());
    }
    Err(WorkerError::Plan(format!(
        "the tokenizer has {pieces} pieces and needs {needed} rows of model.vocab_size = {rows}; {}",
        more_rows(plan, pieces)
    )))
}

/// Rows of the vocabulary that a tokenizer with so many pieces needs: one for each, and one for padding where the model begins here.
/// A base may have none.
pub(crate) fn rows_needed(plan: &Plan, pieces: usize) -> usize {
    pieces + usize::from(plan.base.is_none())
}

/// What to do if there are fewer.
pub(crate) fn more_rows(plan: &Plan, pieces: usize) -> String {
    if plan.base.is_some() {
        return "name the tokenizer of the base model".to_owned();
    }
    format!("set it to {}", rows_needed(plan, pieces).next_multiple_of(128))
}

/// What a person must know before a run without held-out documents trains.
fn nothing_to_measure(plan: &Plan) -> String {
    let measures = match plan.train.held_out_every {
        0 => String::new(),
        every => format!("; train.held_out_every is {every}, but there will be no held-out loss"),
    };
    format!(
        "{}: the models will be averaged and timed, but not evaluated, and no text will be continued{measures}; to evaluate \
         them, stop now and start a run with another name and a larger data.holdout, or with more and smaller documents",
        no_held_out(plan)
    )
}

pub(super) fn no_held_out(plan: &Plan) -> String {
    match plan.data.holdout {
        0.0 => "no text is held out, because data.holdout is 0".to_owned(),
        share => format!("no document is held out: none falls into the share data.holdout = {share}"),
    }
}

/// The file from which a tokenizer was read and, if it can be made, its `tokenizer.json`.
pub(super) fn tokenizer_files(tokenizer: &Tokenizer) -> BTreeMap<&'static str, Vec<u8>> {
    let json = tokenizer.to_json().map(|json| (paths::TOKENIZER_JSON, json.into_bytes()));
    let (name, contents) = tokenizer.file();
    json.into_iter().chain([(name, contents.to_vec())]).collect()
}

/// Keeps the tokenizer, and the plan beside it.
fn keep_tokenizer(run: &Run, tokenizer: &Tokenizer) -> Result<(), WorkerError> {
    for (name, contents) in tokenizer_files(tokenizer) {
        run.write(name, contents)?;
    }
    // On a disk it is there already; in an object store the coordinator keeps it to itself, and other runs could not read
    // this run's models.
    run.write_new(paths::PLAN, run.plan.to_toml().into_bytes())?;
    Ok(())
}

/// The tokenizer that the plan names, or else that of the base, or one trained on the run's own text.
fn tokenizer(run: &Run, base: Option<&Base>, manifest: Option<&Manifest>) -> Result<Tokenizer, WorkerError> {
    let config = &run.plan.tokenizer;
    if let Some(path) = &config.file {
        let bytes = std::fs::read(path).map_err(|error| WorkerError::File { path: path.clone(), error })?;
        return Ok(Tokenizer::read(&bytes, path, config.bos.as_deref(), config.eos.as_deref())?);
    }
    let manifest = match (base, manifest) {
        (Some(base), _) => return Ok(base.tokenizer(None)?.0),
        (None, Some(manifest)) => manifest,
        (None, None) => return Err(WorkerError::Plan("a run needs a base or text".to_owned())),
    };
    let sources = ulmus_dataloader::Sources::open(&run.plan.data, manifest, Some(&run.folder()))?;
    let sample = sources.sample(config.sample.get())?;
    Ok(ulmus_tokenizer::train(&sample, config.pieces as usize)?)
}

/// Fails now, rather than in the first step, if the filters leave no text.
fn must_hold_text(run: &Run, corpus: &Arc<Corpus>) -> Result<(), WorkerError> {
    let start = corpus.start();
    let first: Vec<_> = corpus.lanes().take(1).collect();
    let mut loader =
        ulmus_dataloader::Loader::open(Arc::clone(corpus), run.plan.sequence_length(), &first, &start)?;
    loader.take(&first, 1)?;
    Ok(())
}
