//! `banger vm reset`.

use super::create::StorageWord;
use super::for_each;
use crate::complete;
use crate::confirm::ConfirmArgs;
use crate::context::with_daemon;
use crate::output::OutputArgs;
use crate::patience::Wait;
use crate::report::Outcome;
use banger_api::endpoint::PostVmReset;
use banger_api::vm::{ResetVm, Vm};

/// Throw away what stopped VMs wrote to `/`
///
/// The next boot begins from the image again. Work disk, name, address and keys stay. Asks first on a terminal.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  banger vm reset otter
  banger vm reset otter --storage copy   Also get `/` in another way from now on")]
pub(crate) struct ResetArgs {
    /// The VMs, by name, id or unambiguous prefix
    #[arg(value_name = "NAME", required = true, add = complete::vms())]
    vms: Vec<String>,
    /// How they get their fresh `/` from the image (default: as before)
    #[arg(long, value_enum)]
    storage: Option<StorageWord>,
    #[command(flatten)]
    confirm: ConfirmArgs,
    #[command(flatten)]
    output: OutputArgs,
}

pub(crate) fn run(args: ResetArgs) -> Outcome {
    let names = args.vms.join(", ");
    args.confirm.ask(&format!(
        "This throws away all that {names} wrote to `/`; work disks stay."
    ))?;
    let request = ResetVm {
        storage: args.storage.map(StorageWord::choice),
    };
    with_daemon(async |_, daemon| {
        let wait = Wait {
            what: &format!("a fresh `/` of {names}"),
            goes_on: "they are reset all the same: `banger vm why NAME` tells when that is done",
        };
        let each = for_each(&daemon, &args.vms, args.output, line, |client, name| {
            let request = request.clone();
            async move { client.call::<PostVmReset>(&[("vm", &name)], &request).await }
        });
        wait.outcome(each).await
    })
}

fn line(vm: &Vm) -> String {
    format!("{}: reset ({})\n", vm.name, vm.spec.storage.name())
}

#[cfg(test)]
mod tests {
    use super::*;
    use banger_core::spec::StorageChoice;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        args: ResetArgs,
    }

    #[test]
    fn a_reset_keeps_the_storage_unless_another_is_named() {
        let line = Line::try_parse_from(["reset", "otter", "fox"]).unwrap();
        assert_eq!(line.args.vms, ["otter", "fox"]);
        assert!(line.args.storage.is_none());
        let line = Line::try_parse_from(["reset", "-y", "otter", "--storage", "copy"]).unwrap();
        let choice = line.args.storage.map(StorageWord::choice);
        assert_eq!(choice, Some(StorageChoice::Copy));
        assert!(Line::try_parse_from(["reset"]).is_err());
    }
}
