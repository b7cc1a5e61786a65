//! The systemd that is nearest: the user's own, or the host's for root. It gives a process that is there already a
//! scope, which is a cgroup of its own that lives on when the session ends in which that process began.
//!
//! It is asked at its own socket, of which the kernel says who is at the other end: no bus, and no program is started.

mod message;

use message::{HEAD, Message, Reader, Value, Writer};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long it may take. Usually it takes a millisecond; on a machine that is itself emulated, and busy, three seconds
/// were not enough.
const LIMIT: Duration = Duration::from_secs(10);
/// How much a line of the greeting may have.
const MAX_LINE: usize = 256;
/// How long what is left of a scope may take to end by itself, before it is killed.
const STOP_LIMIT: Duration = Duration::from_secs(10);
/// A guard against a VMM that makes threads without end: one has a few dozen.
const TASKS_MAX: u64 = 1024;
/// The unit that stops VMs in order.
const GUESTS: &str = "banger-guests.service";
/// Where cgroups are.
const CGROUPS: &str = "/sys/fs/cgroup";

/// Why systemd did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum SystemdError {
    /// It does not answer, or not in time.
    #[error("cannot talk to systemd at `{}`", path.display())]
    Talk {
        /// Its socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It says no.
    #[error("systemd refuses: {}", .0.escape_debug())]
    Refused(String),
    /// It tried.
    #[error("systemd could not make `{unit}`: {}", result.escape_debug())]
    Failed {
        /// The scope.
        unit: String,
        /// What became of it.
        result: String,
    },
}

/// Where a systemd listens that does what this process' user asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Systemd {
    socket: PathBuf,
    whose: Whose,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Whose {
    Host,
    User,
}

/// A scope to be.
#[derive(Debug, Clone, Copy)]
pub struct Scope<'a> {
    /// Its name, which ends in `.scope`. None of the same name may be there.
    pub unit: &'a str,
    /// What `systemctl status` shows of it.
    pub description: &'a str,
    /// The process that is put into it. What that one starts later is born in it.
    pub process: u32,
    /// How much it may use of one CPU, in per cent.
    pub cpu_percent: Option<u32>,
}

impl Systemd {
    /// The one that is nearest; `None` on a host without.
    pub fn nearest() -> Option<Self> {
        let user = rustix::process::geteuid();
        let (whose, folder) = if user.is_root() {
            (Whose::Host, PathBuf::from("/run"))
        } else {
            let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
            let folder = runtime
                .filter(|folder| folder.is_absolute())
                .unwrap_or_else(|| PathBuf::from(format!("/run/user/{}", user.as_raw())));
            (Whose::User, folder)
        };
        let socket = folder.join("systemd/private");
        socket.exists().then_some(Self { socket, whose })
    }

    /// Makes the scope, and returns once its process is in it.
    ///
    /// # Errors
    /// It refuses, fails or does not answer in time. Then it may still come later, and goes with its process.
    pub fn start_scope(&self, scope: &Scope<'_>) -> Result<(), SystemdError> {
        let slice = match self.whose {
            Whose::Host => "banger.slice",
            Whose::User => "app-banger.slice",
        };
        let root = ["user@0.service", GUESTS];
        let processes = [scope.process];
        let mut properties = vec![
            ("Description", Value::Text(scope.description)),
            ("Slice", Value::Text(slice)),
            ("PIDs", Value::Processes(&processes)),
            // Nothing of it is left, whatever its end was.
            ("CollectMode", Value::Text("inactive-or-failed")),
            // What is before the other when both start is stopped after it: guests are shut down first.
            (
                "Before",
                Value::Texts(match self.whose {
                    // A daemon of root may also be a unit of root's own systemd.
                    Whose::Host => &root,
                    Whose::User => &root[1..],
                }),
            ),
            ("TimeoutStopUSec", Value::Number(microseconds(STOP_LIMIT))),
            ("TasksMax", Value::Number(TASKS_MAX)),
        ];
        if scope.cpu_percent.is_some() {
            properties.push(("CPUQuotaPerSecUSec", quota(scope.cpu_percent)));
        }
        let mut body = Writer::default();
        body.text(scope.unit);
        body.text("fail");
        body.properties(&properties);
        body.nothing();
        let mut connection = self.connect()?;
        connection.call("StartTransientUnit", "ssa(sv)a(sa(sv))", body)?;
        connection.wait_for_job(scope.unit)
    }

    /// Says how much the processes of `unit` may use of one CPU, in per cent. When this returns, the kernel knows.
    ///
    /// # Errors
    /// It refuses, or does not answer in time.
    pub fn limit_cpu(&self, unit: &str, percent: Option<u32>) -> Result<(), SystemdError> {
        let mut body = Writer::default();
        body.text(unit);
        // It need not outlive the host's boot: the unit does not.
        body.boolean(true);
        body.properties(&[("CPUQuotaPerSecUSec", quota(percent))]);
        let mut connection = self.connect()?;
        connection.call("SetUnitProperties", "sba(sv)", body)?;
        // It tells the kernel before it hears the next call.
        let mut body = Writer::default();
        body.text(unit);
        connection.call("GetUnit", "s", body)?;
        Ok(())
    }

    fn connect(&self) -> Result<Connection<'_>, SystemdError> {
        Connection::open(&self.socket, Instant::now() + LIMIT).map_err(|source| {
            SystemdError::Talk {
                path: self.socket.clone(),
                source,
            }
        })
    }
}

fn microseconds(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// CPU time per second; the largest number is without limit.
fn quota(percent: Option<u32>) -> Value<'static> {
    Value::Number(percent.map_or(u64::MAX, |percent| u64::from(percent) * 10_000))
}

/// A connection for a call or two.
struct Connection<'a> {
    path: &'a Path,
    stream: UnixStream,
    deadline: Instant,
    /// The number of the latest call.
    calls: u32,
    /// Signals that came before an answer.
    signals: Vec<Message>,
}

impl<'a> Connection<'a> {
    fn open(path: &'a Path, deadline: Instant) -> io::Result<Self> {
        // One that hangs takes no connection, and a blocking one would wait for that without end.
        let socket = rustix::net::socket_with(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            None,
        )?;
        rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
        let stream = UnixStream::from(socket);
        stream.set_nonblocking(false)?;
        stream.set_write_timeout(Some(LIMIT))?;
        let mut connection = Self {
            path,
            stream,
            deadline,
            calls: 0,
            signals: Vec::new(),
        };
        let user = rustix::process::geteuid().as_raw().to_string();
        let user: String = user.bytes().map(|digit| format!("{digit:02x}")).collect();
        connection
            .stream
            .write_all(format!("\0AUTH EXTERNAL {user}\r\n").as_bytes())?;
        let answer = connection.line()?;
        if !answer.starts_with("OK ") {
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, answer));
        }
        connection.stream.write_all(b"BEGIN\r\n")?;
        Ok(connection)
    }

    fn talk(&self, source: io::Error) -> SystemdError {
        SystemdError::Talk {
            path: self.path.to_owned(),
            source,
        }
    }

    /// Calls `member`, and gives the body of its answer.
    fn call(
        &mut self,
        member: &str,
        signature: &str,
        body: Writer,
    ) -> Result<Vec<u8>, SystemdError> {
        self.calls += 1;
        let call = message::call(self.calls, member, signature, body.into_bytes());
        self.stream
            .write_all(&call)
            .map_err(|error| self.talk(error))?;
        loop {
            let message = self.message().map_err(|error| self.talk(error))?;
            match message.kind {
                message::RETURN if message.answers == Some(self.calls) => return Ok(message.body),
                message::ERROR if message.answers == Some(self.calls) => {
                    let text = Reader::new(&message.body).text().map(str::to_owned);
                    let name = message.error.unwrap_or_default();
                    return Err(SystemdError::Refused(text.unwrap_or(name)));
                }
                message::SIGNAL => self.signals.push(message),
                _ => {}
            }
        }
    }

    /// Waits until the one job of `unit` is done. systemd tells all who are at its own socket of every job.
    fn wait_for_job(&mut self, unit: &str) -> Result<(), SystemdError> {
        let mut earlier = std::mem::take(&mut self.signals).into_iter();
        loop {
            let message = match earlier.next() {
                Some(message) => message,
                None => self.message().map_err(|error| self.talk(error))?,
            };
            if message.member.as_deref() != Some("JobRemoved") {
                continue;
            }
            let mut body = Reader::new(&message.body);
            // Number and path of the job come first.
            let job = (body.u32(), body.text(), body.text(), body.text());
            let (_, _, Some(of), Some(result)) = job else {
                continue;
            };
            return match result {
                _ if of != unit => continue,
                "done" => Ok(()),
                _ => Err(SystemdError::Failed {
                    unit: unit.to_owned(),
                    result: result.to_owned(),
                }),
            };
        }
    }

    fn message(&mut self) -> io::Result<Message> {
        let unreadable = || io::Error::new(io::ErrorKind::InvalidData, "the answer is unreadable");
        let mut head = [0; HEAD];
        self.fill(&mut head)?;
        let mut rest = vec![0; message::rest(&head).ok_or_else(unreadable)?];
        self.fill(&mut rest)?;
        message::read(&head, &rest).ok_or_else(unreadable)
    }

    fn line(&mut self) -> io::Result<String> {
        let mut line = Vec::new();
        while !line.ends_with(b"\r\n") && line.len() < MAX_LINE {
            let mut byte = [0];
            self.fill(&mut byte)?;
            line.extend(byte);
        }
        Ok(String::from_utf8_lossy(&line).trim_end().to_owned())
    }

    /// Reads so many bytes, until the deadline of the whole.
    fn fill(&mut self, mut buffer: &mut [u8]) -> io::Result<()> {
        let late = || io::Error::new(io::ErrorKind::TimedOut, "it gave no answer in time");
        while !buffer.is_empty() {
            let left = self.deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(late());
            }
            self.stream.set_read_timeout(Some(left))?;
            match self.stream.read(buffer) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => buffer = &mut buffer[count..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(late()),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// The cgroup of a process, below where cgroups are, such as `/user.slice/…/a.scope`.
///
/// # Errors
/// It cannot be read, or there are only those of the first version.
pub fn cgroup_of(process: u32) -> io::Result<String> {
    let groups = std::fs::read_to_string(format!("/proc/{process}/cgroup"))?;
    let group = groups.lines().find_map(|line| line.strip_prefix("0::"));
    group
        .map(str::to_owned)
        .ok_or_else(|| io::Error::new(io::ErrorKind::Unsupported, "cgroups are of version 1"))
}

/// The scope that ends in `cgroup`, if that is a scope.
pub fn scope_in(cgroup: &str) -> Option<&str> {
    let last = cgroup.rsplit('/').next()?;
    last.ends_with(".scope").then_some(last)
}

/// How much of one CPU a cgroup may use, in per cent, as the kernel has it.
///
/// # Errors
/// The kernel does not count there: the controller is not delegated.
pub fn cpu_limit_of(cgroup: &str) -> io::Result<Option<u32>> {
    let path = Path::new(CGROUPS).join(cgroup.trim_start_matches('/'));
    let limit = std::fs::read_to_string(path.join("cpu.max"))?;
    read_cpu_limit(&limit)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "`cpu.max` is unreadable"))
}

/// `max 100000`, or `50000 100000`.
fn read_cpu_limit(text: &str) -> Option<Option<u32>> {
    let (quota, period) = text.trim().split_once(' ')?;
    if quota == "max" {
        return Some(None);
    }
    let (quota, period): (u64, u64) = (quota.parse().ok()?, period.parse().ok()?);
    let percent = quota.checked_mul(100)?.checked_div(period)?;
    Some(Some(u32::try_from(percent).ok()?))
}

#[cfg(test)]
mod tests;
