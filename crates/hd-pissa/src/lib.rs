//! HD-PiSSA fine-tuning for [Burn](burn) models.
//!
//! LoRA and PiSSA train one low-rank adapter, copied to every worker, so that an update of the
//! weight has at most twice the adapter's rank. HD-PiSSA (Wang et al., EMNLP 2025,
//! arXiv 2505.18777) gives each of `K` *shards* its own `r` principal components of the pre-trained
//! weight. In every step each shard turns the gradient of its own data into deltas of its factors;
//! all deltas are gathered, and every copy of the weight takes the same sum, of rank `2·K·r`. The
//! weight starts, stays and ends as a plain dense tensor.
//!
//! # Use
//!
//! 1. [`HdPissaModule::apply_hd_pissa`] attaches adapters to the weights that a [`HdPissaConfig`]
//!    chooses: any Burn model, its code unchanged. [`HdPissaLinear`] in the place of Burn's
//!    `Linear` saves the dense gradient.
//! 2. [`HdPissaModule::select_shard`] before a forward pass says whose data it sees;
//!    [`ShardGradients`] collects the gradients of each shard.
//! 3. [`HdPissaOptimizer::step`] wraps a Burn optimizer and a [transport](comm).
//! 4. `model.valid().materialize()` drops the adapters and leaves the trained weights.
//!
//! One device can host all shards in turn, and any number of workers can share them: the weights
//! come out the same.
//!
//! # Notation
//!
//! | paper | here | shape | meaning |
//! |---|---|---|---|
//! | `W` | the base of a `Param<Tensor<2>>` | `[d_input, d_output]` | the pre-trained weight; Burn's layout, the transpose of PyTorch's |
//! | `K` | `shards`, [`HdPissaConfig::shards`] | | number of shards, over all workers |
//! | `r` | `rank`, [`HdPissaConfig::rank`] | | rank of each shard's factors |
//! | `A_k` | `a`, [`HdPissaShard::a`] | `[d_input, rank]` | left factor of shard `k`, `U_k √Σ_k` unless [`Windows`] and [`FrameScale`] say otherwise |
//! | `B_k` | `b`, [`HdPissaShard::b`] | `[rank, d_output]` | right factor of shard `k`, `√Σ_k V_kᵀ` likewise |
//! | `ΔA_k`, `ΔB_k` | deltas | as the factors | what the inner optimizer adds to a factor in a step |
//! | `α` | `alpha`, [`HdPissaConfig::alpha`] | | numerator of the gradient scale |
//! | | `scale`, [`HdPissaAdapter::scale`] | | gradient scale `alpha / rank` |
//!
//! A *shard* is one window of principal components with its factors, moments and data; a *worker*
//! is a thread or process with one device that hosts one or more shards.
//!
//! # Features
//!
//! No backend by default. `flex` (CPU), `wgpu`, `vulkan`, `metal`, `cuda`, `rocm` and `cpu` enable
//! Burn's feature of the same name and this crate's operations on it; `fusion` adds kernel fusion
//! on the GPU backends. `checkpoint` and `export` add the modules of these names, `learner` HD-PiSSA in
//! Burn's own training loop, `mpi` and `collectives` their [transports](comm).

#![warn(missing_debug_implementations, missing_docs)]
#![forbid(unsafe_code)]

mod adapter;
mod basis;
mod cause;
#[cfg(feature = "checkpoint")]
pub mod checkpoint;
mod config;
mod error;
#[cfg(feature = "export")]
pub mod export;
mod frames;
mod host;
mod hosting;
#[cfg(feature = "learner")]
pub mod learner;
mod linear;
pub mod ops;
mod optim;
mod optimizer_state;
mod parallel;
mod path;
mod pissa;
mod plan;
mod settings;
mod svd;
mod windows;

pub use hd_pissa_comm as comm;

pub use adapter::{HdPissa, HdPissaAdapter, HdPissaModule, HdPissaShard, LayerProgress};
pub use cause::Cause;
pub use config::{
    GradientMode, HdPissaConfig, MergePrecision, SvdMethod, SvdPrecision, TargetRank,
};
pub use error::HdPissaError;
pub use linear::{HdPissaLinear, HdPissaLinearConfig};
pub use optim::{
    CommunicationDtype, HdPissaOptimizer, HdPissaOptimizerConfig, HdPissaOptimizerRecord,
    OptimizerError, ShardGradients, SharedGradients, StepError, StepGradients,
};
pub use parallel::side_by_side;
pub use pissa::{Pissa, PissaConfig, PissaModule};
pub use plan::{HdPissaPlan, LeftOut, LeftOutReason, PlannedWeight};
pub use windows::{FrameScale, Windows};
