//! HD-PiSSA fine-tuning for [Burn](burn) models.
//!
//! LoRA and PiSSA train one low-rank adapter, copied to every worker, so that an update of the
//! weight has at most twice the adapter's rank. HD-PiSSA (Wang et al., EMNLP 2025,
//! arXiv 2505.18777) gives each of `K` *shards* its own `r` principal components of the pre-trained
//! weight. In every step each shard turns the gradient of its own data into deltas of its factors;
//! all deltas are gathered, and every copy of the weight takes the same sum, of rank up to `2·K·r`. The
//! weight starts, stays and ends as a plain dense tensor.
//!
//! # Example
//!
//! ```
//! use burn::nn::{Linear, LinearConfig};
//! use burn::optim::{AdamConfig, GradientsParams};
//! use burn::prelude::*;
//! use burn::tensor::Distribution;
//! use hd_pissa::{HdPissaConfig, HdPissaModule, HdPissaOptimizerConfig, ShardGradients, comm::Solo};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let device = Device::flex().autodiff();
//! let model: Linear = LinearConfig::new(24, 32).init(&device); // any Burn module, pre-trained
//!
//! // Adapters on every linear layer: 4 shards of rank 2. This worker hosts all of them.
//! let config = HdPissaConfig::new().with_rank(2).with_shards(4);
//! let mut model = model.apply_hd_pissa(&config, 0..4)?;
//! let adam = AdamConfig::new().with_epsilon(1e-8).init(); // as the published script; Burn has 1e-5
//! let mut optimizer = HdPissaOptimizerConfig::new().init(adam, Solo)?;
//!
//! let mut gradients = ShardGradients::new(&model);
//! for shard in 0..4 {
//!     model = model.select_shard(shard)?; // whose data the next forward pass sees
//!     let x = Tensor::<2>::random([8, 24], Distribution::Default, &device);
//!     let loss = model.forward(x).square().mean();
//!     gradients.push(shard, GradientsParams::from_grads(loss.backward(), &model));
//! }
//! model = optimizer.step(2e-5, model, gradients)?; // one update of rank up to 2·4·2
//!
//! let trained = model.valid().materialize(); // a plain model
//! # let _ = trained;
//! # Ok(())
//! # }
//! ```
//!
//! One device can host all shards in turn, and any number of workers can share them: the weights
//! come out the same. [`SharedGradients`] shows every batch to every shard, in one pass.
//!
//! # Where to find what
//!
//! | to … | use |
//! |---|---|
//! | choose weights, rank, shards and frames, and see the cost first | [`HdPissaConfig`], [`HdPissaConfig::plan`], [`Windows`], [`FrameScale`] |
//! | attach adapters to any Burn model | [`HdPissaModule`] |
//! | save the dense gradient of a linear layer | [`HdPissaLinear`] |
//! | collect gradients | [`ShardGradients`], [`SharedGradients`], [`side_by_side`] |
//! | take a step, with any Burn optimizer that does not read the parameter | [`HdPissaOptimizer`] |
//! | train half-precision weights | [`MergePrecision`] |
//! | spread shards over threads, devices and machines | [`comm`] |
//! | save and resume a run | `checkpoint` (feature `checkpoint`) |
//! | export a LoRA adapter or a small delta | `export` (feature `export`) |
//! | train in Burn's own loop | `learner` (feature `learner`) |
//! | compare with PiSSA | [`PissaModule`] |
//! | write your own layer on the fused operations | [`ops`] |
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
//! None is on by default. You need one backend.
//!
//! | feature | what it adds |
//! |---|---|
//! | `flex` | Burn's CPU backend, and this crate's operations on it |
//! | `wgpu`, `vulkan`, `metal`, `cuda`, `rocm`, `cpu` | Burn's backend of that name, with kernels |
//! | `fusion` | kernel fusion on the GPU backends |
//! | `autotune` | Burn tries kernels for each shape and keeps the fastest; so does the low-rank product |
//! | `checkpoint` | the module `checkpoint` |
//! | `export` | the module `export` |
//! | `learner` | the module `learner`; it brings `burn-train` |
//! | `mpi` | workers as MPI processes; it needs an MPI library, its headers and libclang |
//! | `collectives` | workers that exchange by Burn's collectives: NCCL on CUDA |
//!
//! # What of the paper was reproduced
//!
//! - **The algorithm.** Recorded runs of the published algorithm replay to 2e-5 of the largest change of
//!   a weight.
//! - **The rank.** After 200 steps on one layer, the effective rank of the update is 64.0 with 8 shards
//!   of rank 4. That of LoRA is 4.0, that of PiSSA 8.0.
//! - **The scores** of models of 7 to 8 billion values: not tried, no GPU was available. A tiny Llama learns
//!   more random facts in the published form than with LoRA and PiSSA of one shard's rank, and fewer than with a
//!   LoRA and a PiSSA of as many trainable values as all shards. On problems of one skill it is ahead of
//!   nothing.
//!
//! The repository's book has all figures, in the chapter `book/src/results/reproduce.md`.

#![cfg_attr(docsrs, feature(doc_cfg))]
#![warn(missing_debug_implementations, missing_docs)]
#![forbid(unsafe_code)]

mod adapter;
mod basis;
pub mod cache;
mod cause;
#[cfg(feature = "checkpoint")]
pub mod checkpoint;
mod config;
mod digits;
mod error;
#[cfg(feature = "export")]
pub mod export;
mod frames;
mod host;
mod hosting;
mod krylov;
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
mod residuals;
mod settings;
mod svd;
mod svd_cache;
mod windows;

pub use hd_pissa_comm as comm;

pub use adapter::{HdPissa, HdPissaAdapter, HdPissaModule, HdPissaShard, LayerProgress};
pub use cause::Cause;
pub use config::{
    GradientMode, HdPissaConfig, MergePrecision, SvdCache, SvdMethod, SvdPrecision, TargetRank,
};
pub use error::HdPissaError;
pub use krylov::NotConverged;
pub use linear::{HdPissaLinear, HdPissaLinearConfig};
pub use optim::{
    CommunicationDtype, HdPissaOptimizer, HdPissaOptimizerConfig, HdPissaOptimizerRecord,
    OptimizerError, ShardGradients, SharedGradients, StepError, StepGradients,
};
pub use parallel::side_by_side;
pub use pissa::{Pissa, PissaConfig, PissaModule};
pub use plan::{HdPissaPlan, LeftOut, LeftOutReason, PlannedWeight};
pub use svd::Decomposition;
pub use svd_cache::CacheUse;
pub use windows::{FrameScale, Windows};
