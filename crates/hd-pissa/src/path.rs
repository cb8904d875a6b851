//! The position of a traversal in a model: names and ids of the parts of adapters.

use std::fmt::{self, Display, Formatter};

use burn::module::ParamId;

use crate::GradientMode;
use crate::windows::FrameChoice;

/// Container type that Burn announces when a traversal enters an attached reparameterization.
pub(crate) const REPARAMETERIZATION: &str = "Reparameterization";

/// Name of the adapters in parameter paths.
pub(crate) const ADAPTER: &str = "hd_pissa";

/// The two factors of a shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Side {
    A,
    B,
}

impl Side {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Side::A => "a",
            Side::B => "b",
        }
    }
}

/// A shard's name in parameter paths: `shard_3_of_8`, or for example
/// `shard_3_of_8_spread_unit_shared` if frames and gradients are not those of the published method.
///
/// Traversals see names, ids and tensors, but no plain field of an adapter. The name therefore
/// holds everything that the optimizer, records and other workers must know of a factor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ShardName {
    pub(crate) index: usize,
    /// Number of shards.
    pub(crate) shards: usize,
    pub(crate) frames: FrameChoice,
    pub(crate) gradients: GradientMode,
}

/// Ending of the names of shards that share gradients.
const SHARED: &str = "_shared";

impl ShardName {
    fn parse(name: &str) -> Option<Self> {
        let name = name.strip_prefix("shard_")?;
        let (name, gradients) = match name.strip_suffix(SHARED) {
            Some(name) => (name, GradientMode::Shared),
            None => (name, GradientMode::PerShard),
        };
        let (index, rest) = name.split_once("_of_")?;
        let (shards, frames) = rest.split_at(rest.find('_').unwrap_or(rest.len()));
        Some(Self {
            index: index.parse().ok()?,
            shards: shards.parse().ok()?,
            frames: FrameChoice::parse(frames)?,
            gradients,
        })
    }

    /// Path of the shard, in the adapter of a weight.
    pub(crate) fn path(&self, weight: &str) -> String {
        format!("{weight}.{}.{self}", ADAPTER)
    }
}

impl Display for ShardName {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let ending = match self.gradients {
            GradientMode::PerShard => "",
            GradientMode::Shared => SHARED,
        };
        let Self {
            index,
            shards,
            frames,
            ..
        } = self;
        write!(f, "shard_{index}_of_{shards}{frames}{ending}")
    }
}

/// Name of a half-precision weight's residual bits in parameter paths.
pub(crate) const RESIDUAL: &str = "companion";

/// Name under which an adapter announces stochastic rounding to traversals: `stochastic_42`.
pub(crate) fn stochastic_name(seed: u64) -> String {
    format!("{STOCHASTIC}{seed}")
}

const STOCHASTIC: &str = "stochastic_";

/// Id of a factor: the same in every process that gives the model the same paths.
pub(crate) fn factor_id(weight_path: &str, shard: usize, side: Side) -> ParamId {
    ParamId::from(hash(&format!(
        "hd_pissa/{weight_path}/{shard}/{}",
        side.name()
    )))
}

/// Id of residual bits: the same in every process, as a factor's.
pub(crate) fn residual_id(weight_path: &str) -> ParamId {
    ParamId::from(hash(&format!("hd_pissa/{weight_path}/{RESIDUAL}")))
}

/// FNV-1a, 64 bits.
pub(crate) fn hash(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// The position of a traversal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// In a shard of the HD-PiSSA adapter of a weight.
    Shard {
        weight: String,
        name: ShardName,
        /// `None` at the shard's flag.
        side: Option<Side>,
    },
    /// At the residual bits of a half-precision weight.
    Residual { weight: String },
    /// Anywhere else.
    Other(String),
}

/// Follows the `enter_module` and `exit_module` calls of a visitor or mapper.
#[derive(Debug, Default)]
pub(crate) struct PathTracker {
    stack: Vec<String>,
    /// Depth of the name of the HD-PiSSA adapter that the traversal is in.
    adapter: Option<usize>,
}

impl PathTracker {
    pub(crate) fn enter(&mut self, name: &str, container: &str) {
        if container == REPARAMETERIZATION && name == ADAPTER {
            self.adapter = Some(self.stack.len());
        }
        self.stack.push(name.to_string());
    }

    pub(crate) fn exit(&mut self) {
        self.stack.pop();
        if self.adapter == Some(self.stack.len()) {
            self.adapter = None;
        }
    }

    pub(crate) fn path(&self) -> String {
        self.stack.join(".")
    }

    pub(crate) fn place(&self) -> Place {
        let Some(depth) = self.adapter else {
            return Place::Other(self.path());
        };
        let weight = self.stack[..depth].join(".");
        let part = self.stack.get(depth + 1).map(String::as_str);
        if part == Some(RESIDUAL) {
            return Place::Residual { weight };
        }
        match part.and_then(ShardName::parse) {
            Some(name) => Place::Shard {
                weight,
                name,
                side: match self.stack.get(depth + 2).map(String::as_str) {
                    Some("a") => Some(Side::A),
                    Some("b") => Some(Side::B),
                    _ => None,
                },
            },
            None => Place::Other(self.path()),
        }
    }

    /// The weight and the seed, if the adapter announces stochastic rounding.
    pub(crate) fn stochastic(&self) -> Option<(String, u64)> {
        let depth = self.adapter?;
        let seed = self.stack.get(depth + 1)?.strip_prefix(STOCHASTIC)?;
        Some((self.stack[..depth].join("."), seed.parse().ok()?))
    }
}

/// The two traversal callbacks that every visitor and mapper here forwards to its tracker.
macro_rules! track_path {
    ($field:ident) => {
        fn enter_module(&mut self, name: &str, container_type: &str) {
            self.$field.enter(name, container_type);
        }

        fn exit_module(&mut self, _name: &str, _container_type: &str) {
            self.$field.exit();
        }
    };
}
pub(crate) use track_path;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{FrameScale, Windows};

    #[test]
    fn factors_are_told_from_lookalikes() {
        let mut tracker = PathTracker::default();
        for (name, container) in [
            ("hd_pissa", "Struct:Model"),
            ("shard_0_of_2", "Struct:Model"),
            ("weight", "Struct:Linear"),
        ] {
            tracker.enter(name, container);
        }
        assert_eq!(
            tracker.place(),
            Place::Other("hd_pissa.shard_0_of_2.weight".into())
        );
        for (name, container) in [
            ("hd_pissa", REPARAMETERIZATION),
            ("shard_11_of_16_trailing_unit", "Struct:HdPissaAdapter"),
            ("b", "Struct:HdPissaShard"),
        ] {
            tracker.enter(name, container);
        }
        assert_eq!(
            tracker.place(),
            Place::Shard {
                weight: "hd_pissa.shard_0_of_2.weight".into(),
                name: ShardName {
                    index: 11,
                    shards: 16,
                    gradients: GradientMode::PerShard,
                    frames: FrameChoice {
                        windows: Windows::Trailing,
                        scale: FrameScale::Unit,
                    },
                },
                side: Some(Side::B)
            }
        );
        for _ in 0..3 {
            tracker.exit();
        }
        assert!(matches!(tracker.place(), Place::Other(_)));
    }

    #[test]
    fn names_of_shards_are_read_back() {
        let all = [
            Windows::Leading,
            Windows::Spread,
            Windows::Trailing,
            Windows::Random { seed: 7 },
        ];
        for (gradients, windows) in [GradientMode::PerShard, GradientMode::Shared]
            .into_iter()
            .flat_map(|gradients| all.map(|windows| (gradients, windows)))
        {
            for scale in [FrameScale::Balanced, FrameScale::Unit] {
                let name = ShardName {
                    index: 3,
                    shards: 8,
                    frames: FrameChoice { windows, scale },
                    gradients,
                };
                assert_eq!(ShardName::parse(&name.to_string()), Some(name));
            }
        }
        for name in [
            "shard_3",
            "shard_x_of_8",
            "shard_3_of_8_",
            "shared",
            "shard_3_of_8_share",
        ] {
            assert_eq!(ShardName::parse(name), None, "{name}");
        }
    }

    #[test]
    fn ids_depend_on_every_part() {
        let ids = [
            factor_id("fc.weight", 0, Side::A),
            factor_id("fc.weight", 0, Side::B),
            factor_id("fc.weight", 1, Side::A),
            factor_id("fc2.weight", 0, Side::A),
        ];
        for (i, id) in ids.iter().enumerate() {
            assert_eq!(ids.iter().position(|other| other == id), Some(i));
        }
    }
}
