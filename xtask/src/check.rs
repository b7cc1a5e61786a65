//! Everything that can be checked without running banger. All of it runs, also after a failure.

use crate::command::{capture, cargo, run};
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
    let mut not_run = vec![(
        "advisories",
        "their database is fetched from the network (cargo deny check advisories)",
    )];
    if has_deny() {
        attempt(
            "licences, bans and sources",
            &["deny", "--locked", "check", "licenses", "bans", "sources"],
            &[],
        );
    } else {
        not_run.push((
            "licences, bans and sources",
            "no cargo-deny (cargo install --locked cargo-deny)",
        ));
    }
    for (what, why) in &not_run {
        eprintln!("SKIPPED: check: {what}: {why}");
    }
    let not_run: Vec<&str> = not_run.iter().map(|(what, _)| *what).collect();
    let verdict = verdict(&failed, &not_run);
    if failed.is_empty() {
        println!("{verdict}");
        Ok(())
    } else {
        Err(Failure::new(verdict))
    }
}

/// Whether `cargo deny` runs. Cargo also finds it in its own folder of programs, which may not be on PATH.
fn has_deny() -> bool {
    capture(cargo().args(["deny", "--version"])).is_ok_and(|captured| captured.success)
}

/// The last line that is shown, so that nobody takes what was not run for checked.
fn verdict(failed: &[&str], not_run: &[&str]) -> String {
    let not_run = not_run.join("; ");
    if failed.is_empty() {
        format!("in order; NOT CHECKED: {not_run}")
    } else {
        format!(
            "not in order: {}; NOT CHECKED: {not_run}",
            failed.join(", ")
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_line_names_what_was_not_run() {
        assert_eq!(
            verdict(&[], &["advisories", "licences"]),
            "in order; NOT CHECKED: advisories; licences"
        );
        assert_eq!(
            verdict(&["lints"], &["advisories"]),
            "not in order: lints; NOT CHECKED: advisories"
        );
    }
}
