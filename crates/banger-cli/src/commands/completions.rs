//! `banger completions`.

use crate::output::print;
use crate::report::{Failure, Outcome};
use banger_api::error::ErrorCode;
use clap_complete::env::Shells;

/// Print the completion script of a shell
///
/// The script asks this program at every press of TAB, so that names of VMs, images and kernels are completed too.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  source <(banger completions bash)\n  banger completions fish | source"
)]
pub(crate) struct CompletionsArgs {
    /// The shell
    #[arg(value_parser = ["bash", "elvish", "fish", "powershell", "zsh"])]
    shell: String,
}

pub(crate) fn run(args: CompletionsArgs) -> Outcome {
    let shells = Shells::builtins();
    let unknown = || {
        Failure::new(
            ErrorCode::InvalidRequest,
            format!("no completion for shell `{}`", args.shell),
        )
    };
    let shell = shells.completer(&args.shell).ok_or_else(unknown)?;
    let mut script = Vec::new();
    shell
        .write_registration("COMPLETE", "banger", "banger", "banger", &mut script)
        .map_err(|error| {
            Failure::new(ErrorCode::Internal, "cannot write the script").caused_by(&error)
        })?;
    print(&String::from_utf8_lossy(&script))?;
    Ok(0)
}
