//! The only place where an error becomes an exit code.

use std::borrow::Cow;
use std::fmt;
use std::io::{self, Write};
use std::process::ExitCode;

use ulmus_types::{ErrorKind, ExitStatus};

/// An error that ends a program: the message for a person, and the exit code.
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

    /// The failure caused by an error of this kind. The message is that of `error` with its sources.
    pub fn of(kind: ErrorKind, error: &(dyn std::error::Error + 'static)) -> Self {
        Self::new(kind.into(), with_causes(error))
    }

    /// The exit status of the program.
    pub const fn status(&self) -> ExitStatus {
        self.status
    }
}

/// Parses the command line. Prints usage errors, and the answers to `--help` and `--version`.
///
/// # Errors
/// The exit code, if the program should end now: the command line was wrong, or asked only for help or the version.
pub fn arguments<A: clap::Parser>() -> Result<A, ExitCode> {
    A::try_parse().map_err(|usage| match finish_output(usage.print()) {
        Ok(()) => ExitCode::from(u8::try_from(usage.exit_code()).unwrap_or(1)),
        Err(failure) => report(Err(failure)),
    })
}

/// Checks the result of writing output. A reader that closes the pipe early, such as `head`, is not a failure.
///
/// # Errors
/// When the output could not be written.
pub fn finish_output(result: io::Result<()>) -> Result<(), Failure> {
    match result {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            let message = format!("cannot write to standard output: {error}");
            Err(Failure::new(ErrorKind::Internal.into(), message))
        }
        _ => Ok(()),
    }
}

/// Escapes control characters for a terminal: file names may contain what a terminal takes for a command.
fn visible(text: &str) -> Cow<'_, str> {
    let is_command = |c: char| c.is_control() && !matches!(c, '\n' | '\t');
    if !text.contains(is_command) {
        return text.into();
    }
    let shown = |c: char| if is_command(c) { c.escape_default().to_string() } else { c.to_string() };
    text.chars().map(shown).collect::<String>().into()
}

/// Prints text and a line feed to standard output.
///
/// # Errors
/// When the text could not be written.
pub fn print(text: &str) -> Result<(), Failure> {
    finish_output(writeln!(io::stdout().lock(), "{}", visible(text)))
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

/// Prints a failure to standard error, and returns the exit code.
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

/// The message of an error followed by those of its causes, on one line.
pub fn with_causes(error: &(dyn std::error::Error + 'static)) -> String {
    let mut message = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let text = cause.to_string();
        // Many errors repeat their source's message in their own.
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
