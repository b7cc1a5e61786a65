//! `banger-netns`: keeps the instance's network namespace and works in it; or holds its way out.

use banger_helper::enter;
use banger_helper::serve::Server;
use banger_helper::warnings;
use banger_helper::way_out;
use banger_host::error_chain;
use banger_host::net::keeper::Readiness;
use rustix::process::Resource;
use std::ffi::OsString;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

const USAGE: &str = "usage: banger-netns --socket PATH [--user-namespace]\n       \
     banger-netns --socket PATH --join-network PATH [--join-user PATH]\n       banger-netns --way-out-of PID --pasta PATH\n       \
     banger-netns --probe-kvm\n       banger-netns --probe-namespaces";

/// What the command line asks for.
enum Task {
    Keep {
        socket: PathBuf,
        user_namespace: bool,
    },
    Rejoin {
        socket: PathBuf,
        network: PathBuf,
        user: Option<PathBuf>,
    },
    WayOut {
        keeper: i32,
        pasta: PathBuf,
    },
    ProbeKvm,
    ProbeNamespaces,
}

fn main() -> ExitCode {
    warnings::to_stderr();
    match parse(std::env::args_os().skip(1)) {
        Some(Task::Keep {
            socket,
            user_namespace,
        }) => keep(&socket, user_namespace, || enter::enter(user_namespace)),
        Some(Task::Rejoin {
            socket,
            network,
            user,
        }) => keep(&socket, user.is_some(), || {
            enter::join(&network, user.as_deref())
        }),
        Some(Task::WayOut { keeper, pasta }) => hold_way_out(keeper, &pasta),
        Some(Task::ProbeKvm) => banger_host::probe::child_main(),
        Some(Task::ProbeNamespaces) => probe_namespaces(),
        None => {
            let _ = writeln!(std::io::stderr(), "{USAGE}");
            ExitCode::from(2)
        }
    }
}

fn parse(mut args: impl Iterator<Item = OsString>) -> Option<Task> {
    let mut socket = None;
    let mut user_namespace = false;
    let (mut keeper, mut pasta) = (None, None);
    let (mut network, mut user) = (None, None);
    while let Some(arg) = args.next() {
        match arg.to_str() {
            Some("--socket") => socket = Some(PathBuf::from(args.next()?)),
            Some("--user-namespace") => user_namespace = true,
            Some("--join-network") => network = Some(PathBuf::from(args.next()?)),
            Some("--join-user") => user = Some(PathBuf::from(args.next()?)),
            Some("--way-out-of") => keeper = Some(args.next()?.to_str()?.parse().ok()?),
            Some("--pasta") => pasta = Some(PathBuf::from(args.next()?)),
            Some("--probe-kvm") if socket.is_none() && !user_namespace => {
                return args.next().is_none().then_some(Task::ProbeKvm);
            }
            Some("--probe-namespaces") if socket.is_none() && !user_namespace => {
                return args.next().is_none().then_some(Task::ProbeNamespaces);
            }
            _ => return None,
        }
    }
    match (socket, network, keeper, pasta) {
        (Some(socket), None, None, None) if user.is_none() => Some(Task::Keep {
            socket,
            user_namespace,
        }),
        (Some(socket), Some(network), None, None) if !user_namespace => Some(Task::Rejoin {
            socket,
            network,
            user,
        }),
        (None, None, Some(keeper), Some(pasta)) if !user_namespace && user.is_none() => {
            Some(Task::WayOut { keeper, pasta })
        }
        _ => None,
    }
}

fn keep(
    socket: &std::path::Path,
    user_namespace: bool,
    enter: impl FnOnce() -> Result<(), enter::EnterError>,
) -> ExitCode {
    // Already a leader of its own when a shell started it; that is as good.
    let _ = rustix::process::setsid();
    allow_many_descriptors();
    let server = match enter() {
        Ok(()) => Server::listen(socket, user_namespace).map_err(|error| error_chain(&error)),
        Err(error) => Err(error_chain(&error)),
    };
    let server = match server {
        Ok(server) => server,
        Err(why) => {
            say(&Readiness::Error(why));
            return ExitCode::FAILURE;
        }
    };
    // Nothing of the starter's is held on to: neither its directory nor its pipe.
    let _ = rustix::process::chdir("/");
    say(&Readiness::Ready(true));
    let_go_of_stdout();
    match server.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "banger-netns: {}", error_chain(&error));
            ExitCode::FAILURE
        }
    }
}

/// Makes the namespaces that a keeper would, and says whether that is allowed; they end with this process.
fn probe_namespaces() -> ExitCode {
    say(&match enter::enter(true) {
        Ok(()) => Readiness::Ready(true),
        Err(error) => Readiness::Error(error_chain(&error)),
    });
    ExitCode::SUCCESS
}

fn hold_way_out(keeper: i32, pasta: &std::path::Path) -> ExitCode {
    let _ = rustix::process::setsid();
    let _ = rustix::process::chdir("/");
    let held = way_out::hold(keeper, pasta, |ready| {
        say(ready);
        let_go_of_stdout();
    });
    match held {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&Readiness::Error(error_chain(&error)));
            ExitCode::FAILURE
        }
    }
}

fn let_go_of_stdout() {
    if let Ok(null) = std::fs::File::options().write(true).open("/dev/null") {
        let _ = rustix::stdio::dup2_stdout(&null);
    }
}

/// Each connection through a published port takes two.
fn allow_many_descriptors() {
    let mut limit = rustix::process::getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    let _ = rustix::process::setrlimit(Resource::Nofile, limit);
}

fn say(readiness: &Readiness) {
    let mut line = serde_json::to_vec(readiness).unwrap_or_default();
    line.push(b'\n');
    let mut stdout = std::io::stdout().lock();
    let _ = stdout.write_all(&line);
    let _ = stdout.flush();
}
