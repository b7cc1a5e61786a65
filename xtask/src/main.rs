//! The project's chores: `cargo xtask VERB`. The Makefile calls these.
//!
//! | verb | what it does |
//! | --- | --- |
//! | `deps [run\|test\|bench]` | installs the system packages that are missing |
//! | `dist [--release\|--debug]` | builds all programs and gathers them in one folder |
//! | `install PREFIX`, `uninstall PREFIX` | puts `target/dist` into place, below `$DESTDIR`; takes it away |
//! | `check` | everything that can be checked without running banger |
//! | `demo` | from nothing to a command run in a VM |
//! | `test` | everything that proves that banger works |
//! | `testhost [--systemd] -- CMD` | runs CMD in an emulated machine that has a working KVM |
//! | `bench` | ratios against the bare thing |

mod bench;
mod check;
mod command;
mod demo;
mod dist;
mod failure;
mod install;
mod layout;
mod packages;
mod tally;
mod test;
mod testhost;

use crate::failure::{Failure, Result};
use crate::packages::Purpose;
use crate::testhost::Init;
use std::process::ExitCode;

const USAGE: &str = "\
usage: cargo xtask VERB

  deps [run|test|bench]          install the system packages that are missing
  dist [--release|--debug]       build all programs into target/dist (or target/dist-debug)
  install PREFIX                 put target/dist below $DESTDIR/PREFIX
  uninstall PREFIX               remove what install put there
  check                          formatting, lints, licences, documentation
  demo                           from nothing to a command run in a VM
  test                           everything that proves that banger works
  testhost [--systemd] -- COMMAND...
                                 run COMMAND in an emulated machine with a working KVM
  bench [--dist DIR] [NAME...]   ratios against the bare thing, of the programs in DIR or of a release build
";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match verb(&args) {
        Ok(code) => code,
        Err(failure) => {
            eprintln!("{failure}");
            ExitCode::FAILURE
        }
    }
}

fn verb(args: &[String]) -> Result<ExitCode> {
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["deps"] | ["deps", "run"] => packages::ensure(Purpose::Run)?,
        ["deps", "test"] => packages::ensure(Purpose::Test)?,
        ["deps", "bench"] => packages::ensure(Purpose::Bench)?,
        ["dist"] | ["dist", "--release"] => {
            dist::dist(dist::Profile::Release)?;
        }
        ["dist", "--debug"] => {
            dist::dist(dist::Profile::Debug)?;
        }
        ["install", prefix] => install::install(prefix)?,
        ["uninstall", prefix] => install::uninstall(prefix)?,
        ["check"] => check::check()?,
        ["demo"] => demo::demo()?,
        ["test"] => return test::test(),
        ["testhost", "--", command @ ..] if !command.is_empty() => {
            return testhost::testhost(Init::Shell, command);
        }
        ["testhost", "--systemd", "--", command @ ..] if !command.is_empty() => {
            return testhost::testhost(Init::Systemd, command);
        }
        ["bench", names @ ..] => bench::bench(names)?,
        ["help" | "--help" | "-h"] => print!("{USAGE}"),
        _ => {
            return Err(Failure::new(format!(
                "`cargo xtask {}` is not understood",
                words.join(" ")
            ))
            .hint(USAGE));
        }
    }
    Ok(ExitCode::SUCCESS)
}
