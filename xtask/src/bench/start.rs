//! What banger adds to the start of a VMM.

use super::bare::{BareVmm, Namespace};
use super::home::{Home, Images, seconds_of};
use super::stats::Target;
use super::table::Row;
use super::{PAIRS, pairs};
use crate::failure::{Failure, Result};
use std::path::Path;
use std::time::Instant;

const VM: &str = "start";
const TARGET: Target = Target {
    at_most: 1.10,
    margin: 0.10,
    at_most_more: Some(0.005),
};

pub(super) fn run(dist: &Path) -> Result<Vec<Row>> {
    let home = Home::new(dist, Images::Tiny)?;
    home.succeed(&[
        "vm", "create", "--name", VM, "--image", "tiny", "--memory", "256",
    ])?;
    let bare = BareVmm::of(&home, VM, home.scratch("bare")?)?;
    home.succeed(&["vm", "kill", VM])?;
    let tap = bare
        .value("ifname=")
        .ok_or_else(|| Failure::new("the VMM's command line names no TAP: is it QEMU's?"))?;
    // Up, as ours is. It needs no bridge, since nothing is sent before QEMU answers.
    let namespace = Namespace::new(&format!(
        "ip tuntap add dev {tap} mode tap; ip link set {tap} up"
    ))?;
    let theirs = || namespace.inside(|| bare.start().map(|(_running, seconds)| seconds));
    let by_command = || {
        let seconds = seconds_of(&mut home.banger(&["vm", "start", VM]))?;
        home.succeed(&["vm", "kill", VM])?;
        Ok(seconds)
    };
    let by_request = || {
        let start = Instant::now();
        home.post(&format!("/v1/vms/{VM}/start"), "{}")?;
        let seconds = start.elapsed().as_secs_f64();
        home.succeed(&["vm", "kill", VM])?;
        Ok(seconds)
    };
    let command = pairs(PAIRS, by_command, theirs)?;
    let request = pairs(PAIRS, by_request, theirs)?;
    Ok(vec![
        Row::pairs("vm start / bare QEMU", &command, TARGET, PAIRS),
        Row::pairs_without_target("  the request alone / bare QEMU", &request),
    ])
}
