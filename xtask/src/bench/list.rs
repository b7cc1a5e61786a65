//! What `banger vm list` adds to fetching the same bytes.

use super::home::{Home, Images, seconds_of, succeed};
use super::stats::Target;
use super::table::Row;
use super::{MANY, PAIRS, pairs};
use crate::command::command;
use crate::failure::{Failure, Result};
use std::path::Path;
use std::process::Command;

const TARGET: Target = Target {
    at_most: 2.0,
    margin: 0.25,
    at_most_more: None,
};

pub(super) fn run(dist: &Path) -> Result<Vec<Row>> {
    let home = Home::new(dist, Images::Tiny)?;
    create_many(&home, MANY)?;
    let lines = home.succeed(&["vm", "list"])?.stdout.lines().count();
    if lines != MANY + 1 {
        return Err(Failure::new(format!(
            "`banger vm list` printed {lines} lines for {MANY} VMs"
        )));
    }
    let curl = || -> Command {
        let mut curl = command("curl");
        curl.args(["--silent", "--show-error", "--fail", "--unix-socket"])
            .arg(home.socket())
            .arg("http://localhost/v1/vms");
        curl
    };
    let bytes = succeed(&mut curl())?.stdout.len();
    eprintln!("{MANY} VMs are {bytes} bytes");
    let summary = pairs(
        PAIRS,
        || seconds_of(&mut home.banger(&["vm", "list"])),
        || seconds_of(&mut curl()),
    )?;
    let name = format!("vm list of {MANY} / curl");
    Ok(vec![Row::pairs(&name, &summary, TARGET, PAIRS)])
}

/// Creates VMs that are not started.
pub(super) fn create_many(home: &Home, count: usize) -> Result<()> {
    for number in 0..count {
        home.post(
            "/v1/vms",
            &format!(r#"{{"name":"vm-{number}","image":"tiny","start":false}}"#),
        )?;
    }
    Ok(())
}
