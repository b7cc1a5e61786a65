//! `banger port`.

use super::{network, worst};
use crate::complete;
use crate::context::with_daemon;
use crate::output::{OutputArgs, json, print, table};
use crate::report::{Failure, Outcome, note};
use crate::value;
use banger_api::client::{Client, ClientError};
use banger_api::endpoint::{DeleteVmPorts, PostVmPorts};
use banger_api::network::{ClosePort, PublishPort, VmNetwork, VmPort};
use banger_api::vm::Vm;
use banger_core::publish::PublishedPort;

/// Lead ports of the host into VMs
///
/// A published port is open while its VM runs, and closed with it. Without an address the host listens on 127.0.0.1
/// alone: nobody else on the network reaches it.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum PortCommand {
    #[command(visible_alias = "ls")]
    List(ListArgs),
    Add(AddArgs),
    #[command(visible_alias = "delete")]
    Rm(RmArgs),
}

/// Publish ports of a VM; they take effect at once
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  banger port add otter 8080:80                 http://127.0.0.1:8080 is port 80 of the guest
  banger port add otter 0.0.0.0:8080:80         The same for everybody who reaches this host
  banger port add otter 8443:443 5353:53/udp")]
pub(crate) struct AddArgs {
    /// The VM, by name, id or unambiguous prefix
    #[arg(value_name = "NAME", add = complete::vms())]
    vm: String,
    /// The ports
    #[arg(value_name = "[ADDRESS:]HOST:GUEST[/udp]", required = true)]
    ports: Vec<PublishedPort>,
    #[command(flatten)]
    output: OutputArgs,
}

/// Close published ports of a VM; connections through them end
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  banger port rm otter 8080
  banger port rm otter 0.0.0.0:8080 5353/udp")]
pub(crate) struct RmArgs {
    /// The VM, by name, id or unambiguous prefix
    #[arg(value_name = "NAME", add = complete::vms())]
    vm: String,
    /// Where the host listens
    #[arg(value_name = "[ADDRESS:]HOST[/udp]", required = true, value_parser = value::place, add = complete::places())]
    ports: Vec<ClosePort>,
    #[command(flatten)]
    output: OutputArgs,
}

/// Show published ports, and whether the host listens there
#[derive(Debug, clap::Args)]
pub(crate) struct ListArgs {
    /// The VMs, by name, id or unambiguous prefix (default: all)
    #[arg(value_name = "NAME", add = complete::vms())]
    vms: Vec<String>,
    #[command(flatten)]
    output: OutputArgs,
}

pub(crate) fn run(command: PortCommand) -> Outcome {
    match command {
        PortCommand::List(args) => list(args),
        PortCommand::Add(args) => {
            let AddArgs { vm, ports, output } = args;
            change(&vm, ports, output, async |client, parameters, port| {
                client
                    .call::<PostVmPorts>(parameters, &PublishPort(port))
                    .await
            })
        }
        PortCommand::Rm(args) => {
            let RmArgs { vm, ports, output } = args;
            change(&vm, ports, output, async |client, parameters, port| {
                client.call::<DeleteVmPorts>(parameters, &port).await
            })
        }
    }
}

/// Does the same for each port, one after the other since they are one VM's, and shows what the VM has then.
fn change<P>(
    vm: &str,
    ports: Vec<P>,
    output: OutputArgs,
    call: impl AsyncFn(&Client, &[(&str, &str)], P) -> Result<Vm, ClientError>,
) -> Outcome {
    with_daemon(async |_, daemon| {
        let parameters = [("vm", vm)];
        let mut latest = None;
        let mut failures: Vec<Failure> = Vec::new();
        for port in ports {
            match call(&daemon.client, &parameters, port).await {
                Ok(vm) => latest = Some(vm),
                Err(error) => failures.push(error.into()),
            }
        }
        if let Some(vm) = latest {
            if output.json {
                json(&vm)?;
            } else {
                let now = network::of(&daemon.client, &vm).await;
                show(now.as_slice())?;
            }
        }
        Ok(worst(&failures))
    })
}

fn list(args: ListArgs) -> Outcome {
    with_daemon(async |_, daemon| {
        let status = network::status(&daemon.client).await?;
        let vms = network::choose(status.vms, &args.vms)?;
        if args.output.json {
            json(&vms)?;
        } else {
            show(&vms)?;
        }
        Ok(0)
    })
}

fn show(vms: &[VmNetwork]) -> Result<(), Failure> {
    if vms.iter().all(|vm| vm.ports.is_empty()) {
        note("no published ports; `banger port add NAME 8080:80` publishes one");
        return Ok(());
    }
    print(&render(vms))
}

fn render(vms: &[VmNetwork]) -> String {
    let state = |vm: &VmNetwork, port: &VmPort| match (&port.problem, port.open) {
        (Some(why), _) => format!("closed: {why}"),
        (None, true) => "open".to_owned(),
        (None, false) if vm.live => "closed".to_owned(),
        (None, false) => "not running".to_owned(),
    };
    let rows = vms.iter().flat_map(|vm| {
        vm.ports.iter().map(move |known| {
            vec![
                vm.name.to_string(),
                format!("{}/{}", known.port.listen, known.port.protocol),
                known.port.guest_port.to_string(),
                known.connections.to_string(),
                state(vm, known),
            ]
        })
    });
    table(&["NAME", "HOST", "GUEST", "CONNECTIONS", "STATE"], rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_tells_where_the_host_listens_and_why_it_does_not() {
        insta::assert_snapshot!(render(&network::tests::example().vms), @r"
        NAME        HOST                GUEST  CONNECTIONS  STATE
        calm-otter  127.0.0.1:8080/tcp  80     2            open
        calm-otter  0.0.0.0:53/udp      53     0            closed: address already in use
        fox         127.0.0.1:9090/tcp  90     0            not running
        ");
    }
}
