//! The table that all benches fill.

use super::stats::{Spread, Summary, Target, Verdict};

/// One line of it.
#[derive(Debug)]
pub(super) struct Row {
    pub(super) name: String,
    ours: String,
    theirs: String,
    ratio: String,
    more: String,
    target: String,
    verdict: &'static str,
}

/// What a bench counts in.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Unit {
    Mebibytes,
    /// Of several requests; the figure is their median.
    Calls {
        most: f64,
    },
}

impl Row {
    /// Of pairs that were measured in seconds.
    pub(super) fn pairs(name: &str, summary: &Summary, target: Target, least_pairs: usize) -> Self {
        let more = target
            .at_most_more
            .map(|more| format!(", ≤ +{:.0} ms", more * 1000.0))
            .unwrap_or_default();
        let (scale, unit) = scale(summary.ours.median);
        Self {
            name: name.to_owned(),
            ours: time(summary.ours.median),
            theirs: time(summary.theirs.median),
            ratio: spread(summary.ratio, 1.0, 2),
            more: format!("{} {unit}", spread(summary.difference, scale, 1)),
            target: format!("≤ {:.2}{more}", target.at_most),
            verdict: summary.verdict(target, least_pairs).word(),
        }
    }

    /// Of pairs without a target: they explain the others.
    pub(super) fn pairs_without_target(name: &str, summary: &Summary) -> Self {
        let any = Target {
            at_most: f64::INFINITY,
            margin: f64::INFINITY,
            at_most_more: None,
        };
        Self {
            target: String::new(),
            verdict: "",
            ..Self::pairs(name, summary, any, 0)
        }
    }

    /// Of a figure that is compared with nothing but its target.
    pub(super) fn figure(name: &str, ours: f64, unit: Unit, at_most: f64) -> Self {
        let (text, unit) = match unit {
            Unit::Mebibytes => (format!("{ours:.2}"), "MiB"),
            Unit::Calls { most } => (format!("{ours} (most {most})"), "calls"),
        };
        let verdict = if ours <= at_most {
            Verdict::Met
        } else {
            Verdict::Missed
        };
        Self {
            name: name.to_owned(),
            ours: format!("{text} {unit}"),
            theirs: String::new(),
            ratio: String::new(),
            more: String::new(),
            target: format!("≤ {at_most} {unit}"),
            verdict: verdict.word(),
        }
    }

    /// Of what there is nothing to compare with, and why; `ours` is in seconds.
    pub(super) fn without_other(name: &str, ours: f64, why: &str) -> Self {
        Self {
            ours: time(ours),
            theirs: why.to_owned(),
            verdict: Verdict::Undecided.word(),
            ..Self::failed(name)
        }
    }

    /// Of a bench that broke off.
    pub(super) fn failed(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            ours: String::new(),
            theirs: String::new(),
            ratio: String::new(),
            more: String::new(),
            target: String::new(),
            verdict: "failed",
        }
    }

    fn cells(&self) -> [&str; 7] {
        [
            &self.name,
            &self.ours,
            &self.theirs,
            &self.ratio,
            &self.more,
            &self.target,
            self.verdict,
        ]
    }
}

/// A time in the unit that suits it.
fn time(seconds: f64) -> String {
    let (scale, unit) = scale(seconds);
    format!("{:.1} {unit}", seconds * scale)
}

/// What seconds are multiplied with, and what they are called then.
fn scale(seconds: f64) -> (f64, &'static str) {
    if seconds.abs() < 0.001 {
        (1e6, "µs")
    } else {
        (1e3, "ms")
    }
}

fn spread(spread: Spread, scale: f64, digits: usize) -> String {
    let Spread { low, median, high } = spread;
    format!(
        "{:.digits$} [{:.digits$} to {:.digits$}]",
        median * scale,
        low * scale,
        high * scale
    )
}

/// All rows below their headings, each column as wide as it must be.
pub(super) fn table(rows: &[Row]) -> String {
    let headings = [
        "bench",
        "ours",
        "theirs",
        "ratio [quartiles]",
        "ours - theirs [quartiles]",
        "target",
        "verdict",
    ];
    let lines: Vec<[&str; 7]> = std::iter::once(headings)
        .chain(rows.iter().map(Row::cells))
        .collect();
    let widths: Vec<usize> = (0..headings.len())
        .map(|column| lines.iter().map(|line| line[column].chars().count()).max())
        .map(Option::unwrap_or_default)
        .collect();
    let mut text = String::new();
    for line in lines {
        let mut row = String::new();
        for (cell, width) in line.iter().zip(&widths) {
            row.push_str(&format!("{cell:<width$}  "));
        }
        text.push_str(row.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::stats::summarise;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let target = Target {
            at_most: 1.1,
            margin: 0.1,
            at_most_more: Some(0.005),
        };
        let summary = summarise(&[(0.102, 0.1)]).unwrap();
        let rows = [
            Row::pairs("a / b", &summary, target, 1),
            Row::figure("memory", 7.5, Unit::Mebibytes, 2.0),
        ];
        let table = table(&rows);
        let lines: Vec<&str> = table.lines().collect();
        assert_eq!(lines.len(), 3);
        assert!(lines[1].starts_with("a / b   102.0 ms  100.0 ms  1.02 [1.02 to 1.02]"));
        assert!(lines[1].ends_with("≤ 1.10, ≤ +5 ms  met"), "{table}");
        assert!(lines[2].starts_with("memory  7.50 MiB"), "{table}");
        assert!(lines[2].ends_with("missed"), "{table}");
    }
}
