//! The optimizer: its settings and its step.

use std::collections::HashMap;
use std::num::{NonZeroU64, NonZeroUsize};

use burn::lr_scheduler::module_lr_scheduler::ModuleLearningRate;
use burn::module::{Module, ParamId};
use burn::optim::{GradientsParams, ModuleOptimizer};
use burn::tensor::{Device, Tensor};
use hd_pissa_comm::{Communicator, Traffic};

use super::checks::{Checks, DenseCounts, Verdict};
use super::clip::clip;
use super::commit::{Commit, Companions, ZeroFactors};
use super::dense::{DenseBefore, mean_gradients, non_finite_values};
use super::exchange::{Deltas, OwnDeltas, PendingDeltas};
use super::factors::{Factors, WeightFactors};
use super::fingerprint::Fingerprints;
use super::frames::Frames;
use super::gradients::{Resolved, StepGradients};
use super::layout::{RunSettings, ShardLayout};
use super::packed::{RowStatistics, pack, sum_of};
use super::probe::Probe;
use super::range::Range;
use super::reduce::reduce_shared;
use super::{OptimizerError, StepError, WireDtype};
use crate::ops::MergeInputs;

/// Most of what more gathers gain (the book's chapter on workers); each is one more pass of the inner
/// optimizer over the model.
const DEFAULT_GATHERS: NonZeroUsize = NonZeroUsize::new(4).unwrap();

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
/// not depend on the parameter's value.
///
/// ```
/// use burn::nn::LinearConfig;
/// use burn::optim::{AdamConfig, GradientsParams};
/// use burn::tensor::{Device, Tensor};
/// use hd_pissa::{HdPissaConfig, HdPissaModule, HdPissaOptimizer, comm::Solo};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let device = Device::flex().autodiff();
/// let config = HdPissaConfig::new().with_rank(4).with_shards(1);
/// let mut model = LinearConfig::new(16, 8).init(&device).apply_hd_pissa(&config, 0..1)?;
/// let mut optim = HdPissaOptimizer::new(AdamConfig::new().with_epsilon(1e-8).init(), Solo)?;
///
/// let loss = model.forward(Tensor::<2>::ones([5, 16], &device)).square().mean();
/// let grads = GradientsParams::from_grads(loss.backward(), &model);
/// model = optim.step(2e-5, model, grads)?;
/// # Ok(())
/// # }
/// ```
pub struct HdPissaOptimizer {
    pub(super) inner: ModuleOptimizer,
    communicator: Box<dyn Communicator>,
    max_grad_norm: Option<f64>,
    fingerprint_every: Option<NonZeroU64>,
    wire: WireDtype,
    /// Gathers of a step, with several workers.
    gathers: NonZeroUsize,
    /// What the workers have agreed on, and the frames of all shards.
    shared: Option<Box<(ShardLayout, Frames)>>,
    /// Whether to measure updates and gradients, and what was found in the last step.
    measure: bool,
    update_norm: Option<f64>,
    gradient_norms: Vec<f64>,
    /// By id the paths of the parameters of a loaded record, until a step has compared them.
    pub(super) recorded: HashMap<u64, String>,
    /// Steps taken, which stochastic rounding draws from.
    pub(super) steps: u64,
}

impl HdPissaOptimizer {
    /// Wraps `inner` for a worker with the given transport.
    ///
    /// # Errors
    ///
    /// - [`OptimizerError::ReadsParameter`] if a trial on a small parameter shows that the update
    ///   depends on its value (weight decay, Lamb, Adafactor's parameter scale). Parameter groups
    ///   are tried with the model's own paths at the first step.
    /// - [`OptimizerError::ClipsPerTensor`] if `inner` clips gradients.
    pub fn new(
        inner: ModuleOptimizer,
        communicator: impl Communicator + 'static,
    ) -> Result<Self, OptimizerError> {
        if inner.has_gradient_clipping() {
            return Err(OptimizerError::ClipsPerTensor);
        }
        let anywhere = [(String::from("weight"), ParamId::new())];
        // Where there is a choice, not a GPU, which may be missing.
        #[cfg(feature = "flex")]
        let device = Device::flex();
        #[cfg(not(feature = "flex"))]
        let device = Device::default();
        let probe = Probe::new(&device, anywhere);
        if probe.reads_parameter(&inner).is_some() {
            return Err(OptimizerError::ReadsParameter { path: None });
        }
        Ok(Self {
            inner,
            communicator: Box::new(communicator),
            max_grad_norm: None,
            fingerprint_every: NonZeroU64::new(50),
            wire: WireDtype::default(),
            gathers: DEFAULT_GATHERS,
            shared: None,
            measure: false,
            update_norm: None,
            gradient_norms: Vec::new(),
            recorded: HashMap::new(),
            steps: 0,
        })
    }

    /// Scales each shard's factor gradients down to this global (2-)norm where it is larger.
    ///
    /// The norm runs over all factors of one shard; with
    /// [`GradientMode::Shared`](crate::GradientMode::Shared) over those of all shards. Gradients of
    /// dense parameters, those outside the adapters, are not clipped.
    ///
    /// # Errors
    ///
    /// [`OptimizerError::InvalidMaxGradNorm`] unless `max_norm` is finite and above 0.
    pub fn with_max_grad_norm(mut self, max_norm: f64) -> Result<Self, OptimizerError> {
        if !(max_norm.is_finite() && max_norm > 0.0) {
            return Err(OptimizerError::InvalidMaxGradNorm { value: max_norm });
        }
        self.max_grad_norm = Some(max_norm);
        Ok(self)
    }

    /// Before every `steps`-th step, compares every parameter that steps move, and all frames, with
    /// the other workers' copies by a hash of 64 bits; 50 by default, `None` for never. A single worker
    /// compares nothing. Devices compute the hashes; two words for each tensor are read back.
    pub fn with_fingerprint_every(mut self, steps: Option<NonZeroU64>) -> Self {
        self.fingerprint_every = steps;
        self
    }

    /// In what precision deltas travel; [`WireDtype::F32`] by default. Every worker alike, from the
    /// first step on.
    ///
    /// A worker's own deltas are rounded as those that it receives, also where it is the only one:
    /// any layout of workers gives the same weights. Frames, and gradients of parameters outside
    /// the adapters, travel in `f32`.
    pub fn with_wire_dtype(mut self, wire: WireDtype) -> Self {
        self.wire = wire;
        self
    }

    /// Gathers the deltas in up to so many groups of weights, of about the same size: while one
    /// group is on its way, the inner optimizer steps the next. Four by default. The weights come
    /// out the same. Every worker alike; a single worker gathers nothing.
    pub fn with_gathers(mut self, gathers: NonZeroUsize) -> Self {
        self.gathers = gathers;
        self
    }

    /// Bytes of payload that this worker has sent and received so far; see [`Traffic`].
    pub fn traffic(&self) -> Traffic {
        self.communicator.traffic()
    }

    /// Measures the norms of every step's update and gradients from now on; see
    /// [`update_norm`](Self::update_norm) and [`gradient_norms`](Self::gradient_norms).
    ///
    /// The GPU backends compute that of the update with every merge anyway; on Flex it costs about
    /// half of a merge for each weight. No tensor of the weight's size is made.
    pub fn with_norms(mut self) -> Self {
        self.measure = true;
        self
    }

    /// Frobenius norm of what the last step added to all adapted weights together, before rounding
    /// to their dtype. `None` before the first step, and without [`with_norms`](Self::with_norms).
    pub fn update_norm(&self) -> Option<f64> {
        self.update_norm
    }

    /// Norms of the gradients of the last step, before clipping: for each shard that this worker
    /// hosts, over all of its factors. Empty before the first step, and without
    /// [`with_norms`](Self::with_norms).
    pub fn gradient_norms(&self) -> &[f64] {
        &self.gradient_norms
    }

    /// Number of steps taken, records included.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Takes one step: Burn's call, with the gradients of one micro-batch (`GradientsParams`), of
    /// several shards ([`ShardGradients`](crate::ShardGradients)), or of several micro-batches for
    /// all shards ([`SharedGradients`](crate::SharedGradients)).
    ///
    /// The gradients must cover every factor of every shard that this worker hosts; of all shards
    /// where these share gradients. All workers step together. Where no one else holds a weight's tensor it is updated in place; a clone of the
    /// model, a copy from `valid()` or a live graph keeps its values, and the step copies. Reads back
    /// from the device once.
    ///
    /// The optimizer may be given another model, or the same one with other frames, from one step to
    /// the next: workers agree anew. Moments belong to parameters by their ids, and stay.
    ///
    /// # Errors
    ///
    /// A refused step gives the model back. Weights, frames and moments are then as before, on
    /// every worker; see [`OptimizerError`] for the causes.
    pub fn step<M: Module>(
        &mut self,
        lr: impl Into<ModuleLearningRate>,
        model: M,
        grads: impl Into<StepGradients>,
    ) -> Result<M, StepError<M>> {
        let prepared = match self.prepare(lr.into(), &model, grads.into()) {
            Ok(prepared) => prepared,
            Err(cause) => return Err(StepError { model, cause }),
        };
        // The last handle to the old weights, so that the merge can write in place.
        drop(model);
        self.commit(prepared)
    }

    /// Merges what is prepared, unless the checks keep the weights as they are.
    fn commit<M: Module>(&mut self, prepared: Prepared<M>) -> Result<M, StepError<M>> {
        let Prepared {
            mut stepped,
            mut companions,
            dense_before,
            inner,
            factors,
            mut deltas,
            dense_counts: [dense_gradients, dense_values],
            ranges,
            squared_gradients,
        } = prepared;
        let (layout, frames) = &mut **self.shared.as_mut().expect("agreed on before");
        let refuse = |stepped: M, cause| {
            let model = dense_before.restore(stepped);
            Err(StepError { model, cause })
        };
        loop {
            let checks = Checks::of(
                &factors,
                frames,
                &deltas,
                &dense_gradients,
                &dense_values,
                &ranges,
            );
            let gate = checks.gate();
            let (merged, squares) =
                Commit::apply(stepped, &factors, companions, self.steps, |weight| {
                    MergeInputs {
                        frames: frames.of(weight),
                        deltas: deltas.packed[weight].clone(),
                        gate: gate.clone(),
                        rank: factors.weights[weight].rank(),
                        measure: self.measure,
                    }
                });
            match checks.read(&factors, squares, squared_gradients.clone()) {
                Ok(Verdict::Merged {
                    squared_norm,
                    squared_gradients,
                }) => {
                    frames.adopt(&factors);
                    self.inner = inner;
                    self.steps += 1;
                    self.update_norm = self.measure.then(|| squared_norm.sqrt());
                    self.gradient_norms = squared_gradients.into_iter().map(f64::sqrt).collect();
                    return Ok(merged);
                }
                // Every worker comes to this, and the gate has kept the weights of all of them.
                Ok(Verdict::StaleFrames) => {
                    *frames = match Frames::gather(&factors, layout, &*self.communicator) {
                        Ok(frames) => frames,
                        Err(cause) => return refuse(merged, cause),
                    };
                    deltas.stale_is_settled();
                    (stepped, companions) = ZeroFactors::apply(merged, &factors.hosted);
                }
                // The gate has kept the weights, and the frames are back.
                Err(cause) => return refuse(merged, cause),
            }
        }
    }

    /// Everything of a step up to the merge; changes neither `self.inner` nor the model.
    fn prepare<M: Module>(
        &mut self,
        lr: ModuleLearningRate,
        model: &M,
        grads: StepGradients,
    ) -> Result<Prepared<M>, OptimizerError> {
        let factors = Factors::of(model, &*self.communicator)?;
        self.share(model, &factors)?;
        let (layout, frames) = &**self.shared.as_ref().expect("just shared");
        let communicator = &*self.communicator;
        let workers = communicator.num_workers();

        let due = self
            .fingerprint_every
            .is_some_and(|every| self.steps > 0 && self.steps.is_multiple_of(every.get()));
        if due && workers > 1 {
            Fingerprints::of_step(model, &factors, frames.all()).compare(communicator)?;
        }

        let (mut shards, dense) = match grads.resolve(&factors)? {
            Resolved::PerShard(mut shards) => {
                let dense = mean_gradients(model, &mut shards, layout, communicator)?;
                (shards, dense)
            }
            Resolved::Shared(sum, micro_batches) => {
                reduce_shared(model, sum, micro_batches, &factors, layout, communicator)?
            }
        };
        let statistics = gradient_statistics(&shards, &factors);
        if let Some(max_norm) = self.max_grad_norm {
            clip(
                &mut shards,
                &factors,
                &statistics,
                max_norm,
                layout,
                communicator,
            )?;
        }

        let mut inner = self.inner.clone();
        let (mut stepped, companions) = ZeroFactors::apply(model.clone(), &factors.hosted);
        let mut gradients = dense.gradients;
        let mut gathers = Vec::new();
        let groups = match workers {
            1 => 1,
            _ => self.gathers.get(),
        };
        let stale = frames.are_stale(&factors);
        for group in factors.groups(groups) {
            take_gradients(&mut shards, &factors.weights[group.clone()], &mut gradients);
            stepped = inner.step(lr.clone(), stepped, std::mem::take(&mut gradients));
            let moved = Factors::of(&stepped, communicator)?;
            let moved = moved.weights[group.clone()].iter();
            let counts = statistics[group.clone()].iter();
            let own = OwnDeltas {
                packed: moved
                    .map(|weight| self.wire.round(weight.packed()))
                    .collect(),
                bad_gradients: counts.map(RowStatistics::non_finite).collect(),
                stale: stale.clone(),
            };
            gathers.push(PendingDeltas::start(own, group, self.wire, communicator)?);
        }
        // All of them before the first merge: a step that fails has changed nothing.
        let deltas = Deltas::finish(gathers, &factors, layout, self.wire)?;

        Ok(Prepared {
            dense_counts: [dense.non_finite, non_finite_values(&stepped)],
            ranges: Range::of_weights(model, &factors),
            squared_gradients: self
                .measure
                .then(|| sum_of(&statistics, RowStatistics::squares)),
            stepped,
            companions,
            dense_before: DenseBefore::of(model),
            inner,
            factors,
            deltas,
        })
    }

    /// Agrees with the other workers on the adapters and shares the frames, where that is not done or
    /// was done for others.
    fn share<M: Module>(&mut self, model: &M, factors: &Factors) -> Result<(), OptimizerError> {
        self.refuse_record_of_others(factors)?;
        let communicator = &*self.communicator;
        let layout = match self.shared.take() {
            Some(shared) if shared.0.fits(factors) => {
                // Several workers learn from each other whether one of them has new frames.
                if communicator.num_workers() > 1 || shared.1.are_of(factors) {
                    self.shared = Some(shared);
                    return Ok(());
                }
                shared.0
            }
            _ => {
                let (shards, workers) = (factors.num_shards, communicator.num_workers());
                if factors.knows_all() && !shards.is_multiple_of(workers) {
                    return Err(OptimizerError::UnevenWorkers { shards, workers });
                }
                self.refuse_groups_that_read(factors)?;
                let settings = RunSettings {
                    wire: self.wire,
                    gathers: self.gathers.get(),
                };
                let model_hash = || Fingerprints::of_all(model).read_joined();
                ShardLayout::agree(factors, settings, communicator, model_hash)?
            }
        };
        let frames = Frames::gather(factors, &layout, communicator)?;
        self.shared = Some(Box::new((layout, frames)));
        Ok(())
    }

    /// The probe of [`new`](Self::new) again, with the paths and ids that parameter groups match.
    fn refuse_groups_that_read(&self, factors: &Factors) -> Result<(), OptimizerError> {
        let params = factors
            .iter()
            .map(|(weight, shard, side, factor)| (weight.factor_path(shard, side), factor.id));
        match Probe::new(&factors.device(), params).reads_parameter(&self.inner) {
            Some(path) => Err(OptimizerError::ReadsParameter { path: Some(path) }),
            None => Ok(()),
        }
    }

    /// Moments belong to the directions that they were collected in.
    fn refuse_record_of_others(&mut self, factors: &Factors) -> Result<(), OptimizerError> {
        if self.recorded.is_empty() {
            return Ok(());
        }
        for (_, shard, _, factor) in factors.iter() {
            let given = shard.to_string();
            let recorded = self.recorded.get(&factor.id.val());
            // A model may be part of a larger one by now: only the shard's own name counts.
            let recorded = recorded.and_then(|path| path.rsplit('.').nth(1));
            if let Some(recorded) = recorded.filter(|&recorded| recorded != given) {
                let recorded = recorded.into();
                return Err(OptimizerError::RecordOfOthers { recorded, given });
            }
        }
        self.recorded.clear();
        Ok(())
    }

    /// The transport, for what workers agree on besides steps, as
    /// [`Checkpoints::save`](crate::checkpoint::Checkpoints::save) does.
    pub fn communicator(&self) -> &dyn Communicator {
        &*self.communicator
    }
}

/// A step that only remains to be committed.
struct Prepared<M> {
    /// The model after the inner step: deltas in the place of factors, dense parameters updated.
    stepped: M,
    companions: Companions,
    dense_before: DenseBefore,
    inner: ModuleOptimizer,
    /// The factors of the model before the step.
    factors: Factors,
    deltas: Deltas,
    /// Bad values in the gradients of dense parameters, and in the stepped parameters themselves.
    dense_counts: [DenseCounts; 2],
    ranges: Vec<Range>,
    /// Of each hosted shard's gradients, `[hosted shards]`, if norms are wanted.
    squared_gradients: Option<Tensor<1>>,
}

/// What is known of each weight's gradients, over the hosted shards.
fn gradient_statistics(shards: &[GradientsParams], factors: &Factors) -> Vec<RowStatistics> {
    let of_weight = |weight: &WeightFactors| {
        let gradients = shards.iter().zip(&weight.shards).map(|(gradients, shard)| {
            let gradient = |id| gradients.get::<2>(id).expect("no gradient is missing");
            (gradient(shard.a.id), gradient(shard.b.id))
        });
        RowStatistics::of(pack(gradients), weight.split())
    };
    factors.weights.iter().map(of_weight).collect()
}

/// Moves the gradients of some weights from the hosted shards to those for the inner optimizer,
/// whose parameters have different ids in each shard.
fn take_gradients(
    shards: &mut [GradientsParams],
    weights: &[WeightFactors],
    joined: &mut GradientsParams,
) {
    for weight in weights {
        for (gradients, shard) in shards.iter_mut().zip(&weight.shards) {
            for id in [shard.a.id, shard.b.id] {
                if let Some(gradient) = gradients.remove::<2>(id) {
                    joined.register(id, gradient);
                }
            }
        }
    }
}
