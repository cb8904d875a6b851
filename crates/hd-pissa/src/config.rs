//! Settings of the adapters.

use std::path::PathBuf;

use burn::config::Config;
use burn::module::ParamGroup;

use crate::{FrameScale, Windows};

/// Floating-point precision of the singular value decomposition.
#[derive(Config, Debug, Copy, PartialEq, Eq)]
pub enum SvdPrecision {
    /// Single precision: about 1.6 times as fast as double.
    F32,
    /// Double precision, rounded to `f32` factors at the end.
    F64,
}

/// How the principal components of a weight are computed.
#[derive(Config, Debug, Copy, PartialEq, Eq)]
pub enum SvdMethod {
    /// A full decomposition on the host. Exact up to rounding, for every spectrum.
    Exact(SvdPrecision),
    /// Only the leading triples, from a block Krylov space that the weight's device builds in `f32`.
    /// Faster if `K·r` is far below the smaller side of a large weight. Needs [`Windows::Leading`].
    ///
    /// The cosine of the angle between every vector and the exact one is at least 0.999: a test compares
    /// residuals with the gaps between singular values. A weight that fails the test is decomposed as with
    /// `Exact(F32)`, and so is one with `K·r` above `min(d_input, d_output) / 16 + 16`.
    /// [`Decomposition`](crate::Decomposition) says which. The book's chapter on the decomposition
    /// explains the method and its cost.
    Krylov,
}

/// Where decompositions are kept for later runs: one file for each weight, method and choice of
/// components. Its name is a hash of these and of the weight's values. Runs with the same `K·r`, with
/// PiSSA or HD-PiSSA, share files. Several runs can use the folder at the same time.
///
/// A file is compared with its digest before it is used. A damaged file is computed again and replaced. If
/// a file cannot be written, the run goes on. [`CacheUse`](crate::CacheUse) and the log report both. A file
/// takes `4·K·r·(d_input + d_output)` bytes, and 8 for each singular value; vectors of
/// [`SvdPrecision::F64`] take twice as much. You can delete files or the folder at any time.
#[derive(Config, Debug, PartialEq, Eq)]
pub struct SvdCache {
    /// The folder, which is made when it is first written to.
    pub folder: PathBuf,
    /// How much all files may take together, in bytes. The files that have not been used for longest
    /// are deleted first.
    #[config(default = "4_294_967_296")]
    pub max_bytes: u64,
}

/// What a half-precision weight (`f16`, `bf16`) keeps of a step's update, which is computed in `f32`.
/// The choice makes no difference to an `f32` weight.
#[derive(Config, Debug, Copy, PartialEq, Eq)]
pub enum MergePrecision {
    /// Everything: a parameter of residual bits holds 16 more bits of every element, so that weight
    /// and residual bits together follow the trajectory of an `f32` weight (with `f16` within its range;
    /// below `2^-16` to within `2^-39`). It takes as much memory as the weight, is part of the
    /// model's record, and goes with the adapter when the model is materialized.
    Compensated,
    /// The sum, rounded up or down at random with the sum as its mean: no memory, no bias, but noise
    /// of the size of the weight's rounding step in every step. The random bits depend only on the
    /// seed, the optimizer's step, the path of the weight and the element's place.
    Stochastic {
        /// Seed of the run.
        seed: u64,
    },
    /// The sum, rounded to the nearest value. Updates below half a rounding step are lost, which
    /// is most of them at ordinary learning rates.
    Nearest,
}

/// Which gradients a shard learns from.
#[derive(Config, Debug, Copy, PartialEq, Eq)]
pub enum GradientMode {
    /// Each shard takes the gradients of its own micro-batches, as published.
    /// A forward pass serves the [selected](crate::HdPissaModule::select_shard) shard.
    PerShard,
    /// Every shard takes the mean gradient over all micro-batches of the step. A forward pass
    /// serves all shards at once.
    ///
    /// Each worker knows the frames of all shards, and hosts the optimizer state of its share of
    /// them. With an optimizer that works element by element, as Adam does, `K` shards of rank `r`
    /// train like one shard of rank `K·r`.
    Shared,
}

/// A rank for some of the targets.
#[derive(Config, Debug)]
pub struct TargetRank {
    /// The weights that take it.
    pub targets: ParamGroup,
    /// Their rank, for each shard.
    pub rank: usize,
}

/// Which weights get an HD-PiSSA adapter, and of what size.
///
/// ```
/// use burn::module::ParamGroup;
/// use hd_pissa::HdPissaConfig;
///
/// let config = HdPissaConfig::new()
///     .with_rank(16)
///     .with_shards(8)
///     .with_targets(Some(ParamGroup::from_regex(r"(q|k|v|o)_proj\.weight$").unwrap()));
/// assert_eq!(config.rank * config.shards, 128);
/// ```
#[derive(Config, Debug)]
pub struct HdPissaConfig {
    /// Rank `r` of each shard's factors.
    #[config(default = 16)]
    pub rank: usize,
    /// Number of shards `K`, over all workers.
    #[config(default = 8)]
    pub shards: usize,
    /// Numerator of the gradient scale `alpha / rank`. `None` takes each weight's own rank, for a
    /// scale of 1. Under Adam the scale matters only through epsilon.
    #[config(default = "None")]
    pub alpha: Option<f64>,
    /// The weights to adapt, by path or id; every rank-2 parameter it matches.
    ///
    /// `None` takes the `weight` of every `Linear` and [`HdPissaLinear`](crate::HdPissaLinear),
    /// except of layers called `lm_head` or `head`. [`plan`](HdPissaConfig::plan) shows what is
    /// left out, and why.
    #[config(default = "None")]
    pub targets: Option<ParamGroup>,
    /// Ranks that differ from `rank`; of several that match a weight the last one counts.
    #[config(default = "Vec::new()")]
    pub target_ranks: Vec<TargetRank>,
    /// Which directions of a weight its shards hold.
    #[config(default = "Windows::Leading")]
    pub windows: Windows,
    /// How long the vectors of the frames are. [`Windows::Random`] needs [`FrameScale::Unit`].
    #[config(default = "FrameScale::Balanced")]
    pub frame_scale: FrameScale,
    /// How principal components are computed.
    #[config(default = "SvdMethod::Exact(SvdPrecision::F32)")]
    pub svd: SvdMethod,
    /// Where decompositions are kept for later runs; `None` keeps none.
    #[config(default = "None")]
    pub svd_cache: Option<SvdCache>,
    /// What half-precision weights keep of an update.
    #[config(default = "MergePrecision::Compensated")]
    pub precision: MergePrecision,
    /// Which gradients a shard learns from.
    #[config(default = "GradientMode::PerShard")]
    pub gradients: GradientMode,
}
