//! `banger vm start`, `pause`, `resume` and `kill`: verbs that take little but names.

use super::create::DriverWord;
use super::{boot, for_each, render};
use crate::commands::network;
use crate::complete;
use crate::context::with_daemon;
use crate::output::OutputArgs;
use crate::patience::Wait;
use crate::report::{Failure, Outcome};
use crate::value;
use banger_api::client::Client;
use banger_api::endpoint::{
    Endpoint, Nothing, PatchVm, PostVmKill, PostVmPause, PostVmResume, PostVmStart,
};
use banger_api::vm::{SetVm, Vm};
use banger_core::spec::DriverChoice;
use std::time::Duration;

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
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  banger vm start otter
  banger vm start otter --wait                  Wait until it can be used, and time its boot
  banger vm start otter fox --wait --timeout 5m
  banger vm start otter --driver qemu           Another VMM from now on")]
pub(crate) struct StartArgs {
    #[command(flatten)]
    vms: Vms,
    /// The VMM that runs them from now on; `auto` lets each start choose. They must be stopped
    #[arg(long, value_enum)]
    driver: Option<DriverWord>,
    /// Wait until they are ready; of a single one, print the stages of its boot with their times
    #[arg(long)]
    wait: bool,
    /// How long to wait
    #[arg(long, value_name = "DURATION", default_value = "120s", requires = "wait", value_parser = value::duration)]
    timeout: Duration,
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
/// Their disks stay. It also ends a VM that is unreachable, which cannot be stopped.
#[derive(Debug, clap::Args)]
pub(crate) struct KillArgs {
    #[command(flatten)]
    vms: Vms,
}

pub(crate) fn start(args: StartArgs) -> Outcome {
    let Vms { vms, output } = args.vms;
    let limit = args.wait.then_some(args.timeout);
    let say_stages = vms.len() == 1;
    let driver = args.driver.map(DriverWord::choice);
    with_daemon(async |_, daemon| {
        let each = for_each(&daemon, &vms, output, render::line, |client, name| {
            start_one(client, name, driver, limit, say_stages)
        });
        let wait = Wait {
            what: &format!("the start of {}", vms.join(", ")),
            goes_on: "what was started boots on: `banger vm list` shows it",
        };
        wait.outcome(each).await
    })
}

async fn start_one(
    client: Client,
    name: String,
    driver: Option<DriverChoice>,
    limit: Option<Duration>,
    say_stages: bool,
) -> Result<Vm, Failure> {
    let parameters = [("vm", name.as_str())];
    if driver.is_some() {
        let change = SetVm {
            driver,
            ..SetVm::default()
        };
        client.call::<PatchVm>(&parameters, &change).await?;
    }
    let vm = client.call::<PostVmStart>(&parameters, &Nothing {}).await?;
    network::warn_about(&client, &vm).await;
    match limit {
        Some(limit) => boot::watch(&client, vm, limit, say_stages).await,
        None => Ok(vm),
    }
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
