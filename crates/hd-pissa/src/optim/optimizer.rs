use std::num::{NonZeroU64, NonZeroUsize};
use std::path::Path;

use burn::lr_scheduler::module_lr_scheduler::ModuleLearningRate;
use burn::module::{Module, ParamId};
use burn::optim::{GradientsParams, ModuleOptimizer, OptimizerRecord};
use burn::tensor::{Bytes, Device, Tensor};
use burn_pack::{Reader, Scalar, Writer};
use hd_pissa_comm::{Communicator, Traffic};

use super::exchange::{Pair, Roster, ShardDeltas, compare};
use super::factors::{Commit, Companions, Factors, WeightFactors, ZeroFactors};
use super::fingerprint;
use super::gradients::ShardGradients;
use super::others::{OthersBefore, mean_gradients};
use super::probe::Probe;
use super::{OptimizerError, StepError, WireDtype};
use crate::adapter::path::shard_path;
use crate::checkpoint::check_record;
use crate::ops::{self, MergeInputs};

/// Version of the records that this build writes and reads.
const FORMAT_VERSION: u64 = 1;
const FORMAT_KEY: &str = "hd_pissa.format_version";
const STEPS_KEY: &str = "hd_pissa.steps";

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
    inner: ModuleOptimizer,
    communicator: Box<dyn Communicator>,
    max_grad_norm: Option<f64>,
    fingerprint_every: Option<NonZeroU64>,
    wire: WireDtype,
    /// Gathers of a step, with several workers.
    gathers: NonZeroUsize,
    roster: Option<Roster>,
    /// Whether to measure updates, and the norm of the last one.
    measure: bool,
    update_norm: Option<f64>,
    /// Steps taken, which stochastic rounding draws from.
    steps: u64,
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
            roster: None,
            measure: false,
            update_norm: None,
            steps: 0,
        })
    }

    /// Scales each shard's factor gradients down to this global (2-)norm where it is larger.
    ///
    /// The norm runs over all factors of one shard. Gradients of parameters outside the adapters
    /// are not clipped.
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

    /// Before every `steps`-th step, compares every parameter that steps move with the other
    /// workers' copies, bit for bit; 50 by default, `None` for never. A single worker compares
    /// nothing. Reads all these parameters back from the device.
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

    /// Measures the norm of every update from now on; see [`update_norm`](Self::update_norm).
    ///
    /// The GPU backends compute it with every merge anyway; on Flex it costs about half of a merge
    /// for each weight. No tensor of the weight's size is made.
    pub fn with_update_norm(mut self) -> Self {
        self.measure = true;
        self
    }

    /// Frobenius norm of what the last step added to all adapted weights together, before rounding
    /// to their dtype. `None` before the first step, and without
    /// [`with_update_norm`](Self::with_update_norm).
    pub fn update_norm(&self) -> Option<f64> {
        self.update_norm
    }

    /// Number of steps taken, records included.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Takes one step: Burn's call, with the gradients of one shard (`GradientsParams`) or of
    /// several ([`ShardGradients`]).
    ///
    /// The gradients must cover every shard that this worker hosts. All workers step together.
    /// Where no one else holds a weight's tensor it is updated in place; a clone of the model, a
    /// copy from `valid()` or a live graph keeps its values, and the step copies. Reads back from
    /// the device once.
    ///
    /// # Errors
    ///
    /// A refused step gives the model back. Weights, frames and moments are then as before, on
    /// every worker; see [`OptimizerError`] for the causes.
    pub fn step<M: Module>(
        &mut self,
        lr: impl Into<ModuleLearningRate>,
        model: M,
        grads: impl Into<ShardGradients>,
    ) -> Result<M, StepError<M>> {
        let Prepared {
            stepped,
            companions,
            others_before,
            inner,
            factors,
            deltas,
            bad_values,
        } = match self.prepare(lr.into(), &model, grads.into()) {
            Ok(prepared) => prepared,
            Err(cause) => return Err(StepError { model, cause }),
        };
        // The last handle to the old weights, so that the merge can write in place.
        drop(model);
        let roster = self
            .roster
            .as_ref()
            .expect("agreed on before the first step");
        let moved = |weight: usize| deltas.iter().map(move |shard| shard.pairs[weight].clone());
        let gate = bad_values.total();
        let (stepped, squares) =
            Commit::apply(stepped, &factors, companions, self.steps, |weight| {
                MergeInputs {
                    frames: rows(roster.frames(&factors, weight)),
                    deltas: rows(moved(weight)),
                    gate: gate.clone(),
                    rank: factors.weights[weight].rank(),
                    measure: self.measure,
                }
            });
        match bad_values.read(&factors, squares) {
            Ok(squared_norm) => {
                self.inner = inner;
                self.steps += 1;
                self.update_norm = self.measure.then(|| squared_norm.sqrt());
                Ok(stepped)
            }
            // The gate has kept the weights, and the frames are back.
            Err(cause) => Err(StepError {
                model: others_before.restore(stepped),
                cause,
            }),
        }
    }

    /// Everything of a step up to the merge; changes neither `self.inner` nor the model.
    fn prepare<M: Module>(
        &mut self,
        lr: ModuleLearningRate,
        model: &M,
        grads: ShardGradients,
    ) -> Result<Prepared<M>, OptimizerError> {
        let factors = Factors::of(model)?;
        let communicator = &*self.communicator;
        let roster = match self.roster.take() {
            Some(roster) => roster,
            None => {
                self.refuse_groups_that_read(&factors)?;
                let (wire, gathers) = (self.wire, self.gathers.get());
                Roster::agree(&factors, wire, gathers, communicator, || {
                    fingerprint::join(&fingerprint::of_all(model))
                })?
            }
        };
        let roster = self.roster.insert(roster);

        let due = self
            .fingerprint_every
            .is_some_and(|every| self.steps > 0 && self.steps.is_multiple_of(every.get()));
        if due && communicator.num_workers() > 1 {
            compare(
                &fingerprint::of_trained(model, &factors),
                &factors,
                communicator,
            )?;
        }

        let mut shards = grads.resolve(&factors)?;
        if let Some(max_norm) = self.max_grad_norm {
            clip(&mut shards, &factors, max_norm);
        }
        let others = mean_gradients(model, &mut shards, roster, communicator)?;

        let mut inner = self.inner.clone();
        let (mut stepped, companions) = ZeroFactors::apply(model.clone());
        let mut gradients = others.gradients;
        let mut gathers = Vec::new();
        let groups = match communicator.num_workers() {
            1 => 1,
            _ => self.gathers.get(),
        };
        for group in factors.groups(groups) {
            let weights = &factors.weights[group.clone()];
            let bad_gradients = take_gradients(&mut shards, weights, &mut gradients);
            stepped = inner.step(lr.clone(), stepped, std::mem::take(&mut gradients));
            let moved = Factors::of(&stepped)?;
            let hosted = deltas_of(&moved.weights[group], bad_gradients, self.wire);
            gathers.push(roster.start_deltas(hosted, weights, self.wire, communicator)?);
        }
        // All of them before the first merge: a step that fails has changed nothing.
        let deltas = roster.finish_deltas(gathers)?;
        let bad_values = BadValues::of(&deltas, others.non_finite);

        Ok(Prepared {
            stepped,
            companions,
            others_before: OthersBefore::of(model),
            inner,
            factors,
            deltas,
            bad_values,
        })
    }

    /// The probe of [`new`](Self::new) again, with the paths and ids that parameter groups match.
    fn refuse_groups_that_read(&self, factors: &Factors) -> Result<(), OptimizerError> {
        let params = factors.iter().map(|(weight, shard, side, factor)| {
            let shard = shard_path(&weight.path, shard, factors.num_shards);
            (format!("{shard}.{}", side.name()), factor.id)
        });
        let device = factors.weights[0].shards[0].a.value.device().inner();
        match Probe::new(&device, params).reads_parameter(&self.inner) {
            Some(path) => Err(OptimizerError::ReadsParameter { path: Some(path) }),
            None => Ok(()),
        }
    }

    /// The transport, for what workers agree on besides steps, as
    /// [`Checkpoints::save`](crate::checkpoint::Checkpoints::save) does.
    pub fn communicator(&self) -> &dyn Communicator {
        &*self.communicator
    }

    /// Serializes the state of the inner optimizer (the moments of the hosted shards) in Burn's
    /// format, with the number of steps and a format version.
    ///
    /// # Errors
    ///
    /// [`OptimizerError::InvalidRecord`] if the state cannot be serialized.
    pub fn to_bytes(&self) -> Result<Bytes, OptimizerError> {
        let reader = Reader::from_bytes(self.inner.into_bytes()?).map_err(invalid_record)?;
        let scalars = reader.scalars().clone();
        let metadata = reader.metadata().clone();
        let mut writer = Writer::new(reader.into_tensors().map_err(invalid_record)?)
            .with_scalar(FORMAT_KEY, Scalar::from(FORMAT_VERSION))
            .with_scalar(STEPS_KEY, Scalar::from(self.steps));
        for (key, value) in &scalars {
            writer = writer.with_scalar(key, *value);
        }
        for (key, value) in &metadata {
            writer = writer.with_metadata(key, value);
        }
        writer.into_bytes().map_err(invalid_record)
    }

    /// Restores a state written by [`to_bytes`](Self::to_bytes).
    ///
    /// # Errors
    ///
    /// [`OptimizerError::InvalidRecord`] or [`OptimizerError::UnsupportedVersion`]; `self` is then
    /// lost, the record unread.
    pub fn from_bytes(mut self, bytes: Bytes) -> Result<Self, OptimizerError> {
        let reader = Reader::from_bytes(bytes.clone()).map_err(invalid_record)?;
        let scalar = |key: &str| {
            let value = reader.scalars().get(key).copied();
            let value = value.and_then(|value| u64::try_from(value).ok());
            value.ok_or_else(|| OptimizerError::InvalidRecord {
                reason: format!("it has no scalar `{key}`"),
            })
        };
        let found = scalar(FORMAT_KEY)?;
        if found != FORMAT_VERSION {
            return Err(OptimizerError::UnsupportedVersion {
                found,
                supported: FORMAT_VERSION,
            });
        }
        self.steps = scalar(STEPS_KEY)?;
        let scalars = reader.scalars().clone();
        let tensors = reader.into_tensors().map_err(invalid_record)?;
        check_record(&tensors, &scalars)
            .map_err(|reason| OptimizerError::InvalidRecord { reason })?;
        self.inner = self.inner.load_record(OptimizerRecord::from_bytes(bytes)?);
        Ok(self)
    }

    /// Writes the state to a file, beside it first and then renamed: the file is complete or as
    /// before.
    ///
    /// # Errors
    ///
    /// [`OptimizerError::Io`] with the path, and those of [`to_bytes`](Self::to_bytes).
    pub fn save(&self, path: impl AsRef<Path>) -> Result<(), OptimizerError> {
        let path = path.as_ref();
        let bytes = self.to_bytes()?;
        let write = || -> std::io::Result<()> {
            let folder = match path.parent() {
                Some(folder) if !folder.as_os_str().is_empty() => folder,
                _ => Path::new("."),
            };
            let mut file = tempfile::NamedTempFile::new_in(folder)?;
            std::io::Write::write_all(&mut file, &bytes)?;
            file.as_file().sync_all()?;
            file.persist(path)?;
            Ok(())
        };
        write().map_err(|error| io_error(path, &error))
    }

    /// Restores a state written by [`save`](Self::save).
    ///
    /// # Errors
    ///
    /// [`OptimizerError::Io`] with the path, and those of [`from_bytes`](Self::from_bytes).
    pub fn load(self, path: impl AsRef<Path>) -> Result<Self, OptimizerError> {
        let path = path.as_ref();
        let bytes = std::fs::read(path).map_err(|error| io_error(path, &error))?;
        self.from_bytes(Bytes::from_bytes_vec(bytes))
    }
}

/// A step that only remains to be committed.
struct Prepared<M> {
    /// The model after the inner step: deltas in the place of factors, other parameters updated.
    stepped: M,
    companions: Companions,
    others_before: OthersBefore,
    inner: ModuleOptimizer,
    /// The factors of the model before the step.
    factors: Factors,
    /// The deltas of every shard, by index.
    deltas: Vec<ShardDeltas>,
    bad_values: BadValues,
}

fn invalid_record(error: impl std::fmt::Display) -> OptimizerError {
    OptimizerError::InvalidRecord {
        reason: error.to_string(),
    }
}

fn io_error(path: &Path, error: &std::io::Error) -> OptimizerError {
    OptimizerError::Io {
        path: path.display().to_string(),
        reason: error.to_string(),
    }
}

/// Scales the factor gradients of each shard to a global norm of at most `max_norm`.
fn clip(shards: &mut [GradientsParams], factors: &Factors, max_norm: f64) {
    for (gradients, &shard) in shards.iter_mut().zip(&factors.hosted) {
        let ids: Vec<ParamId> = factors
            .iter()
            .filter(|&(_, index, _, _)| index == shard)
            .map(|(_, _, _, factor)| factor.id)
            .collect();
        let squares = ids
            .iter()
            .filter_map(|&id| gradients.get::<2>(id))
            .map(|gradient| gradient.square().sum());
        let Some(sum) = squares.reduce(|sum, square| sum + square) else {
            continue;
        };
        // The small term is that of PyTorch's clip_grad_norm_.
        let factor = (sum.sqrt() + 1e-6).recip() * max_norm;
        let factor = factor.clamp_max(1.0).unsqueeze::<2>();
        for id in ids {
            if let Some(gradient) = gradients.remove::<2>(id) {
                gradients.register(id, gradient * factor.clone());
            }
        }
    }
}

/// Moves the gradients of some weights from the hosted shards to those for the inner optimizer,
/// whose parameters have different ids in each shard; for each shard and weight the number of bad
/// values.
fn take_gradients(
    shards: &mut [GradientsParams],
    weights: &[WeightFactors],
    joined: &mut GradientsParams,
) -> Vec<Vec<Option<Tensor<1>>>> {
    shards
        .iter_mut()
        .enumerate()
        .map(|(position, gradients)| {
            weights
                .iter()
                .map(|weight| {
                    let shard = &weight.shards[position];
                    [shard.a.id, shard.b.id]
                        .into_iter()
                        .filter_map(|id| {
                            let gradient = gradients.remove::<2>(id)?;
                            let count = ops::count_non_finite(gradient.clone());
                            joined.register(id, gradient);
                            Some(count)
                        })
                        .reduce(|sum, count| sum + count)
                })
                .collect()
        })
        .collect()
}

/// Reads the deltas of some weights out of the factors' places, shard by shard, as they arrive
/// after the exchange.
fn deltas_of(
    stepped: &[WeightFactors],
    bad_gradients: Vec<Vec<Option<Tensor<1>>>>,
    wire: WireDtype,
) -> Vec<ShardDeltas> {
    bad_gradients
        .into_iter()
        .enumerate()
        .map(|(position, bad_gradients)| {
            let mut pairs = Vec::with_capacity(stepped.len());
            let mut non_finite = Vec::with_capacity(stepped.len());
            for (weight, bad_gradients) in stepped.iter().zip(bad_gradients) {
                let shard = &weight.shards[position];
                let pair = Pair {
                    a: wire.round(shard.a.value.clone().inner()),
                    b: wire.round(shard.b.value.clone().inner()),
                };
                // Rounding can carry a value to infinity.
                let bad =
                    ops::count_non_finite(pair.a.clone()) + ops::count_non_finite(pair.b.clone());
                non_finite.push(match bad_gradients {
                    Some(count) => bad + count,
                    None => bad,
                });
                pairs.push(pair);
            }
            ShardDeltas { pairs, non_finite }
        })
        .collect()
}

/// How many NaN and infinite values a step's gradients and deltas hold, on the device.
struct BadValues {
    /// For each shard and weight, then for each other parameter, `[n]`.
    counts: Tensor<1>,
    shards: usize,
    /// Paths of the other parameters.
    others: Vec<String>,
}

impl BadValues {
    fn of(all: &[ShardDeltas], others: Vec<(String, Tensor<1>)>) -> Self {
        let (paths, others): (Vec<_>, Vec<_>) = others.into_iter().unzip();
        let shards = all
            .iter()
            .flat_map(|shard| shard.non_finite.iter().cloned());
        Self {
            counts: Tensor::cat(shards.chain(others).collect(), 0),
            shards: all.len(),
            others: paths,
        }
    }

    /// Zero if and only if there are none, `[1]`.
    fn total(&self) -> Tensor<1> {
        self.counts.clone().sum()
    }

    /// The step's one read-back: the sum of `squares`, unless there are bad values.
    fn read(self, factors: &Factors, squares: Vec<Tensor<1>>) -> Result<f64, OptimizerError> {
        let all = [vec![self.counts], squares].concat();
        let all: Vec<f32> = Tensor::cat(all, 0).into_data().iter::<f32>().collect();
        let weights = factors.weights.len();
        let (counts, squares) = all.split_at(all.len() - weights);
        let Some(position) = counts.iter().position(|&count| count != 0.0) else {
            return Ok(squares.iter().map(|&square| f64::from(square)).sum());
        };
        let path = match position.checked_sub(self.shards * weights) {
            Some(other) => self.others[other].clone(),
            None => {
                let (shard, weight) = (position / weights, position % weights);
                shard_path(&factors.weights[weight].path, shard, factors.num_shards)
            }
        };
        Err(OptimizerError::NonFinite {
            path,
            count: counts[position] as usize,
        })
    }
}

/// One row for each shard: its `a`, then its `b`, row by row.
fn rows(pairs: impl Iterator<Item = Pair>) -> Tensor<2> {
    let parts: Vec<Tensor<1>> = pairs
        .flat_map(|pair| [pair.a.flatten(0, 1), pair.b.flatten(0, 1)])
        .collect();
    let shards = parts.len() / 2;
    let all = Tensor::cat(parts, 0);
    let len = all.dims()[0] / shards;
    all.reshape([shards, len])
}
