//! Everything that proves that banger works, one after another, and the count at the end.
//!
//! | part | what runs |
//! | --- | --- |
//! | tests | `cargo test` over the workspace |
//! | system tests | the ignored tests of every `crates/*/tests/system_*.rs`, which start real daemons and guests |
//! | test host | the ignored tests of `crates/banger-testhost/tests/suite.rs`, inside the test host, and the daemon's own tests of storage |
//! | systemd | those of `crates/banger-testhost/tests/systemd.rs`, inside one whose first process is systemd |
//! | neighbours | those of its module `neighbours`, in one of their own |
//!
//! What tests are given: `BANGER_LIBEXEC`, the folder of all programs; `BANGER_TEST_FIXTURES`, an `XDG_DATA_HOME`
//! with the tiny image and the default kernel; `BANGER_SKIP_LOG`, a file to append skips to.

use crate::command::{cargo, find, follow, run};
use crate::dist::{self, Profile};
use crate::failure::{Failure, Result};
use crate::layout::{root, target};
use crate::packages::{self, Purpose};
use crate::tally::Tally;
use crate::testhost::{self, DAEMON_TESTS, Init};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

/// Where the suite is inside the test host.
const SUITE: &str = "/mnt/suite";
/// Those that share the test host with Docker, firewalld and ufw.
const NEIGHBOURS_SUITE: [&str; 5] = [
    SUITE,
    "--ignored",
    "--nocapture",
    "--test-threads=1",
    "neighbours::",
];
/// Each boot of the test host has its own tests.
const SYSTEMD_SUITE: &str =
    "exec /mnt/suite --ignored --nocapture --test-threads=1 boot_$TESTHOST_BOOT::";

pub(crate) fn test() -> Result<ExitCode> {
    packages::ensure(Purpose::Test)?;
    let dist = dist::dist(Profile::Debug)?;
    let skip_log = target().join("skipped.log");
    std::fs::write(&skip_log, "").map_err(Failure::io(format!(
        "cannot write `{}`",
        skip_log.display()
    )))?;
    let mut tally = Tally::default();
    let fixtures = match ensure_fixtures(&dist) {
        Ok(fixtures) => Some(fixtures),
        Err(failure) => {
            eprintln!("{failure}");
            tally.fail("building the tests' image and kernel");
            None
        }
    };
    let given = |command: &mut Command| {
        command
            .env("BANGER_LIBEXEC", &dist)
            .env("BANGER_SKIP_LOG", &skip_log);
        if let Some(fixtures) = &fixtures {
            command.env("BANGER_TEST_FIXTURES", fixtures);
        }
    };

    let mut tests = cargo_test();
    tests.args(["--", "--show-output"]);
    given(&mut tests);
    part(&mut tally, "cargo test", &mut tests)?;

    if has_system_tests() && fixtures.is_some() {
        let mut tests = cargo_test();
        tests
            .args(["--test", "system_*", "--", "--ignored", "--nocapture"])
            .env("RUST_TEST_THREADS", "2");
        given(&mut tests);
        part(&mut tally, "system tests", &mut tests)?;
    }

    if let Some(fixtures) = &fixtures {
        if find("firecracker").is_none() {
            tally.skip("test host: no firecracker on PATH, so no Firecracker ran");
        }
        eprintln!("the test host gets {}", fixtures.display());
        part(
            &mut tally,
            "the test host's suite",
            &mut testhost::command(Init::Shell, &["sh", "-c", &in_test_host()])?,
        )?;
        part(
            &mut tally,
            "the suite under systemd",
            &mut testhost::command(Init::Systemd, &["sh", "-c", SYSTEMD_SUITE])?,
        )?;
        part(
            &mut tally,
            "the suite beside Docker, firewalld and ufw",
            &mut testhost::command(Init::Systemd, &NEIGHBOURS_SUITE)?,
        )?;
    }

    let skipped = std::fs::read_to_string(&skip_log).unwrap_or_default();
    for line in skipped.lines() {
        tally.read(line);
    }
    println!("\n{}", tally.summary());
    Ok(if tally.succeeded() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// All that runs inside the test host, as one line of shell that fails if any of it does.
fn in_test_host() -> String {
    format!(
        "{SUITE} --ignored --nocapture --test-threads=1; suite=$?; \
         /mnt/{DAEMON_TESTS} --test-threads=1 --show-output storage::tests && exit $suite"
    )
}

fn cargo_test() -> Command {
    let mut command = cargo();
    command
        .current_dir(root())
        .args(["test", "--workspace", "--locked", "--no-fail-fast"]);
    command
}

fn part(tally: &mut Tally, name: &str, command: &mut Command) -> Result<()> {
    let failures_before = tally.failures();
    let success = follow(command, |line| {
        println!("{line}");
        tally.read(line);
    })?;
    // A test program that crashed, or did not build, counts nothing.
    if !success && tally.failures() == failures_before {
        tally.fail(name);
    }
    Ok(())
}

/// The image and kernel that guests in tests boot, made on first use and kept as long as they are current.
fn ensure_fixtures(dist: &Path) -> Result<PathBuf> {
    let fixtures = target().join("fixtures");
    run(
        crate::command::command(target().join("debug/test-fixtures"))
            .arg(&fixtures)
            .arg(dist.join("banger-init")),
    )?;
    Ok(fixtures)
}

fn has_system_tests() -> bool {
    let tests = |crate_dir: PathBuf| std::fs::read_dir(crate_dir.join("tests"));
    std::fs::read_dir(root().join("crates")).is_ok_and(|crates| {
        crates
            .flatten()
            .filter_map(|entry| tests(entry.path()).ok())
            .flat_map(|entries| entries.flatten())
            .any(|entry| {
                let name = entry.file_name();
                let name = name.to_string_lossy();
                name.starts_with("system_") && name.ends_with(".rs")
            })
    })
}
