//! Plan files: reading them, and the ones that come with the program.

use std::path::Path;

use ulmus_plan::{Plan, Preset};
use ulmus_rt::{Failure, load_plans};
use ulmus_types::ExitStatus;

/// Reads a plan file with overrides; a plan with variants gives several.
///
/// # Errors
/// When the file cannot be read, or with every problem of the plan.
pub fn load(path: &Path, overrides: &[String]) -> Result<Vec<Plan>, Failure> {
    #[cfg(feature = "local-workers")]
    let pieces = ulmus_worker::tokenizer_pieces;
    // Without the data plane, nothing here can read a tokenizer.
    #[cfg(not(feature = "local-workers"))]
    let pieces = |_: &str| None;
    load_plans(path, overrides, pieces)
}

/// The commented plan of a published model.
///
/// # Errors
/// When there is no such preset.
pub fn published(name: &str) -> Result<&'static str, Failure> {
    Ok(match Preset::from_name(name) {
        Some(Preset::Openelm270m) => include_str!("../../plans/openelm-270m.toml"),
        Some(Preset::Openelm450m) => include_str!("../../plans/openelm-450m.toml"),
        Some(Preset::Openelm1_1b) => include_str!("../../plans/openelm-1_1b.toml"),
        Some(Preset::Openelm3b) => include_str!("../../plans/openelm-3b.toml"),
        None => {
            let names = Preset::ALL.map(Preset::name).join(", ");
            return Err(Failure::new(
                ExitStatus::InvalidInput,
                format!("no preset {name:?}; use one of {names}"),
            ));
        }
    })
}
