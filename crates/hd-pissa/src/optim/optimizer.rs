//! The optimizer, and what it tells of itself.

use std::collections::HashMap;
use std::fmt::{self, Debug, Formatter};
use std::num::NonZeroUsize;

use burn::module::ParamId;
use burn::optim::ModuleOptimizer;
use burn::tensor::Device;
use hd_pissa_comm::{Communicator, Traffic};

use super::frames::Frames;
use super::inner::InnerOptimizer;
use super::layout::ShardLayout;
use super::probe::Probe;
use super::{HdPissaOptimizerConfig, OptimizerError};

/// Steps of a model with HD-PiSSA adapters: a Burn optimizer turns each shard's gradients into
/// deltas of its factors, all deltas are gathered, and every weight takes
///
/// `W += Σ_k (a_k·Δb_k + Δa_k·b_k + Δa_k·Δb_k)`
///
/// as one product. The factors stay as they are. Trainable parameters outside the adapters take
/// the mean of the shards' gradients.
///
/// The inner optimizer's moments, parameter groups and records are Burn's own: the factors of each
/// shard are parameters with ids of their own. It may be any [`ModuleOptimizer`] whose update does
/// not depend on the parameter's value. Built by [`HdPissaOptimizerConfig::init`].
///
/// ```
/// use burn::nn::LinearConfig;
/// use burn::optim::{AdamConfig, GradientsParams};
/// use burn::tensor::{Device, Tensor};
/// use hd_pissa::{HdPissaConfig, HdPissaModule, HdPissaOptimizerConfig, comm::Solo};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let device = Device::flex().autodiff();
/// let config = HdPissaConfig::new().with_rank(4).with_shards(1);
/// let mut model = LinearConfig::new(16, 8).init(&device).apply_hd_pissa(&config, 0..1)?;
/// let adam = AdamConfig::new().with_epsilon(1e-8).init();
/// let mut optim = HdPissaOptimizerConfig::new().init(adam, Solo)?;
///
/// let loss = model.forward(Tensor::<2>::ones([5, 16], &device)).square().mean();
/// let grads = GradientsParams::from_grads(loss.backward(), &model);
/// model = optim.step(2e-5, model, grads)?;
/// # Ok(())
/// # }
/// ```
pub struct HdPissaOptimizer {
    pub(super) config: HdPissaOptimizerConfig,
    pub(super) inner: InnerOptimizer,
    pub(super) communicator: Box<dyn Communicator>,
    /// What the workers have agreed on, and the frames of all shards.
    pub(super) shared: Option<Box<(ShardLayout, Frames)>>,
    /// What was measured of the last step.
    pub(super) update_norm: Option<f64>,
    pub(super) gradient_norms: Vec<f64>,
    /// By id the paths of the parameters of a loaded record, until a step has compared them.
    pub(super) recorded: HashMap<u64, String>,
    /// Steps taken, which stochastic rounding draws from.
    pub(super) steps: u64,
}

impl HdPissaOptimizerConfig {
    /// Wraps `inner` for the worker of `communicator`.
    ///
    /// `inner` may be any [`ModuleOptimizer`] whose update does not depend on the parameter's value.
    ///
    /// # Errors
    ///
    /// - [`OptimizerError::ReadsParameter`] if a trial on a small parameter shows that the update
    ///   depends on its value (weight decay, Lamb, Adafactor's parameter scale). Parameter groups
    ///   are tried with the model's own paths at the first step.
    /// - [`OptimizerError::ClipsPerTensor`] if `inner` clips gradients.
    /// - [`OptimizerError::InvalidMaxGradNorm`] unless [`max_grad_norm`](Self::max_grad_norm) is finite
    ///   and above 0.
    pub fn init(
        &self,
        inner: ModuleOptimizer,
        communicator: impl Communicator + 'static,
    ) -> Result<HdPissaOptimizer, OptimizerError> {
        if let Some(value) = self.max_grad_norm
            && !(value.is_finite() && value > 0.0)
        {
            return Err(OptimizerError::InvalidMaxGradNorm { value });
        }
        if inner.has_gradient_clipping() {
            return Err(OptimizerError::ClipsPerTensor);
        }
        let anywhere = [(String::from("weight"), ParamId::new())];
        // Where there is a choice, not a GPU, which may be missing.
        #[cfg(feature = "flex")]
        let device = Device::flex();
        #[cfg(not(feature = "flex"))]
        let device = Device::default();
        if Probe::new(&device, anywhere).updates(&inner).is_err() {
            return Err(OptimizerError::ReadsParameter { path: None });
        }
        Ok(HdPissaOptimizer {
            config: self.clone(),
            inner: InnerOptimizer::new(inner, self.pack_factors),
            communicator: Box::new(communicator),
            shared: None,
            update_norm: None,
            gradient_norms: Vec::new(),
            recorded: HashMap::new(),
            steps: 0,
        })
    }
}

impl HdPissaOptimizer {
    /// The settings.
    pub fn config(&self) -> &HdPissaOptimizerConfig {
        &self.config
    }

    /// Other [`buckets`](HdPissaOptimizerConfig::buckets) from the next step on. Every worker alike:
    /// workers compare the number at the first step alone.
    pub fn set_buckets(&mut self, buckets: NonZeroUsize) {
        self.config.buckets = buckets;
    }

    /// Bytes of payload that this worker has sent and received so far; see [`Traffic`].
    pub fn traffic(&self) -> Traffic {
        self.communicator.traffic()
    }

    /// Frobenius norm of what the last step added to all adapted weights together, before rounding
    /// to their dtype. `None` before the first step, and without
    /// [`measure_norms`](HdPissaOptimizerConfig::measure_norms).
    pub fn update_norm(&self) -> Option<f64> {
        self.update_norm
    }

    /// Norms of the gradients of the last step, before clipping: for each shard that this worker
    /// hosts, over all of its factors. Empty before the first step, and without
    /// [`measure_norms`](HdPissaOptimizerConfig::measure_norms).
    pub fn gradient_norms(&self) -> &[f64] {
        &self.gradient_norms
    }

    /// Number of steps taken, records included.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// The transport, for what workers agree on besides steps, such as a checkpoint.
    pub fn communicator(&self) -> &dyn Communicator {
        &*self.communicator
    }
}

impl Debug for HdPissaOptimizer {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.debug_struct("HdPissaOptimizer")
            .field("config", &self.config)
            .field("worker_index", &self.communicator.worker_index())
            .field("num_workers", &self.communicator.num_workers())
            .field("steps", &self.steps)
            .finish_non_exhaustive()
    }
}
