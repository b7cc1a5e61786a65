//! `banger vm wait`.

use super::render;
use crate::complete;
use crate::context::with_daemon;
use crate::output::{OutputArgs, json, print};
use crate::patience::{Wait, cancelled};
use crate::report::Outcome;
use crate::value;
use banger_api::endpoint::GetVmWait;
use banger_api::vm::{WaitFor, WaitVm};
use clap::ValueEnum;
use std::time::Duration;

/// Wait until a VM is ready, running or stopped
///
/// Ends with exit code 6 if that takes too long; nothing is undone.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  banger vm wait otter\n  banger vm wait otter --for stopped --timeout 5m"
)]
pub(crate) struct WaitArgs {
    /// The VM, by name, id or unambiguous prefix
    #[arg(value_name = "NAME", add = complete::vms())]
    vm: String,
    /// What to wait for
    #[arg(long = "for", value_name = "STATE", value_enum, default_value_t = State::Ready)]
    state: State,
    /// How long to wait
    #[arg(long, value_name = "DURATION", default_value = "60s", value_parser = value::duration)]
    timeout: Duration,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum State {
    /// It can be used
    Ready,
    /// Its VMM runs
    Running,
    /// It is stopped
    Stopped,
}

pub(crate) fn run(args: WaitArgs) -> Outcome {
    let condition = match args.state {
        State::Ready => WaitFor::Ready,
        State::Running => WaitFor::Running,
        State::Stopped => WaitFor::Stopped,
    };
    let request = WaitVm {
        condition,
        timeout_ms: Some(value::milliseconds(args.timeout)),
        after: None,
    };
    with_daemon(async |_, daemon| {
        let parameters = [("vm", args.vm.as_str())];
        let wait = Wait {
            what: &format!("VM `{}`", args.vm),
            goes_on: "nothing is undone",
        };
        let waited = daemon.client.call::<GetVmWait>(&parameters, &request);
        let Some(vm) = wait.of(waited).await else {
            return cancelled();
        };
        let vm = vm?;
        if args.output.json {
            json(&vm)?;
        } else {
            print(&render::line(&vm))?;
        }
        Ok(0)
    })
}
