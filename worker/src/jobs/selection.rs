//! Makes pairs of the answers that were sampled for a tuning stage, by their scores.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use ulmus_chat::{Item, Pair, Viewer};
use ulmus_dataloader::read_named;
use ulmus_plan::{OnUseless, RsoConfig, TuneConfig};
use ulmus_run::paths::{self, ExampleSet};
use ulmus_run::results::{self, Dropped, Examples, RowsOf};
use ulmus_types::{Digest, Job, JobName, StageName, counted};

use super::candidates::prompts_of;
use super::examples::{numbered, tuning_of, updates};
use crate::WorkerError;
use crate::examples::{digest_of, result};
use crate::rso::{Answers, accept, from_lines, pairs, scores_from_lines};
use crate::run::Run;

/// Pairs that are shown to people.
const SHOWN: usize = 3;

/// Selects answers for the tuning stage that a job is for.
pub(super) fn select(run: &Run, job: &Job, say: &dyn Fn(String)) -> Result<Examples, WorkerError> {
    let (tuning, config) = tuning_of(run, job, StageName::selection)?;
    let rso = config.rso.as_ref().ok_or_else(|| super::no_stage(job))?;
    let prompts: Examples = result(run, &JobName::stored(tuning.examples().to_string()))?;
    let all = answers(run, tuning, config)?;
    let scored = scores(run, tuning, rso, &all)?;
    let seed = rso.seed.or(config.seed).unwrap_or(run.plan.run.seed);
    let mut chosen = Chosen::default();
    let asked = prompts_of(run, tuning, rso, &prompts)?;
    for ((answers, scores), prompt) in all.iter().zip(&scored.scores).zip(&asked) {
        chosen.choose(answers, scores, &prompt.ids, config.on_useless, rso, seed);
    }
    let Chosen { items, equal, alone } = chosen;
    let (rows, kept) = (items.len() as u64 + equal.rows + alone.rows, items.len() as u64);
    let dropped: Vec<Dropped> = [
        equal.dropped("the scores of both answers are equal", tuning),
        alone.dropped("a prompt has no two different answers", tuning),
    ]
    .into_iter()
    .flatten()
    .collect();
    if items.is_empty() {
        return Err(WorkerError::Plan(format!(
            "tune {tuning}: the answers to {} make no pair: of none, two with different scores were accepted; look at {}, and raise beta, accept, temperature or candidates",
            counted(all.len() as u64, "prompt"),
            paths::candidates(tuning)
        )));
    }
    let tokenizer = run.tokenizer()?;
    let viewer = Viewer::new(&tokenizer);
    let shown: Vec<String> = (1..)
        .zip(items.iter().take(SHOWN))
        .map(|(number, item)| format!("pair {number} of sampled answers: {}", viewer.show(item)))
        .collect();
    let mut files = vec![(ExampleSet::Pairs, numbered(items))];
    if prompts.held_out > 0 {
        let eval = run.read_own(&paths::examples(tuning, ExampleSet::Eval))?;
        files.push((ExampleSet::Eval, eval));
    }
    let digest = digest_of(&files);
    let (set, bytes) = files.swap_remove(0);
    run.write(&paths::examples(tuning, set), bytes)?;
    run.write(&paths::shown_examples(tuning), shown.join("\n").into_bytes())?;
    say(format!("{tuning}: {kept} of {rows} pairs of sampled answers are kept"));
    Ok(Examples {
        rows,
        kept,
        dropped,
        updates: updates(tuning, config, kept)?,
        held_out: prompts.held_out,
        files: prompts.files.into_iter().chain(scored.file).collect(),
        digest,
        elsewhere: prompts.elsewhere,
    })
}

/// The answers that were sampled.
fn answers(run: &Run, tuning: StageName, config: &TuneConfig) -> Result<Vec<Answers>, WorkerError> {
    let job = config.of.job_name(tuning.candidates());
    let results::Candidates { digest, .. } = result(run, &job)?;
    let file = paths::candidates(tuning);
    let lines = run.read_own(&file)?;
    let answers = if Digest::of(&lines) == digest {
        from_lines(&lines)
    } else {
        Err(format!("its hash is not the one in the result of {job}"))
    };
    answers.map_err(|reason| WorkerError::Damaged {
        file,
        reason,
        act: "put back what was sampled; scores belong into a file of their own",
    })
}

/// The scores of all answers, and the file that they are from.
struct Scored {
    scores: Vec<Vec<f64>>,
    file: Option<RowsOf>,
}

fn scores(run: &Run, tuning: StageName, rso: &RsoConfig, all: &[Answers]) -> Result<Scored, WorkerError> {
    let Some(path) = &rso.scores else {
        let scores = all.iter().map(|answers| answers.scores.clone().unwrap_or_default()).collect();
        return Ok(Scored { scores, file: None });
    };
    let Some(lines) = read_named(path)? else {
        return Err(WorkerError::Plan(format!(
            "tune {tuning}: the answers to {} are sampled, and {path} is not there yet; score those in {}, with a line {{\"number\": …, \"scores\": […]}} for each, and run the same command again",
            counted(all.len() as u64, "prompt"),
            format_args!("{}/{}", run.store.location(), paths::candidates(tuning))
        )));
    };
    let scores = scores_from_lines(&lines, all).map_err(|reason| {
        WorkerError::Plan(format!(
            "tune {tuning}: {path} does not fit the answers: {reason}; write a line for each prompt, with a score for each of its answers"
        ))
    })?;
    let file = RowsOf {
        file: path.clone(),
        hash: Digest::of(&lines).to_string(),
        rows: scores.len() as u64,
        form: "scores of sampled answers".to_owned(),
    };
    Ok(Scored { scores, file: Some(file) })
}

/// What was made of the prompts so far.
#[derive(Default)]
struct Chosen {
    items: Vec<Item>,
    equal: LeftOut,
    alone: LeftOut,
}

/// Pairs that were not made.
#[derive(Default)]
struct LeftOut {
    rows: u64,
    /// Number of the first prompt that they belong to.
    first: u64,
}

impl Chosen {
    fn choose(
        &mut self,
        answers: &Answers,
        scores: &[f64],
        prompt: &[u32],
        on_useless: OnUseless,
        rso: &RsoConfig,
        seed: u64,
    ) {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        // Streams of sampling count up from 0.
        random.set_stream(u64::MAX - answers.number);
        // 53 random bits make a number from 0 up to, but not including, 1.
        let uniform = || (random.next_u64() >> 11) as f64 / (1_u64 << 53) as f64;
        let accepted = accept(scores, rso.accept as usize, rso.beta, uniform);
        if accepted.len() < 2 {
            return self.alone.count(1, answers.number);
        }
        let all = pairs(&accepted, scores, rso.pairing);
        let is_useful =
            |[winner, loser]: &[usize; 2]| on_useless == OnUseless::Keep || scores[*winner] != scores[*loser];
        let (pairs, equal): (Vec<_>, Vec<_>) = all.into_iter().partition(is_useful);
        self.equal.count(equal.len() as u64, answers.number);
        let item = |[winner, loser]: [usize; 2]| {
            let [winner, loser] = [winner, loser].map(|at| answers.ids[at].clone());
            Item::Pair(Pair::of_answers(prompt.to_vec(), winner, loser))
        };
        self.items.extend(pairs.into_iter().map(item));
    }
}

impl LeftOut {
    fn count(&mut self, rows: u64, number: u64) {
        if self.rows == 0 {
            self.first = number;
        }
        self.rows += rows;
    }

    fn dropped(&self, reason: &str, tuning: StageName) -> Option<Dropped> {
        let (reason, file) = (reason.to_owned(), paths::candidates(tuning));
        (self.rows > 0).then(|| Dropped { reason, rows: self.rows, file, row: self.first.saturating_sub(1) })
    }
}
