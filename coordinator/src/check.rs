//! `--check`: what a plan means and whether it can run, without starting anything.

use std::fmt::{self, Write};
use std::path::Path;

use ulmus_plan::{MemoryPlan, Plan, data_memory, tuning_memory, worker_memory};
use ulmus_process::{Failure, print};
use ulmus_types::{ExitStatus, Of, Reads, SNAPSHOT_SLOTS, StageKind, StageName, counted};

use crate::args::Check;

/// Prints what the plans of a file mean and, if asked for, what they read. The last line is the verdict.
///
/// # Errors
/// With everything for which a run would be refused.
pub fn check(path: &Path, plans: &[Plan], what: Check) -> Result<ExitStatus, Failure> {
    for plan in plans {
        print(&report(plan))?;
    }
    match what {
        Check::Plan => print("the plan can run, if what it reads is there; --check sources looks")?,
        Check::Sources => {
            check_sources(path, plans)?;
            print("\nthe plan can run")?;
        }
    }
    Ok(ExitStatus::Done)
}

/// Opens what the plans read.
#[cfg(feature = "local-workers")]
fn check_sources(path: &Path, plans: &[Plan]) -> Result<(), Failure> {
    use std::collections::BTreeSet;

    use ulmus_types::{Problem, Problems};
    use ulmus_worker::SourceCheck;

    let (mut told, mut problems, mut first_kind) = (BTreeSet::new(), Problems::new(), None);
    for plan in plans {
        let SourceCheck { found, problems: of_plan, kind } = ulmus_worker::check_sources(plan);
        first_kind = first_kind.or(kind);
        for Problem { key, value, rule, fix } in of_plan.iter().cloned() {
            if problems.iter().all(|problem: &Problem| (&problem.key, &problem.fix) != (&key, &fix)) {
                problems.add(key, value, rule, fix);
            }
        }
        // Variants mostly read the same.
        if !found.is_empty() && told.insert(found.clone()) {
            print(&found)?;
        }
    }
    match first_kind {
        Some(kind) => Err(Failure::new(kind.into(), ulmus_process::cannot_run(path, &problems))),
        None => Ok(()),
    }
}

#[cfg(not(feature = "local-workers"))]
fn check_sources(_: &Path, _: &[Plan]) -> Result<(), Failure> {
    let message =
        "this coordinator was built without local workers and cannot open sources; use a full build";
    Err(Failure::new(ExitStatus::InvalidInput, message))
}

/// Writes a section of what a plan means.
type Section = fn(&mut String, &Plan) -> fmt::Result;
/// A part of the memory that a stage takes.
type Part = fn(&MemoryPlan) -> u64;

/// What a plan means that broke no rule.
fn report(plan: &Plan) -> String {
    let mut text = format!("# plan {}, resolved\n\n{}\n", plan.run.name, plan.to_toml());
    let sections: [(Section, bool); 8] = [
        (write_model, true),
        (write_training, plan.pretrains()),
        (write_tuning, !plan.tune.is_empty()),
        (write_memory, true),
        (write_checkpoints, plan.pretrains()),
        (write_evaluation, plan.pretrains()),
        (write_shares, plan.pretrains()),
        (write_stages, true),
    ];
    for (write, _) in sections.into_iter().filter(|(_, is_there)| *is_there) {
        write(&mut text, plan).expect("writing to a string cannot fail");
        text.push('\n');
    }
    text.truncate(text.trim_end().len());
    text.push('\n');
    text
}

fn write_model(text: &mut String, plan: &Plan) -> fmt::Result {
    writeln!(text, "# model: {} parameters", grouped(plan.model.parameters()))?;
    writeln!(text, "layer  query heads  kv heads  ffn dim")?;
    for (index, layer) in plan.model.layers().iter().enumerate() {
        writeln!(text, "{index:>5}  {:>11}  {:>8}  {:>7}", layer.q_heads, layer.kv_heads, layer.ffn_dim)?;
    }
    Ok(())
}

/// The graph of the stages: what each reads, and who can do it.
fn write_stages(text: &mut String, plan: &Plan) -> fmt::Result {
    let graph = plan.graph();
    let rows = graph.stages().iter().map(|stage| {
        let after = match &stage.reads {
            Reads::Nothing => String::new(),
            Reads::Average => StageName::AVERAGE.to_owned(),
            Reads::Last | Reads::Averaged | Reads::Spread => StageName::TRAIN.to_owned(),
            Reads::Tuned(tuning) => tuning.to_string(),
            Reads::Models(models) => {
                let after = models.iter().map(|of| match of {
                    Of::Base => "the base".to_owned(),
                    Of::Tuned(tuning) => tuning.export().to_string(),
                    Of::Average => StageName::AVERAGE.to_owned(),
                    Of::Last => StageName::TRAIN.to_owned(),
                    Of::Milestones => "each milestone".to_owned(),
                    Of::Model(place) => place.clone(),
                });
                after.collect::<Vec<_>>().join(", ")
            }
        };
        let purpose = match stage.kind {
            StageKind::Train => format!("{} updates", plan.train.iterations),
            kind => kind.purpose().to_owned(),
        };
        let after = if stage.kind == StageKind::Train { StageName::PREPARE.to_owned() } else { after };
        (stage.name.to_string(), purpose, after, stage.needs.to_string())
    });
    let rows: Vec<_> = rows.collect();
    writeln!(text, "# stages")?;
    let width = |of: fn(&(String, String, String, String)) -> &String| {
        rows.iter().map(|row| of(row).chars().count()).max().unwrap_or(0)
    };
    let [names, purposes, afters] = [width(|row| &row.0), width(|row| &row.1), width(|row| &row.2)];
    writeln!(text, "{:names$}  {:purposes$}  {:afters$}  needs a worker", "stage", "does", "after")?;
    for (name, purpose, after, needs) in rows {
        writeln!(
            text,
            "{}",
            format!("{name:names$}  {purpose:purposes$}  {after:afters$}  {needs}").trim_end()
        )?;
    }
    Ok(())
}

fn write_training(text: &mut String, plan: &Plan) -> fmt::Result {
    let train = &plan.train;
    let per_step = plan.tokens_per_step();
    let sequences = counted(train.sequences, "sequence");
    writeln!(text, "# training")?;
    writeln!(text, "tokens per step      {} ({sequences} of {})", grouped(per_step), plan.sequence_length())?;
    writeln!(text, "tokens in all        {}", grouped(per_step.saturating_mul(train.iterations)))?;
    let each = counted(train.micro_batch, "sequence");
    writeln!(text, "micro-batches        {} of {each}", train.micro_batches())?;
    for source in &plan.data.source {
        if let Some(tokens) = source.tokens {
            let all: u64 = plan.data.source.iter().filter_map(|source| source.tokens).sum();
            let in_all = per_step as f64 * train.iterations as f64;
            let epochs = in_all * (tokens as f64 / all as f64) / tokens as f64;
            writeln!(
                text,
                "source {:<24} {:>17} tokens, {:.2} epochs; {}",
                source.name,
                grouped(tokens),
                epochs,
                source.tokens_from.as_deref().unwrap_or("source not stated")
            )?;
        }
    }
    Ok(())
}

/// What tuning stages train, and how long, as far as that is known without their examples.
fn write_tuning(text: &mut String, plan: &Plan) -> fmt::Result {
    writeln!(text, "# tuning")?;
    for config in &plan.tune {
        let shape = plan.shape_of(&config.of);
        let trainable = config.trainable(&shape);
        let share = 100.0 * trainable as f64 / shape.parameters() as f64;
        let length = match (config.steps, config.epochs.unwrap_or(1)) {
            (Some(steps), _) => counted(steps, "update"),
            (None, epochs) => counted(epochs, "epoch"),
        };
        writeln!(
            text,
            "{:<20} {length} of {}, in micro-batches of {}; trains {} parameters ({share:.1} %)",
            config.name,
            counted(config.batch, "example"),
            config.micro_batch,
            grouped(trainable)
        )?;
    }
    Ok(())
}

/// The memory of a worker in each stage that trains. It does one at a time.
fn write_memory(text: &mut String, plan: &Plan) -> fmt::Result {
    let of_pretraining = plan.pretrains().then(|| {
        let memory = worker_memory(&plan.model, &plan.train, plan.sequence_length());
        (StageName::TRAIN, memory)
    });
    let of_tuning =
        plan.tune.iter().map(|tune| (&tune.name[..], tuning_memory(&plan.shape_of(&tune.of), tune)));
    let stages: Vec<(&str, MemoryPlan)> = of_pretraining.into_iter().chain(of_tuning).collect();
    let rows: [(&str, Part); 8] = [
        ("parameters", |memory| memory.parameters),
        ("gradients", |memory| memory.gradients),
        ("optimizer", |memory| memory.optimizer),
        ("exact reduction", |memory| memory.reduction),
        ("activations", |memory| memory.activations),
        ("as it begins", |memory| memory.loading),
        ("at most", |memory| memory.total),
        // Weights and moments of what is trained.
        ("a copy of the state", |memory| memory.gradients + memory.optimizer),
    ];
    writeln!(text, "# memory per worker on a CPU, bytes")?;
    let width = |name: &str| name.len().max(17);
    let line = |first: &str, cells: &mut dyn Iterator<Item = String>| {
        let cells = stages.iter().zip(cells).map(|((name, _), cell)| format!("  {cell:>0$}", width(name)));
        format!("{first:<20}{}", cells.collect::<String>())
    };
    writeln!(text, "{}", line("stage", &mut stages.iter().map(|(name, _)| (*name).to_owned())))?;
    for (name, bytes) in rows {
        writeln!(text, "{}", line(name, &mut stages.iter().map(|(_, memory)| grouped(bytes(memory)))))?;
    }
    writeln!(text, "and such a copy for each of up to {SNAPSHOT_SLOTS} states that are being stored")?;
    if !plan.tune.is_empty() {
        writeln!(
            text,
            "a tuning stage reads its weights before it uses gradients and activations, and holds the tokens of its examples, 8 bytes \
             for each"
        )?;
    }
    Ok(())
}

fn write_checkpoints(text: &mut String, plan: &Plan) -> fmt::Result {
    let milestones = plan.train.iterations.div_ceil(plan.checkpoint.every);
    let bytes = checkpoint_bytes(plan);
    writeln!(text, "# checkpoints")?;
    writeln!(text, "one                  {} bytes", grouped(bytes))?;
    writeln!(
        text,
        "milestones           {milestones}, every {}; {} bytes in all",
        counted(plan.checkpoint.every, "step"),
        grouped(bytes.saturating_mul(milestones))
    )?;
    writeln!(text, "average              of the last {}", plan.checkpoint.average)
}

/// Weights and both moments, in float32.
fn checkpoint_bytes(plan: &Plan) -> u64 {
    12 * plan.model.parameters()
}

fn write_evaluation(text: &mut String, plan: &Plan) -> fmt::Result {
    writeln!(text, "# evaluation")?;
    match (plan.data.holdout, plan.evaluate.text.get()) {
        (0.0, _) => writeln!(text, "none: data.holdout = 0 keeps no text back to measure on"),
        (_, 0) => writeln!(text, "none: evaluate.text is 0"),
        (share, _) => writeln!(
            text,
            "on up to {} of the documents that are held out, one of {:.0}; with fewer of them there may be none",
            plan.evaluate.text,
            share.recip()
        ),
    }
}

fn write_shares(text: &mut String, plan: &Plan) -> fmt::Result {
    let train = &plan.train;
    writeln!(text, "# shares and communication")?;
    writeln!(text, "workers  micro-batches each  memory of data, about  bytes sent per worker and step")?;
    for workers in [1, 2, 4, 8, 16, 128].into_iter().filter(|workers| *workers <= train.micro_batches()) {
        // Reduce-scatter of i64 and all-gather of f32 over a ring.
        let sent = 12 * plan.model.parameters() * (workers - 1) / workers;
        let micro_batches = train.micro_batches().div_ceil(workers);
        let lanes = micro_batches * train.micro_batch * plan.data.lanes / train.sequences;
        let data = data_memory(&plan.data, lanes, plan.sequence_length());
        writeln!(text, "{workers:>7}  {micro_batches:>18}  {:>21}  {:>30}", grouped(data), grouped(sent))?;
    }
    Ok(())
}

/// A number with a comma between thousands.
pub(crate) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thousands_are_grouped() {
        assert_eq!(
            ["0", "999", "1,000", "12,345,678"],
            [0, 999, 1000, 12_345_678].map(grouped).each_ref().map(String::as_str)
        );
    }
}
