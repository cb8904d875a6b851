//! Errors of attaching adapters.

use burn::tensor::DType;
use hd_pissa_comm::CommError;

use crate::Windows;

/// Why a model could not be prepared for HD-PiSSA or PiSSA.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum HdPissaError {
    /// The target group selects no weight.
    #[error(
        "no target matched: of the model's {} candidate weights none is selected by the targets; \
         candidates: {}",
        candidates.len(), list(candidates)
    )]
    NoTarget {
        /// Paths of the rank-2 `weight` parameters that could have been chosen.
        candidates: Vec<String>,
    },
    /// The rank is zero.
    #[error("the rank of `{path}` is 0; it must be at least 1")]
    ZeroRank {
        /// Path of the weight.
        path: String,
    },
    /// The number of shards is zero.
    #[error("the number of shards is 0; it must be at least 1")]
    ZeroShards,
    /// The windows of all shards need more principal components than the weight has.
    #[error(
        "`{path}` of shape [{d_input}, {d_output}] has {} principal components, but {shards} \
         shards of rank {rank} need {}: the largest rank for {shards} shards is {}, the largest \
         number of shards of rank {rank} is {}",
        d_input.min(d_output), shards.saturating_mul(*rank), d_input.min(d_output) / shards,
        d_input.min(d_output) / rank
    )]
    RankTooLarge {
        /// Path of the weight.
        path: String,
        /// First dimension of the weight.
        d_input: usize,
        /// Second dimension of the weight.
        d_output: usize,
        /// Rank of each shard.
        rank: usize,
        /// Number of shards.
        shards: usize,
    },
    /// Alpha is NaN, infinite, zero or negative.
    #[error("alpha is {alpha}; it must be a finite number above 0")]
    InvalidAlpha {
        /// The value given.
        alpha: f64,
    },
    /// Random directions have no singular values that frames could be scaled by.
    #[error(
        "windows are Random {{ seed: {seed} }} and frame_scale is Balanced, but random directions \
         have no singular values to balance; set frame_scale to Unit"
    )]
    BalancedRandom {
        /// The seed of the windows.
        seed: u64,
    },
    /// The block Krylov method finds only the leading components.
    #[error(
        "svd is Krylov and windows are {windows:?}, but the block Krylov method finds only the leading \
         components; set svd to Exact, or windows to Leading"
    )]
    KrylovWindows {
        /// The windows given.
        windows: Windows,
    },
    /// A parameter already carries a reparameterization, and Burn does not nest them.
    #[error(
        "`{path}` already carries the reparameterization `{name}`; materialize() the model first"
    )]
    AlreadyReparameterized {
        /// Path of the parameter.
        path: String,
        /// Name of the reparameterization.
        name: String,
    },
    /// The weight is on a backend that the adapter's operations are not implemented for.
    #[error(
        "`{path}` is on {device}, a backend this build of hd-pissa has no operations for; enable \
         the feature of that backend (flex, wgpu, cuda, rocm, metal, vulkan or cpu)"
    )]
    UnsupportedBackend {
        /// Path of the weight.
        path: String,
        /// The device, in Burn's words.
        device: String,
    },
    /// The weight is quantized or of a float type that is not supported.
    #[error(
        "`{path}` has dtype {dtype:?}; supported are F32, F16 and BF16: cast it, or leave it out of the \
         targets"
    )]
    UnsupportedDtype {
        /// Path of the weight.
        path: String,
        /// Its dtype.
        dtype: DType,
    },
    /// The weight holds NaN or infinite values.
    #[error(
        "`{path}` holds {count} NaN or infinite values, the first at row {row}, column {col}; load an \
         undamaged checkpoint"
    )]
    NonFiniteWeight {
        /// Path of the weight.
        path: String,
        /// Their number.
        count: usize,
        /// Row of the first one.
        row: usize,
        /// Column of the first one.
        col: usize,
    },
    /// Every element of the weight is zero. It has no principal components: the gradients of all
    /// factors would be zero in every step.
    #[error(
        "`{path}` is all zeros, so its adapter could never train it; initialize it, or leave it out of \
         the targets"
    )]
    ZeroWeight {
        /// Path of the weight.
        path: String,
    },
    /// The weight has fewer singular values above rounding than its adapter needs.
    #[error(
        "`{path}` has the numeric rank {numeric_rank}, but its shards need {needed} principal \
         components: the factors of the last ones would be rounding noise; give it a lower rank \
         with target_ranks, take fewer shards, leave it out of the targets, or set frame_scale to \
         Unit"
    )]
    RankDeficient {
        /// Path of the weight.
        path: String,
        /// Number of singular values above `max(d_input, d_output) · 2⁻²³` of the largest one.
        numeric_rank: usize,
        /// The last component that a shard holds, counted from 1: with leading windows the number
        /// of shards times rank.
        needed: usize,
    },
    /// The singular value decomposition did not converge.
    #[error(
        "the singular value decomposition of `{path}` did not converge; set svd to Exact(F64), or \
         leave it out of the targets"
    )]
    NoConvergence {
        /// Path of the weight.
        path: String,
    },
    /// The hosted shards are empty, or hold a shard twice or one that does not exist.
    #[error("hosted shards {hosted:?} are not a non-empty set of distinct indices below {shards}")]
    InvalidHostedShards {
        /// What was given.
        hosted: Vec<usize>,
        /// Number of shards of the configuration.
        shards: usize,
    },
    /// With shared gradients, every worker computes those of all shards.
    #[error(
        "hosted shards {hosted:?} of {shards}: with GradientMode::Shared every worker names all \
         shards, 0..{shards}; the optimizer deals them out to the workers"
    )]
    SharedNeedsAllShards {
        /// What was given.
        hosted: Vec<usize>,
        /// Number of shards of the configuration.
        shards: usize,
    },
    /// The selected shard exists in no adapter of the model.
    #[error("shard {index} cannot be selected: the model's adapters have the shards {hosted:?}")]
    NotHosted {
        /// The index given.
        index: usize,
        /// The shards of the model's adapters; none if it has no adapter.
        hosted: Vec<usize>,
    },
    /// A shard was selected in a model whose shards share gradients.
    #[error(
        "shard {index} cannot be selected: the shards share gradients, and every forward pass serves \
         all of them; leave select_shard out"
    )]
    SharesGradients {
        /// The index given.
        index: usize,
    },
    /// Another worker could not prepare its share.
    #[error("worker {worker}: {reason}")]
    OtherWorker {
        /// Index of the worker.
        worker: usize,
        /// Its error, which names the weight if it concerns one.
        reason: String,
    },
    /// Workers want to prepare different adapters.
    #[error("worker {worker} prepares {theirs}, this worker {ours}")]
    WorkerMismatch {
        /// Index of the other worker.
        worker: usize,
        /// The first difference, on this worker.
        ours: String,
        /// The same on the other worker.
        theirs: String,
    },
    /// The exchange between workers failed.
    #[error(transparent)]
    Comm(#[from] CommError),
}

fn list(paths: &[String]) -> String {
    const SHOWN: usize = 12;
    match paths.len() {
        0 => "none (no rank-2 parameter named `weight`)".into(),
        n if n <= SHOWN => paths.join(", "),
        n => format!("{}, and {} more", paths[..SHOWN].join(", "), n - SHOWN),
    }
}
