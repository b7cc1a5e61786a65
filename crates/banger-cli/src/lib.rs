//! The command line of banger. It knows the daemon only through the socket, and starts it when it is needed.

mod args;
mod commands;
mod complete;
mod confirm;
mod context;
mod ensure_daemon;
mod escape;
mod output;
mod patience;
mod progress;
mod report;
mod ssh;
mod systemd;
mod value;

use clap::{CommandFactory, Parser};
use std::process::ExitCode;

/// Reads the arguments of this process, does what they say, and returns the exit code.
pub fn main() -> ExitCode {
    clap_complete::CompleteEnv::with_factory(args::Cli::command).complete();
    let cli = args::Cli::parse();
    match commands::run(cli.command) {
        Ok(code) => ExitCode::from(code),
        Err(failure) => {
            report::print(&failure.0);
            ExitCode::from(failure.0.code.exit_code())
        }
    }
}
