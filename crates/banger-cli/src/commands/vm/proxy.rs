//! `banger vm proxy`: stdin and stdout are a connection to a guest's port. `ssh` runs it where the host has no route.

use crate::context::{Context, block_on};
use crate::ensure_daemon::silence;
use crate::report::{Failure, Outcome};
use crate::ssh::vm_of_host;
use banger_api::endpoint::GetVmConnect;
use banger_api::error::ErrorCode;
use banger_api::vm::ConnectVm;
use std::os::fd::AsFd;
use tokio::fs::File;
use tokio::io::AsyncWriteExt;

/// Connect stdin and stdout to a TCP port of a VM
#[derive(Debug, clap::Args)]
pub(crate) struct ProxyArgs {
    /// The VM, by name, id or unambiguous prefix; `NAME.vm` is its name as a host's
    #[arg(value_name = "NAME")]
    vm: String,
    /// The port
    port: u16,
}

pub(crate) fn run(args: ProxyArgs) -> Outcome {
    let context = Context::from_env()?;
    block_on(async {
        let client = context.daemon().await?.client;
        let request = ConnectVm { port: args.port };
        let probed = context.client();
        let parameters = [("vm", vm_of_host(&args.vm))];
        let stream = tokio::select! {
            stream = client.upgrade::<GetVmConnect>(&parameters, &request) => stream?,
            failure = silence(&probed) => return Err(failure),
        };
        let (mut from_guest, mut to_guest) = tokio::io::split(stream);
        let (mut stdin, mut stdout) = (file(std::io::stdin())?, file(std::io::stdout())?);
        let upwards = async {
            // A failure shows as the other direction's end.
            let _ = tokio::io::copy(&mut stdin, &mut to_guest).await;
            let _ = to_guest.shutdown().await;
            std::future::pending::<()>().await;
        };
        let downwards = async {
            let copied = tokio::io::copy(&mut from_guest, &mut stdout).await;
            copied.and(stdout.flush().await)
        };
        tokio::select! {
            () = upwards => Ok(0),
            result = downwards => {
                let broken = |error| {
                    Failure::new(ErrorCode::Internal, format!("the connection to vm `{}` broke", args.vm)).caused_by(&error)
                };
                result.map(|()| 0).map_err(broken)
            }
        }
    })
}

/// A standard stream without the buffer that Rust puts around it.
fn file(stream: impl AsFd) -> Result<File, Failure> {
    let descriptor = stream.as_fd().try_clone_to_owned().map_err(|error| {
        Failure::new(ErrorCode::Internal, "cannot use standard input and output").caused_by(&error)
    })?;
    Ok(File::from_std(std::fs::File::from(descriptor)))
}
