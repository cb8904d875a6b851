//! The choice of frames: the directions of a weight that the shards hold, and their length.

use std::fmt::{self, Display, Formatter};

use burn::config::Config;
use serde::{Deserialize, Serialize};

/// The directions of a weight `W = U Σ Vᵀ` in the frames of its `K` shards of rank `r`.
///
/// The `n = min(d_input, d_output)` components are counted from 0 by descending singular value.
/// Shard `k` holds `r` directions, `j = 0..r`, on each side of the weight. With every choice, the
/// directions of all shards are `K·r` different columns of one orthonormal basis on each side:
/// windows of different shards are disjoint and orthogonal.
///
/// An update of the weight moves it within `Σ_k U_k X_k + Y_k V_kᵀ`, with any `X_k` and `Y_k`. The
/// choice thus determines which changes are in reach. The book's chapter on the mathematics has the
/// share of a change that is out of reach.
///
/// ```
/// use burn::nn::LinearConfig;
/// use burn::tensor::Device;
/// use hd_pissa::{FrameScale, HdPissaConfig, HdPissaModule, Windows};
///
/// # fn main() -> Result<(), hd_pissa::HdPissaError> {
/// let config = HdPissaConfig::new()
///     .with_rank(4)
///     .with_shards(2)
///     .with_windows(Windows::Random { seed: 7 }) // no singular value decomposition
///     .with_frame_scale(FrameScale::Unit);
/// let layer = LinearConfig::new(24, 16).init(&Device::flex());
/// let layer = layer.apply_hd_pissa(&config, 0..2)?;
/// # Ok(())
/// # }
/// ```
#[derive(Config, Debug, Copy, PartialEq, Eq)]
pub enum Windows {
    /// The leading components, as published (Wang et al., section 3; of one shard, PiSSA's
    /// initialization in Meng et al., section 3): shard `k` holds the components `k·r + j`.
    Leading,
    /// Components spread evenly over the whole spectrum, given to the shards in turn: shard `k`
    /// holds the components `⌊(j·K + k)·n / (K·r)⌋`.
    ///
    /// The first is component 0. Neighbours go to different shards, so each shard has large and
    /// small singular values, and all have about the same energy.
    Spread,
    /// The trailing components: shard `k` holds the components `n − K·r + k·r + j`.
    Trailing,
    /// Random directions, uniformly distributed: on each side the orthonormal factor of a Gaussian
    /// matrix. Shard `k` holds its columns `k·r + j`.
    ///
    /// Nothing is decomposed. The directions depend only on the seed and on the path and shape of
    /// the weight, not on its values, workers, threads or hosted shards. They have no singular
    /// values, so they need [`FrameScale::Unit`].
    Random {
        /// Seed of the run.
        seed: u64,
    },
}

/// The length of the vectors of the frames.
///
/// An optimizer such as Adam moves every entry of a factor by about the learning rate. The weight
/// then moves by that times the length of the *other* factor's vector. The length thus scales the
/// learning rate of each direction.
#[derive(Config, Debug, Copy, PartialEq, Eq)]
pub enum FrameScale {
    /// The root of each component's singular value, as published: `a = U_k √Σ_k`, `b = √Σ_k V_kᵀ`.
    /// Every component needs a singular value above rounding.
    Balanced,
    /// The same for all: `a = √σ̄ U_k`, `b = √σ̄ V_kᵀ` with the root-mean-square singular value
    /// `σ̄ = ‖W‖_F / √min(d_input, d_output)`.
    ///
    /// A component may have the singular value zero. Its direction would be arbitrary, so the
    /// frames take random directions among those on which the weight is zero. They depend only on
    /// the weight and its path.
    Unit,
}

impl Windows {
    /// The components that the shards hold, shard by shard, of `n` in all; `None` for random
    /// directions.
    pub(crate) fn components(self, shards: usize, rank: usize, n: usize) -> Option<Vec<usize>> {
        let count = shards * rank;
        let spread = |index: usize| (index as u128 * n as u128 / count as u128) as usize;
        match self {
            Self::Leading => Some((0..count).collect()),
            Self::Spread => {
                let of_shard = |shard| (0..rank).map(move |j| j * shards + shard);
                Some((0..shards).flat_map(of_shard).map(spread).collect())
            }
            Self::Trailing => Some((n - count..n).collect()),
            Self::Random { .. } => None,
        }
    }
}

/// Both choices. Prints as the end of a shard's name in parameter paths, such as `_random_7_unit`;
/// it is empty for the published choices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FrameChoice {
    pub(crate) windows: Windows,
    pub(crate) scale: FrameScale,
}

impl FrameChoice {
    #[cfg(any(feature = "checkpoint", test))]
    pub(crate) fn published() -> Self {
        Self {
            windows: Windows::Leading,
            scale: FrameScale::Balanced,
        }
    }

    /// Of what it prints.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let (windows, scale) = match text.strip_suffix("_unit") {
            Some(windows) => (windows, FrameScale::Unit),
            None => (text, FrameScale::Balanced),
        };
        let windows = match windows {
            "" => Windows::Leading,
            "_spread" => Windows::Spread,
            "_trailing" => Windows::Trailing,
            random => Windows::Random {
                seed: random.strip_prefix("_random_")?.parse().ok()?,
            },
        };
        Some(Self { windows, scale })
    }
}

impl Display for FrameChoice {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self.windows {
            Windows::Leading => Ok(()),
            Windows::Spread => f.write_str("_spread"),
            Windows::Trailing => f.write_str("_trailing"),
            Windows::Random { seed } => write!(f, "_random_{seed}"),
        }?;
        match self.scale {
            FrameScale::Balanced => Ok(()),
            FrameScale::Unit => f.write_str("_unit"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn components_of_each_choice() {
        // 3 shards of rank 2 and 13 components: 0, 13/6, 26/6, ... rounded down, in turn.
        let components = |windows: Windows| windows.components(3, 2, 13).unwrap();
        assert_eq!(components(Windows::Leading), [0, 1, 2, 3, 4, 5]);
        assert_eq!(components(Windows::Spread), [0, 6, 2, 8, 4, 10]);
        assert_eq!(components(Windows::Trailing), [7, 8, 9, 10, 11, 12]);
        assert_eq!(Windows::Random { seed: 1 }.components(3, 2, 13), None);
    }

    proptest! {
        /// No component twice, none that does not exist, and all of them if all are requested.
        #[test]
        fn windows_are_disjoint(shards in 1usize..9, rank in 1usize..9, more in 0usize..40) {
            let n = shards * rank + more;
            for windows in [Windows::Leading, Windows::Spread, Windows::Trailing] {
                let mut components = windows.components(shards, rank, n).unwrap();
                prop_assert_eq!(components.len(), shards * rank);
                components.sort_unstable();
                components.dedup();
                prop_assert_eq!(components.len(), shards * rank);
                prop_assert!(components.iter().all(|&component| component < n));
                // Evenly: gaps differ by 1 at most.
                if windows == Windows::Spread {
                    let gaps = components.windows(2).map(|pair| pair[1] - pair[0]);
                    let gap = n / (shards * rank);
                    prop_assert!(gaps.into_iter().all(|g| g == gap || g == gap + 1));
                }
            }
        }

        #[test]
        fn a_printed_choice_is_read_again(seed: u64) {
            let random = Windows::Random { seed };
            for windows in [Windows::Leading, Windows::Spread, Windows::Trailing, random] {
                for scale in [FrameScale::Balanced, FrameScale::Unit] {
                    let choice = FrameChoice { windows, scale };
                    prop_assert_eq!(FrameChoice::parse(&choice.to_string()), Some(choice));
                }
            }
        }
    }

    #[test]
    fn other_texts_are_no_choice() {
        for text in [
            "_",
            "_leading",
            "spread",
            "_random_",
            "_random_x",
            "_unit_unit",
            "_unitary",
        ] {
            assert_eq!(FrameChoice::parse(text), None, "{text}");
        }
    }
}
