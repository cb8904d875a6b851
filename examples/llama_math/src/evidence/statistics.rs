//! Means with their 95 % intervals.

use serde::{Deserialize, Serialize};

/// The mean of a few values, and its uncertainty.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// The mean.
    pub mean: f64,
    /// Half the width of the 95 % interval around it.
    pub half_width: f64,
}

/// 97.5 % quantiles of Student's distribution with 1, 2, ... degrees of freedom.
const STUDENT: [f64; 30] = [
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
    2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
    2.052, 2.048, 2.045, 2.042,
];
/// The same of the normal distribution.
const NORMAL: f64 = 1.960;

impl Estimate {
    /// The mean of independent values of one normal distribution, by Student's `t`. From one value
    /// the interval is unbounded.
    ///
    /// # Panics
    ///
    /// If there is no value.
    pub fn of(values: &[f64]) -> Self {
        assert!(!values.is_empty(), "no value has no mean");
        let count = values.len() as f64;
        let mean = values.iter().sum::<f64>() / count;
        if values.len() == 1 {
            let half_width = f64::INFINITY;
            return Self { mean, half_width };
        }
        let squares = values.iter().map(|value| (value - mean).powi(2));
        let variance = squares.sum::<f64>() / (count - 1.0);
        let quantile = STUDENT.get(values.len() - 2).copied().unwrap_or(NORMAL);
        Self {
            mean,
            half_width: quantile * (variance / count).sqrt(),
        }
    }

    /// The mean difference of values that belong together in pairs, such as those of one seed.
    ///
    /// # Panics
    ///
    /// If there is no value, or if the numbers of values differ.
    pub fn of_differences(values: &[f64], others: &[f64]) -> Self {
        assert_eq!(values.len(), others.len(), "values come in pairs");
        let differences: Vec<f64> = values.iter().zip(others).map(|(a, b)| a - b).collect();
        Self::of(&differences)
    }

    /// The difference of two shares, each of a number of independent answers.
    pub fn of_shares(share: f64, other: f64, answers: usize) -> Self {
        // Two answers, one of each kind, are added, so a share of 0 or 1 has a width too (Agresti
        // and Caffo 2000).
        let count = answers as f64 + 2.0;
        let variance = |share: f64| {
            let share = (share * answers as f64 + 1.0) / count;
            share * (1.0 - share) / count
        };
        Self {
            mean: share - other,
            half_width: NORMAL * (variance(share) + variance(other)).sqrt(),
        }
    }

    /// Whether the whole interval is above 0.
    pub fn is_positive(self) -> bool {
        self.mean > self.half_width
    }

    /// Whether the whole interval is below 0.
    pub fn is_negative(self) -> bool {
        self.mean < -self.half_width
    }
}

/// A share in percent, for tables.
pub fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(found: f64, expected: f64) {
        assert!((found - expected).abs() < 1e-4, "{found} for {expected}");
    }

    #[test]
    fn means_and_intervals_are_those_computed_by_hand() {
        // Deviations −2, 0, 2: variance 8/2 = 4, standard error √(4/3) = 1.154701, times 4.303.
        let three = Estimate::of(&[1.0, 3.0, 5.0]);
        close(three.mean, 3.0);
        close(three.half_width, 4.968676);
        // Deviations ±1 twice: variance 4/3, standard error √(1/3) = 0.577350, times 3.182.
        let four = Estimate::of(&[4.0, 6.0, 4.0, 6.0]);
        close(four.mean, 5.0);
        close(four.half_width, 1.837129);
        assert_eq!(Estimate::of(&[7.0]).half_width, f64::INFINITY);
        assert_eq!(Estimate::of(&[2.0, 2.0]).half_width, 0.0);
    }

    #[test]
    fn pairs_remove_what_both_have_in_common() {
        let paired = Estimate::of_differences(&[0.1, 0.5, 0.9], &[0.0, 0.4, 0.8]);
        close(paired.mean, 0.1);
        close(paired.half_width, 0.0);
        assert!(paired.is_positive() && !paired.is_negative());
    }

    #[test]
    fn shares_of_few_answers_differ_by_chance() {
        // 61/102 and 41/102: variances 0.0023568, 0.0023568; √0.0047137 = 0.068656, times 1.96.
        let difference = Estimate::of_shares(0.6, 0.4, 100);
        close(difference.mean, 0.2);
        close(difference.half_width, 0.134566);
        assert!(difference.is_positive());
        assert!(Estimate::of_shares(0.4, 0.6, 100).is_negative());
        let same = Estimate::of_shares(0.0, 0.0, 100);
        assert!(same.half_width > 0.0 && !same.is_positive() && !same.is_negative());
    }
}
