//! Limits on the rank of an exported change.

use super::ExportError;

/// The number of components that an exported change keeps.
///
/// The first-order part of a change has rank `2·K·r`. If the limits allow that rank, the change keeps all of it,
/// without a decomposition. Otherwise it keeps the leading singular triples.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RankLimit {
    /// This many components, or all if there are fewer.
    pub rank: Option<usize>,
    /// The fewest components that hold this share of the squared norm of the first-order part. Above 0
    /// and at most 1.
    pub energy: Option<f64>,
    /// The largest number of components, also with `energy`. The default is 256: inference servers accept
    /// that rank.
    pub max_rank: usize,
}

impl Default for RankLimit {
    fn default() -> Self {
        Self {
            rank: None,
            energy: None,
            max_rank: 256,
        }
    }
}

impl RankLimit {
    /// Keeps all components.
    pub const NONE: Self = Self {
        rank: None,
        energy: None,
        max_rank: usize::MAX,
    };

    pub(super) fn check(&self) -> Result<(), ExportError> {
        let is_share = |energy: f64| energy > 0.0 && energy <= 1.0;
        let (setting, value, allowed) = match *self {
            Self { rank: Some(0), .. } => ("rank", "0".into(), "at least 1"),
            Self { max_rank: 0, .. } => ("max_rank", "0".into(), "at least 1"),
            Self {
                energy: Some(energy),
                ..
            } if !is_share(energy) => ("energy", energy.to_string(), "above 0 and at most 1"),
            _ => return Ok(()),
        };
        Err(ExportError::InvalidLimit {
            setting,
            value,
            allowed,
        })
    }

    /// Whether a change of rank `rank` is kept as it is.
    pub(super) fn keeps_all_of(&self, rank: usize) -> bool {
        self.energy.is_none() && rank <= self.most()
    }

    /// How many of the components with these singular values are kept, at least 1.
    pub(super) fn count(&self, values: &[f64]) -> usize {
        let square = |value: &f64| value * value;
        let total: f64 = values.iter().map(square).sum();
        let enough = match self.energy {
            None => values.len(),
            Some(energy) => {
                let mut held = 0.0;
                let short = values.iter().map(square).take_while(|square| {
                    held += square;
                    held < energy * total
                });
                1 + short.count()
            }
        };
        enough.min(self.most()).clamp(1, values.len().max(1))
    }

    fn most(&self) -> usize {
        self.rank.unwrap_or(usize::MAX).min(self.max_rank)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fewest_components_with_the_energy_are_counted() {
        let values = [4.0, 3.0, 0.0];
        let with = |rank, energy, max_rank| {
            let limit = RankLimit {
                rank,
                energy,
                max_rank,
            };
            limit.count(&values)
        };
        assert_eq!(with(None, None, 9), 3);
        assert_eq!(with(None, None, 2), 2);
        assert_eq!(with(Some(1), None, 2), 1);
        // 16 / 25 and 25 / 25.
        assert_eq!(with(None, Some(0.64), 9), 1);
        assert_eq!(with(None, Some(0.65), 9), 2);
        assert_eq!(with(None, Some(1.0), 9), 2);
        assert_eq!(with(None, Some(1.0), 1), 1);
        // A weight that has not moved.
        let all = RankLimit::NONE;
        assert_eq!(all.count(&[0.0, 0.0]), 2);
        let energy = RankLimit {
            energy: Some(0.9),
            ..all
        };
        assert_eq!(energy.count(&[0.0, 0.0]), 1);
    }

    #[test]
    fn limits_that_keep_nothing_are_refused() {
        let all = RankLimit::NONE;
        for (limit, named) in [
            (
                RankLimit {
                    rank: Some(0),
                    ..all
                },
                "rank is 0",
            ),
            (
                RankLimit { max_rank: 0, ..all },
                "max_rank is 0; it must be at least 1",
            ),
            (
                RankLimit {
                    energy: Some(0.0),
                    ..all
                },
                "energy is 0;",
            ),
            (
                RankLimit {
                    energy: Some(1.5),
                    ..all
                },
                "energy is 1.5;",
            ),
            (
                RankLimit {
                    energy: Some(f64::NAN),
                    ..all
                },
                "energy is NaN; it must be above 0 and at most 1",
            ),
        ] {
            let error = limit.check().unwrap_err().to_string();
            assert!(error.contains(named), "{error}");
        }
        assert_eq!(RankLimit::default().check(), Ok(()));
    }
}
