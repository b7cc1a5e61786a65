//! The shim: one small process per running VM, the VMM's parent and the one client of its control socket and of the
//! guest's agent.
//!
//! Single-threaded, one `poll` loop, nothing that blocks. The daemon may die at any moment: a shim serves whoever
//! connects next. If the shim itself is killed, the VMM runs on and keeps the lock, so the VM counts as alive.
//!
//! SIGTERM, SIGINT and SIGHUP are ignored once the VMM runs: a logout or a restarted daemon ends no VM.

mod agent;
mod channel;
mod clients;
mod control;
mod guest;
mod machine;
mod pipes;
mod sandbox;
mod start;

use crate::launch;
use crate::protocol::Launched;
use std::process::ExitCode;

/// The whole life of a shim. Standard input is the socket of [`crate::launch::spawn`].
pub fn run() -> ExitCode {
    start::close_inherited();
    let (launch, descriptors) = match launch::receive(rustix::stdio::stdin()) {
        Ok(Some(received)) => received,
        // The daemon died before it sent: nothing was begun.
        Ok(None) => return ExitCode::SUCCESS,
        Err(error) => {
            return refuse(
                format!("the launch message cannot be used: {error}"),
                String::new(),
            );
        }
    };
    let (machine, watch) = match start::start(launch, descriptors) {
        Ok(started) => started,
        Err(failure) => return refuse(failure.error, failure.stderr),
    };
    let running = Launched::Running {
        vmm_pid: machine.vmm_pid(),
        shim_pid: std::process::id() as i32,
        sandbox: machine.sandbox().to_vec(),
    };
    // Nobody may be listening any more: the VM runs all the same, and is found by its lock and socket.
    let _ = launch::answer(rustix::stdio::stdin(), &running);
    start::detach_stdin();
    machine.serve(watch)
}

fn refuse(error: String, stderr: String) -> ExitCode {
    let _ = launch::answer(rustix::stdio::stdin(), &Launched::Failed { error, stderr });
    ExitCode::FAILURE
}
