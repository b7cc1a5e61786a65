//! The verbs, one file each.

mod completions;
mod config;
mod daemon;
mod dns;
mod doctor;
mod driver;
mod explain;
mod host;
mod image;
mod kernel;
mod nat;
mod net;
mod network;
mod port;
mod ssh_config;
mod trash;
mod version;
mod vm;

use crate::escape;
use crate::output::{self, OutputArgs, json, table};
use crate::report::{self, Failure, Outcome, note, print};
use banger_api::error::ErrorCode;
use banger_api::host::Mended;

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    #[command(subcommand)]
    Vm(vm::VmCommand),
    #[command(subcommand)]
    Trash(trash::TrashCommand),
    #[command(subcommand)]
    Nat(nat::NatCommand),
    #[command(subcommand)]
    Port(port::PortCommand),
    #[command(subcommand)]
    Net(net::NetCommand),
    #[command(subcommand)]
    Dns(dns::DnsCommand),
    #[command(subcommand)]
    Image(image::ImageCommand),
    #[command(subcommand)]
    Kernel(kernel::KernelCommand),
    #[command(subcommand)]
    Driver(driver::DriverCommand),
    SshConfig(ssh_config::SshConfigArgs),
    #[command(subcommand)]
    Config(config::ConfigCommand),
    #[command(subcommand)]
    Daemon(daemon::DaemonCommand),
    #[command(subcommand)]
    Host(host::HostCommand),
    Doctor(doctor::DoctorArgs),
    Explain(explain::ExplainArgs),
    Version(version::VersionArgs),
    Completions(completions::CompletionsArgs),
}

/// Does what was asked.
pub(crate) fn run(command: Command) -> Outcome {
    match command {
        Command::Vm(command) => vm::run(command),
        Command::Trash(command) => trash::run(command),
        Command::Nat(command) => nat::run(command),
        Command::Port(command) => port::run(command),
        Command::Net(command) => net::run(command),
        Command::Dns(command) => dns::run(command),
        Command::Image(command) => image::run(command),
        Command::Kernel(command) => kernel::run(command),
        Command::Driver(command) => driver::run(command),
        Command::Config(command) => config::run(command),
        Command::SshConfig(args) => ssh_config::run(args),
        Command::Daemon(command) => daemon::run(command),
        Command::Host(command) => host::run(command),
        Command::Doctor(args) => doctor::run(args),
        Command::Explain(args) => explain::run(args),
        Command::Version(args) => version::run(args),
        Command::Completions(args) => completions::run(args),
    }
}

/// The table of exit codes, made from the error codes themselves.
pub(crate) fn exit_codes() -> String {
    let mut codes: Vec<u8> = ErrorCode::ALL.iter().map(|code| code.exit_code()).collect();
    codes.sort_unstable();
    codes.dedup();
    let mut text = String::from("  0    done\n");
    for exit_code in codes {
        let names: Vec<_> = ErrorCode::ALL
            .iter()
            .filter(|code| code.exit_code() == exit_code)
            .map(|code| code.name())
            .collect();
        let usage = if exit_code == 2 { "usage, " } else { "" };
        text.push_str(&format!("  {exit_code:<4} {usage}{}\n", names.join(", ")));
    }
    text.push_str(
        "  `vm ssh` ends with the exit code of the command, or 255 if ssh itself failed.\n",
    );
    text.push_str("  A verb for several things does all it can and ends with the highest code.\n");
    text.push_str("  `banger explain CODE` tells more about a code.");
    text
}

/// The table of error codes.
fn codes_table() -> String {
    table(
        &["CODE", "EXIT"],
        ErrorCode::ALL
            .iter()
            .map(|code| vec![code.name().to_owned(), code.exit_code().to_string()]),
    )
}

/// Reports every failure of a verb that was given several things; the highest exit code wins.
fn worst(failures: &[Failure]) -> u8 {
    for failure in failures {
        print(&failure.0);
    }
    failures.iter().map(Failure::exit_code).max().unwrap_or(0)
}

/// What was done to each of several VMs that the daemon chose; failures are told elsewhere.
fn done_to_each(outcomes: &[banger_api::vm::Outcome], done: &str) -> String {
    let good = outcomes.iter().filter(|outcome| outcome.error.is_none());
    good.map(|outcome| format!("{}: {done}\n", outcome.name))
        .collect()
}

/// Prints what was put right and what is left; something left is a failure.
fn mended(mended: &Mended, output: OutputArgs, nothing: &str) -> Outcome {
    if output.json {
        json(mended)?;
    } else {
        let lines = mended.done.iter().map(|line| escape::line(line) + "\n");
        output::print(&lines.collect::<String>())?;
        for left in &mended.left {
            report::left(left);
        }
        if mended.done.is_empty() && mended.left.is_empty() {
            note(nothing);
        }
    }
    Ok(if mended.left.is_empty() {
        0
    } else {
        ErrorCode::HostUnfit.exit_code()
    })
}
