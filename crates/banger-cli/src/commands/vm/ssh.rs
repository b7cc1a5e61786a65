//! `banger vm ssh`: hands this process over to the system's `ssh`.

use super::boot;
use crate::complete;
use crate::context::{Context, Daemon, block_on, own_program};
use crate::report::{Failure, Outcome, note};
use crate::ssh::{SshTarget, arguments};
use crate::value;
use banger_api::daemon::Mode;
use banger_api::endpoint::{GetVm, Nothing};
use banger_api::error::{ErrorBody, ErrorCode};
use banger_api::vm::Vm;
use banger_core::phase::Phase;
use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Duration;

/// Log in to a VM, or run a command in it
///
/// As root, with banger's own key; the VM's host key is checked against the one that banger gave it. Waits until the
/// VM is ready. Ends with the exit code of the command; as with `ssh`, its words are joined and read by a shell in the
/// VM.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  banger vm ssh otter
  banger vm ssh otter -- uname -a
  banger vm ssh otter -- 'cd /etc && cat os-release'")]
pub(crate) struct SshArgs {
    /// The VM, by name, id or unambiguous prefix
    #[arg(value_name = "NAME", add = complete::vms())]
    vm: String,
    /// Give the command a terminal
    #[arg(short, long)]
    tty: bool,
    /// How long to wait until the VM is ready
    #[arg(long, value_name = "DURATION", default_value = "120s", value_parser = value::duration)]
    timeout: Duration,
    /// The command; without it a shell
    #[arg(last = true, value_name = "CMD")]
    command: Vec<String>,
}

pub(crate) fn run(args: SshArgs) -> Outcome {
    let context = Context::from_env()?;
    let mut words = Vec::new();
    let outcome = block_on(async {
        let daemon = context.daemon().await?;
        words = prepare(&context, &daemon, &args).await?;
        Ok(0)
    });
    outcome?;
    Err(exec(&words))
}

/// The arguments for `ssh`, once the VM is ready.
async fn prepare(
    context: &Context,
    daemon: &Daemon,
    args: &SshArgs,
) -> Result<Vec<OsString>, Failure> {
    let vm = daemon
        .client
        .call::<GetVm>(&[("vm", &args.vm)], &Nothing {})
        .await?;
    let vm = ready(daemon, vm, args.timeout).await?;
    let identity = context.paths.ssh().join("id_ed25519");
    std::fs::File::open(&identity).map_err(|error| {
        let message = format!("cannot read banger's ssh key `{}`", identity.display());
        Failure::new(ErrorCode::BadFile, message)
            .caused_by(&error)
            .hint(
                "the daemon makes it at its first start; a new key reaches a VM when it is started",
            )
    })?;
    let banger = own_program()?;
    let target = SshTarget {
        banger: &banger,
        identity: &identity,
        id: vm.id.to_string(),
        address: vm.address.to_string(),
        host_key: &vm.host_key,
        through_daemon: daemon.status().await?.mode == Mode::Rootless,
        tty: args.tty,
    };
    arguments(&target, &args.command)
        .map_err(|error| Failure(ErrorBody::from_error(ErrorCode::Internal, &error)))
}

async fn ready(daemon: &Daemon, vm: Vm, limit: Duration) -> Result<Vm, Failure> {
    let name = vm.name.clone();
    match &vm.phase {
        Phase::Running {
            ready: true,
            reachable: true,
        } => return Ok(vm),
        Phase::Running {
            reachable: false, ..
        } => {
            return Err(Failure::new(
                ErrorCode::Unreachable,
                format!("vm `{name}` is unreachable"),
            )
            .hint(format!(
                "`banger vm kill {name}` ends it, `banger vm start {name}` then starts it again"
            )));
        }
        Phase::Stopped { why } => {
            return Err(Failure::new(
                ErrorCode::WrongPhase,
                format!("vm `{name}` is stopped ({why})"),
            )
            .hint(format!("`banger vm start {name}`")));
        }
        Phase::Stopping { .. } => {
            return Err(
                Failure::new(ErrorCode::WrongPhase, format!("vm `{name}` is stopping")).hint(
                    format!("`banger vm restart {name}` starts it again when it has stopped"),
                ),
            );
        }
        Phase::Starting { .. } | Phase::Running { .. } | Phase::Paused { .. } => {}
    }
    note(&format!("waiting until vm `{name}` is ready"));
    tokio::select! {
        vm = boot::watch(&daemon.client, vm, limit, false) => vm,
        _ = tokio::signal::ctrl_c() => {
            Err(Failure::new(ErrorCode::Cancelled, format!("no longer waiting; vm `{name}` boots on")))
        }
    }
}

/// Replaces this process; returns only why that failed.
fn exec(words: &[OsString]) -> Failure {
    #[expect(
        clippy::disallowed_methods,
        reason = "this process becomes ssh, nothing is spawned"
    )]
    let error = Command::new("ssh").args(words).exec();
    let failure = Failure::new(ErrorCode::HostUnfit, "cannot run the program `ssh`");
    if error.kind() == std::io::ErrorKind::NotFound {
        failure
            .caused_by(&error)
            .hint("install it: apt install openssh-client")
    } else {
        failure.caused_by(&error)
    }
}
