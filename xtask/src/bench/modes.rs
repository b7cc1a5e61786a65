//! What it costs a start that root's work is done by the helper, or by nobody.

use super::home::{Home, Images, Mode, fill_store, scripted_vmm, seconds_of};
use super::machine::on_a_machine;
use super::stats::Target;
use super::table::Row;
use super::{PAIRS, pairs};
use crate::failure::Result;
use std::path::Path;

const VM: &str = "start";
const TARGET: Target = Target {
    at_most: 1.15,
    margin: 0.10,
    at_most_more: None,
};

pub(super) fn run(dist: &Path) -> Result<Vec<Row>> {
    fill_store(dist, Images::Tiny)?;
    let scripted = scripted_vmm()?;
    on_a_machine(dist, |machine| {
        let _helper = machine.helper()?;
        let mut rows = Vec::new();
        for vmm in [None, Some(scripted.as_path())] {
            let home = |mode| -> Result<Home> {
                let home = Home::on(machine, mode, vmm)?;
                home.succeed(&[
                    "vm", "create", "--name", VM, "--image", "tiny", "--memory", "256",
                ])?;
                home.succeed(&["vm", "kill", VM])?;
                Ok(home)
            };
            let root = home(Mode::Root)?;
            for (mode, word) in [(Mode::Helper, "helper"), (Mode::Rootless, "rootless")] {
                let other = home(mode)?;
                let pairs = pairs(PAIRS, || start(&other), || start(&root))?;
                rows.push(match vmm {
                    None => Row::pairs(&format!("vm start: {word} / root"), &pairs, TARGET, PAIRS),
                    // A VMM that takes no time shows what is ours alone.
                    Some(_) => Row::pairs_without_target(
                        &format!("  of a scripted VMM: {word} / root"),
                        &pairs,
                    ),
                });
            }
        }
        Ok(rows)
    })
}

fn start(home: &Home) -> Result<f64> {
    let seconds = seconds_of(&mut home.banger(&["vm", "start", VM]))?;
    home.succeed(&["vm", "kill", VM])?;
    Ok(seconds)
}
