//! The change of each trained weight as a product of two thin matrices, and files of it.
//!
//! Frames do not move while a model trains. The first-order part of all updates of a weight is
//! therefore `A·X + Y·B`, with the frames `A: [d_input, K·r]` and `B: [K·r, d_output]` of all shards and
//! some `X` and `Y`. This matrix has rank `2·K·r`. [`WeightChange`] computes it from the weight before and
//! after the training and from the [configuration](crate::HdPissaConfig), without a singular value
//! decomposition of the change. [`write_peft`] writes changes as a LoRA adapter that Python's PEFT opens.
//! [`write_delta`] writes one file, from which [`WeightChange::added_to`] rebuilds the trained weight.
//!
//! ```
//! use burn::nn::LinearConfig;
//! use burn::tensor::{Device, Distribution, Tensor};
//! use hd_pissa::HdPissaConfig;
//! use hd_pissa::export::{RankLimit, WeightChange, read_delta, write_delta};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let device = Device::flex();
//! let config = HdPissaConfig::new().with_rank(2).with_shards(3);
//! let base = Tensor::<2>::random([24, 16], Distribution::Default, &device);
//! // Stands for a training: a change that the frames can express.
//! let [a, b] = config.frames("fc.weight", &base)?;
//! let x = Tensor::<2>::random([6, 16], Distribution::Default, &device);
//! let y = Tensor::<2>::random([24, 6], Distribution::Default, &device);
//! let trained = base.clone() + (a.clone().matmul(x) + y.matmul(b.clone())) * 1e-2;
//!
//! let limit = RankLimit::default();
//! let change = WeightChange::new("fc.weight", &base, &trained, &[a, b], &limit)?;
//! assert_eq!(change.rank(), 2 * 3 * 2);
//! assert!(change.relative_error() < 1e-4);
//!
//! let folder = tempfile::tempdir()?;
//! let path = folder.path().join("delta.safetensors");
//! write_delta(&path, &[change])?;
//! let rebuilt = read_delta(&path)?[0].added_to(&base)?;
//! assert!((rebuilt - trained).abs().max().into_scalar::<f32>() < 1e-6);
//! # Ok(())
//! # }
//! ```

mod change;
mod delta;
mod error;
mod limit;
mod peft;
mod tensors;

pub use change::WeightChange;
pub use delta::{read_delta, write_delta};
pub use error::ExportError;
pub use limit::RankLimit;
pub use peft::{Peft, read_peft, write_peft};
