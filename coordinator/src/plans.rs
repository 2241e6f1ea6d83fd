//! Reads plan files, and contains the ones that come with the program.

use std::path::Path;

use ulmus_plan::Plan;
use ulmus_process::{Failure, load_plans};
use ulmus_types::ExitStatus;

/// Reads a plan file and applies overrides. A plan with variants gives several plans.
///
/// # Errors
/// When the file cannot be read, or with every problem of the plan.
pub fn load(path: &Path, overrides: &[String]) -> Result<Vec<Plan>, Failure> {
    #[cfg(feature = "local-workers")]
    {
        let plans = load_plans(path, overrides, ulmus_worker::tokenizer_pieces, ulmus_worker::base_shape)?;
        for problems in plans.iter().map(ulmus_worker::check_tasks) {
            if !problems.is_empty() {
                let message = ulmus_process::cannot_run(path, &problems);
                return Err(Failure::new(ExitStatus::InvalidInput, message));
            }
        }
        Ok(plans)
    }
    // Without the data plane and the evaluator, nothing here can read a tokenizer or knows tasks.
    #[cfg(not(feature = "local-workers"))]
    load_plans(path, overrides, |_| None, |_, _| Err("this coordinator reads no models".to_owned()))
}

/// The commented plans that come with the program, by name.
const PUBLISHED: [(&str, &str); 8] = [
    ("openelm-270m", include_str!("../../plans/openelm-270m.toml")),
    ("openelm-270m-modern", include_str!("../../plans/openelm-270m-modern.toml")),
    ("openelm-450m", include_str!("../../plans/openelm-450m.toml")),
    ("openelm-450m-modern", include_str!("../../plans/openelm-450m-modern.toml")),
    ("openelm-1_1b", include_str!("../../plans/openelm-1_1b.toml")),
    ("openelm-1_1b-modern", include_str!("../../plans/openelm-1_1b-modern.toml")),
    ("openelm-3b", include_str!("../../plans/openelm-3b.toml")),
    ("openelm-3b-modern", include_str!("../../plans/openelm-3b-modern.toml")),
];

/// The commented plan of a published model, or its `-modern` variant, which packs documents as is usual today.
///
/// # Errors
/// When there is no such plan.
pub fn published(name: &str) -> Result<&'static str, Failure> {
    // Model names also occur with a dot in the size, such as openelm-1.1b.
    let name = name.replace('.', "_");
    PUBLISHED.iter().find(|(known, _)| *known == name).map(|(_, plan)| *plan).ok_or_else(|| {
        let names = PUBLISHED.map(|(name, _)| name).join(", ");
        Failure::new(ExitStatus::InvalidInput, format!("no plan {name:?}; use one of {names}"))
    })
}
