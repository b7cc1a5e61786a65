//! How fast banger is against the bare thing, measured in interleaved pairs.

mod stats;

use crate::command::{capture, command};
use crate::dist::{self, Profile};
use crate::failure::{Failure, Result};
use stats::{Target, Verdict, summarise};
use std::path::Path;
use std::time::Instant;

/// Pairs for what takes milliseconds.
const PAIRS: usize = 30;

/// What runs on either side of a pair: it does the thing once and gives what it took.
type Side<'a> = Box<dyn FnMut() -> Result<f64> + 'a>;

/// One comparison.
struct Bench<'a> {
    name: &'static str,
    pairs: usize,
    target: Target,
    ours: Side<'a>,
    theirs: Side<'a>,
}

/// Runs the benches whose names contain one of `names`, or all, and prints a table of ratios.
pub(crate) fn bench(names: &[&str]) -> Result<()> {
    let dist = dist::dist(Profile::Release)?;
    println!(
        "bench                              pairs   ratio  [quartiles]      difference   target  verdict"
    );
    for mut bench in benches(&dist) {
        if names.is_empty() || names.iter().any(|name| bench.name.contains(name)) {
            run(&mut bench)?;
        }
    }
    Ok(())
}

fn benches(dist: &Path) -> Vec<Bench<'_>> {
    vec![Bench {
        name: "banger --version / /bin/true",
        pairs: PAIRS,
        target: Target {
            at_most: 3.0,
            margin: 0.25,
        },
        ours: Box::new(|| seconds_of(&dist.join("banger"), &["--version"])),
        theirs: Box::new(|| seconds_of(Path::new("/bin/true"), &[])),
    }]
}

fn run(bench: &mut Bench<'_>) -> Result<()> {
    // The first of each side pays for cold caches.
    (bench.ours)()?;
    (bench.theirs)()?;
    let mut pairs = Vec::with_capacity(bench.pairs);
    for number in 0..bench.pairs {
        // Whoever goes second finds a warmer machine, so the sides take turns.
        let pair = if number % 2 == 0 {
            let ours = (bench.ours)()?;
            (ours, (bench.theirs)()?)
        } else {
            let theirs = (bench.theirs)()?;
            ((bench.ours)()?, theirs)
        };
        pairs.push(pair);
    }
    let Some(summary) = summarise(&pairs) else {
        println!("{:<34} {}", bench.name, Verdict::Undecided.word());
        return Ok(());
    };
    println!(
        "{:<34} {:>5} {:>7.2}  [{:.2} to {:.2}]   {:>8.2} ms  ≤ {:<5.2}  {}",
        bench.name,
        summary.pairs,
        summary.median,
        summary.low,
        summary.high,
        summary.difference * 1000.0,
        bench.target.at_most,
        summary.verdict(bench.target, bench.pairs).word(),
    );
    Ok(())
}

/// How long the command takes, in seconds, from before it is started until its end was seen.
fn seconds_of(program: &Path, args: &[&str]) -> Result<f64> {
    let start = Instant::now();
    let ended = capture(command(program).args(args))?;
    let seconds = start.elapsed().as_secs_f64();
    if ended.success {
        Ok(seconds)
    } else {
        Err(Failure::new(format!(
            "`{} {}` failed: {}",
            program.display(),
            args.join(" "),
            ended.stderr.trim()
        )))
    }
}
