//! What a person sees during a run: a progress bar in a terminal, plain lines elsewhere.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use ulmus_coord_core::{Notification, Phase, Status};
use ulmus_types::{CheckpointKind, Job, StageName, Step, StepReport, for_people};

/// The longest text from a worker that is shown, in characters.
const TEXT_LIMIT: usize = 2000;
/// Minimum time between two plain lines about steps.
const PLAIN_EVERY: Duration = Duration::from_secs(5);
/// How often a person is told that the run is waiting for workers.
const WAITING_EVERY: Duration = Duration::from_secs(30);

/// The display.
#[derive(Debug)]
pub(crate) struct Console {
    bar: ProgressBar,
    terminal: bool,
    /// The last update that was shown, and the total number of tokens of its stage by then.
    last: Option<(StageName, Step, u64)>,
    speed: Option<f64>,
    held_out: Option<f64>,
    last_plain: Option<Instant>,
    /// When the run began to wait for workers, or when a person was last told so.
    waiting: Option<Instant>,
}

impl Console {
    /// A display of a run.
    pub(crate) fn new() -> Self {
        let terminal = std::io::stdout().is_terminal();
        let target = if terminal { ProgressDrawTarget::stdout() } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(None, target);
        let style =
            ProgressStyle::with_template("{prefix:>12.bold} {wide_bar:.green} {pos}/{len} {msg} {eta} left")
                .expect("the template names only fields that exist");
        bar.set_style(style);
        Self { bar, terminal, last: None, speed: None, held_out: None, last_plain: None, waiting: None }
    }

    /// Prints a line, above the progress bar if there is one.
    pub(crate) fn line(&self, text: &str) {
        tracing::info!("{text}");
        self.bar.suspend(|| print(text));
    }

    /// Prints a line that a person should act on.
    pub(crate) fn alarm(&self, text: &str) {
        tracing::warn!("{text}");
        self.bar.suspend(|| print(&format!("ALARM: {text}")));
    }

    /// Prints a notification.
    pub(crate) fn notify(&mut self, notification: &Notification) {
        match notification {
            Notification::Joined(worker) => self.line(&format!("worker {} joined", worker.name())),
            Notification::Lost(worker, why) => self.line(&format!("worker {} is lost: {why}", worker.name())),
            Notification::GroupFormed { generation, size, training, step, last } => {
                let is_pretraining = *training == StageName::pretraining();
                let name = if is_pretraining { "pretrain".to_owned() } else { training.to_string() };
                self.bar.set_prefix(name);
                self.bar.set_length(last.get());
                self.bar.set_position(step.get());
                self.bar.reset_eta();
                let train =
                    if *size == 1 { "1 worker trains".to_owned() } else { format!("{size} workers train") };
                let of = if is_pretraining { String::new() } else { format!(" {training}") };
                self.line(&format!("generation {generation}: {train}{of} from step {step} of {last}"));
            }
            Notification::GroupEnded(generation, why) => {
                self.line(&format!("generation {generation} ended: {why}"));
            }
            Notification::Checkpoint(id, kind) => {
                let kind = match kind {
                    CheckpointKind::Milestone => "milestone",
                    CheckpointKind::Recovery => "recovery",
                };
                self.line(&format!("checkpoint {id} stored ({kind})"));
            }
            Notification::JobStarted { job, worker, purpose } => {
                self.bar.set_prefix(job.to_string());
                self.line(&format!("{job} on {}: {purpose}", worker.name()));
            }
            Notification::Drained(worker) => {
                self.line(&format!("worker {} has left as requested", worker.name()));
            }
            Notification::SitsOut(worker, pause, why) => {
                self.line(&format!("worker {} sits out for {} s: {why}", worker.name(), pause.as_secs()));
            }
            Notification::Info(text) => self.line(text),
            Notification::Alarm(text) => self.alarm(text),
        }
    }

    /// Prints which workers are there, and again at intervals, while the run waits for workers.
    pub(crate) fn waiting(&mut self, status: &Status) {
        let Phase::Waiting { ready, needed } = status.phase else {
            self.waiting = None;
            return;
        };
        if self.waiting.get_or_insert_with(Instant::now).elapsed() < WAITING_EVERY {
            return;
        }
        self.waiting = Some(Instant::now());
        let members = status.members.iter().map(|member| {
            let name = member.worker.name();
            let serves = if member.only_jobs { ", and serves jobs only" } else { "" };
            match member.sits_out {
                Some(left) => format!("; {name} sits out for another {} s{serves}", left.as_secs()),
                None => format!("; {name} is {}{serves}", member.doing),
            }
        });
        self.line(&format!(
            "waiting for workers: {ready} of {needed} can take work{}",
            members.collect::<String>()
        ));
    }

    /// Prints that a job has ended. If there was nothing to do, its result says why.
    pub(crate) fn job_done(&self, job: &Job, result: &str) {
        self.line(&match ulmus_run::results::why_skipped(result) {
            Some(why) => format!("{} skipped: {}", job.name(), for_people(&why, TEXT_LIMIT)),
            None => format!("{} done", job.name()),
        });
    }

    /// Shows an update of a stage that ends with the update `end`.
    pub(crate) fn step(&mut self, training: StageName, report: &StepReport, end: Step) {
        match self.last.replace((training, report.step, report.tokens)) {
            // Workers repeat reports that may have been lost.
            Some((of, step, _)) if (of, step) == (training, report.step) => return,
            Some((of, ..)) if of != training => (self.speed, self.held_out) = (None, None),
            Some((_, step, tokens)) if step.next() == report.step => {
                let tokens = report.tokens.saturating_sub(tokens) as f64;
                let now = tokens / report.elapsed.as_secs_f64().max(1e-9);
                self.speed = Some(self.speed.map_or(now, |speed| 0.9 * speed + 0.1 * now));
            }
            _ => {}
        }
        self.held_out = report.held_out_loss.or(self.held_out);
        let held_out = self.held_out.map(|loss| format!(" held-out {loss:.3}")).unwrap_or_default();
        let speed = self.speed.map(|speed| format!(" {speed:.0} tokens/s")).unwrap_or_default();
        let message = format!("loss {:.3}{held_out}{speed}", report.loss);
        // A group may have been formed by the coordinator before this one.
        self.bar.set_length(end.get());
        self.bar.set_position(report.step.get());
        self.bar.set_message(message.clone());
        if self.terminal {
            return;
        }
        let last = report.step == end;
        if last || self.last_plain.is_none_or(|at| at.elapsed() >= PLAIN_EVERY) {
            self.last_plain = Some(Instant::now());
            let left = humantime::format_duration(Duration::from_secs(self.bar.eta().as_secs()));
            let of =
                if training == StageName::pretraining() { String::new() } else { format!("{training} ") };
            print(&format!("{of}step {}/{end} {message} {left} left", report.step));
        }
    }

    /// Removes the progress bar.
    pub(crate) fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

/// Prints a line during a run, which must not stop because nobody reads it. Errors matter only for the final summary.
fn print(text: &str) {
    writeln!(std::io::stdout(), "{text}").ok();
}
