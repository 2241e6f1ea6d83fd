//! `--check`: what a plan means, without starting anything.

use std::fmt::Write;

use ulmus_plan::{Plan, data_memory, worker_memory};

/// The whole report on a plan that broke no rule.
pub fn report(plan: &Plan) -> String {
    let mut text = String::new();
    write_report(&mut text, plan).expect("writing to a string cannot fail");
    text
}

fn write_report(text: &mut String, plan: &Plan) -> std::fmt::Result {
    let model = &plan.model;
    let parameters = model.parameters();
    writeln!(text, "# plan {}, resolved\n", plan.run.name)?;
    writeln!(text, "{}", plan.to_toml())?;

    writeln!(text, "# model: {} parameters", grouped(parameters))?;
    writeln!(text, "layer  query heads  kv heads  ffn dim")?;
    for (index, layer) in model.layers().iter().enumerate() {
        writeln!(text, "{index:>5}  {:>11}  {:>8}  {:>7}", layer.q_heads, layer.kv_heads, layer.ffn_dim)?;
    }

    let train = &plan.train;
    let per_step = plan.tokens_per_step();
    writeln!(text, "\n# training")?;
    writeln!(
        text,
        "tokens per step      {} ({} sequences of {})",
        grouped(per_step),
        train.sequences,
        plan.sequence_length()
    )?;
    writeln!(text, "tokens in all        {}", grouped(per_step.saturating_mul(train.iterations)))?;
    writeln!(text, "micro-batches        {} of {} sequences", train.micro_batches(), train.micro_batch)?;
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

    let memory = worker_memory(model, train, plan.sequence_length());
    writeln!(text, "\n# memory per worker, bytes")?;
    for (name, bytes) in [
        ("parameters", memory.parameters),
        ("gradients", memory.gradients),
        ("optimizer", memory.optimizer),
        ("exact reduction", memory.reduction),
        ("activations", memory.activations),
        ("in all", memory.total),
    ] {
        writeln!(text, "{name:<20} {:>17}", grouped(bytes))?;
    }
    writeln!(
        text,
        "and while a checkpoint is stored, a copy of parameters and optimizer: {}",
        grouped(12 * parameters)
    )?;

    writeln!(text, "\n# checkpoints")?;
    let milestones = train.iterations.div_ceil(plan.checkpoint.every);
    writeln!(text, "one                  {} bytes", grouped(12 * parameters))?;
    writeln!(
        text,
        "milestones           {milestones}, every {} steps; {} bytes in all",
        plan.checkpoint.every,
        grouped((12 * parameters).saturating_mul(milestones))
    )?;
    writeln!(text, "average              of the last {}", plan.checkpoint.average)?;

    writeln!(text, "\n# evaluation")?;
    match (plan.data.holdout, plan.evaluate.text.get()) {
        (0.0, _) => writeln!(text, "none: data.holdout = 0 keeps no text back to measure on")?,
        (_, 0) => writeln!(text, "none: evaluate.text is 0")?,
        (share, _) => writeln!(
            text,
            "on up to {} of the documents that are held out, one of {:.0}; with fewer of them there may be none",
            plan.evaluate.text,
            share.recip()
        )?,
    }

    writeln!(text, "\n# shares and communication")?;
    writeln!(text, "workers  micro-batches each  memory of data, about  bytes sent per worker and step")?;
    for workers in [1, 2, 4, 8, 16, 128].into_iter().filter(|workers| *workers <= train.micro_batches()) {
        // Reduce-scatter of i64 and all-gather of f32 over a ring.
        let sent = 12 * parameters * (workers - 1) / workers;
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
