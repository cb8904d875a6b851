//! The optimizer and its public state.

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
/// as one product. The factors do not change. Trainable parameters outside the adapters take the
/// mean of the shards' gradients.
///
/// The inner optimizer's moments, parameter groups and records are Burn's own: each factor is a
/// parameter with its own id. Any [`ModuleOptimizer`] works if its update does not depend on the
/// parameter's value. [`HdPissaOptimizerConfig::init`] builds it.
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
    /// The layout that the workers agreed on, and the frames of all shards.
    pub(super) shared: Option<Box<(ShardLayout, Frames)>>,
    /// The norm of the last step's update, if measured.
    pub(super) update_norm: Option<f64>,
    pub(super) gradient_norms: Vec<f64>,
    /// The paths of the parameters of a loaded record, by id, until a step has compared them.
    pub(super) recorded: HashMap<u64, String>,
    /// Number of steps taken, which is part of the key of stochastic rounding.
    pub(super) steps: u64,
}

impl HdPissaOptimizerConfig {
    /// Wraps `inner` for the worker of `communicator`.
    ///
    /// `inner` may be any [`ModuleOptimizer`] whose update does not depend on the parameter's
    /// value. Give Adam the epsilon 1e-8 of the published script: Burn's default of 1e-5 is large
    /// next to the gradients of factors.
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
        // Flex if possible, because a GPU may be missing.
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

    /// Sets [`buckets`](HdPissaOptimizerConfig::buckets) from the next step on. Call it on every
    /// worker: workers compare the number only at the first step.
    pub fn set_buckets(&mut self, buckets: NonZeroUsize) {
        self.config.buckets = buckets;
    }

    /// Bytes of payload that this worker has sent and received so far; see [`Traffic`].
    pub fn traffic(&self) -> Traffic {
        self.communicator.traffic()
    }

    /// Frobenius norm of the last step's update of all adapted weights together, before rounding to
    /// their dtype. `None` before the first step, and without
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

    /// The transport, for other exchanges between workers, such as a checkpoint.
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
