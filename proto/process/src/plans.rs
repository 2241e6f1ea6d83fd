//! Reading plan files.

use std::path::Path;

use ulmus_plan::{ModelConfig, Plan};
use ulmus_types::{ExitStatus, Problems, counted};

use crate::Failure;

/// Reads a plan file and applies overrides. A plan with variants gives several plans. `pieces` counts the pieces of a
/// tokenizer file, which determine `model.vocab_size` if the plan does not set it; it returns `None` if the file is not
/// on this machine. `shape` reads the shape of a base model, of which the plan says nothing else; it is also told the plan's store.
///
/// # Errors
/// When the file or the base cannot be read, or with every problem of the plan.
pub fn load_plans(
    path: &Path,
    overrides: &[String],
    pieces: impl FnOnce(&str) -> Option<usize>,
    shape: impl FnOnce(&str, &str) -> Result<ModelConfig, String>,
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
    let shape = ulmus_plan::base_to_read(&text, overrides).map(|(base, store)| {
        shape(&base, &store).map_err(|problem| {
            let message = format!(
                "{}:\nbase.model = {base:?}: {problem}; correct it, or say the shape of the model in [model]",
                path.display()
            );
            Failure::new(ExitStatus::InvalidInput, message)
        })
    });
    let shape = shape.transpose()?.map(|shape| ulmus_plan::shape_overrides(&shape)).unwrap_or_default();
    let overrides: Vec<String> = counted.into_iter().chain(shape).chain(overrides.iter().cloned()).collect();
    ulmus_plan::read(&text, &overrides)
        .map_err(|problems| Failure::new(ExitStatus::InvalidInput, cannot_run(path, &problems)))
}

/// The problems of the plan in a file, and the verdict that follows from them.
pub fn cannot_run(path: &Path, problems: &Problems) -> String {
    let count = counted(problems.len() as u64, "problem");
    format!("{}:\n{problems}\nthe plan cannot run: {count}", path.display())
}
