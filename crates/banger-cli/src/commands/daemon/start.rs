//! `banger daemon start` and `banger daemon restart`.

use super::render;
use crate::context::{Context, block_on};
use crate::ensure_daemon::{self, Mode};
use crate::output::{OutputArgs, json, print};
use crate::report::Outcome;
use banger_api::daemon::DaemonStatus;

/// Start the daemon if it does not run
#[derive(Debug, clap::Args)]
pub(crate) struct StartArgs {
    #[command(flatten)]
    output: OutputArgs,
}

/// Stop the daemon and start it again; VMs run on
#[derive(Debug, clap::Args)]
pub(crate) struct RestartArgs {
    #[command(flatten)]
    output: OutputArgs,
}

pub(crate) fn run(args: StartArgs) -> Outcome {
    let context = Context::from_env()?;
    block_on(async {
        let daemon = context.daemon_as(Mode::Start).await?;
        show(&daemon.status().await?, args.output)
    })
}

pub(crate) fn restart(args: RestartArgs) -> Outcome {
    let context = Context::from_env()?;
    block_on(async {
        ensure_daemon::restart(&context.paths).await?;
        let daemon = context.daemon_as(Mode::Start).await?;
        show(&daemon.status().await?, args.output)
    })
}

fn show(status: &DaemonStatus, output: OutputArgs) -> Outcome {
    if output.json {
        json(status)?;
    } else {
        print(&render(status))?;
    }
    Ok(0)
}
