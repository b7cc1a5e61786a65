//! Reads what test programs print, and counts.

use std::collections::BTreeSet;

/// What begins the line of a test that did not run: `SKIPPED: <test>: <why>`.
const SKIPPED: &str = "SKIPPED: ";
/// What begins the line of a real run of Firecracker: `FIRECRACKER RUN: <what>: <figures>`.
const FIRECRACKER_RUN: &str = "FIRECRACKER RUN: ";
/// Of what a failed test said, this many lines are repeated in the summary.
const SAID_LINES: usize = 12;

/// The count over all test programs.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    passed: usize,
    failed: BTreeSet<String>,
    failed_count: usize,
    /// What panicked and what it said, of all threads, in their order: whether its test failed shows later.
    panics: Vec<Panic>,
    /// Whether the lines that come still belong to the last panic.
    in_panic: bool,
    /// Whether the lines that come are the names of a test program's failed tests.
    in_failures: bool,
    skipped: BTreeSet<String>,
    firecracker_runs: Vec<String>,
    /// Whether the test program whose output is being read holds system tests or the test host's, which are ignored
    /// at first and run by themselves later.
    in_system_tests: bool,
}

/// One panic: the thread's name, which is the test's if its own thread panicked, and what was printed of it.
#[derive(Debug)]
struct Panic {
    thread: String,
    said: Vec<String>,
}

impl Tally {
    /// Takes in one line of the merged output of cargo and the test programs.
    pub(crate) fn read(&mut self, line: &str) {
        self.read_failures(line);
        let line = line.trim();
        if let Some(program) = line.strip_prefix("Running ") {
            self.in_system_tests = ["tests/system_", "tests/suite.rs", "tests/systemd.rs"]
                .iter()
                .any(|tests| program.contains(tests));
        }
        self.hear_panic(line);
        // The harness and a test may share a line when output is not captured.
        if let Some(at) = line.find(SKIPPED) {
            self.skip(&line[at + SKIPPED.len()..]);
        }
        if let Some(at) = line.find(FIRECRACKER_RUN) {
            self.firecracker_runs
                .push(line[at + FIRECRACKER_RUN.len()..].to_owned());
        }
        if let Some(counts) = line.strip_prefix("test result: ") {
            self.passed += count(counts, "passed");
            self.failed_count += count(counts, "failed");
        } else if let Some(test) = line.strip_prefix("test ") {
            if let Some(test) = test.strip_suffix(" ... FAILED") {
                self.failed.insert(test.to_owned());
            } else if let Some((test, why)) = test.split_once(" ... ignored")
                && !self.in_system_tests
            {
                let why = why.trim_start_matches(", ");
                let why = if why.is_empty() { "ignored" } else { why };
                self.skipped.insert(format!("{test}: {why}"));
            }
        }
    }

    /// Takes in the list that a test program ends with. Where output is not captured and tests run one after another,
    /// the verdict does not stand on the test's line.
    fn read_failures(&mut self, line: &str) {
        let line = line.trim_end();
        match line.strip_prefix("    ") {
            Some(test) if self.in_failures && !test.contains(' ') => {
                self.failed.insert(test.to_owned());
            }
            _ => self.in_failures = line == "failures:",
        }
    }

    /// Keeps `thread 'name' (1234) panicked at file:line:` and the lines after it, up to the backtrace or the hint
    /// about one.
    fn hear_panic(&mut self, line: &str) {
        let thread = line
            .split_once("thread '")
            .filter(|(_, rest)| rest.contains(" panicked at "))
            .and_then(|(_, rest)| rest.split_once('\''));
        if let Some((thread, place)) = thread {
            self.in_panic = true;
            self.panics.push(Panic {
                thread: thread.to_owned(),
                said: vec![place.trim_start().to_owned()],
            });
        } else if [
            "stack backtrace:",
            "---- ",
            "failures:",
            "successes:",
            "note: run with `RUST_BACKTRACE",
            "test ",
        ]
        .iter()
        .any(|end| line.starts_with(end))
        {
            self.in_panic = false;
        } else if self.in_panic
            && let Some(panic) = self.panics.last_mut()
            && panic.said.len() < SAID_LINES
        {
            panic.said.push(line.to_owned());
        }
    }

    /// Notes a test that did not run, as `<test>: <why>`.
    pub(crate) fn skip(&mut self, what: &str) {
        self.skipped.insert(what.trim().to_owned());
    }

    /// Notes a failure that no test program counted.
    pub(crate) fn fail(&mut self, what: impl Into<String>) {
        self.failed.insert(what.into());
    }

    /// How many failures there are so far. Tests of the same name in different programs count each.
    pub(crate) fn failures(&self) -> usize {
        self.failed_count.max(self.failed.len())
    }

    pub(crate) fn succeeded(&self) -> bool {
        self.failures() == 0
    }

    /// Real runs, skips and failures with what they said, and as the last line the counts: who sees only the end of
    /// a log sees what matters most.
    pub(crate) fn summary(&self) -> String {
        let mut text = String::new();
        for run in &self.firecracker_runs {
            text.push_str(&format!("{FIRECRACKER_RUN}{run}\n"));
        }
        text.push_str(&format!(
            "{} real runs of Firecracker\n",
            self.firecracker_runs.len()
        ));
        for skipped in &self.skipped {
            text.push_str(&format!("{SKIPPED}{skipped}\n"));
        }
        for failed in &self.failed {
            text.push_str(&format!("FAILED: {failed}\n"));
            for panic in self.panics.iter().filter(|panic| panic.thread == *failed) {
                for line in &panic.said {
                    text.push_str(&format!("    {line}\n"));
                }
            }
        }
        let failed = self.failures();
        // The harness counts a test that skipped itself as passed.
        let passed = self.passed.saturating_sub(self.skipped_by_themselves());
        let skipped = self.skipped.len();
        text.push_str(&format!(
            "{passed} passed, {failed} failed, {skipped} skipped"
        ));
        text
    }

    fn skipped_by_themselves(&self) -> usize {
        self.skipped
            .iter()
            .filter(|skipped| !skipped.ends_with(": ignored") && !skipped.starts_with("test host"))
            // One that left out several parts of itself is one.
            .filter_map(|skipped| skipped.split(": ").next())
            .collect::<BTreeSet<_>>()
            .len()
    }
}

/// The number before `word` in `3 passed; 0 failed; …`.
fn count(counts: &str, word: &str) -> usize {
    counts
        .split([';', '.'])
        .filter_map(|part| part.trim().strip_suffix(word))
        .find_map(|number| number.trim().parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tally(lines: &str) -> Tally {
        let mut tally = Tally::default();
        lines.lines().for_each(|line| tally.read(line));
        tally
    }

    #[test]
    fn a_skipped_test_is_not_a_passed_one() {
        let tally = tally(
            "     Running unittests src/lib.rs (target/debug/deps/x-1)\n\
             test a ... ok\n\
             test b ... ok\n\
             test c ... FAILED\n\
             test d ... ignored\n\
             SKIPPED: b: not root\n\
             test result: FAILED. 2 passed; 1 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.1s\n\
             SKIPPED: b: not root",
        );
        assert!(!tally.succeeded());
        let summary = tally.summary();
        assert!(
            summary.ends_with("\n1 passed, 1 failed, 2 skipped"),
            "{summary}"
        );
        assert!(summary.contains("SKIPPED: b: not root\n"), "{summary}");
        assert!(summary.contains("FAILED: c\n"), "{summary}");
    }

    #[test]
    fn system_tests_are_ignored_at_first_without_a_word() {
        let tally = tally(
            "     Running tests/system_boot.rs (target/debug/deps/system_boot-1)\n\
             test boots ... ignored\n\
             test result: ok. 0 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out\n\
             test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out",
        );
        assert!(tally.succeeded());
        assert!(tally.summary().ends_with("1 passed, 0 failed, 0 skipped"));
    }

    #[test]
    fn firecracker_runs_are_listed_and_counted() {
        let summary = tally("FIRECRACKER RUN: create and ssh: ready after 6.1 s").summary();
        assert!(summary.contains("create and ssh: ready after 6.1 s\n1 real runs"));
    }

    #[test]
    fn what_a_failed_test_said_is_repeated_before_the_counts() {
        let summary = tally(
            "FIRECRACKER RUN: create: 1 s\n\
             test a ... thread 'a' (12) panicked at src/a.rs:1:2:\n\
             expected and caught\n\
             note: run with `RUST_BACKTRACE=1` environment variable to display a backtrace\n\
             ok\n\
             thread 'b' (13) panicked at src/b.rs:3:4:\n\
             assertion failed: found\n\
             ---- c stdout ----\n\
             something else\n\
             test b ... FAILED\n\
             test result: FAILED. 1 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out",
        )
        .summary();
        assert!(
            summary.ends_with(
                "FAILED: b\n    (13) panicked at src/b.rs:3:4:\n    assertion failed: found\n\
                 1 passed, 1 failed, 0 skipped"
            ),
            "{summary}"
        );
        assert!(summary.starts_with("FIRECRACKER RUN: "), "{summary}");
    }

    #[test]
    fn a_failed_test_is_named_where_its_output_stands_before_the_verdict() {
        let summary = tally(
            "test boot_1::a ... FIRECRACKER RUN: a: 1 s\n\
             FAILED\n\
             \n\
             failures:\n\
             \n\
             failures:\n    boot_1::a\n\
             \n\
             test result: FAILED. 0 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out",
        )
        .summary();
        assert!(summary.contains("FAILED: boot_1::a\n"), "{summary}");
        assert!(summary.ends_with("0 passed, 1 failed, 0 skipped"));
    }

    #[test]
    fn a_failure_outside_of_the_tests_counts() {
        let mut tally = Tally::default();
        tally.fail("cargo test");
        assert!(!tally.succeeded());
        assert!(tally.summary().ends_with("0 passed, 1 failed, 0 skipped"));
    }
}
