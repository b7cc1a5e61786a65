//! Whether `nat up` grows with the VMs that run, and what it adds to the kernel's own part.

use super::bare::Namespace;
use super::cpu;
use super::home::{Home, Images, Mode, fill_store, scripted_vmm};
use super::machine::{Machine, on_a_machine};
use super::netlink::{Change, Netlink};
use super::stats::{Summary, Target, summarise};
use super::table::Row;
use super::{PAIRS, pairs};
use crate::command::{capture, command};
use crate::failure::{Failure, Result};
use std::cell::RefCell;
use std::io::Write;
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::Stdio;
use std::time::Instant;

/// VMs that run where many do.
const MANY: usize = 500;
/// How often it is turned on in one measurement.
const UPS: u32 = 5;
/// Each time, it was turned off before.
const CHANGES: f64 = 10.0;
const EQUAL: Target = Target {
    at_most: 1.10,
    margin: 0.15,
    at_most_more: None,
};

pub(super) fn run(dist: &Path) -> Result<Vec<Row>> {
    fill_store(dist, Images::Tiny)?;
    let vmm = scripted_vmm()?;
    on_a_machine(dist, |machine| {
        // The first one opens the way out as well, so the second is what the last is held against.
        let (first, second, last) = (
            Crowd::new(machine, &vmm, 1)?,
            Crowd::new(machine, &vmm, 2)?,
            Crowd::new(machine, &vmm, MANY)?,
        );
        let mut rows = Vec::new();
        let (wall, both, keeper) =
            compare(|costs| last.nat_up(costs), |costs| second.nat_up(costs))?;
        let name = format!("nat up: VM {MANY} / VM 2");
        rows.push(Row::pairs(&name, &wall, EQUAL, PAIRS));
        let name = "  CPU time of daemon and keeper";
        rows.push(Row::pairs(name, &both, EQUAL, PAIRS));
        let name = "  CPU time of the keeper";
        rows.push(Row::pairs(name, &keeper, EQUAL, PAIRS));
        let (wall, ..) = compare(|costs| first.nat_up(costs), |costs| second.nat_up(costs))?;
        let name = "nat up: VM 1, which opens the way out / VM 2";
        rows.push(Row::pairs_without_target(name, &wall));
        let bare = Bare::like(&last)?;
        let (wall, both, keeper) = compare(|costs| last.nat_up(costs), |costs| bare.nat_up(costs))?;
        for (name, summary) in [
            (format!("nat up: VM {MANY} / bare netlink batch"), wall),
            (
                "  CPU time of daemon and keeper / of the batch".to_owned(),
                both,
            ),
            ("  CPU time of the keeper / of the batch".to_owned(), keeper),
        ] {
            rows.push(Row::pairs_without_target(&name, &summary));
        }
        Ok(rows)
    })
}

/// The CPU time of one change, in seconds.
#[derive(Debug, Clone, Copy)]
struct Cost {
    daemon_and_keeper: f64,
    keeper: f64,
}

/// Pairs of both: what it took by the clock, the CPU time of all, and that of the keeper alone.
fn compare(
    ours: impl Fn(&mut Vec<Cost>) -> Result<f64>,
    theirs: impl Fn(&mut Vec<Cost>) -> Result<f64>,
) -> Result<(Summary, Summary, Summary)> {
    let (mut our_costs, mut their_costs) = (Vec::new(), Vec::new());
    let wall = pairs(PAIRS, || ours(&mut our_costs), || theirs(&mut their_costs))?;
    let sum = |part: fn(&Cost) -> f64| {
        let parts = |costs: &[Cost]| costs.iter().map(part).collect::<Vec<_>>();
        sum_up(&parts(&our_costs), &parts(&their_costs))
    };
    Ok((
        wall,
        sum(|cost| cost.daemon_and_keeper)?,
        sum(|cost| cost.keeper)?,
    ))
}

/// What was measured in pairs, the first of which does not count.
fn sum_up(ours: &[f64], theirs: &[f64]) -> Result<Summary> {
    let pairs: Vec<(f64, f64)> = ours.iter().copied().zip(theirs.iter().copied()).collect();
    summarise(pairs.get(1..).unwrap_or_default())
        .ok_or_else(|| Failure::new("the other side took no time at all"))
}

/// VMs that run, all of which but the last have NAT.
struct Crowd {
    home: Home,
    last: String,
    daemon: i64,
    keeper: i64,
}

impl Crowd {
    fn new(machine: &Machine, vmm: &Path, count: usize) -> Result<Self> {
        let home = Home::on(machine, Mode::Root, Some(vmm))?;
        for number in 1..=count {
            let nat = number < count;
            let body = format!(
                r#"{{"name":"vm-{number}","image":"tiny","memory_mib":128,"nat":{nat},"start":true}}"#
            );
            home.post("/v1/vms", &body)?;
        }
        let daemon = home.daemon_pid()?;
        let keeper = cpu::process_with("banger-netns", &home.folder())?;
        Ok(Self {
            home,
            last: format!("/v1/vms/vm-{count}"),
            daemon,
            keeper,
        })
    }

    fn set(&self, nat: bool) -> Result<()> {
        let body = format!(r#"{{"nat":{nat}}}"#);
        self.home.request("PATCH", &self.last, &body)
    }

    /// So far.
    fn cost(&self) -> Result<Cost> {
        let keeper = cpu::seconds_of_process(self.keeper)?;
        let daemon_and_keeper = keeper + cpu::seconds_of_process(self.daemon)?;
        Ok(Cost {
            daemon_and_keeper,
            keeper,
        })
    }

    /// How long the request takes until it is answered, of several. The CPU time of a change is put to `costs`.
    fn nat_up(&self, costs: &mut Vec<Cost>) -> Result<f64> {
        let before = self.cost()?;
        let took = ups(|| self.set(false), || self.set(true))?;
        let after = self.cost()?;
        costs.push(Cost {
            daemon_and_keeper: (after.daemon_and_keeper - before.daemon_and_keeper) / CHANGES,
            keeper: (after.keeper - before.keeper) / CHANGES,
        });
        Ok(took)
    }
}

/// Turns it off and on again several times: the kernel counts a process's CPU time when it goes to sleep, which may be
/// after it has answered. Answers how long an `up` takes.
fn ups(down: impl Fn() -> Result<()>, up: impl Fn() -> Result<()>) -> Result<f64> {
    let mut took = 0.0;
    for _ in 0..UPS {
        down()?;
        let start = Instant::now();
        up()?;
        took += start.elapsed().as_secs_f64();
    }
    Ok(took / f64::from(UPS))
}

/// A namespace that holds the very rules and elements of another one, and nobody who looks after them.
struct Bare {
    _namespace: Namespace,
    socket: RefCell<Netlink>,
}

impl Bare {
    const ADDRESS: Ipv4Addr = Ipv4Addr::new(100, 126, 255, 253);

    fn like(crowd: &Crowd) -> Result<Self> {
        let mut list = command("nsenter");
        list.arg(format!("--net=/proc/{}/ns/net", crowd.keeper))
            .args(["nft", "list", "ruleset"]);
        let rules = capture(&mut list)?.stdout;
        let namespace = Namespace::new("true")?;
        let socket = namespace.inside(|| {
            load(&rules)?;
            let mut socket = Netlink::netfilter()?;
            socket.change_nat(Change::Add, Self::ADDRESS)?;
            Ok(socket)
        })?;
        Ok(Self {
            _namespace: namespace,
            socket: RefCell::new(socket),
        })
    }

    fn nat_up(&self, costs: &mut Vec<Cost>) -> Result<f64> {
        let change = |change| self.socket.borrow_mut().change_nat(change, Self::ADDRESS);
        let before = cpu::seconds_of_this_thread();
        let took = ups(|| change(Change::Delete), || change(Change::Add))?;
        let cost = (cpu::seconds_of_this_thread() - before) / CHANGES;
        costs.push(Cost {
            daemon_and_keeper: cost,
            keeper: cost,
        });
        Ok(took)
    }
}

/// Loads rules into the namespace of the calling thread.
pub(super) fn load(rules: &str) -> Result<()> {
    let failed = || Failure::io("cannot run `nft`");
    let mut nft = command("nft")
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .spawn()
        .map_err(failed())?;
    if let Some(mut pipe) = nft.stdin.take() {
        pipe.write_all(rules.as_bytes()).map_err(failed())?;
    }
    let status = nft.wait().map_err(failed())?;
    if status.success() {
        Ok(())
    } else {
        Err(Failure::new("`nft` does not load the rules"))
    }
}
