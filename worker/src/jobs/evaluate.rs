//! Evaluates finished models on held-out text: perplexity, and continuations for people to read.

use std::sync::Arc;

use ulmus_backend::Backend;
use ulmus_evaluator::{continuations, perplexity};
use ulmus_model::Model;
use ulmus_plan::OnBadUnit;
use ulmus_process::with_causes;
use ulmus_run::results::{Continuation, Continuations, Measured, Perplexity};
use ulmus_tokenizer::Tokenizer;
use ulmus_types::CheckpointId;

use super::prepare::no_held_out;
use super::subject::of_checkpoint;
use crate::WorkerError;
use crate::run::Run;

/// The text on which finished models are measured.
pub(super) struct HeldOut {
    tokenizer: Tokenizer,
    /// Held-out documents in their fixed order, up to the plan's limit.
    pub(super) texts: Vec<String>,
    /// Units that had to be skipped, and why.
    pub(super) left_out: Vec<String>,
}

/// Reads the text on which finished models are measured, or says why there is none.
///
/// If it `may_report`, a unit that cannot be read is reported as in training, as long as the coordinator may still
/// quarantine it. Otherwise it is skipped here alone: a finished run must not depend forever on a file that only its evaluation needs.
pub(super) fn held_out(
    run: &Run,
    say: &dyn Fn(String),
    may_report: bool,
) -> Result<Result<HeldOut, String>, WorkerError> {
    let limit = run.plan.evaluate.text.get();
    if limit == 0 {
        return Ok(Err("evaluate.text is 0".to_owned()));
    }
    let data = &run.plan.data;
    let quarantined = run.quarantine()?.len() as u64;
    let reports = may_report && data.on_bad_unit == OnBadUnit::Quarantine && quarantined < data.max_bad_units;
    // A token is at least one byte of text, so this many sequences contain enough.
    let length = run.plan.sequence_length();
    let sequences = limit.div_ceil(length as u64) as usize;
    let mut corpus = run.corpus()?;
    let mut left_out = Vec::new();
    let texts = loop {
        let error = match corpus.held_out(length, sequences) {
            Ok(held_out) => break held_out.texts,
            Err(error) => WorkerError::from(error),
        };
        let Some(unit) = error.bad_unit().filter(|_| !reports) else { return Err(error) };
        let why = format!("{unit} is skipped in the evaluation: {}", with_causes(&error));
        say(why.clone());
        left_out.push(why);
        corpus = corpus.without([&unit]);
    };
    let mut bytes = 0;
    let mut fits = |text: &String| {
        let fits = bytes == 0 || bytes + text.len() as u64 <= limit;
        bytes += text.len() as u64;
        fits
    };
    let texts: Vec<String> =
        texts.into_iter().filter(|text| !text.is_empty()).take_while(&mut fits).collect();
    if texts.is_empty() {
        return Ok(Err([vec![no_held_out(&run.plan)], left_out].concat().join("; ")));
    }
    Ok(Ok(HeldOut { tokenizer: corpus.tokenizer().clone(), texts, left_out }))
}

pub(super) fn evaluate<B: Backend>(
    run: &Run,
    say: &dyn Fn(String),
    model: impl FnOnce() -> Result<Arc<Model<B>>, WorkerError>,
) -> Result<Measured<Perplexity>, WorkerError> {
    let HeldOut { tokenizer, texts, left_out } = match held_out(run, say, true)? {
        Ok(held_out) => held_out,
        Err(skipped) => return Ok(Measured::Skipped { skipped }),
    };
    let result = perplexity(&model()?, &tokenizer, &texts, run.plan.sequence_length())?;
    Ok(Measured::Done { result, left_out })
}

/// Continues the same held-out text with the model at several points of its training.
pub(super) fn continue_text<B: Backend>(
    run: &Run,
    say: &dyn Fn(String),
    checkpoints: &[CheckpointId],
    backend: &B,
) -> Result<Measured<Continuations>, WorkerError> {
    let HeldOut { tokenizer, texts, left_out } = match held_out(run, say, true)? {
        Ok(held_out) => held_out,
        Err(skipped) => return Ok(Measured::Skipped { skipped }),
    };
    let config = &run.plan.evaluate;
    let mut prompt = String::new();
    let mut written = Vec::new();
    for checkpoint in checkpoints {
        let model = of_checkpoint(run, *checkpoint, backend)?;
        let (start, length) = (config.prompt as usize, config.continuation as usize);
        for continuation in continuations(&model, &tokenizer, &texts[..1], start, length)? {
            prompt = continuation.prompt;
            written.push(Continuation { checkpoint: *checkpoint, text: continuation.text });
        }
    }
    Ok(Measured::Done { result: Continuations { prompt, continuations: written }, left_out })
}
