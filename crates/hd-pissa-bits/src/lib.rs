//! The bits that all backends of HD-PiSSA agree on, in plain Rust.
//!
//! The CPU path calls these functions. The GPU kernels repeat them in their own language, and tests
//! compare the two bit for bit.
//!
//! - [`Rounding`] and [`Half`]: rounding of an `f32` sum to an element of a half-precision weight;
//! - [`StochasticKey`] and [`threefry`]: the random bits of stochastic rounding;
//! - [`fingerprint()`]: 64 bits that tell whether two tensors hold the same bits.

#![cfg_attr(docsrs, feature(doc_cfg))]

mod fingerprint;
mod random;
mod rounding;

pub use fingerprint::{SEEDS, fingerprint, mix};
pub use random::{KEY_PARITY, ROTATIONS, StochasticKey, splitmix, threefry};
pub use rounding::{F16_FINE, F16_NORMAL, Half, Rounding};
