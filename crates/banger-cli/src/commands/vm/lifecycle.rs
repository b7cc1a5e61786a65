//! `banger vm start`, `pause`, `resume` and `kill`: verbs that take nothing but names.

use super::{for_each, render};
use crate::complete;
use crate::context::with_daemon;
use crate::output::OutputArgs;
use crate::report::Outcome;
use banger_api::endpoint::{Endpoint, Nothing, PostVmKill, PostVmPause, PostVmResume, PostVmStart};
use banger_api::vm::Vm;

/// The VMs that a verb is for.
#[derive(Debug, clap::Args)]
struct Vms {
    /// The VMs, by name, id or unambiguous prefix
    #[arg(value_name = "NAME", required = true, add = complete::vms())]
    vms: Vec<String>,
    #[command(flatten)]
    output: OutputArgs,
}

/// Start VMs; returns when their VMMs run
///
/// `banger vm wait` waits until a VM can be used.
#[derive(Debug, clap::Args)]
pub(crate) struct StartArgs {
    #[command(flatten)]
    vms: Vms,
}

/// Pause VMs: their vCPUs stand still, their memory stays
#[derive(Debug, clap::Args)]
pub(crate) struct PauseArgs {
    #[command(flatten)]
    vms: Vms,
}

/// Let paused VMs run on
#[derive(Debug, clap::Args)]
pub(crate) struct ResumeArgs {
    #[command(flatten)]
    vms: Vms,
}

/// End VMs at once, without asking them, as if their plug were pulled
///
/// Their disks stay. It is the only verb for a VM that is unreachable.
#[derive(Debug, clap::Args)]
pub(crate) struct KillArgs {
    #[command(flatten)]
    vms: Vms,
}

pub(crate) fn start(args: StartArgs) -> Outcome {
    each::<PostVmStart>(args.vms)
}

pub(crate) fn pause(args: PauseArgs) -> Outcome {
    each::<PostVmPause>(args.vms)
}

pub(crate) fn resume(args: ResumeArgs) -> Outcome {
    each::<PostVmResume>(args.vms)
}

pub(crate) fn kill(args: KillArgs) -> Outcome {
    each::<PostVmKill>(args.vms)
}

fn each<E: Endpoint<Request = Nothing, Reply = Vm>>(args: Vms) -> Outcome {
    with_daemon(async |_, daemon| {
        for_each(
            &daemon,
            &args.vms,
            args.output,
            render::line,
            |client, name| async move { client.call::<E>(&[("vm", &name)], &Nothing {}).await },
        )
        .await
    })
}
