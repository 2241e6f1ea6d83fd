//! Samples answers of a model to the prompts of a tuning stage.
//!
//! Some prompts at a time go to a file, under a hash of everything on which their answers depend. Workers share these files among
//! them, and what an earlier start has sampled is used again.

use std::ops::Range;

use ulmus_backend::{Backend, WeightFormat};
use ulmus_chat::Item;
use ulmus_checkpoint::StoreError;
use ulmus_model::{Generator, ModelError, Sampler, Sampling};
use ulmus_plan::{RsoConfig, TuneConfig};
use ulmus_run::paths::{self, ExampleSet};
use ulmus_run::results;
use ulmus_tokenizer::Tokenizer;
use ulmus_types::{Digest, Job, JobName, StageName};

use super::examples::tuning_of;
use super::subject;
use crate::WorkerError;
use crate::examples::{Kept, result, stored};
use crate::rso::{Answers, RewardHead, from_lines, to_lines};
use crate::run::Run;

/// Prompts whose answers are kept in one file.
const PROMPTS_PER_FILE: usize = 16;
/// Answers that are sampled side by side.
const SIDE_BY_SIDE: usize = 32;
/// How hard zstd tries.
const LEVEL: i32 = 3;

/// Samples the answers that a job is asked for.
pub(super) fn sample<B: Backend>(
    run: &Run,
    job: &Job,
    backend: &B,
    say: &dyn Fn(String),
) -> Result<results::Candidates, WorkerError> {
    let (tuning, config) = tuning_of(run, job, StageName::candidates)?;
    let rso = config.rso.as_ref().ok_or_else(|| super::no_stage(job))?;
    let made = result(run, &JobName::stored(tuning.examples().to_string()))?;
    let prompts = prompts_of(run, tuning, rso, &made)?;
    let (model, origin) = subject::model_and_digest(run, job, backend, WeightFormat::F32)?;
    let head = rso.reward_head.as_ref().map(|_| head(run, tuning, config, model.config().model_dim));
    let sampled = Sampled {
        tokenizer: &run.tokenizer()?,
        head: head.transpose()?,
        seed: rso.seed.or(config.seed).unwrap_or(run.plan.run.seed),
        length: config.max_length as usize,
        rso,
    };
    let folder = paths::sampled(tuning, sampled.key(origin, &prompts));
    let files: Vec<&[Prompt]> = prompts.chunks(PROMPTS_PER_FILE).collect();
    let share = job.part().map_or(0..files.len(), |part| part.share(files.len()));
    let mut generator = Generator::with_sequences(model, sampled.length, SIDE_BY_SIDE)?;
    let mut all = Vec::new();
    for at in share {
        let path = format!("{folder}/{at:08}.jsonl.zst");
        let known = load(run, &path)?.filter(|known| known.len() == files[at].len());
        if let Some(known) = known {
            all.extend(known);
            continue;
        }
        let answers = files[at].iter().map(|prompt| sampled.answers(&mut generator, prompt));
        let answers: Vec<Answers> = answers.collect::<Result<_, ModelError>>()?;
        run.write(&path, compressed(&to_lines(&answers)))?;
        all.extend(answers);
    }
    let lines = to_lines(&all);
    let found = results::Candidates {
        prompts: all.len() as u64,
        answers: all.iter().map(|answers| answers.answers.len() as u64).sum(),
        digest: Digest::of(&lines),
    };
    if job.part().is_none() {
        let path = paths::candidates(tuning);
        run.write(&path, lines)?;
        say(format!(
            "{tuning}: {} different answers to {} prompts are in {path}",
            found.answers, found.prompts
        ));
    }
    Ok(found)
}

/// A prompt and its number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Prompt {
    number: u64,
    pub(super) ids: Vec<u32>,
}

/// The prompts that were found to be `made` of the rows of a stage.
pub(super) fn prompts_of(
    run: &Run,
    tuning: StageName,
    rso: &RsoConfig,
    made: &results::Examples,
) -> Result<Vec<Prompt>, WorkerError> {
    let job = JobName::stored(tuning.examples().to_string());
    let kept = if rso.reward_head.is_some() {
        let sets = [ExampleSet::Data, ExampleSet::Eval, ExampleSet::Reward];
        let [kept, ..] = stored(run, tuning, sets, made, &job)?;
        kept
    } else {
        let [kept, _] = stored(run, tuning, [ExampleSet::Data, ExampleSet::Eval], made, &job)?;
        kept
    };
    let prompts = kept.into_iter().filter_map(|Kept { row, item }| match item {
        Item::Prompt(ids) => Some(Prompt { number: row, ids }),
        Item::Example(_) | Item::Pair(_) => None,
    });
    Ok(prompts.collect())
}

/// The reward head of a stage.
fn head(run: &Run, tuning: StageName, config: &TuneConfig, width: usize) -> Result<RewardHead, WorkerError> {
    let job = config.of.job_name(tuning.reward());
    let results::RewardHead { digest, .. } = result(run, &job)?;
    let file = paths::reward_head(tuning);
    let head = RewardHead::from_bytes(&run.read_own(&file)?, width);
    head.filter(|head| Digest::of(bytemuck::cast_slice(head.values())) == digest).ok_or_else(|| {
        let reason = format!("its hash is not the one in the result of {job}");
        WorkerError::Damaged { file, reason, act: "put back a copy of it, or give the stage another name" }
    })
}

/// How answers are sampled.
struct Sampled<'a> {
    tokenizer: &'a Tokenizer,
    rso: &'a RsoConfig,
    head: Option<RewardHead>,
    seed: u64,
    /// The most tokens of a prompt and an answer.
    length: usize,
}

impl Sampled<'_> {
    /// A hash of everything on which answers depend; `origin` is that of the weights.
    fn key(&self, origin: Digest, prompts: &[Prompt]) -> Digest {
        let RsoConfig { candidates, temperature, top_k, .. } = self.rso;
        let head = self.head.as_ref().map(|head| Digest::of(bytemuck::cast_slice(head.values())).to_string());
        let (head, seed, length) = (head.unwrap_or_default(), self.seed, self.length);
        let ids: Vec<u8> = prompts
            .iter()
            .flat_map(|prompt| std::iter::once(prompt.ids.len() as u32).chain(prompt.ids.iter().copied()))
            .flat_map(u32::to_le_bytes)
            .collect();
        let prompts = Digest::of(&ids);
        let text = format!(
            "ulmus candidates, form 1\n{origin}\n{head}\n{prompts}\n{candidates} {temperature:?} {top_k}\n{seed} {length}\n"
        );
        Digest::of(text.as_bytes())
    }

    /// The answers to a prompt: neither two equal ones nor blank ones.
    fn answers<B: Backend>(
        &self,
        generator: &mut Generator<B>,
        prompt: &Prompt,
    ) -> Result<Answers, ModelError> {
        let candidates = self.rso.candidates;
        let mut found = Answers {
            number: prompt.number,
            prompt: self.tokenizer.decode(&prompt.ids),
            answers: Vec::new(),
            ids: Vec::new(),
            scores: self.head.as_ref().map(|_| Vec::new()),
        };
        let mut first = 0;
        while first < candidates {
            let some = first..candidates.min(first + SIDE_BY_SIDE as u64);
            first = some.end;
            for Answer { ids, score } in self.side_by_side(generator, prompt, some)? {
                let without_end = ids.strip_suffix(&[self.tokenizer.eos()]).unwrap_or(&ids);
                let text = self.tokenizer.decode(without_end);
                if text.trim().is_empty() || found.answers.contains(&text) {
                    continue;
                }
                found.answers.push(text);
                found.ids.push(ids);
                found.scores.iter_mut().for_each(|scores| scores.extend(score));
            }
        }
        Ok(found)
    }

    /// Samples some of the answers to a prompt, each of a random stream of its own.
    fn side_by_side<B: Backend>(
        &self,
        generator: &mut Generator<B>,
        prompt: &Prompt,
        candidates: Range<u64>,
    ) -> Result<Vec<Answer>, ModelError> {
        let RsoConfig { temperature, top_k, .. } = self.rso;
        let sampling = Sampling::new(*temperature as f32, Some(*top_k as usize), 1.0);
        let sampling = sampling.map_err(ModelError::Batch)?;
        let stream = |candidate| prompt.number.wrapping_mul(self.rso.candidates).wrapping_add(candidate);
        let mut samplers: Vec<Sampler> =
            candidates.map(|candidate| Sampler::new(sampling, self.seed, stream(candidate))).collect();
        generator.reset();
        let logits = generator.feed_to(0, &prompt.ids)?;
        let begun =
            samplers.iter_mut().map(|sampler| Answer { ids: vec![sampler.choose(logits)], score: None });
        let mut answers: Vec<Answer> = begun.collect();
        generator.fork(&(1..answers.len()).map(|to| (0, to)).collect::<Vec<_>>())?;
        let eos = self.tokenizer.eos();
        let is_whole = |answer: &Answer| {
            answer.ids.last() == Some(&eos) || prompt.ids.len() + answer.ids.len() >= self.length
        };
        let mut open: Vec<usize> = (0..answers.len()).collect();
        loop {
            // A head scores the state after the last token, so the model reads that, too.
            if self.head.is_none() {
                open.retain(|at| !is_whole(&answers[*at]));
            }
            if open.is_empty() {
                return Ok(answers);
            }
            let tokens: Vec<(usize, u32)> =
                open.iter().filter_map(|at| Some((*at, *answers[*at].ids.last()?))).collect();
            let logits = generator.feed_each(&tokens)?;
            let of_each = logits.chunks_exact(logits.len() / open.len());
            let next = open
                .iter()
                .zip(of_each)
                .map(|(at, logits)| (!is_whole(&answers[*at])).then(|| samplers[*at].choose(logits)));
            let next: Vec<Option<u32>> = next.collect();
            if let Some(head) = &self.head
                && next.contains(&None)
            {
                let states = generator.states(open.len());
                let of_each = states.chunks_exact(states.len() / open.len());
                for ((at, state), _) in open.iter().zip(of_each).zip(&next).filter(|(_, next)| next.is_none())
                {
                    answers[*at].score = Some(head.score(state));
                }
            }
            for (at, token) in open.iter().zip(&next) {
                answers[*at].ids.extend(token);
            }
            let mut next = next.iter();
            open.retain(|_| next.next().is_some_and(Option::is_some));
        }
    }
}

/// A sampled answer, and its score if there is a reward head.
struct Answer {
    ids: Vec<u32>,
    score: Option<f64>,
}

fn compressed(lines: &[u8]) -> Vec<u8> {
    let write = || -> std::io::Result<Vec<u8>> {
        let mut encoder = zstd::Encoder::new(Vec::new(), LEVEL)?;
        encoder.include_checksum(true)?;
        std::io::Write::write_all(&mut encoder, lines)?;
        encoder.finish()
    };
    write().expect("memory can be written")
}

/// The answers in a file, if it is there and whole. One that is damaged is told, and as good as not there.
fn load(run: &Run, path: &str) -> Result<Option<Vec<Answers>>, WorkerError> {
    let bytes = match run.read(path) {
        Err(StoreError::NotFound { .. }) => return Ok(None),
        bytes => bytes?,
    };
    // zstd compares a checksum.
    let lines = zstd::decode_all(&bytes[..]).map_err(|error| error.to_string());
    let answers = lines.and_then(|lines| from_lines(&lines));
    if let Err(reason) = &answers {
        tracing::warn!("{path} is damaged ({reason}); what it held is sampled again");
    }
    Ok(answers.ok())
}
