//! Plan files.

use std::path::Path;

use ulmus_plan::Plan;
use ulmus_types::ExitStatus;

use crate::Failure;

/// Reads a plan file with overrides; a plan with variants gives several. `pieces` counts those of a tokenizer file,
/// which decides `model.vocab_size` where the plan does not say it; none if the file is not on this machine.
///
/// # Errors
/// When the file cannot be read, or with every problem of the plan.
pub fn load_plans(
    path: &Path,
    overrides: &[String],
    pieces: impl FnOnce(&str) -> Option<usize>,
) -> Result<Vec<Plan>, Failure> {
    let text = std::fs::read_to_string(path).map_err(|error| {
        let message = format!(
            "{}: {error}; name a plan with --plan, for instance plans/quickstart.toml",
            path.display()
        );
        Failure::new(ExitStatus::InvalidInput, message)
    })?;
    let counted = ulmus_plan::tokenizer_to_count(&text, overrides).and_then(|file| pieces(&file));
    let counted = counted.map(|pieces| format!("tokenizer.pieces={pieces}"));
    let overrides: Vec<String> = counted.into_iter().chain(overrides.iter().cloned()).collect();
    ulmus_plan::read(&text, &overrides).map_err(|problems| {
        let count =
            if problems.len() == 1 { "1 problem".to_owned() } else { format!("{} problems", problems.len()) };
        Failure::new(ExitStatus::InvalidInput, format!("{}: {count}\n{problems}", path.display()))
    })
}
