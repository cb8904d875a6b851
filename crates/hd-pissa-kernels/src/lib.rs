//! CubeCL kernels of HD-PiSSA: the delta merge and the low-rank products.
//!
//! The crate knows CubeCL and nothing of Burn. Every function takes a [`Client`](cubecl::client::Client)
//! and device handles with explicit shapes and strides ([`Matrix`], [`Buffer`]), checks them, and
//! queues its kernels without waiting for the device:
//!
//! - [`merge()`]: `W += Σ_k (a_k + Δa_k)·Δb_k + Δa_k·b_k` in place, gated by
//! - [`count_non_finite`]: the number of NaN and infinite elements, kept on the device;
//! - [`low_rank_product`]: `y = x·W` and `p = x·a` in one launch; with the feature `pipeline`,
//!   `low_rank_product_by_pipeline` does the same on the device's matrix units, where it has them;
//! - [`factor_product()`]: `p = x·a` alone, and the gradients of the factors, without a copy of `x` in
//!   `f32`;
//! - [`row_statistics()`]: what is not finite, and sums of squares, row by row;
//! - [`join()`]: copies of matrices end to end in one buffer, many of them in one launch;
//! - [`fingerprint()`]: 64 bits that tell whether two matrices hold the same bits.
//!
//! [`mod@reference`] holds the same functions in plain Rust, slow and obvious.
//!
//! Results are bit-identical for identical inputs on the same device: every sum has a fixed order
//! and no float is added atomically.

mod error;
mod factor_product;
mod fingerprint;
mod join;
mod matrix;
mod merge;
mod merge_kernel;
#[cfg(feature = "pipeline")]
mod pipeline;
mod planes;
mod product;
mod reduce;
pub mod reference;
mod rounding;
mod row_statistics;
mod tile;

/// The kernels themselves, for building their source without a device. Not a stable interface.
#[doc(hidden)]
pub mod kernels {
    pub use crate::factor_product::kernel as factor_product;
    pub use crate::fingerprint::{kernel as fingerprint, storage_type};
    pub use crate::join::kernel as join;
    pub use crate::merge_kernel::{Engine, OperandsLaunch, TargetLaunch, kernel as merge};
    #[cfg(feature = "pipeline")]
    pub use crate::pipeline::{
        Planes, arguments as pipeline_arguments, kernel as pipeline, problem as pipeline_problem,
    };
    pub use crate::planes::PlaneTile;
    pub use crate::product::kernel as product;
    pub use crate::reduce::kernel as reduce;
    pub use crate::rounding::Rounding;
    pub use crate::row_statistics::kernel as row_statistics;
    pub use crate::tile::{Access, OperandLaunch, Tile};
}

pub use error::KernelError;
pub use factor_product::{FactorProduct, factor_product};
pub use fingerprint::fingerprint;
pub use join::join;
pub use matrix::{Buffer, FloatType, Matrix};
pub use merge::{
    Arithmetic, Merge, MergePrecision, ShardedFactors, companion_len, companion_shape, merge,
    merge_with,
};
#[cfg(feature = "pipeline")]
pub use pipeline::low_rank_product_by_pipeline;
pub use product::{LowRankProduct, has_matrix_units, low_rank_product};
pub use reduce::{count_non_finite, new_counter};
pub use rounding::{StochasticKey, path_hash};
pub use row_statistics::row_statistics;
