//! Reads what test programs print, and counts.

use std::collections::BTreeSet;

/// What begins the line of a test that did not run: `SKIPPED: <test>: <why>`.
const SKIPPED: &str = "SKIPPED: ";
/// What begins the line of a real run of Firecracker: `FIRECRACKER RUN: <what>: <figures>`.
const FIRECRACKER_RUN: &str = "FIRECRACKER RUN: ";

/// The count over all test programs.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    passed: usize,
    failed: BTreeSet<String>,
    failed_count: usize,
    skipped: BTreeSet<String>,
    firecracker_runs: Vec<String>,
    /// Whether the test program whose output is being read holds system tests or the test host's, which are ignored
    /// at first and run by themselves later.
    in_system_tests: bool,
}

impl Tally {
    /// Takes in one line of the merged output of cargo and the test programs.
    pub(crate) fn read(&mut self, line: &str) {
        let line = line.trim();
        if let Some(program) = line.strip_prefix("Running ") {
            self.in_system_tests = ["tests/system_", "tests/suite.rs", "tests/systemd.rs"]
                .iter()
                .any(|tests| program.contains(tests));
        }
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

    /// All skips and failures, and as the last line the counts.
    pub(crate) fn summary(&self) -> String {
        let mut text = String::new();
        for skipped in &self.skipped {
            text.push_str(&format!("{SKIPPED}{skipped}\n"));
        }
        for failed in &self.failed {
            text.push_str(&format!("FAILED: {failed}\n"));
        }
        for run in &self.firecracker_runs {
            text.push_str(&format!("{FIRECRACKER_RUN}{run}\n"));
        }
        text.push_str(&format!(
            "{} real runs of Firecracker\n",
            self.firecracker_runs.len()
        ));
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
    fn a_failure_outside_of_the_tests_counts() {
        let mut tally = Tally::default();
        tally.fail("cargo test");
        assert!(!tally.succeeded());
        assert!(tally.summary().ends_with("0 passed, 1 failed, 0 skipped"));
    }
}
