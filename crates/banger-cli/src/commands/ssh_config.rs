//! `banger ssh-config`: what the person's own ssh needs to reach VMs by name.

use crate::context::{Context, own_program};
use crate::output::print;
use crate::report::Outcome;
use crate::ssh::config_block;

/// Print a block for ~/.ssh/config, so that ssh, scp, rsync and all that use ssh reach `NAME.vm`
///
/// It holds for all VMs, also for those made later, in every mode: connections go through the daemon, as root with
/// banger's own key, and a VM's host key is the one that banger gave it. An `Include` belongs into the first line of
/// ~/.ssh/config, before any `Host`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  banger ssh-config > ~/.ssh/banger.config     Once; `Include banger.config` in ~/.ssh/config
  ssh otter.vm
  rsync -a ./site/ otter.vm:/srv/site/
  ssh -F ~/.ssh/banger.config otter.vm         Without an Include")]
pub(crate) struct SshConfigArgs {}

pub(crate) fn run(SshConfigArgs {}: SshConfigArgs) -> Outcome {
    let identity = Context::from_env()?.paths.ssh().join("id_ed25519");
    print(&config_block(&own_program()?, &identity))?;
    Ok(0)
}
