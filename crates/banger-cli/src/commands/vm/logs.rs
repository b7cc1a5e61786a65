//! `banger vm logs`.

use crate::complete;
use crate::context::with_daemon;
use crate::escape::Escaper;
use crate::output::{print, print_raw};
use crate::report::Outcome;
use banger_api::endpoint::GetVmLogs;
use banger_api::vm::{LogSource, ReadLog};
use std::io::IsTerminal as _;

/// Print the log of a VM's console
///
/// On a terminal, control characters are shown instead of sent; elsewhere the bytes come as they are.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  banger vm logs otter -f      Follow the console\n  banger vm logs --vmm otter   The log of the VMM"
)]
pub(crate) struct LogsArgs {
    /// The VM, by name, id or unambiguous prefix
    #[arg(value_name = "NAME", add = complete::vms())]
    vm: String,
    /// Go on with what comes
    #[arg(short, long)]
    follow: bool,
    /// Print the log of the VMM and its shim instead
    #[arg(long)]
    vmm: bool,
    /// Do not escape control characters, also on a terminal
    #[arg(long)]
    raw: bool,
}

pub(crate) fn run(args: LogsArgs) -> Outcome {
    let source = if args.vmm {
        LogSource::Vmm
    } else {
        LogSource::Console
    };
    let request = ReadLog {
        source,
        follow: args.follow,
    };
    with_daemon(async |_, daemon| {
        let mut chunks = daemon
            .client
            .stream::<GetVmLogs>(&[("vm", &args.vm)], &request)
            .await?;
        let mut escaper = (std::io::stdout().is_terminal() && !args.raw).then(Escaper::default);
        while let Some(bytes) = chunks.next().await? {
            match &mut escaper {
                Some(escaper) => print(&escaper.feed(&bytes))?,
                None => print_raw(&bytes)?,
            }
        }
        if let Some(mut escaper) = escaper {
            print(&escaper.finish())?;
        }
        Ok(0)
    })
}
