//! Values against their expectations.

use crate::measure::sample::Host;

/// The expected value of one element, and a bound on the effect of rounding.
#[derive(Clone, Copy, Debug)]
pub struct Expected {
    /// Row and column.
    pub place: [usize; 2],
    pub value: f64,
    pub bound: f64,
}

/// A result, and the expected values of some or all of its elements.
#[derive(Clone, Debug)]
pub struct Compared {
    /// Name of the result in its case.
    pub what: String,
    pub found: Host,
    pub expected: Vec<Expected>,
}

/// The element with the largest error, relative to its bound.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub struct Difference {
    pub place: [usize; 2],
    pub found: f64,
    pub expected: f64,
    /// `|found − expected|`; infinite if `found` is NaN.
    pub difference: f64,
    pub bound: f64,
    /// `difference / bound`: above 1 is wrong.
    pub share: f64,
}

impl Difference {
    pub fn is_within(&self) -> bool {
        self.share <= 1.0
    }
}

impl Compared {
    pub fn new(what: impl Into<String>, found: Host, expected: Vec<Expected>) -> Self {
        Self {
            what: what.into(),
            found,
            expected,
        }
    }

    /// # Panics
    ///
    /// If nothing is expected of the result.
    pub fn worst(&self) -> Difference {
        let each = self.expected.iter().map(|expected| {
            let [row, column] = expected.place;
            let found = self.found.at(row, column);
            let difference = match (found - expected.value).abs() {
                difference if difference.is_nan() => f64::INFINITY,
                difference => difference,
            };
            let share = match (difference, expected.bound) {
                (0.0, _) => 0.0,
                (_, 0.0) => f64::INFINITY,
                (difference, bound) => difference / bound,
            };
            Difference {
                place: expected.place,
                found,
                expected: expected.value,
                difference,
                bound: expected.bound,
                share,
            }
        });
        each.max_by(|x, y| x.share.total_cmp(&y.share))
            .expect("a case expects something")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compared(values: Vec<f32>, bound: f64) -> Difference {
        let expected = (0..2).map(|column| Expected {
            place: [0, column],
            value: 1.0,
            bound,
        });
        let found = Host { values, columns: 2 };
        Compared::new("", found, expected.collect()).worst()
    }

    #[test]
    fn the_worst_element_counts_and_nan_is_never_within() {
        assert!(compared(vec![1.0, 1.25], 0.25).is_within());
        let beyond = compared(vec![1.0, 1.5], 0.25);
        assert!(!beyond.is_within());
        assert_eq!((beyond.place, beyond.share), ([0, 1], 2.0));
        for wrong in [f32::NAN, f32::INFINITY] {
            assert!(!compared(vec![wrong, 1.0], 0.25).is_within());
            assert!(!compared(vec![1.0, wrong], 1e30).is_within());
        }
        assert!(compared(vec![1.0, 1.0], 0.0).is_within());
        assert!(!compared(vec![1.0, 1.000_001], 0.0).is_within());
    }
}
