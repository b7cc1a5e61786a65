//! What processes have taken of the CPUs, which depends less than a clock on what else the machine was doing.

use crate::failure::{Failure, Result};
use std::path::Path;

/// The CPU time that the threads of a process took so far, those aside that have ended, in seconds.
pub(super) fn seconds_of_process(pid: i64) -> Result<f64> {
    let tasks = format!("/proc/{pid}/task");
    let failed = || Failure::io(format!("cannot read `{tasks}`"));
    let mut nanoseconds = 0.0;
    for task in std::fs::read_dir(&tasks).map_err(failed())?.flatten() {
        // One that has ended since it was listed says nothing.
        let text = std::fs::read_to_string(task.path().join("schedstat")).unwrap_or_default();
        nanoseconds += parse_ran(&text);
    }
    Ok(nanoseconds / 1e9)
}

/// The CPU time that the calling thread took so far, in seconds.
pub(super) fn seconds_of_this_thread() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    std::time::Duration::try_from(time).map_or(0.0, |time| time.as_secs_f64())
}

/// The first figure of `schedstat`: the time on a CPU, in nanoseconds.
fn parse_ran(text: &str) -> f64 {
    let first = text.split_whitespace().next();
    first.and_then(|word| word.parse().ok()).unwrap_or(0.0)
}

/// The process whose program's name is `name` and whose command line holds `argument`.
pub(super) fn process_with(name: &str, argument: &str) -> Result<i64> {
    let found = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut pids = found.filter_map(|entry| entry.file_name().to_str()?.parse::<i64>().ok());
    let is_it = |pid: &i64| {
        let line = std::fs::read(Path::new("/proc").join(pid.to_string()).join("cmdline"));
        let line = line.unwrap_or_default();
        let mut words = line.split(|&byte| byte == 0).map(String::from_utf8_lossy);
        let program = words.next().unwrap_or_default();
        Path::new(&*program)
            .file_name()
            .is_some_and(|file| file == name)
            && words.any(|word| word.contains(argument))
    };
    pids.find(is_it)
        .ok_or_else(|| Failure::new(format!("no `{name}` of `{argument}` runs")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_on_a_cpu_is_the_first_figure() {
        assert_eq!(parse_ran("1234 55 3\n"), 1234.0);
        assert_eq!(parse_ran(""), 0.0);
    }

    #[test]
    fn this_thread_has_taken_some() {
        assert!(seconds_of_this_thread() > 0.0);
        let pid = i64::from(std::process::id());
        assert!(seconds_of_process(pid).unwrap() > 0.0);
    }
}
