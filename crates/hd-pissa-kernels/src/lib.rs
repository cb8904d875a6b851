//! CubeCL kernels of HD-PiSSA: the merge of all shards' deltas and the low-rank product.
//!
//! The crate uses CubeCL, not Burn. Every function takes a [`Client`](cubecl::client::Client) and
//! device handles, checks shapes and strides ([`Matrix`]), and queues its kernels without waiting
//! for the device:
//!
//! - [`merge()`]: `W += Σ_k (a_k + Δa_k)·Δb_k + Δa_k·b_k` in place;
//! - [`low_rank_product`]: `p = x·f` for a factor of few columns, without a copy of `x` in `f32`,
//!   and optionally `y = x·W` in the same launch;
//! - [`row_statistics()`]: counts of values that are not finite, and sums of squares, row by row;
//! - [`join()`]: copies of matrices end to end in one buffer, many of them in one launch;
//! - [`fingerprint()`]: 64 bits that tell whether two matrices hold the same bits.
//!
//! [`mod@reference`] has products, updates and statistics in slow and simple Rust. Roundings and
//! fingerprints have the bits of `hd-pissa-bits`.
//!
//! Identical inputs give bit-identical results on the same device: every sum has a fixed order, and
//! kernels add no float atomically.

#![cfg_attr(docsrs, feature(doc_cfg))]

mod error;
mod fingerprint;
mod float;
mod grid;
mod join;
mod matrix;
mod merge;
mod merge_kernel;
mod product;
mod reduce;
pub mod reference;
mod rounding;
mod row_statistics;
mod tile;

/// The kernels, for building their source without a device. Not a stable interface.
#[doc(hidden)]
pub mod kernels {
    pub use crate::fingerprint::{kernel as fingerprint, storage_type};
    pub use crate::join::kernel as join;
    pub use crate::merge_kernel::{OperandsLaunch, TargetLaunch, kernel as merge};
    pub use crate::product::{ExtentsLaunch, PlacesLaunch, kernel as product};
    pub use crate::reduce::kernel as reduce;
    pub use crate::rounding::Store;
    pub use crate::row_statistics::kernel as row_statistics;
    pub use crate::tile::{Access, OperandLaunch, Tile};
}

pub use error::KernelError;
pub use fingerprint::fingerprint;
pub use float::FloatType;
pub use join::join;
pub use matrix::Matrix;
pub use merge::{Merge, merge, residual_shape};
pub use product::{DenseProduct, LowRankProduct, low_rank_product};
pub use row_statistics::row_statistics;
