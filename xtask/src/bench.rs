//! How fast banger is against the bare thing, measured in interleaved pairs, and how little it takes.
//!
//! | bench | ours | theirs |
//! | --- | --- | --- |
//! | `version` | `banger --version` | `/bin/true` |
//! | `start` | `banger vm start`, which returns when QEMU has answered its first QMP command | the identical QEMU command by itself, until it has answered that |
//! | `create` | a VM over an image of 20 GiB | the same over one of 2 GiB |
//! | `list` | `banger vm list` with 1,000 VMs | `curl --unix-socket` of the same bytes |
//! | `memory` | PSS of the daemon and of a shim | |
//! | `syncs` | waits for the disk before the answer | |
//! | `modes` | `vm start` with the helper, and without root | the same as root, on the same machine |
//! | `nat` | `nat up` for the last of 500 VMs that run | for the second of two; one bare netlink batch |
//! | `forward` | small packets forwarded with 500 VMs in the sets | with one |
//! | `reconcile` | what 1,000 stopped VMs add to the start of a daemon | one dump each of links, rules, loops and processes |
//! | `dns` | answers of `banger-dns` to 20,000 queries, and the 99th percentile of their times | dnsmasq with the same names |
//! | `boot` | create until a command ran over ssh, default image | the same packages as Debian boots them |

mod bare;
mod boot;
mod cpu;
mod create;
mod debian;
mod dns;
mod forward;
mod home;
mod list;
mod machine;
mod memory;
mod modes;
mod nat;
mod netlink;
mod reconcile;
mod start;
mod stats;
mod syncs;
mod table;

use crate::command::command;
use crate::dist::{self, Profile};
use crate::failure::{Failure, Result};
use crate::packages::{self, Purpose};
use home::seconds_of;
use stats::{Summary, Target, summarise};
use std::path::{Path, PathBuf};
use table::{Row, table};

/// Pairs for what takes milliseconds.
const PAIRS: usize = 30;
/// VMs where many are wanted.
const MANY: usize = 1000;

/// One group of rows.
struct Bench {
    name: &'static str,
    run: fn(&Path) -> Result<Vec<Row>>,
}

const BENCHES: [Bench; 12] = [
    Bench {
        name: "version",
        run: version,
    },
    Bench {
        name: "start",
        run: start::run,
    },
    Bench {
        name: "create",
        run: create::run,
    },
    Bench {
        name: "list",
        run: list::run,
    },
    Bench {
        name: "memory",
        run: memory::run,
    },
    Bench {
        name: "syncs",
        run: syncs::run,
    },
    Bench {
        name: "modes",
        run: modes::run,
    },
    Bench {
        name: "nat",
        run: nat::run,
    },
    Bench {
        name: "forward",
        run: forward::run,
    },
    Bench {
        name: "reconcile",
        run: reconcile::run,
    },
    Bench {
        name: "dns",
        run: dns::run_bench,
    },
    Bench {
        name: "boot",
        run: boot::run,
    },
];

/// Runs the benches that are named, or all, and prints a table. After `--dist` comes the folder of the programs to
/// measure; without it they are built in release.
pub(crate) fn bench(words: &[&str]) -> Result<()> {
    let (given, names) = match words {
        ["--dist", folder, names @ ..] => (Some(PathBuf::from(folder)), names),
        names => (None, names),
    };
    if let Some(unknown) = names
        .iter()
        .find(|name| BENCHES.iter().all(|bench| bench.name != **name))
    {
        let known = BENCHES.map(|bench| bench.name).join(", ");
        return Err(Failure::new(format!("there is no bench `{unknown}`"))
            .hint(format!("there are {known}")));
    }
    packages::ensure(Purpose::Bench)?;
    let dist = match given {
        Some(folder) => std::path::absolute(&folder)
            .map_err(Failure::io(format!("cannot find `{}`", folder.display())))?,
        None => dist::dist(Profile::Release)?,
    };
    let mut rows = Vec::new();
    let mut failures = 0;
    for bench in BENCHES {
        if !names.is_empty() && !names.contains(&bench.name) {
            continue;
        }
        eprintln!("== {}", bench.name);
        match (bench.run)(&dist) {
            Ok(more) => rows.extend(more),
            Err(failure) => {
                eprintln!("{failure}");
                rows.push(Row::failed(bench.name));
                failures += 1;
            }
        }
    }
    print!("\n{}", table(&rows));
    println!("medians; `undecided`: the pairs spread wider than the margin, around the target");
    if failures == 0 {
        Ok(())
    } else {
        Err(Failure::new(format!("{failures} of the benches failed")))
    }
}

fn version(dist: &Path) -> Result<Vec<Row>> {
    let target = Target {
        at_most: 3.0,
        margin: 0.25,
        at_most_more: None,
    };
    let summary = pairs(
        PAIRS,
        || seconds_of(command(dist.join("banger")).arg("--version")),
        || seconds_of(&mut command("/bin/true")),
    )?;
    let name = "banger --version / true";
    Ok(vec![Row::pairs(name, &summary, target, PAIRS)])
}

/// Measures both sides in turn, each giving what it took, in seconds. The first pair pays for cold caches and does
/// not count.
fn pairs(
    count: usize,
    mut ours: impl FnMut() -> Result<f64>,
    mut theirs: impl FnMut() -> Result<f64>,
) -> Result<Summary> {
    ours()?;
    theirs()?;
    let mut pairs = Vec::with_capacity(count);
    for number in 0..count {
        // Whoever goes second finds a warmer machine, so the sides take turns.
        let pair = if number % 2 == 0 {
            let ours = ours()?;
            (ours, theirs()?)
        } else {
            let theirs = theirs()?;
            (ours()?, theirs)
        };
        pairs.push(pair);
    }
    summarise(&pairs).ok_or_else(|| Failure::new("the other side took no time at all"))
}
