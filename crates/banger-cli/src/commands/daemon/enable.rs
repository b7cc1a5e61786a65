//! `banger daemon enable` and `banger daemon disable`.

use crate::context::{Context, block_on};
use crate::ensure_daemon::{self, Mode};
use crate::output::print;
use crate::report::{Failure, Outcome, note, warn};
use crate::systemd;
use banger_api::error::{ErrorBody, ErrorCode};
use banger_api::paths::{Paths, ProcessEnv};
use banger_api::unit::{self, DaemonUnit};

/// Start the daemon with this host, so that VMs with autostart come back
///
/// Has your systemd start the daemon, and run from the host's boot to its shutdown (linger). VMs are then shut
/// down cleanly before the host goes down. Without linger this happens when you log out.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  banger daemon enable
  banger vm set --autostart on calm-otter   Has this VM come back with the host")]
pub(crate) struct EnableArgs {
    /// Leave linger as it is
    #[arg(long)]
    no_linger: bool,
}

/// No longer start the daemon with this host
///
/// The daemon and its VMs run on. Linger stays as it is, since other programs may need it.
#[derive(Debug, clap::Args)]
pub(crate) struct DisableArgs {}

pub(crate) fn enable(args: EnableArgs) -> Outcome {
    let context = Context::from_env()?;
    let unit = unit()?;
    same_folders(&context.paths, &managed()?)?;
    let lingers = !args.no_linger && linger();
    systemd::enable()?;
    // Only now is the runtime folder what it will be.
    let context = Context::from_env()?;
    block_on(async {
        let running = ensure_daemon::status(&context.paths).await?;
        let live = running.as_ref().map_or(0, |status| status.live);
        if running.is_some() {
            ensure_daemon::restart(&context.paths).await?;
        } else {
            ensure_daemon::ensure(&context.paths, Mode::Start).await?;
        }
        if live > 0 {
            note("VMs that run now go over to systemd when they are next started");
        }
        let until = if lingers {
            "from this host's boot to its shutdown"
        } else {
            "while you are logged in, or longer if linger is on"
        };
        print(&format!(
            "enabled  {}\nthe daemon runs {until}; VMs with autostart come back with it\n",
            unit.path.display()
        ))?;
        Ok(0)
    })
}

pub(crate) fn disable(DisableArgs {}: DisableArgs) -> Outcome {
    let unit = unit()?;
    if !unit.enabled {
        note("it is not enabled");
        return Ok(0);
    }
    systemd::disable()?;
    print(&format!(
        "disabled  {}\nthe daemon runs on; linger stays as it is (`loginctl disable-linger` turns it off)\n",
        unit.path.display()
    ))?;
    Ok(0)
}

fn linger() -> bool {
    match systemd::linger() {
        Ok(()) => true,
        Err(failure) => {
            let causes = failure.0.causes.iter().map(|cause| format!(": {cause}"));
            let message: String = std::iter::once(failure.0.message.clone())
                .chain(causes)
                .collect();
            warn(
                &message,
                &[
                    "`sudo loginctl enable-linger $USER` keeps VMs running when you log out"
                        .to_owned(),
                ],
            );
            false
        }
    }
}

fn unit() -> Result<DaemonUnit, Failure> {
    let unfit = |message: &str| Failure::new(ErrorCode::HostUnfit, message);
    if !unit::is_booted() {
        return Err(unfit("this machine is not run by systemd, which would start the daemon").hint(
            "have whatever starts programs here run `banger daemon start` at boot, and `banger daemon stop --vms` before a shutdown",
        ));
    }
    DaemonUnit::find(&ProcessEnv).ok_or_else(|| {
        unfit("the unit `bangerd.service` is not installed")
            .hint("`make install` puts it where systemd finds it; `systemctl --user unmask bangerd` if it is masked")
    })
}

fn managed() -> Result<Paths, Failure> {
    unit::paths(&ProcessEnv).map_err(|error| {
        Failure(ErrorBody::from_error(ErrorCode::HostUnfit, &error))
            .hint("set HOME to your home folder")
    })
}

/// Refuses a daemon of systemd's that would not be the one of this shell.
fn same_folders(ours: &Paths, managed: &Paths) -> Result<(), Failure> {
    let folders =
        |paths: &Paths| [&paths.state, &paths.data, &paths.config, &paths.cache].map(Clone::clone);
    let differing = folders(ours)
        .into_iter()
        .zip(folders(managed))
        .find(|(one, other)| one != other);
    match differing {
        None => Ok(()),
        Some((one, other)) => Err(Failure::new(
            ErrorCode::HostUnfit,
            format!(
                "a daemon of systemd's would use `{}`, and not `{}` as this shell does",
                other.display(),
                one.display()
            ),
        )
        .hint("repeat the command without XDG_CONFIG_HOME, XDG_STATE_HOME, XDG_DATA_HOME and XDG_CACHE_HOME")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn a_shell_with_folders_of_its_own_is_refused_but_for_the_runtime_folder() {
        let paths = |state: &str, runtime: &str| Paths {
            config: "/c".into(),
            state: state.into(),
            data: "/d".into(),
            cache: "/k".into(),
            runtime: Path::new(runtime).to_owned(),
        };
        assert!(same_folders(&paths("/s", "/r"), &paths("/s", "/other")).is_ok());
        let failure = same_folders(&paths("/s", "/r"), &paths("/t", "/r")).unwrap_err();
        assert!(
            failure.0.message.contains("`/t`, and not `/s`"),
            "{failure:?}"
        );
    }
}
