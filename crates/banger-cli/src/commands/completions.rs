//! `banger completions`.

use crate::output::print;
use crate::report::{Failure, Outcome};
use banger_api::error::ErrorCode;
use clap_complete::env::Shells;

/// zsh runs a file of its own folders as the body of the function of that name, at the first press of TAB: then the
/// file is to complete as well.
const ZSH_AUTOLOADED: &str =
    "[ \"$funcstack[1]\" = _banger ] && _clap_dynamic_completer_banger \"$@\"\n";

/// Print the completion script of a shell
///
/// `make install` has put those of bash, fish and zsh where these look. The script asks this program at every press of
/// TAB, so that names of VMs, images and kernels are completed too.
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
    let mut script = String::from_utf8_lossy(&script).into_owned();
    if args.shell == "zsh" {
        script.push_str(ZSH_AUTOLOADED);
    }
    print(&script)?;
    Ok(0)
}
