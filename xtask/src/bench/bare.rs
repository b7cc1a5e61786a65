//! A VMM without banger: the same command line, in a network namespace that holds nothing but its TAP.

use super::home::Home;
use crate::command::command;
use crate::failure::{Failure, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

/// How long QEMU may take to answer for the first time.
const ANSWER_LIMIT: Duration = Duration::from_secs(20);

/// A network namespace that lives as long as this value.
#[derive(Debug)]
pub(super) struct Namespace {
    holder: Child,
    file: OwnedFd,
}

impl Namespace {
    /// A new one, prepared by `commands` for a shell.
    pub(super) fn new(commands: &str) -> Result<Self> {
        let failed = || Failure::io("cannot make a network namespace".to_owned());
        let script = format!("set -e; {commands}; echo ready; read -r end || true");
        // It ends when its standard input does, and that ends with this process at the latest.
        let mut holder = command("unshare")
            .args(["--net", "sh", "-c", &script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(failed())?;
        let mut said = String::new();
        if let Some(pipe) = holder.stdout.take() {
            BufReader::new(pipe)
                .read_line(&mut said)
                .map_err(failed())?;
        }
        let opened = std::fs::File::open(format!("/proc/{}/ns/net", holder.id()));
        if said.trim() != "ready" {
            // It failed, and said why on standard error.
            let _ = holder.kill();
            let _ = holder.wait();
            return Err(Failure::new("cannot make a network namespace")
                .hint("this bench needs root: run it with sudo"));
        }
        Ok(Self {
            holder,
            file: opened.map_err(failed())?.into(),
        })
    }

    /// The process that holds it.
    pub(super) fn pid(&self) -> u32 {
        self.holder.id()
    }

    /// Does `work` inside, on a thread of its own.
    pub(super) fn inside<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                move_into_link_name_space(self.file.as_fd(), Some(LinkNameSpaceType::Network))
                    .map_err(|error| {
                        Failure::io("cannot enter a network namespace")(error.into())
                    })?;
                work()
            });
            thread
                .join()
                .unwrap_or_else(|_| Err(Failure::new("a bench's thread panicked")))
        })
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        drop(self.holder.stdin.take());
        let _ = self.holder.wait();
    }
}

/// A VMM's command line.
#[derive(Debug)]
pub(super) struct BareVmm {
    pub(super) program: String,
    pub(super) args: Vec<String>,
    /// Where it runs, and makes its sockets.
    pub(super) folder: PathBuf,
}

/// A VMM that runs; it is killed when this value goes.
#[derive(Debug)]
pub(super) struct RunningVmm {
    child: Child,
}

impl Drop for RunningVmm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl BareVmm {
    /// The command line of a VM of `home` that runs, with the small files of its run copied to `folder`.
    pub(super) fn of(home: &Home, vm: &str, folder: PathBuf) -> Result<Self> {
        let shown = home.json(&["vm", "show", vm])?;
        let directory = PathBuf::from(shown["directory"].as_str().unwrap_or_default());
        let mirror = directory.join("vm.json");
        let text = std::fs::read_to_string(&mirror)
            .map_err(Failure::io(format!("cannot read `{}`", mirror.display())))?;
        let json: serde_json::Value = serde_json::from_str(&text)
            .map_err(|error| Failure::new(format!("`{}`: {error}", mirror.display())))?;
        let config = &json["config"];
        let run = directory.join("run");
        for entry in std::fs::read_dir(&run)
            .map_err(Failure::io(format!("cannot read `{}`", run.display())))?
            .flatten()
        {
            if entry.file_type().is_ok_and(|kind| kind.is_file()) {
                let to = folder.join(entry.file_name());
                std::fs::copy(entry.path(), &to)
                    .map_err(Failure::io(format!("cannot write `{}`", to.display())))?;
            }
        }
        let (here, there) = (run.display().to_string(), folder.display().to_string());
        let args: Vec<String> = config["args"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|arg| arg.as_str())
            .map(|arg| arg.replace(&here, &there))
            .collect();
        match config["program"].as_str() {
            Some(program) if !args.is_empty() => Ok(Self {
                program: program.to_owned(),
                args,
                folder,
            }),
            _ => Err(Failure::new(format!(
                "`{}` holds no command line",
                mirror.display()
            ))),
        }
    }

    /// The value of the option `name` that starts with `prefix`, up to the next comma.
    pub(super) fn value(&self, prefix: &str) -> Option<&str> {
        self.args.iter().find_map(|arg| {
            let at = arg.find(prefix)? + prefix.len();
            arg[at..].split(',').next()
        })
    }

    /// Starts it. Returns when it has answered its first QMP command, with how long that took, in seconds. It is what
    /// the shim waits for, too.
    pub(super) fn start(&self) -> Result<(RunningVmm, f64)> {
        let failed = || Failure::io(format!("cannot run `{}`", self.program));
        let qmp = self.folder.join("qmp.sock");
        for socket in ["qmp.sock", "agent.sock"] {
            // Most often there is none.
            let _ = std::fs::remove_file(self.folder.join(socket));
        }
        let mut program = command(&self.program);
        program
            .args(&self.args)
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .current_dir(&self.folder)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let watch = inotify::init(inotify::CreateFlags::CLOEXEC)
            .and_then(|watch| {
                inotify::add_watch(&watch, &self.folder, inotify::WatchFlags::CREATE).map(|_| watch)
            })
            .map_err(|error| failed()(error.into()))?;
        let start = Instant::now();
        let child = program.spawn().map_err(failed())?;
        let running = RunningVmm { child };
        let stream = connect(&qmp, &watch, start)?;
        stream
            .set_read_timeout(Some(ANSWER_LIMIT))
            .map_err(failed())?;
        // QEMU greets from a thread of its own while it still sets its machine up; the answer comes from its main
        // loop, so it is what says that the machine is there.
        (&stream)
            .write_all(b"{\"execute\":\"qmp_capabilities\"}\n")
            .map_err(failed())?;
        for line in BufReader::new(&stream).lines() {
            if line.map_err(failed())?.contains("\"return\"") {
                let took = start.elapsed().as_secs_f64();
                return Ok((running, took));
            }
        }
        Err(Failure::new(format!(
            "`{}` ended before it answered",
            self.program
        )))
    }
}

/// Connects as soon as somebody listens.
fn connect(socket: &Path, watch: &OwnedFd, start: Instant) -> Result<UnixStream> {
    let mut wait = Timespec {
        tv_sec: 20,
        tv_nsec: 0,
    };
    while start.elapsed() < ANSWER_LIMIT {
        match UnixStream::connect(socket) {
            Ok(stream) => return Ok(stream),
            // The moment between the socket's appearance and the first listening has no event.
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => {
                wait = Timespec {
                    tv_sec: 0,
                    tv_nsec: 100_000,
                };
            }
            Err(_) => {}
        }
        let mut polled = [PollFd::new(watch, PollFlags::IN)];
        if poll(&mut polled, Some(&wait)).is_ok_and(|ready| ready > 0) {
            let mut events = [0; 1024];
            let _ = rustix::io::read(watch, &mut events);
        }
    }
    Err(Failure::new(format!(
        "nobody listens at `{}`",
        socket.display()
    )))
}
