//! What the daemon and a shim take: the proportional set size, in which a shared page counts by its share.

use super::MANY;
use super::home::{Home, Images};
use super::list::create_many;
use super::table::{Row, Unit};
use crate::failure::{Failure, Result};
use std::path::Path;

const VM: &str = "memory";

pub(super) fn run(dist: &Path) -> Result<Vec<Row>> {
    let home = Home::new(dist, Images::Tiny)?;
    let daemon = || -> Result<f64> { pss(home.daemon_pid()?) };
    let idle = daemon()?;
    home.succeed(&[
        "vm", "create", "--name", VM, "--image", "tiny", "--memory", "256",
    ])?;
    let shim = home.json(&["vm", "show", VM])?["attempt"]["shim_pid"]
        .as_i64()
        .ok_or_else(|| Failure::new("`banger vm show` names no shim"))?;
    let shim = pss(shim)?;
    home.succeed(&["vm", "delete", VM, "--force", "--purge"])?;
    create_many(&home, MANY)?;
    home.succeed(&["vm", "list"])?;
    let full = daemon()?;
    home.succeed(&["daemon", "stop"])?;
    home.succeed(&["daemon", "start"])?;
    home.succeed(&["vm", "list"])?;
    let restarted = daemon()?;
    let row = |name: &str, ours, at_most| Row::figure(name, ours, Unit::Mebibytes, at_most);
    Ok(vec![
        row("daemon with no VM", idle, 20.0),
        row(&format!("daemon that created {MANY} VMs"), full, 30.0),
        row(&format!("daemon that found {MANY} VMs"), restarted, 30.0),
        row("shim", shim, 2.0),
    ])
}

/// A process's proportional set size, in MiB.
fn pss(pid: i64) -> Result<f64> {
    let path = format!("/proc/{pid}/smaps_rollup");
    let text =
        std::fs::read_to_string(&path).map_err(Failure::io(format!("cannot read `{path}`")))?;
    parse_pss(&text).ok_or_else(|| Failure::new(format!("`{path}` has no line `Pss:`")))
}

fn parse_pss(text: &str) -> Option<f64> {
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:"))?;
    let kibibytes: f64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kibibytes / 1024.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_total_is_read_not_its_parts() {
        let text = "00400000-7fff [rollup]\nRss:   9000 kB\nPss:   2048 kB\nPss_Dirty:  1024 kB\n";
        assert_eq!(parse_pss(text), Some(2.0));
        assert_eq!(parse_pss("Rss: 1 kB\n"), None);
    }
}
