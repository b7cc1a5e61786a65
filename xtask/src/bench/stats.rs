//! What a series of pairs says. Both sides of a pair ran one right after the other, so what else the machine was
//! doing hits both alike; the ratio of each pair is what is looked at, never a ratio of two medians.

/// What a bench is to show.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Target {
    /// The largest ratio that is good enough.
    pub(crate) at_most: f64,
    /// The spread, as a share of the median ratio, above which nothing is decided.
    pub(crate) margin: f64,
    /// How much more ours may take, in the unit of the measurements; also the spread of the differences above which
    /// nothing is decided.
    pub(crate) at_most_more: Option<f64>,
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

/// A median with its quartiles.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Spread {
    /// The first quartile.
    pub(crate) low: f64,
    pub(crate) median: f64,
    /// The third quartile.
    pub(crate) high: f64,
}

impl Spread {
    /// Of `values`, of which there is at least one.
    fn of(values: impl Iterator<Item = f64>) -> Self {
        let mut sorted: Vec<f64> = values.collect();
        sorted.sort_by(f64::total_cmp);
        Self {
            low: quantile(&sorted, 0.25),
            median: quantile(&sorted, 0.5),
            high: quantile(&sorted, 0.75),
        }
    }

    fn verdict(self, at_most: f64, widest: f64) -> Verdict {
        let wide = self.high - self.low > widest;
        let straddles = self.low <= at_most && at_most < self.high;
        if wide && straddles {
            Verdict::Undecided
        } else if self.median <= at_most {
            Verdict::Met
        } else {
            Verdict::Missed
        }
    }
}

/// The pairs, summed up, in the unit of the measurements.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Summary {
    pub(crate) pairs: usize,
    pub(crate) ours: Spread,
    pub(crate) theirs: Spread,
    /// Of the ratios within each pair.
    pub(crate) ratio: Spread,
    /// Of the differences within each pair.
    pub(crate) difference: Spread,
}

/// Sums up pairs of ours and theirs. `None` without pairs, or where theirs took no time at all.
pub(crate) fn summarise(pairs: &[(f64, f64)]) -> Option<Summary> {
    if pairs.is_empty() || pairs.iter().any(|(_, theirs)| *theirs <= 0.0) {
        return None;
    }
    Some(Summary {
        pairs: pairs.len(),
        ours: Spread::of(pairs.iter().map(|(ours, _)| *ours)),
        theirs: Spread::of(pairs.iter().map(|(_, theirs)| *theirs)),
        ratio: Spread::of(pairs.iter().map(|(ours, theirs)| ours / theirs)),
        difference: Spread::of(pairs.iter().map(|(ours, theirs)| ours - theirs)),
    })
}

impl Summary {
    /// Whether the target is met. Pairs that spread wider than the margin decide nothing, unless the whole spread
    /// is on one side of the target.
    pub(crate) fn verdict(&self, target: Target, least_pairs: usize) -> Verdict {
        if self.pairs < least_pairs {
            return Verdict::Undecided;
        }
        let ratio = self
            .ratio
            .verdict(target.at_most, target.margin * self.ratio.median);
        let difference = target
            .at_most_more
            .map_or(Verdict::Met, |more| self.difference.verdict(more, more));
        match (ratio, difference) {
            (Verdict::Missed, _) | (_, Verdict::Missed) => Verdict::Missed,
            (Verdict::Met, Verdict::Met) => Verdict::Met,
            _ => Verdict::Undecided,
        }
    }
}

/// The median. `None` of nothing.
pub(crate) fn median(values: &[f64]) -> Option<f64> {
    (!values.is_empty()).then(|| Spread::of(values.iter().copied()).median)
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
        at_most_more: None,
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
        assert_eq!(summary.ratio.median, 2.0);
        assert_eq!((summary.ratio.low, summary.ratio.high), (2.0, 2.0));
        assert_eq!(summary.difference.median, 1.0);
        assert_eq!((summary.ours.median, summary.theirs.median), (2.0, 1.0));
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
    fn a_good_ratio_is_not_enough_where_the_difference_counts_too() {
        let with = |at_most_more| {
            let target = Target {
                at_most_more: Some(at_most_more),
                ..TARGET
            };
            summarise(&pairs(&[1.04, 1.05, 1.06]))
                .unwrap()
                .verdict(target, 3)
        };
        assert_eq!(with(0.2), Verdict::Met);
        assert_eq!(with(0.05), Verdict::Missed);
    }

    #[test]
    fn too_few_pairs_decide_nothing() {
        assert_eq!(verdict(&[1.0, 1.0]), Verdict::Undecided);
        assert_eq!(summarise(&[]), None);
        assert_eq!(summarise(&[(1.0, 0.0)]), None);
    }
}
