//! What a run is started with besides its plan.

use std::path::PathBuf;

use ulmus_process::HostPort;
use ulmus_transport::TokenSource;

use crate::args::OnTerm;

/// Options of the coordinator besides the plan.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Path of the plan, for messages.
    pub plan: PathBuf,
    /// Overrides of the plan's keys, for messages.
    pub overrides: Vec<String>,
    /// Where to listen.
    pub listen: Option<HostPort>,
    /// The token that workers must show.
    pub token: TokenSource,
    /// Run the plan a second time with a killed worker, and compare.
    pub demo_failure: bool,
    /// Rebuild a lost database from the run folder.
    pub recover: bool,
    /// Start over if every checkpoint is damaged.
    pub from_start: bool,
    /// What SIGTERM does; `None` leaves that to the plan.
    pub on_term: Option<OnTerm>,
}

impl Options {
    /// The command that runs this plan again.
    pub(crate) fn command(&self) -> String {
        let mut command = format!("coordinator --plan {}", quoted(&self.plan.display().to_string()));
        for value in &self.overrides {
            command.push_str(" --set ");
            command.push_str(&quoted(value));
        }
        command
    }
}

/// A word, quoted for a shell if necessary.
fn quoted(word: &str) -> String {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_./=:,@%+".contains(&byte);
    if word.bytes().all(is_plain) { word.to_owned() } else { format!("'{}'", word.replace('\'', "'\\''")) }
}
