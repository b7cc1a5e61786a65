//! `banger host`.

use super::mended;
use crate::context::with_daemon;
use crate::output::{OutputArgs, json, print, table};
use crate::patience::{Wait, cancelled};
use crate::report::{Outcome, note};
use banger_api::endpoint::{GetHost, Nothing, PostHostClean};
use banger_api::host::{CleanHost, HostObject};

/// See and remove what banger has on this host
#[derive(Debug, clap::Subcommand)]
pub(crate) enum HostCommand {
    #[command(visible_alias = "list")]
    Ls(LsArgs),
    Clean(CleanArgs),
}

/// List all that banger has on this host: processes, links, rules, devices, and whose they are
#[derive(Debug, clap::Args)]
pub(crate) struct LsArgs {
    #[command(flatten)]
    output: OutputArgs,
}

/// Return this host to what it was before banger: VMs keep their records and files
///
/// What is left over goes in any case. The daemon itself stays; `banger daemon stop` ends it. Ends with exit code 7 if
/// something is left.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  banger host clean
  banger host clean --force   Stop running VMs first")]
pub(crate) struct CleanArgs {
    /// Stop all VMs first; without it a running VM is a reason to refuse
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    output: OutputArgs,
}

pub(crate) fn run(command: HostCommand) -> Outcome {
    match command {
        HostCommand::Ls(args) => ls(args),
        HostCommand::Clean(args) => clean(args),
    }
}

fn ls(args: LsArgs) -> Outcome {
    with_daemon(async |_, daemon| {
        let objects = daemon.client.call::<GetHost>(&[], &Nothing {}).await?;
        if args.output.json {
            json(&objects)?;
        } else {
            print(&render(&objects))?;
            if objects.iter().any(|object| !object.expected) {
                note("what is left over goes with `banger doctor --repair` or `banger host clean`");
            }
        }
        Ok(0)
    })
}

fn render(objects: &[HostObject]) -> String {
    let rows = objects.iter().map(|object| {
        vec![
            object.kind.name().to_owned(),
            object.name.clone(),
            object.owner.clone(),
            if object.expected { "" } else { "left over" }.to_owned(),
        ]
    });
    table(&["KIND", "NAME", "OWNER", ""], rows)
}

fn clean(args: CleanArgs) -> Outcome {
    let request = CleanHost { force: args.force };
    with_daemon(async |_, daemon| {
        let wait = Wait {
            what: if args.force {
                "the VMs to stop, then for what banger has on this host to be removed"
            } else {
                "what banger has on this host to be removed"
            },
            goes_on: "all of it is done all the same: `banger host ls` shows what is left",
        };
        let clean = daemon.client.call::<PostHostClean>(&[], &request);
        let Some(done) = wait.of(clean).await else {
            return cancelled();
        };
        mended(&done?, args.output, "there was nothing to remove")
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use banger_api::host::HostKind;

    #[test]
    fn what_is_left_over_is_marked() {
        let object = |kind, name: &str, owner: &str, expected| HostObject {
            kind,
            name: name.to_owned(),
            owner: owner.to_owned(),
            expected,
        };
        let objects = [
            object(HostKind::Process, "12 (bangerd)", "(instance)", true),
            object(HostKind::Tap, "bt1f2e3d4c5b", "calm-otter", false),
        ];
        insta::assert_snapshot!(render(&objects), @r"
        KIND     NAME          OWNER
        process  12 (bangerd)  (instance)
        tap      bt1f2e3d4c5b  calm-otter  left over
        ");
    }
}
