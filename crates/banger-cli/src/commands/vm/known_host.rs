//! `banger vm known-host`: the line of a known-hosts file for one VM. `ssh` runs it, so that no file is needed.

use crate::output::print;
use crate::report::Outcome;

/// Print the pinned host key of a VM for ssh
#[derive(Debug, clap::Args)]
pub(crate) struct KnownHostArgs {
    /// The VM's id
    id: String,
    /// The key's type
    kind: String,
    /// The key
    key: String,
}

pub(crate) fn run(args: KnownHostArgs) -> Outcome {
    print(&format!("{} {} {}\n", args.id, args.kind, args.key))?;
    Ok(0)
}
