//! Everything that can be checked without running banger. All of it runs, also after a failure.

use crate::command::{cargo, find, run};
use crate::failure::{Failure, Result};
use crate::layout::root;

pub(crate) fn check() -> Result<()> {
    let mut failed = Vec::new();
    let mut attempt = |what: &'static str, args: &[&str], environment: &[(&str, &str)]| {
        let mut command = cargo();
        command
            .current_dir(root())
            .args(args)
            .envs(environment.iter().copied());
        if let Err(failure) = run(&mut command) {
            eprintln!("{failure}");
            failed.push(what);
        }
    };
    attempt("formatting", &["fmt", "--all", "--check"], &[]);
    attempt(
        "lints",
        &[
            "clippy",
            "--workspace",
            "--all-targets",
            "--locked",
            "--",
            "-D",
            "warnings",
        ],
        &[],
    );
    attempt(
        "documentation",
        &[
            "doc",
            "--workspace",
            "--no-deps",
            "--document-private-items",
            "--locked",
        ],
        &[("RUSTDOCFLAGS", "-D warnings")],
    );
    let mut not_run = Vec::new();
    if find("cargo-deny").is_some() {
        attempt(
            "licences",
            &["deny", "check", "bans", "licenses", "sources"],
            &[],
        );
    } else {
        not_run
            .push("licences, sources and bans: no cargo-deny (cargo install --locked cargo-deny)");
    }
    not_run.push(
        "advisories: their database is fetched from the network (cargo deny check advisories)",
    );
    for what in &not_run {
        eprintln!("SKIPPED: check: {what}");
    }
    if failed.is_empty() {
        println!("checked, except for {} above", not_run.len());
        Ok(())
    } else {
        Err(Failure::new(format!("not in order: {}", failed.join(", "))))
    }
}
