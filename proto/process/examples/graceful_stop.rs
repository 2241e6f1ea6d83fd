//! A program in the manner of Ulmus: it works until it is asked to stop, and one place turns its result into an exit code.
//!
//!     cargo run -p ulmus-process --example graceful_stop; echo $?

#![expect(clippy::print_stdout, reason = "an example")]

use std::process::ExitCode;
use std::time::Duration;

use ulmus_process::{Failure, HostPort, Shutdown, Signal, report};
use ulmus_types::ExitStatus;

fn main() -> ExitCode {
    report(run())
}

fn run() -> Result<ExitStatus, Failure> {
    let address: HostPort = "[::1]:7070"
        .parse()
        .map_err(|reason: String| Failure::new(ExitStatus::InvalidInput, format!("the address: {reason}")))?;
    println!("host {}, port {:?}", address.host(), address.port());

    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .map_err(|error| Failure::new(ExitStatus::Failed, format!("cannot start: {error}")))?;
    // A program would say `Shutdown::on_signals`; here nobody presses Ctrl-C, so the program asks itself.
    let shutdown = Shutdown::manual();
    let signal = runtime.block_on(async {
        let mut steps = 0;
        loop {
            tokio::select! {
                signal = shutdown.requested() => return signal,
                () = tokio::time::sleep(Duration::from_millis(10)) => steps += 1,
            }
            println!("step {steps}");
            if steps == 3 {
                shutdown.request(Signal::Interrupt);
            }
        }
    });
    println!("stopped by {signal:?}; exit code {}", ExitStatus::Interrupted.code());
    Ok(ExitStatus::Interrupted)
}
