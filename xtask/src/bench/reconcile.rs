//! What a daemon that comes up pays for the VMs that it finds, against what looking at the host costs by itself: one
//! dump each of the links, the packet filter's rules, the loop devices and the processes.

use super::cpu;
use super::home::{Home, Images};
use super::list::create_many;
use super::netlink::Netlink;
use super::stats::{Target, summarise};
use super::table::Row;
use super::{MANY, PAIRS};
use crate::failure::{Failure, Result};
use rustix::process::{Pid, Signal, kill_process};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Instant;

const TARGET: Target = Target {
    at_most: 2.0,
    margin: 0.25,
    at_most_more: None,
};

pub(super) fn run(dist: &Path) -> Result<Vec<Row>> {
    let full = Home::new(dist, Images::Tiny)?;
    create_many(&full, MANY)?;
    full.succeed(&["daemon", "stop"])?;
    leave_locks(&full)?;
    let empty = Home::new(dist, Images::Tiny)?;
    empty.succeed(&["daemon", "stop"])?;
    let (mut walls, mut cpus, mut whole) = (Vec::new(), Vec::new(), Vec::new());
    let mut size = 0;
    for number in 0..=PAIRS {
        let found = come_up(&full)?;
        let base = come_up(&empty)?;
        let dumped = dump(&mut size)?;
        // The first pays for cold caches.
        if number > 0 {
            walls.push((found.wall - base.wall, dumped.wall));
            cpus.push((found.cpu - base.cpu, dumped.cpu));
            whole.push((found.wall, base.wall));
        }
    }
    eprintln!("the dumps are {size} bytes");
    let sum = |pairs: &[(f64, f64)]| {
        summarise(pairs).ok_or_else(|| Failure::new("the dumps took no time at all"))
    };
    let name = format!("daemon: {MANY} stopped VMs found / bare dumps");
    Ok(vec![
        Row::pairs(&name, &sum(&walls)?, TARGET, PAIRS),
        Row::pairs("  the same in CPU time", &sum(&cpus)?, TARGET, PAIRS),
        Row::pairs_without_target(
            &format!("  until it serves: with {MANY} VMs / with none"),
            &sum(&whole)?,
        ),
    ])
}

/// What a run leaves in the folder of a VM, so that the daemon has to see whether it lives.
fn leave_locks(home: &Home) -> Result<()> {
    let vms = Path::new(&home.folder()).join("state/banger/vms");
    let failed = || Failure::io(format!("cannot write in `{}`", vms.display()));
    for entry in std::fs::read_dir(&vms).map_err(failed())?.flatten() {
        std::fs::write(entry.path().join("vm.lock"), "").map_err(failed())?;
    }
    Ok(())
}

/// Seconds.
#[derive(Debug, Clone, Copy)]
struct Took {
    wall: f64,
    cpu: f64,
}

/// A daemon that runs in front of us, and is ended in any case.
struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        let pid = i32::try_from(self.0.id()).ok().and_then(Pid::from_raw);
        if let Some(pid) = pid {
            let _ = kill_process(pid, Signal::TERM);
        }
        let _ = self.0.wait();
    }
}

/// What it takes until the daemon serves.
fn come_up(home: &Home) -> Result<Took> {
    let failed = || Failure::io("cannot start `bangerd`");
    let start = Instant::now();
    let child = home
        .program("bangerd")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(failed())?;
    let mut daemon = Daemon(child);
    let mut said = String::new();
    if let Some(pipe) = daemon.0.stdout.take() {
        BufReader::new(pipe)
            .read_line(&mut said)
            .map_err(failed())?;
    }
    let wall = start.elapsed().as_secs_f64();
    if !said.contains("\"ready\"") {
        return Err(Failure::new(format!("the daemon did not start: {said}")));
    }
    let cpu = cpu::seconds_of_process(daemon.0.id().into())?;
    Ok(Took { wall, cpu })
}

/// One look at everything. Adds up how much it is, so that nothing of it is left out.
fn dump(size: &mut usize) -> Result<Took> {
    let cpu = cpu::seconds_of_this_thread();
    let start = Instant::now();
    *size = Netlink::route()?.dump_links()?
        + Netlink::netfilter()?.dump_rules()?
        + read_below("/sys/block", "loop", &["loop/backing_file"])
        + read_below("/proc", "", &["stat", "cmdline"]);
    Ok(Took {
        wall: start.elapsed().as_secs_f64(),
        cpu: cpu::seconds_of_this_thread() - cpu,
    })
}

/// The bytes in these files of all that is in `folder` and has a name that starts so. What is missing is none.
fn read_below(folder: &str, prefix: &str, files: &[&str]) -> usize {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let wanted = entries.filter(|entry| {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        match prefix {
            "" => name.bytes().all(|byte| byte.is_ascii_digit()),
            prefix => name.starts_with(prefix),
        }
    });
    wanted
        .map(|entry| {
            let read = |file: &&str| std::fs::read(entry.path().join(file));
            let read = |file| read(file).map_or(0, |bytes| bytes.len());
            files.iter().map(read).sum::<usize>()
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processes_are_read_and_what_is_missing_is_none() {
        assert!(read_below("/proc", "", &["stat", "cmdline"]) > 100);
        assert_eq!(read_below("/nonexistent", "", &["stat"]), 0);
        assert_eq!(read_below("/proc", "", &["nonexistent"]), 0);
    }
}
