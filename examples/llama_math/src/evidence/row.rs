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
    /// Every parameter.
    Full,
}

impl Row {
    /// All of them, in the order of tables.
    pub const ALL: [Self; 10] = [
        Self::Lora,
        Self::Pissa,
        Self::Published,
        Self::SharedLeading,
        Self::SharedSpread,
        Self::SharedRandom,
        Self::SharedTrailing,
        Self::LoraWide,
        Self::PissaWide,
        Self::Full,
    ];

    /// The adaptation, with shards of this rank and random directions of this seed.
    pub fn adaptation(self, rank: usize, shards: usize, seed: u64) -> Adaptation {
        let (leading, spread) = (Windows::Leading, Windows::Spread);
        let (random, trailing) = (Windows::Random { seed }, Windows::Trailing);
        let (balanced, unit) = (FrameScale::Balanced, FrameScale::Unit);
        let (per_shard, shared) = (GradientMode::PerShard, GradientMode::Shared);
        let narrow = |method| (method, rank, leading, balanced, per_shard);
        let wide = |method| (method, rank * shards, leading, balanced, per_shard);
        let sharing = |windows, scale| (Method::HdPissa, rank, windows, scale, shared);
        let (method, rank, windows, frame_scale, gradients) = match self {
            Self::Lora => narrow(Method::Lora),
            Self::Pissa => narrow(Method::Pissa),
            Self::Published => narrow(Method::HdPissa),
            Self::SharedLeading => sharing(leading, balanced),
            Self::SharedSpread => sharing(spread, unit),
            Self::SharedRandom => sharing(random, unit),
            Self::SharedTrailing => sharing(trailing, unit),
            Self::LoraWide => wide(Method::Lora),
            Self::PissaWide => wide(Method::Pissa),
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
            Self::SharedLeading => "HD-PiSSA, shared".into(),
            Self::SharedSpread => "HD-PiSSA, shared, spread".into(),
            Self::SharedRandom => "HD-PiSSA, shared, random".into(),
            Self::SharedTrailing => "HD-PiSSA, shared, trailing".into(),
            Self::LoraWide => format!("LoRA r {wide}"),
            Self::PissaWide => format!("PiSSA r {wide}"),
            Self::Full => "full".into(),
        }
    }
}

impl Row {
    /// A short name for pictures.
    pub fn short(self, rank: usize, shards: usize) -> String {
        let name = match self {
            Self::Published => "HD published",
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
            Self::Lora | Self::LoraWide => 0,
            Self::Pissa | Self::PissaWide => 2,
            Self::Published => 4,
            Self::SharedLeading | Self::SharedRandom => 1,
            Self::SharedSpread => 3,
            Self::SharedTrailing => 6,
            Self::Full => 5,
        }
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
    fn wide_rows_have_the_rank_of_all_shards_and_one_row_alone_splits_the_data() {
        for row in Row::ALL {
            let adaptation = row.adaptation(3, 5, 1);
            let is_wide = [Row::LoraWide, Row::PissaWide].contains(&row);
            assert_eq!(adaptation.rank, if is_wide { 15 } else { 3 }, "{row}");
            let splits = adaptation.method == Method::HdPissa && !adaptation.shares_gradients();
            assert_eq!(splits, row == Row::Published, "{row}");
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
