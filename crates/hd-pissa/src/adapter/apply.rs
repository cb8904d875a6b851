//! Computing adapters and attaching them to a model.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use burn::module::{Flag, Module, Param, Reparameterizer};
use burn::tensor::{DType, Int, Tensor, TensorData};
use hd_pissa_comm::Communicator;

use super::joined::JoinedFrames;
use super::module::{HdPissaAdapter, HdPissaShard};
use super::select::select_shard;
use crate::frames::WeightFrames;
use crate::parallel;
use crate::path::{Side, factor_id, residual_id};
use crate::plan::Target;
use crate::residuals::materialize_f32;
use crate::svd::Decomposition;
use crate::svd_cache::CacheUse;
use crate::{GradientMode, HdPissaConfig, HdPissaError, MergePrecision};

/// Facts about a weight whose factors have just been computed.
#[derive(Clone, Debug)]
pub struct LayerProgress {
    /// Position of the weight, from 0.
    pub index: usize,
    /// Number of weights.
    pub total: usize,
    /// Path of the weight.
    pub path: String,
    /// `[d_input, d_output]`.
    pub shape: [usize; 2],
    /// Share of the weight's squared Frobenius norm in the window of each shard,
    /// `‖U_kᵀ W V_k‖² / ‖W‖²`: for components that of their squared singular values.
    pub explained_variance: Vec<f64>,
    /// Largest absolute inner product of two directions of different shards, on either side of the
    /// weight; rounding error.
    pub orthogonality_error: f64,
    /// How the frames were found. [`Fallback`](Decomposition::Fallback) means that the block Krylov method
    /// did not converge.
    pub decomposition: Decomposition,
    /// What the cache of decompositions did.
    pub cache: CacheUse,
    /// Time it took to find the frames, most of it for the decomposition.
    pub elapsed: Duration,
}

/// The [`Reparameterizer`] that attaches HD-PiSSA adapters.
///
/// [`prepare`](Self::prepare) chooses the targets and decomposes them. This can fail.
/// `model.apply_reparameterization(hd_pissa)` then attaches the adapters and freezes every other
/// float parameter. This cannot fail. [`HdPissaModule::apply_hd_pissa`] does both.
#[derive(Debug)]
pub struct HdPissa {
    pub(super) adapters: HashMap<String, HdPissaAdapter>,
}

impl HdPissa {
    /// Computes the adapters of `model` for the shards in `hosted_shards`, one weight at a time.
    ///
    /// `progress` is called after each weight. The factors are made on the weight's device, in
    /// `f32`. The first hosted shard is selected.
    ///
    /// # Errors
    ///
    /// See [`HdPissaError`]. All settings are checked before the first decomposition. NaN, infinite
    /// values, zeros and too low a rank of a weight are found when that weight is decomposed.
    pub fn prepare<M: Module>(
        model: &M,
        config: &HdPissaConfig,
        hosted_shards: impl IntoIterator<Item = usize>,
        mut progress: impl FnMut(LayerProgress),
    ) -> Result<Self, HdPissaError> {
        let Selected { hosted, targets } = Selected::of(model, config, hosted_shards)?;
        let mut adapters = HashMap::with_capacity(targets.len());
        parallel::try_for_each(
            (0..targets.len()).collect(),
            |index| {
                let target = &targets[index];
                let (frames, layer) = frames(&targets, index, config)?;
                let adapter = adapter(target, |shard| frames.window(shard), config, &hosted);
                Ok((target.path.clone(), adapter, layer))
            },
            |result: Result<_, HdPissaError>| {
                let (path, adapter, layer) = result?;
                progress(layer);
                adapters.insert(path, adapter);
                Ok::<(), HdPissaError>(())
            },
        )?;
        Ok(Self { adapters })
    }

    /// What [`prepare`](Self::prepare) makes, with zeros as factors. A record that is loaded next
    /// replaces them.
    #[cfg(feature = "checkpoint")]
    pub(crate) fn blank<M: Module>(
        model: &M,
        config: &HdPissaConfig,
        hosted_shards: impl IntoIterator<Item = usize>,
    ) -> Result<Self, HdPissaError> {
        let Selected { hosted, targets } = Selected::of(model, config, hosted_shards)?;
        let adapters = targets.iter().map(|target| {
            let [d_input, d_output] = target.weight.dims();
            let zeros = |size: usize| vec![0.0; target.rank * size];
            let window = |_| (zeros(d_input), zeros(d_output));
            let adapter = adapter(target, window, config, &hosted);
            (target.path.clone(), adapter)
        });
        Ok(Self {
            adapters: adapters.collect(),
        })
    }
}

/// What a worker will prepare, checked as far as possible without decompositions.
pub(super) struct Selected {
    /// Ascending.
    pub(super) hosted: Vec<usize>,
    /// In traversal order.
    pub(super) targets: Vec<Target>,
}

impl Selected {
    pub(super) fn of<M: Module>(
        model: &M,
        config: &HdPissaConfig,
        hosted_shards: impl IntoIterator<Item = usize>,
    ) -> Result<Self, HdPissaError> {
        let hosted = check_hosted(hosted_shards.into_iter().collect(), config)?;
        let targets = config.choose(model)?.targets;
        if config.precision == MergePrecision::Nearest {
            let half = targets.iter().filter(|target| is_half(&target.weight));
            if let Some(target) = half.clone().next() {
                log::warn!(
                    "MergePrecision::Nearest: {} half-precision weights, the first `{}`, lose \
                     updates below their rounding step",
                    half.count(),
                    target.path
                );
            }
        }
        Ok(Self { hosted, targets })
    }
}

/// The frames of the target at position `index`.
pub(super) fn frames(
    targets: &[Target],
    index: usize,
    config: &HdPissaConfig,
) -> Result<(WeightFrames, LayerProgress), HdPissaError> {
    let start = Instant::now();
    let target = &targets[index];
    let frames = WeightFrames::compute(&target.path, &target.weight, target.rank, config)?;
    let layer = LayerProgress {
        index,
        total: targets.len(),
        path: target.path.clone(),
        shape: target.weight.dims(),
        explained_variance: frames.explained_variance.clone(),
        orthogonality_error: frames.orthogonality_error(),
        decomposition: frames.decomposition,
        cache: frames.cache.clone(),
        elapsed: start.elapsed(),
    };
    Ok((frames, layer))
}

fn check_hosted(
    mut hosted: Vec<usize>,
    config: &HdPissaConfig,
) -> Result<Vec<usize>, HdPissaError> {
    let shards = config.shards;
    if shards == 0 {
        return Err(HdPissaError::ZeroShards);
    }
    hosted.sort_unstable();
    let distinct = hosted.windows(2).all(|pair| pair[0] != pair[1]);
    match hosted.last() {
        Some(&last) if distinct && last < shards => match config.gradients {
            GradientMode::Shared if hosted.len() < shards => {
                Err(HdPissaError::SharedNeedsAllShards { hosted, shards })
            }
            _ => Ok(hosted),
        },
        _ => Err(HdPissaError::InvalidHostedShards { hosted, shards }),
    }
}

/// The adapter of a target, given the factors of each shard, `a` and `b` row by row.
pub(super) fn adapter(
    target: &Target,
    window: impl Fn(usize) -> (Vec<f32>, Vec<f32>) + Sync,
    config: &HdPissaConfig,
    hosted: &[usize],
) -> HdPissaAdapter {
    let device = target.weight.device();
    let [d_input, d_output] = target.weight.dims();
    let rank = target.rank;
    let is_shared = config.gradients == GradientMode::Shared;
    let factor = |values: Vec<f32>, shape: [usize; 2], shard: usize, side: Side| {
        let data = TensorData::new(values, shape);
        let mut param = Param::from_tensor(Tensor::<2>::from_data(data, (&device, DType::F32)));
        param.id = factor_id(&target.path, shard, side);
        param
    };
    // As Burn's own parameters: they live as long as the model.
    let shards = device.memory_persistent_allocations((), |_| {
        hosted
            .iter()
            .map(|&index| {
                let (a, b) = window(index);
                HdPissaShard {
                    a: factor(a, [d_input, rank], index, Side::A),
                    b: factor(b, [rank, d_output], index, Side::B),
                    selected: Param::<Flag>::from_bool(is_shared || index == hosted[0]),
                    index,
                }
            })
            .collect()
    });
    let half = is_half(&target.weight);
    let residual = match config.precision {
        MergePrecision::Compensated if half => {
            let shape = [d_input, d_output.div_ceil(2)];
            let options = (&device, DType::I32);
            Some(device.memory_persistent_allocations((), |_| {
                let zeros = Tensor::<2, Int>::zeros(shape, options);
                Param::initialized(residual_id(&target.path), zeros)
            }))
        }
        _ => None,
    };
    HdPissaAdapter {
        shards,
        num_shards: config.shards,
        gradients: config.gradients,
        windows: config.windows,
        frame_scale: config.frame_scale,
        scale: config.alpha.map_or(1.0, |alpha| alpha / rank as f64),
        residual,
        rounding_seed: match config.precision {
            MergePrecision::Stochastic { seed } if half => Some(seed),
            _ => None,
        },
        joined: JoinedFrames::default(),
    }
}

fn is_half(weight: &Tensor<2>) -> bool {
    weight.dtype() != DType::F32
}

impl Reparameterizer for HdPissa {
    type Reparam = HdPissaAdapter;

    fn reparameterize<const D: usize>(
        &mut self,
        path: &str,
        param: Param<Tensor<D>>,
    ) -> (Param<Tensor<D>>, Option<Self::Reparam>) {
        (param.set_require_grad(false), self.adapters.remove(path))
    }
}

/// HD-PiSSA on any Burn model.
pub trait HdPissaModule: Module {
    /// Attaches HD-PiSSA adapters to the weights that `config` chooses and freezes every other
    /// float parameter. Model code stays as it is.
    ///
    /// `hosted_shards` are the shards whose gradients this worker computes: `0..config.shards` on
    /// a single worker, and on every worker with [`GradientMode::Shared`]. If every one of several
    /// workers is given all shards, each hosts an even share, in the order of workers, and keeps the
    /// factors of the others. The values of all weights stay as they are, bit for bit. Flags of modules
    /// (dropout, batch normalization) keep their state, as with Burn's `Lora`.
    ///
    /// An adapted weight takes no gradient of its own. `freeze()` stops the training of everything;
    /// after `unfreeze()` a step is refused. `set_require_grad_group` makes other parameters train
    /// too.
    ///
    /// A [`Linear`](burn::nn::Linear) whose weight carries an adapter computes a dense gradient in
    /// its backward pass, and the adapter projects it on the factors.
    /// [`HdPissaLinear`](crate::HdPissaLinear) computes no tensor of the weight's size.
    ///
    /// # Errors
    ///
    /// See [`HdPissaError`].
    fn apply_hd_pissa(
        self,
        config: &HdPissaConfig,
        hosted_shards: impl IntoIterator<Item = usize>,
    ) -> Result<Self, HdPissaError> {
        let hd_pissa = HdPissa::prepare(&self, config, hosted_shards, |_| ())?;
        Ok(self.apply_reparameterization(hd_pissa))
    }

    /// Like [`apply_hd_pissa`](Self::apply_hd_pissa), but the workers divide the decompositions among
    /// them; see [`HdPissa::prepare_shared`].
    ///
    /// # Errors
    ///
    /// See [`HdPissaError`].
    fn apply_hd_pissa_shared(
        self,
        config: &HdPissaConfig,
        hosted_shards: impl IntoIterator<Item = usize>,
        communicator: &dyn Communicator,
    ) -> Result<Self, HdPissaError> {
        let hd_pissa = HdPissa::prepare_shared(&self, config, hosted_shards, communicator, |_| ())?;
        Ok(self.apply_reparameterization(hd_pissa))
    }

    /// Directs the gradients of the following forward passes to shard `index`.
    ///
    /// If you forget it, the step is refused, because gradients of another shard were pushed.
    ///
    /// # Errors
    ///
    /// - [`HdPissaError::NotHosted`] if no adapter of the model has that shard.
    /// - [`HdPissaError::SharesGradients`] with [`GradientMode::Shared`], where every forward pass
    ///   serves all shards.
    fn select_shard(self, index: usize) -> Result<Self, HdPissaError> {
        select_shard(self, index)
    }

    /// The model without adapters and in validation mode, with every `f16` and `bf16` parameter in `f32`.
    ///
    /// A weight with residual bits gets all of its value, bit for bit; see
    /// [`MergePrecision::Compensated`]. Burn's [`materialize`](Module::materialize) keeps the half-precision
    /// value alone. With `f32` parameters both do the same. The host joins weights and residual bits, one weight
    /// after the other; everything stays on its device.
    ///
    /// ```
    /// use burn::prelude::*;
    /// use burn::tensor::DType;
    /// use hd_pissa::{HdPissaConfig, HdPissaLinearConfig, HdPissaModule};
    ///
    /// let device = Device::flex().autodiff();
    /// let mut layer = HdPissaLinearConfig::new(8, 6).with_bias(false).init(&device);
    /// layer.weight = layer.weight.map(|weight| weight.cast(DType::BF16).detach());
    /// let config = HdPissaConfig::new().with_rank(2).with_shards(2);
    /// let layer = layer.apply_hd_pissa(&config, 0..2)?;
    /// // ... train `layer` ...
    /// assert_eq!(layer.materialize_f32().weight.dtype(), DType::F32);
    /// # Ok::<(), hd_pissa::HdPissaError>(())
    /// ```
    fn materialize_f32(&self) -> Self {
        materialize_f32(self)
    }
}

impl<M: Module> HdPissaModule for M {}
