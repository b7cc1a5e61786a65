//! What a series of pairs says. Both sides of a pair ran one right after the other, so what else the machine was
//! doing hits both alike; the ratio of each pair is what is looked at, never a ratio of two medians.

/// What a bench is to show.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Target {
    /// The largest ratio that is good enough.
    pub(crate) at_most: f64,
    /// The spread, as a share of the median ratio, above which nothing is decided.
    pub(crate) margin: f64,
}

/// What it showed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    Met,
    Missed,
    /// The pairs differ too much, or are too few, to say.
    Undecided,
}

impl Verdict {
    pub(crate) const fn word(self) -> &'static str {
        match self {
            Self::Met => "met",
            Self::Missed => "missed",
            Self::Undecided => "undecided",
        }
    }
}

/// The pairwise ratios, summed up.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Summary {
    pub(crate) pairs: usize,
    pub(crate) median: f64,
    /// The first quartile.
    pub(crate) low: f64,
    /// The third quartile.
    pub(crate) high: f64,
    /// The median of the differences within each pair, in the unit of the measurements.
    pub(crate) difference: f64,
}

/// Sums up pairs of ours and theirs. `None` without pairs, or where theirs took no time at all.
pub(crate) fn summarise(pairs: &[(f64, f64)]) -> Option<Summary> {
    if pairs.is_empty() || pairs.iter().any(|(_, theirs)| *theirs <= 0.0) {
        return None;
    }
    let ratios = sorted(pairs.iter().map(|(ours, theirs)| ours / theirs));
    let differences = sorted(pairs.iter().map(|(ours, theirs)| ours - theirs));
    Some(Summary {
        pairs: pairs.len(),
        median: quantile(&ratios, 0.5),
        low: quantile(&ratios, 0.25),
        high: quantile(&ratios, 0.75),
        difference: quantile(&differences, 0.5),
    })
}

impl Summary {
    /// Whether the target is met. Pairs that spread wider than the margin decide nothing, unless the whole spread
    /// is on one side of the target.
    pub(crate) fn verdict(&self, target: Target, least_pairs: usize) -> Verdict {
        if self.pairs < least_pairs {
            return Verdict::Undecided;
        }
        let wide = self.high - self.low > target.margin * self.median;
        let straddles = self.low <= target.at_most && target.at_most < self.high;
        if wide && straddles {
            Verdict::Undecided
        } else if self.median <= target.at_most {
            Verdict::Met
        } else {
            Verdict::Missed
        }
    }
}

fn sorted(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values
}

/// The value below which the share `q` of `sorted` lies, between neighbours in proportion. `sorted` is not empty.
fn quantile(sorted: &[f64], q: f64) -> f64 {
    #[expect(
        clippy::cast_precision_loss,
        reason = "a bench has a few dozen pairs, not 2^52"
    )]
    let position = q * (sorted.len() - 1) as f64;
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "the position is within the slice"
    )]
    let below = position.floor() as usize;
    let above = (below + 1).min(sorted.len() - 1);
    let share = position - position.floor();
    sorted[below] * (1.0 - share) + sorted[above] * share
}

#[cfg(test)]
mod tests {
    use super::*;

    const TARGET: Target = Target {
        at_most: 1.1,
        margin: 0.1,
    };

    fn pairs(ratios: &[f64]) -> Vec<(f64, f64)> {
        ratios.iter().map(|ratio| (ratio * 2.0, 2.0)).collect()
    }

    fn verdict(ratios: &[f64]) -> Verdict {
        summarise(&pairs(ratios)).unwrap().verdict(TARGET, 3)
    }

    #[test]
    fn the_median_of_the_ratios_is_not_the_ratio_of_the_medians() {
        // The machine slowed down threefold for the last pair; each pair still says the same.
        let slowed = [(2.0, 1.0), (2.0, 1.0), (6.0, 3.0)];
        let summary = summarise(&slowed).unwrap();
        assert_eq!(summary.median, 2.0);
        assert_eq!((summary.low, summary.high), (2.0, 2.0));
        assert_eq!(summary.difference, 1.0);
    }

    #[test]
    fn quantiles_lie_between_neighbours() {
        assert_eq!(quantile(&[1.0, 2.0], 0.5), 1.5);
        assert_eq!(quantile(&[1.0, 2.0, 3.0, 4.0, 5.0], 0.25), 2.0);
        assert_eq!(quantile(&[7.0], 0.75), 7.0);
    }

    #[test]
    fn a_narrow_spread_decides() {
        assert_eq!(verdict(&[1.0, 1.01, 1.02]), Verdict::Met);
        assert_eq!(verdict(&[1.2, 1.21, 1.22]), Verdict::Missed);
    }

    #[test]
    fn a_spread_wider_than_the_margin_around_the_target_does_not() {
        assert_eq!(verdict(&[0.7, 1.0, 1.5]), Verdict::Undecided);
        assert_eq!(verdict(&[0.7, 1.2, 1.5]), Verdict::Undecided);
    }

    #[test]
    fn a_wide_spread_on_one_side_of_the_target_decides() {
        assert_eq!(verdict(&[0.3, 0.5, 0.8]), Verdict::Met);
        assert_eq!(verdict(&[1.5, 2.0, 3.0]), Verdict::Missed);
    }

    #[test]
    fn too_few_pairs_decide_nothing() {
        assert_eq!(verdict(&[1.0, 1.0]), Verdict::Undecided);
        assert_eq!(summarise(&[]), None);
        assert_eq!(summarise(&[(1.0, 0.0)]), None);
    }
}
