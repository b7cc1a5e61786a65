//! `banger-helper`: root's operations for ordinary users.

use banger_helper::root::say;
use banger_helper::{confine, door, root, warnings};
use banger_host::error_chain;
use banger_host::host_side::Host;
use rustix::fd::OwnedFd;
use rustix::fs::Mode;
use std::error::Error;
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

const USAGE: &str = "usage: banger-helper [--listen PATH] [--folder PATH] [--idle SECONDS]\n\
                     Without --listen it takes its socket from systemd, and ends after a minute without work.";
const IDLE: Duration = Duration::from_secs(60);

#[derive(Default)]
struct Options {
    listen: Option<PathBuf>,
    folder: Option<PathBuf>,
    idle: Option<Duration>,
}

fn main() -> ExitCode {
    let Some(options) = parse(std::env::args_os().skip(1)) else {
        say(format_args!("{USAGE}"));
        return ExitCode::from(2);
    };
    let variable = |name| std::env::var(name).ok();
    let (listen_pid, listen_fds) = (variable("LISTEN_PID"), variable("LISTEN_FDS"));
    banger_host::crash::remember();
    confine::clear_environment();
    warnings::to_stderr();
    match run(options, listen_pid.as_deref(), listen_fds.as_deref()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(format_args!("banger-helper: {}", error_chain(&*error)));
            ExitCode::FAILURE
        }
    }
}

fn run(
    options: Options,
    listen_pid: Option<&str>,
    listen_fds: Option<&str>,
) -> Result<(), Box<dyn Error>> {
    let (listener, idle): (OwnedFd, _) = match &options.listen {
        Some(path) => (door::listen(path)?, options.idle),
        None => (
            door::handed_over(listen_pid, listen_fds)?,
            Some(options.idle.unwrap_or(IDLE)),
        ),
    };
    rustix::process::umask(Mode::RWXG | Mode::RWXO);
    rustix::process::chdir("/")?;
    confine::confine()?;
    let host = match options.folder {
        Some(folder) => Host::with_folder(folder),
        None => Host::of_this_machine(),
    };
    Ok(root::serve(listener, host, idle)?)
}

fn parse(mut args: impl Iterator<Item = OsString>) -> Option<Options> {
    let mut options = Options::default();
    while let Some(arg) = args.next() {
        match arg.to_str() {
            Some("--listen") => options.listen = Some(PathBuf::from(args.next()?)),
            Some("--folder") => options.folder = Some(PathBuf::from(args.next()?)),
            Some("--idle") => {
                let seconds = args.next()?.to_str()?.parse().ok()?;
                options.idle = Some(Duration::from_secs(seconds));
            }
            _ => return None,
        }
    }
    Some(options)
}
