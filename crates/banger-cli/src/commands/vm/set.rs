//! `banger vm set`.

use super::render;
use crate::complete;
use crate::context::with_daemon;
use crate::output::{OutputArgs, json, print};
use crate::report::Outcome;
use crate::value;
use banger_api::endpoint::PatchVm;
use banger_api::vm::SetVm;

/// Change vCPUs or memory of a stopped VM
#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("change").args(["vcpu", "memory"]).required(true).multiple(true))]
#[command(
    after_help = "Examples:\n  banger vm set otter --memory 4G\n  banger vm set otter --vcpu 4 --memory 2048"
)]
pub(crate) struct SetArgs {
    /// The VM, by name, id or unambiguous prefix
    #[arg(value_name = "NAME", add = complete::vms())]
    vm: String,
    /// vCPUs, 1 to 16
    #[arg(long, alias = "vcpus", value_name = "N", value_parser = value::vcpus)]
    vcpu: Option<u64>,
    /// Memory in MiB, or with a unit such as `2G`; 128 MiB to 32 GiB
    #[arg(long, value_name = "SIZE", value_parser = value::memory_mib)]
    memory: Option<u64>,
    #[command(flatten)]
    output: OutputArgs,
}

pub(crate) fn run(args: SetArgs) -> Outcome {
    let request = SetVm {
        vcpus: args.vcpu,
        memory_mib: args.memory,
        ..SetVm::default()
    };
    with_daemon(async |_, daemon| {
        let vm = daemon
            .client
            .call::<PatchVm>(&[("vm", &args.vm)], &request)
            .await?;
        if args.output.json {
            json(&vm)?;
        } else {
            print(&render::list(std::slice::from_ref(&vm), false))?;
        }
        Ok(0)
    })
}
