//! The rows of a comparison: methods with everything but the learning rate.

use std::fmt::{self, Display, Formatter};

use clap::ValueEnum;
use hd_pissa::{FrameScale, GradientMode, Windows};
use serde::{Deserialize, Serialize};

use crate::method::{Adaptation, Method, SvdOption};

/// A method with its settings.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, ValueEnum, Serialize, Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub enum Row {
    /// LoRA of the rank of one shard.
    Lora,
    /// PiSSA of the rank of one shard.
    Pissa,
    /// HD-PiSSA as published: every shard learns from its own micro-batches, and holds leading
    /// components with the roots of their singular values.
    Published,
    /// The same frames; every shard learns from all micro-batches.
    SharedLeading,
    /// Every shard learns from its own micro-batches; random directions, frames of unit scale.
    PerShardRandom,
    /// Shared gradients, components spread over the whole spectrum, frames of unit scale.
    SharedSpread,
    /// Shared gradients, random directions, frames of unit scale.
    SharedRandom,
    /// Shared gradients, trailing components, frames of unit scale.
    SharedTrailing,
    /// LoRA with as many trainable parameters as HD-PiSSA.
    LoraWide,
    /// PiSSA with as many trainable parameters as HD-PiSSA.
    PissaWide,
    /// LoRA whose rank is the largest that an update of HD-PiSSA has, twice that of `LoraWide`.
    LoraDouble,
    /// Every parameter.
    Full,
}

impl Row {
    /// All of them, in the order of tables.
    pub const ALL: [Self; 12] = [
        Self::Lora,
        Self::Pissa,
        Self::Published,
        Self::PerShardRandom,
        Self::SharedLeading,
        Self::SharedSpread,
        Self::SharedRandom,
        Self::SharedTrailing,
        Self::LoraWide,
        Self::PissaWide,
        Self::LoraDouble,
        Self::Full,
    ];

    /// Those of a sweep: all but the two that only controls need.
    pub fn swept() -> impl Iterator<Item = Self> {
        let is_swept = |row: &Self| !matches!(row, Self::PerShardRandom | Self::LoraDouble);
        Self::ALL.into_iter().filter(is_swept)
    }

    /// The adaptation, with shards of this rank and random directions of this seed.
    pub fn adaptation(self, rank: usize, shards: usize, seed: u64) -> Adaptation {
        let (leading, spread) = (Windows::Leading, Windows::Spread);
        let (random, trailing) = (Windows::Random { seed }, Windows::Trailing);
        let (balanced, unit) = (FrameScale::Balanced, FrameScale::Unit);
        let (per_shard, shared) = (GradientMode::PerShard, GradientMode::Shared);
        let narrow = |method| (method, rank, leading, balanced, per_shard);
        let wide = |method| (method, rank * shards, leading, balanced, per_shard);
        let double = (
            Method::Lora,
            2 * rank * shards,
            leading,
            balanced,
            per_shard,
        );
        let sharing = |windows, scale| (Method::HdPissa, rank, windows, scale, shared);
        let (method, rank, windows, frame_scale, gradients) = match self {
            Self::Lora => narrow(Method::Lora),
            Self::Pissa => narrow(Method::Pissa),
            Self::Published => narrow(Method::HdPissa),
            Self::PerShardRandom => (Method::HdPissa, rank, random, unit, per_shard),
            Self::SharedLeading => sharing(leading, balanced),
            Self::SharedSpread => sharing(spread, unit),
            Self::SharedRandom => sharing(random, unit),
            Self::SharedTrailing => sharing(trailing, unit),
            Self::LoraWide => wide(Method::Lora),
            Self::PissaWide => wide(Method::Pissa),
            Self::LoraDouble => double,
            Self::Full => narrow(Method::Full),
        };
        Adaptation {
            method,
            rank,
            shards,
            windows,
            frame_scale,
            alpha: None,
            targets: None,
            gradients,
            svd: SvdOption::Exact,
            svd_cache: None,
        }
    }

    /// The name in tables, with shards of this rank.
    pub fn title(self, rank: usize, shards: usize) -> String {
        let wide = rank * shards;
        match self {
            Self::Lora => format!("LoRA r {rank}"),
            Self::Pissa => format!("PiSSA r {rank}"),
            Self::Published => "HD-PiSSA, published".into(),
            Self::PerShardRandom => "HD-PiSSA, per shard, random".into(),
            Self::SharedLeading => "HD-PiSSA, shared".into(),
            Self::SharedSpread => "HD-PiSSA, shared, spread".into(),
            Self::SharedRandom => "HD-PiSSA, shared, random".into(),
            Self::SharedTrailing => "HD-PiSSA, shared, trailing".into(),
            Self::LoraWide => format!("LoRA r {wide}"),
            Self::PissaWide => format!("PiSSA r {wide}"),
            Self::LoraDouble => format!("LoRA r {}", 2 * wide),
            Self::Full => "full".into(),
        }
    }
}

impl Row {
    /// A short name for pictures.
    pub fn short(self, rank: usize, shards: usize) -> String {
        let name = match self {
            Self::Published => "HD published",
            Self::PerShardRandom => "HD per shard",
            Self::SharedLeading => "HD shared",
            Self::SharedSpread => "HD spread",
            Self::SharedRandom => "HD random",
            Self::SharedTrailing => "HD trailing",
            _ => return self.title(rank, shards).replace(" r ", " "),
        };
        name.into()
    }

    /// The number of the colour of its curves.
    pub fn color(self) -> usize {
        match self {
            Self::Lora | Self::LoraWide | Self::LoraDouble => 0,
            Self::Pissa | Self::PissaWide => 2,
            Self::Published => 4,
            Self::SharedLeading | Self::SharedRandom => 1,
            Self::SharedSpread | Self::PerShardRandom => 3,
            Self::SharedTrailing => 6,
            Self::Full => 5,
        }
    }

    /// Whether each shard learns from micro-batches of its own.
    pub fn splits_data(self) -> bool {
        let adaptation = self.adaptation(1, 1, 0);
        adaptation.method == Method::HdPissa && !adaptation.shares_gradients()
    }

    /// Whether this is HD-PiSSA in one of its forms.
    pub fn is_hd_pissa(self) -> bool {
        self.adaptation(1, 1, 0).method == Method::HdPissa
    }
}

/// As on the command line and in names of files.
impl Display for Row {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let name = self.to_possible_value().expect("no row is hidden");
        f.write_str(name.get_name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wide_rows_have_the_rank_of_all_shards_and_two_rows_split_the_data() {
        for row in Row::ALL {
            let adaptation = row.adaptation(3, 5, 1);
            let rank = match row {
                Row::LoraWide | Row::PissaWide => 15,
                Row::LoraDouble => 30,
                _ => 3,
            };
            assert_eq!(adaptation.rank, rank, "{row}");
            assert_eq!(
                row.splits_data(),
                [Row::Published, Row::PerShardRandom].contains(&row)
            );
        }
    }

    #[test]
    fn names_on_the_command_line_are_those_in_files() {
        for row in Row::ALL {
            let json = serde_json::to_string(&row).unwrap();
            assert_eq!(json, format!("\"{row}\""));
        }
    }
}
