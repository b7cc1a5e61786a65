//! From nothing to a command run in a VM, with the time that each stage took.

use crate::command::{capture, command, run};
use crate::dist::{self, Profile};
use crate::failure::{Failure, Result};
use crate::packages::{self, Purpose};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

const VM: &str = "demo";
const IN_THE_VM: &str = "uname -a; cat /etc/os-release; ip addr; df -h /";
/// The CLI's exit code for something that does not exist.
const NOT_FOUND: i32 = 4;

pub(crate) fn demo() -> Result<()> {
    let mut stages = Stages::default();
    stages.time("packages", || packages::ensure(Purpose::Run))?;
    let dist = stages.time("build", || dist::dist(Profile::Release))?;
    let banger = Banger {
        program: dist.join("banger"),
    };
    stages.time("daemon", || run(&mut banger.verb(&["daemon", "start"])))?;
    stages.time("kernel", || run(&mut banger.verb(&["kernel", "import"])))?;
    stages.time("image", || run(&mut banger.verb(&["image", "build"])))?;
    let how = banger.how_to_get_ready()?;
    stages.time(how.stage, || run(&mut banger.verb(how.args)))?;
    let said = stages.time("ssh", || {
        let mut ssh = banger.verb(&["vm", "ssh", VM, "--", IN_THE_VM]);
        let said = capture(&mut ssh)?;
        if said.success {
            Ok(said.stdout)
        } else {
            Err(Failure::new(format!(
                "`banger vm ssh {VM}` failed: {}",
                said.stderr.trim()
            ))
            .hint(format!("{} vm why {VM}", banger.program.display())))
        }
    })?;
    println!("\n$ banger vm ssh {VM} -- '{IN_THE_VM}'\n{said}");
    let boot = banger
        .show()?
        .map(|vm| boot_stages(&vm))
        .unwrap_or_default();
    print!("{}", stages.table(&boot));
    println!("{}", next_steps(&banger.program));
    Ok(())
}

struct Banger {
    program: PathBuf,
}

/// The verb that brings the VM to readiness from where it is.
#[derive(Debug, PartialEq, Eq)]
struct HowToGetReady {
    stage: &'static str,
    args: &'static [&'static str],
}

impl Banger {
    fn verb(&self, args: &[&str]) -> Command {
        let mut banger = command(&self.program);
        banger.args(args);
        banger
    }

    /// The VM as the API gives it, if it exists.
    fn show(&self) -> Result<Option<Value>> {
        let shown = capture(&mut self.verb(&["vm", "show", VM, "--json"]))?;
        if shown.code == Some(NOT_FOUND) {
            return Ok(None);
        }
        if !shown.success {
            return Err(Failure::new(format!(
                "`banger vm show {VM}` failed: {}",
                shown.stderr.trim()
            )));
        }
        serde_json::from_str(&shown.stdout)
            .map(Some)
            .map_err(|error| {
                Failure::new(format!(
                    "`banger vm show {VM} --json` printed no JSON: {error}"
                ))
            })
    }

    fn how_to_get_ready(&self) -> Result<HowToGetReady> {
        how_to_get_ready(self.show()?.as_ref())
    }
}

fn how_to_get_ready(vm: Option<&Value>) -> Result<HowToGetReady> {
    let Some(vm) = vm else {
        return Ok(HowToGetReady {
            stage: "create",
            args: &["vm", "create", "--name", VM, "--wait"],
        });
    };
    let phase = phase(vm);
    Ok(match phase {
        "stopped" => HowToGetReady {
            stage: "start",
            args: &["vm", "start", VM, "--wait"],
        },
        "starting" | "running" => HowToGetReady {
            stage: "reuse",
            args: &["vm", "wait", VM],
        },
        "paused" => HowToGetReady {
            stage: "resume",
            args: &["vm", "resume", VM],
        },
        _ => {
            return Err(Failure::new(format!("VM `{VM}` is {phase}"))
                .hint("wait for it to end, then repeat the command"));
        }
    })
}

fn phase(vm: &Value) -> &str {
    vm["phase"]["state"]
        .as_str()
        .unwrap_or("in a phase that this demo does not know")
}

/// The stages of the latest boot in the order they were reached, in time since the start was asked for.
fn boot_stages(vm: &Value) -> Vec<(String, Duration)> {
    ["vmm_up", "kernel", "banger_init", "agent", "ssh", "ready"]
        .iter()
        .filter_map(|stage| {
            let milliseconds = vm["boot"][stage].as_u64()?;
            Some((stage.replace('_', " "), Duration::from_millis(milliseconds)))
        })
        .collect()
}

fn next_steps(banger: &Path) -> String {
    let banger = banger.display();
    format!(
        "\nThe VM is yours. Next:\n  {banger} vm ssh {VM}\n  {banger} vm list\n  {banger} vm stop {VM}\n  \
         {banger} vm delete {VM} --force --purge\n  {banger} daemon stop --vms"
    )
}

#[derive(Default)]
struct Stages {
    done: Vec<(&'static str, Duration)>,
}

impl Stages {
    fn time<T>(&mut self, stage: &'static str, work: impl FnOnce() -> Result<T>) -> Result<T> {
        eprintln!("== {stage}");
        let start = Instant::now();
        let result = work();
        self.done.push((stage, start.elapsed()));
        result
    }

    fn table(&self, boot: &[(String, Duration)]) -> String {
        let mut table = String::from("stage          seconds\n");
        let mut row = |name: &str, time: Duration| {
            table.push_str(&format!("{name:<14} {:>7.2}\n", time.as_secs_f64()));
        };
        for (stage, time) in &self.done {
            row(stage, *time);
        }
        let total: Duration = self.done.iter().map(|(_, time)| *time).sum();
        let build: Duration = self
            .done
            .iter()
            .filter(|(stage, _)| *stage == "build")
            .map(|(_, time)| *time)
            .sum();
        row("all", total);
        row("without build", total.saturating_sub(build));
        if !boot.is_empty() {
            table.push_str("\nlatest boot, since the start was asked for\n");
            for (stage, time) in boot {
                table.push_str(&format!("{stage:<14} {:>7.2}\n", time.as_secs_f64()));
            }
        }
        table
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_vm_is_created_started_or_reused() {
        assert_eq!(how_to_get_ready(None).unwrap().stage, "create");
        let of = |phase: &str| how_to_get_ready(Some(&json!({ "phase": { "state": phase } })));
        assert_eq!(of("stopped").unwrap().stage, "start");
        assert_eq!(of("running").unwrap().stage, "reuse");
        assert!(of("stopping").is_err());
    }

    #[test]
    fn the_builds_share_is_given_apart() {
        let stages = Stages {
            done: vec![
                ("build", Duration::from_secs(60)),
                ("image", Duration::from_secs(30)),
            ],
        };
        let vm = json!({ "boot": { "kernel": 1500, "ssh": null } });
        let table = stages.table(&boot_stages(&vm));
        assert!(table.contains("all              90.00"), "{table}");
        assert!(table.contains("without build    30.00"), "{table}");
        assert!(table.contains("kernel            1.50"), "{table}");
        assert!(!table.contains("ssh"), "{table}");
    }
}
