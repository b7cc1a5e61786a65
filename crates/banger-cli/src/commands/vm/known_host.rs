//! `banger vm known-host`: the line of a known-hosts file for one VM. `ssh` runs it, so that no file is needed.

use crate::context::with_daemon;
use crate::output::print;
use crate::report::{Failure, Outcome};
use crate::ssh::{HostKeyError, split_host_key, vm_of_host};
use banger_api::endpoint::{GetVm, Nothing};
use banger_api::error::{ErrorBody, ErrorCode};

/// Print the pinned host key of a VM for ssh
#[derive(Debug, clap::Args)]
pub(crate) struct KnownHostArgs {
    /// The VM's id, or the host name that ssh looks for
    host: String,
    /// The key's type; without it the daemon is asked
    #[arg(requires = "key")]
    kind: Option<String>,
    /// The key
    key: Option<String>,
}

pub(crate) fn run(args: KnownHostArgs) -> Outcome {
    let host = args.host;
    if let (Some(kind), Some(key)) = (args.kind, args.key) {
        print(&format!("{host} {kind} {key}\n"))?;
        return Ok(0);
    }
    with_daemon(async |_, daemon| {
        let name = vm_of_host(&host);
        let vm = daemon
            .client
            .call::<GetVm>(&[("vm", name)], &Nothing {})
            .await?;
        let invalid = || HostKeyError(vm.host_key.clone());
        let (kind, key) = split_host_key(&vm.host_key)
            .ok_or_else(|| Failure(ErrorBody::from_error(ErrorCode::Internal, &invalid())))?;
        print(&format!("{host} {kind} {key}\n"))?;
        Ok(0)
    })
}
