//! `banger vm`.

mod boot;
mod create;
mod delete;
mod known_host;
mod lifecycle;
mod list;
mod logs;
mod proxy;
pub(super) mod render;
mod reset;
mod restore;
mod set;
mod show;
mod ssh;
mod stop;
mod undelete;
mod wait;
mod why;

use crate::commands::worst;
use crate::context::Daemon;
use crate::output::{OutputArgs, json, print};
use crate::report::{Failure, Outcome};
use banger_api::client::Client;
use banger_api::vm::Vm;
use tokio::task::JoinSet;

/// Create and use VMs
#[derive(Debug, clap::Subcommand)]
pub(crate) enum VmCommand {
    Create(create::CreateArgs),
    List(list::ListArgs),
    Show(show::ShowArgs),
    Start(lifecycle::StartArgs),
    Stop(stop::StopArgs),
    Restart(stop::RestartArgs),
    Pause(lifecycle::PauseArgs),
    Resume(lifecycle::ResumeArgs),
    Kill(lifecycle::KillArgs),
    Set(set::SetArgs),
    Reset(reset::ResetArgs),
    Delete(delete::DeleteArgs),
    Undelete(undelete::UndeleteArgs),
    Restore(restore::RestoreArgs),
    Ssh(ssh::SshArgs),
    Logs(logs::LogsArgs),
    Wait(wait::WaitArgs),
    Why(why::WhyArgs),
    #[command(hide = true)]
    Proxy(proxy::ProxyArgs),
    #[command(hide = true)]
    KnownHost(known_host::KnownHostArgs),
}

pub(crate) fn run(command: VmCommand) -> Outcome {
    match command {
        VmCommand::Create(args) => create::run(args),
        VmCommand::List(args) => list::run(args),
        VmCommand::Show(args) => show::run(args),
        VmCommand::Start(args) => lifecycle::start(args),
        VmCommand::Stop(args) => stop::run(args),
        VmCommand::Restart(args) => stop::restart(args),
        VmCommand::Pause(args) => lifecycle::pause(args),
        VmCommand::Resume(args) => lifecycle::resume(args),
        VmCommand::Kill(args) => lifecycle::kill(args),
        VmCommand::Set(args) => set::run(args),
        VmCommand::Reset(args) => reset::run(args),
        VmCommand::Delete(args) => delete::run(args),
        VmCommand::Undelete(args) => undelete::run(args),
        VmCommand::Restore(args) => restore::run(args),
        VmCommand::Ssh(args) => ssh::run(args),
        VmCommand::Logs(args) => logs::run(args),
        VmCommand::Wait(args) => wait::run(args),
        VmCommand::Why(args) => why::run(args),
        VmCommand::Proxy(args) => proxy::run(args),
        VmCommand::KnownHost(args) => known_host::run(args),
    }
}

/// Does the same to each VM, side by side, and prints what became of them in the order they were named.
pub(super) async fn for_each<F, E>(
    daemon: &Daemon,
    names: &[String],
    output: OutputArgs,
    line: impl Fn(&Vm) -> String,
    call: impl Fn(Client, String) -> F,
) -> Outcome
where
    F: Future<Output = Result<Vm, E>> + Send + 'static,
    E: Into<Failure> + Send + 'static,
{
    let mut calls = JoinSet::new();
    for (place, name) in names.iter().enumerate() {
        let call = call(daemon.client.clone(), name.clone());
        calls.spawn(async move { (place, call.await) });
    }
    let mut results = calls.join_all().await;
    results.sort_by_key(|(place, _)| *place);
    let mut vms = Vec::new();
    let mut failures = Vec::new();
    for (_, result) in results {
        match result {
            Ok(vm) => vms.push(vm),
            Err(error) => failures.push(error.into()),
        }
    }
    match (output.json, names) {
        (true, [_]) => vms.iter().try_for_each(json)?,
        (true, _) => json(&vms)?,
        (false, _) => print(&vms.iter().map(line).collect::<String>())?,
    }
    Ok(worst(&failures))
}
