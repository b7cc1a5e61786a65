//! `banger-init`: the first program of a guest, and, under the name of [`AGENT_NAME`], the agent that it leaves behind.

mod agent;
mod init;
mod sys;

/// The agent's `argv[0]`. systemd's last killing spree spares processes whose name starts with `@`, so the agent
/// lives until the kernel ends and can tell how.
const AGENT_NAME: &str = "@banger-agent";

fn main() {
    let name = std::env::args_os().next().unwrap_or_default();
    if name == AGENT_NAME {
        agent::run();
    } else if rustix::process::getpid().is_init() {
        init::run();
    } else {
        eprintln!("banger-init is the first program of a virtual machine and does nothing else");
        std::process::exit(2);
    }
}
