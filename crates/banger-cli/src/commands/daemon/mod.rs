//! `banger daemon`.

mod enable;
mod logs;
mod start;
mod status;
mod stop;

use crate::output::fields;
use crate::report::Outcome;
use crate::value;
use banger_api::daemon::DaemonStatus;

/// Look after the daemon
///
/// The daemon is started by whatever needs it. VMs run on while it is down.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum DaemonCommand {
    Status(status::StatusArgs),
    Start(start::StartArgs),
    Stop(stop::StopArgs),
    Restart(start::RestartArgs),
    Enable(enable::EnableArgs),
    Disable(enable::DisableArgs),
    Logs(logs::LogsArgs),
}

pub(crate) fn run(command: DaemonCommand) -> Outcome {
    match command {
        DaemonCommand::Status(args) => status::run(args),
        DaemonCommand::Start(args) => start::run(args),
        DaemonCommand::Stop(args) => stop::run(args),
        DaemonCommand::Restart(args) => start::restart(args),
        DaemonCommand::Enable(args) => enable::enable(args),
        DaemonCommand::Disable(args) => enable::disable(args),
        DaemonCommand::Logs(args) => logs::run(args),
    }
}

fn render(status: &DaemonStatus) -> String {
    let mut text = fields([
        ("daemon", "running".to_owned()),
        (
            "version",
            format!("{} (build {})", status.version, status.build),
        ),
        ("pid", status.pid.to_string()),
        ("mode", mode(status)),
        ("started", value::date(status.started_at)),
        ("VMs", format!("{} ({} live)", status.vms, status.live)),
        ("addresses", status.pool.network().to_string()),
        ("instance", status.instance.to_string()),
        ("schema", status.schema.to_string()),
        ("state", status.state_dir.clone()),
    ]);
    for notice in &status.notices {
        text.push_str(&fields([("notice:", notice.clone())]));
    }
    text
}

fn mode(status: &DaemonStatus) -> String {
    let name = status.mode.name();
    if status.mode_why.is_empty() {
        name.to_owned()
    } else {
        format!("{name} ({})", status.mode_why)
    }
}
