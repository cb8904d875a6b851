use burn::module::{ParamId, Reparameterization};

use super::HdPissaAdapter;
use crate::windows::FrameChoice;

/// Container type that Burn announces when a traversal enters an attached reparameterization.
pub(crate) const REPARAMETERIZATION: &str = "Reparameterization";

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

/// Name of a shard in parameter paths: `shard_3_of_8`, or `shard_3_of_8_spread_unit` where the frames
/// are not those of the published method.
///
/// Traversals see names, ids and tensors, but no plain field of an adapter. The index, the number of
/// shards and the choice of frames are part of the name so that the optimizer, records and other
/// workers know which directions of the weight a factor holds.
pub(crate) fn shard_name(index: usize, shards: usize, frames: FrameChoice) -> String {
    format!("shard_{index}_of_{shards}{frames}")
}

/// Path of a shard of the adapter of a weight.
pub(crate) fn shard_path(weight: &str, index: usize, shards: usize, frames: FrameChoice) -> String {
    let (adapter, shard) = (HdPissaAdapter::NAME, shard_name(index, shards, frames));
    format!("{weight}.{adapter}.{shard}")
}

/// Name of a half-precision weight's companion in parameter paths.
pub(crate) const COMPANION: &str = "companion";

/// Name under which an adapter announces stochastic rounding to traversals: `stochastic_42`.
pub(crate) fn stochastic_name(seed: u64) -> String {
    format!("{STOCHASTIC}{seed}")
}

const STOCHASTIC: &str = "stochastic_";

fn parse_shard_name(name: &str) -> Option<(usize, usize, FrameChoice)> {
    let (index, rest) = name.strip_prefix("shard_")?.split_once("_of_")?;
    let (shards, frames) = rest.split_at(rest.find('_').unwrap_or(rest.len()));
    let frames = FrameChoice::parse(frames)?;
    Some((index.parse().ok()?, shards.parse().ok()?, frames))
}

/// Id of a factor: the same in every process that gives the model the same paths.
pub(crate) fn factor_id(weight_path: &str, shard: usize, side: Side) -> ParamId {
    ParamId::from(hash(&format!(
        "hd_pissa/{weight_path}/{shard}/{}",
        side.name()
    )))
}

/// Id of a companion: the same in every process, as a factor's.
pub(crate) fn companion_id(weight_path: &str) -> ParamId {
    ParamId::from(hash(&format!("hd_pissa/{weight_path}/{COMPANION}")))
}

/// FNV-1a, 64 bits.
pub(crate) fn hash(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// Where a traversal stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// In a shard of the HD-PiSSA adapter of a weight.
    Shard {
        weight: String,
        index: usize,
        shards: usize,
        frames: FrameChoice,
        /// `None` at the shard's flag.
        side: Option<Side>,
    },
    /// At the companion of a half-precision weight.
    Companion { weight: String },
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
        if container == REPARAMETERIZATION && name == HdPissaAdapter::NAME {
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
        if part == Some(COMPANION) {
            return Place::Companion { weight };
        }
        match part.and_then(parse_shard_name) {
            Some((index, shards, frames)) => Place::Shard {
                weight,
                index,
                shards,
                frames,
                side: match self.stack.get(depth + 2).map(String::as_str) {
                    Some("a") => Some(Side::A),
                    Some("b") => Some(Side::B),
                    _ => None,
                },
            },
            None => Place::Other(self.path()),
        }
    }

    /// The weight and the seed, where the adapter announces stochastic rounding.
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
                index: 11,
                shards: 16,
                frames: FrameChoice {
                    windows: Windows::Trailing,
                    scale: FrameScale::Unit,
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
