//! How often a request waits for the disk before it is answered.

use super::home::{Home, Images};
use super::stats::median;
use super::table::{Row, Unit};
use crate::command::command;
use crate::failure::{Failure, Result};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{SystemTime, UNIX_EPOCH};

/// Requests of each kind.
const REQUESTS: usize = 30;
const CALLS: &str = "trace=fsync,fdatasync,sync_file_range,sync,syncfs,msync";
const VM: &str = "syncs";

pub(super) fn run(dist: &Path) -> Result<Vec<Row>> {
    let home = Home::new(dist, Images::Tiny)?;
    let create = |name: &str| {
        home.post(
            "/v1/vms",
            &format!(r#"{{"name":"{name}","image":"tiny","memory_mib":256,"start":false}}"#),
        )
    };
    let start = || home.post(&format!("/v1/vms/{VM}/start"), "{}");
    // The first of each makes what all others share.
    create(VM)?;
    start()?;
    home.succeed(&["vm", "kill", VM])?;
    let trace = Trace::of(home.daemon_pid()?, home.scratch("trace")?.join("calls"))?;
    let mut creates = Vec::new();
    let mut starts = Vec::new();
    for number in 0..REQUESTS {
        creates.push(Window::around(|| create(&format!("vm-{number}")))?);
        starts.push(Window::around(start)?);
        home.succeed(&["vm", "kill", VM])?;
    }
    let calls = trace.end()?;
    let mut rows = Vec::new();
    for (name, windows, at_most) in [("create", &creates, 2.0), ("start", &starts, 1.0)] {
        let counts: Vec<f64> = windows.iter().map(|window| window.count(&calls)).collect();
        let most = counts.iter().copied().fold(0.0, f64::max);
        let middle = median(&counts).unwrap_or(f64::INFINITY);
        rows.push(Row::figure(
            &format!("waits for the disk before a {name} is answered"),
            middle,
            Unit::Calls { most },
            at_most,
        ));
    }
    Ok(rows)
}

/// From a request to its answer, in seconds since 1970.
#[derive(Debug, Clone, Copy)]
struct Window {
    from: f64,
    to: f64,
}

impl Window {
    fn around(request: impl FnOnce() -> Result<()>) -> Result<Self> {
        let now = || {
            SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0.0, |time| time.as_secs_f64())
        };
        let from = now();
        request()?;
        Ok(Self { from, to: now() })
    }

    /// How many of `calls` began within it.
    fn count(self, calls: &[f64]) -> f64 {
        calls
            .iter()
            .filter(|call| self.from <= **call && **call <= self.to)
            .fold(0.0, |count, _| count + 1.0)
    }
}

/// A trace of a process and all that it starts.
#[derive(Debug)]
struct Trace {
    strace: Child,
    file: PathBuf,
}

impl Trace {
    fn of(pid: i64, file: PathBuf) -> Result<Self> {
        let failed = || Failure::io("cannot run `strace`");
        let mut strace = command("strace")
            .args(["-f", "-ttt", "-e", CALLS, "-p", &pid.to_string(), "-o"])
            .arg(&file)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(failed())?;
        let mut said = String::new();
        if let Some(pipe) = strace.stderr.take() {
            // The rest of what it says is about processes that come and go: it gets a reader, so that it never waits.
            let mut pipe = BufReader::new(pipe);
            pipe.read_line(&mut said).map_err(failed())?;
            std::thread::spawn(move || std::io::copy(&mut pipe, &mut std::io::sink()));
        }
        if said.contains("attached") {
            Ok(Self { strace, file })
        } else {
            let _ = strace.wait();
            Err(Failure::new(format!(
                "`strace` did not attach: {}",
                said.trim()
            )))
        }
    }

    /// Ends it. Returns when each call began, in seconds since 1970.
    fn end(mut self) -> Result<Vec<f64>> {
        self.detach();
        let text = std::fs::read_to_string(&self.file).map_err(Failure::io(format!(
            "cannot read `{}`",
            self.file.display()
        )))?;
        Ok(text.lines().filter_map(call_began).collect())
    }

    fn detach(&mut self) {
        if !matches!(self.strace.try_wait(), Ok(None)) {
            return;
        }
        let pid = i32::try_from(self.strace.id()).ok();
        if let Some(pid) = pid.and_then(rustix::process::Pid::from_raw) {
            // Killed, it would leave what it traces stopped. It is our child and not yet waited for.
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::INT);
        }
        let _ = self.strace.wait();
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        self.detach();
    }
}

/// When the call of a line of a trace began; `None` for a line about something else, or about a call's end.
fn call_began(line: &str) -> Option<f64> {
    let mut words = line.split_whitespace();
    let _thread = words.next()?;
    let time = words.next()?.parse().ok()?;
    let what = words.next()?;
    what.contains("sync").then_some(time)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_counts_once_and_only_before_the_answer() {
        let trace = "\
            12 100.1 fdatasync(12) = 0\n\
            12 100.2 fsync(13 <unfinished ...>\n\
            13 100.25 --- SIGCHLD {si_signo=SIGCHLD} ---\n\
            12 100.3 <... fsync resumed>) = 0\n\
            14 100.6 fsync(3) = 0\n\
            14 100.7 +++ exited with 0 +++\n";
        let calls: Vec<f64> = trace.lines().filter_map(call_began).collect();
        assert_eq!(calls, [100.1, 100.2, 100.6]);
        let window = Window {
            from: 100.0,
            to: 100.5,
        };
        assert_eq!(window.count(&calls), 2.0);
    }
}
