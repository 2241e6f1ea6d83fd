//! The one place where an error becomes an exit code.

use std::borrow::Cow;
use std::fmt;
use std::io::{self, Write};
use std::process::ExitCode;

use ulmus_types::{ErrorKind, ExitStatus};

/// An error on its way out of a program: what a person is told, and the exit code.
#[derive(Debug)]
pub struct Failure {
    status: ExitStatus,
    message: String,
}

impl Failure {
    /// A failure with the exit code of `status`.
    pub fn new(status: ExitStatus, message: impl Into<String>) -> Self {
        Self { status, message: message.into() }
    }

    /// The failure that an error of this kind leads to; `error` is printed with its sources.
    pub fn of(kind: ErrorKind, error: &(dyn std::error::Error + 'static)) -> Self {
        Self::new(kind.into(), with_causes(error))
    }

    /// The exit code it leads to.
    pub const fn status(&self) -> ExitStatus {
        self.status
    }
}

/// What a program was told on its command line; else the exit code, when that was wrong or asked for help alone, which is
/// printed then.
///
/// # Errors
/// With the exit code to end with.
pub fn arguments<A: clap::Parser>() -> Result<A, ExitCode> {
    A::try_parse().map_err(|told| match finish_output(told.print()) {
        Ok(()) => ExitCode::from(u8::try_from(told.exit_code()).unwrap_or(1)),
        Err(failure) => report(Err(failure)),
    })
}

/// What became of an output. A reader that has seen enough, such as `head`, is no failure.
///
/// # Errors
/// When the output could not be written.
pub fn finish_output(result: io::Result<()>) -> Result<(), Failure> {
    match result {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(Failure::of(ErrorKind::Internal, &error))
        }
        _ => Ok(()),
    }
}

/// Text as a terminal may be given it: names of files may hold what a terminal takes for a command.
fn visible(text: &str) -> Cow<'_, str> {
    let is_command = |c: char| c.is_control() && !matches!(c, '\n' | '\t');
    if !text.contains(is_command) {
        return text.into();
    }
    let shown = |c: char| if is_command(c) { c.escape_default().to_string() } else { c.to_string() };
    text.chars().map(shown).collect::<String>().into()
}

/// Prints a result and a line's end.
///
/// # Errors
/// When it could not be written.
pub fn print(text: &str) -> Result<(), Failure> {
    finish_output(writeln!(io::stdout().lock(), "{}", visible(text)))
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

/// Prints a failure to standard error, and gives the exit code.
#[expect(clippy::print_stderr, reason = "the last words of a program")]
pub fn report(result: Result<ExitStatus, Failure>) -> ExitCode {
    match result {
        Ok(status) => status.into(),
        Err(failure) => {
            eprintln!("error: {}", visible(&failure.to_string()));
            failure.status.into()
        }
    }
}

/// An error in one line, with its causes.
pub fn with_causes(error: &(dyn std::error::Error + 'static)) -> String {
    let mut message = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let text = cause.to_string();
        // Many errors repeat their source in their own text.
        if !message.contains(&text) {
            message = format!("{message}: {text}");
        }
        source = cause.source();
    }
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_terminal_gets_no_commands() {
        assert_eq!(visible("a\u{1b}[2Jb\r\tc\n"), "a\\u{1b}[2Jb\\r\tc\n");
    }
}
