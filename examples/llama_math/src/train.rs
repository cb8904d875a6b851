//! Steps of training, the same micro-batches for every method.

use std::borrow::Borrow;
use std::ops::Range;

use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::{
    AdamConfig, AdamWConfig, GradientsAccumulator, GradientsParams, ModuleOptimizer,
};
use burn::tensor::{Bytes, Device, Tensor};
use hd_pissa::checkpoint::Checkpoint;
use hd_pissa::comm::{Communicator, Solo};
use hd_pissa::{
    CommunicationDtype, HdPissaModule, HdPissaOptimizer, HdPissaOptimizerConfig,
    HdPissaOptimizerRecord, OptimizerError, ShardGradients, SharedGradients, StepGradients,
    side_by_side,
};

use crate::batch::{MicroBatch, POSITIONS_PER_PASS};
use crate::loss::LossMean;
use crate::method::{Adaptation, Method, num_trainable};
use crate::ops::is_flex;
use crate::spectrum::WeightsBefore;
use crate::{Error, Llama};

/// Epsilon of Adam: PyTorch's default, where Burn's is 1e-5.
const EPSILON: f32 = 1e-8;

/// Settings of the optimizer.
#[derive(Clone, Copy, Debug, Default)]
pub struct OptimizerSettings {
    /// Largest global gradient norm; with HD-PiSSA of each shard.
    pub clip: Option<f64>,
    /// Decoupled weight decay; not with HD-PiSSA.
    pub weight_decay: f64,
    /// In what precision deltas travel between workers, with HD-PiSSA.
    pub wire: CommunicationDtype,
    /// Over what the loss of a step is the mean.
    pub loss_mean: LossMean,
}

/// A model in training.
pub struct Trainer {
    /// `None` only while a step holds it.
    model: Option<Llama>,
    optimizer: Optimizer,
    device: Device,
    /// Whose micro-batches this worker takes.
    share: Share,
    loss_mean: LossMean,
}

/// The micro-batches of a step that a worker takes.
enum Share {
    /// Those of these shards, each with its own.
    Shards(Range<usize>),
    /// The part of this worker, of so many, for all shards at once.
    Part { worker: usize, workers: usize },
}

impl Share {
    /// Of the micro-batches of all shards, those of this worker: a group for each shard, or one. Their
    /// mean loss is that of the shard, or of all shards.
    fn of(&self, mut shards: Vec<Vec<MicroBatch>>, mean: LossMean) -> Vec<Vec<MicroBatch>> {
        match self {
            Self::Shards(_) => shards
                .iter_mut()
                .for_each(|shard| mean.apply(shard.iter_mut())),
            Self::Part { .. } => mean.apply(shards.iter_mut().flatten()),
        }
        match self {
            Self::Shards(hosted) => shards.drain(hosted.clone()).collect(),
            Self::Part { worker, workers } => {
                let mut all: Vec<MicroBatch> = shards.into_iter().flatten().collect();
                let part = all.len() / workers;
                vec![all.drain(worker * part..(worker + 1) * part).collect()]
            }
        }
    }

    /// The first of the shards that have micro-batches of their own.
    fn first_shard(&self) -> Option<usize> {
        match self {
            Self::Shards(hosted) => Some(hosted.start),
            Self::Part { .. } => None,
        }
    }
}

enum Optimizer {
    /// A step per shard's mean gradient, merged into the weights.
    HdPissa(HdPissaOptimizer),
    /// One step with the mean gradient of all micro-batches.
    Mean {
        inner: ModuleOptimizer,
        clip: Option<f64>,
    },
}

impl Optimizer {
    fn communicator(&self) -> &dyn Communicator {
        match self {
            Self::HdPissa(inner) => inner.communicator(),
            Self::Mean { .. } => &Solo,
        }
    }
}

/// What one step did.
#[derive(Clone, Copy, Debug)]
pub struct StepReport {
    /// Mean loss per target, over what [`LossMean`] says, and over the shards.
    pub loss: f64,
    /// Global norm of the gradients before clipping, over all shards.
    pub gradient_norm: f64,
    /// Frobenius norm of the change of all weight matrices together.
    pub update_norm: f64,
    /// Tokens processed, without padding.
    pub tokens: usize,
}

impl Trainer {
    /// Prepares `model`, which must be on an autodiff device.
    ///
    /// # Errors
    ///
    /// Those of [`Adaptation::apply`], and [`Error::Optimizer`].
    pub fn new(
        model: Llama,
        adaptation: &Adaptation,
        settings: OptimizerSettings,
    ) -> Result<Self, Error> {
        Self::with_communicator(model, adaptation, settings, Solo, None)
    }

    /// Prepares `model` on one of several workers, which hosts its share of HD-PiSSA's shards: the
    /// first worker the first ones, and so on. The number of workers must divide that of shards.
    ///
    /// Model and optimizer have the state of the checkpoint, if one is given.
    ///
    /// # Errors
    ///
    /// Those of [`new`](Self::new), [`Error::Checkpoint`], and [`Error::Optimizer`] for the record of
    /// another optimizer.
    pub fn with_communicator(
        model: Llama,
        adaptation: &Adaptation,
        settings: OptimizerSettings,
        communicator: impl Communicator + 'static,
        saved: Option<&Checkpoint>,
    ) -> Result<Self, Error> {
        let device = model.device();
        let (worker, workers) = (communicator.worker_index(), communicator.num_workers());
        let part = adaptation.shards / workers;
        let own = part * worker..part * (worker + 1);
        let is_per_shard = adaptation.method == Method::HdPissa && !adaptation.shares_gradients();
        let (hosted, share) = match is_per_shard {
            true => (own.clone(), Share::Shards(own)),
            false => (0..adaptation.shards, Share::Part { worker, workers }),
        };
        let model = adaptation.apply_hosted(model, hosted, &communicator, saved)?;
        let state = saved.map(|saved| saved.optimizer(&model, &communicator));
        let state = state.transpose()?;
        let optimizer = match adaptation.method {
            Method::HdPissa => {
                let adam = AdamConfig::new().with_epsilon(EPSILON).init();
                let config = HdPissaOptimizerConfig::new()
                    .with_measure_norms(true)
                    .with_communication_dtype(settings.wire)
                    .with_max_grad_norm(settings.clip);
                let mut optimizer = config.init(adam, communicator)?;
                if let Some(state) = state {
                    optimizer.load_record(HdPissaOptimizerRecord::from_bytes(state)?)?;
                }
                Optimizer::HdPissa(optimizer)
            }
            _ => {
                // Without decay this is Adam.
                let inner = AdamWConfig::new()
                    .with_epsilon(EPSILON)
                    .with_weight_decay(settings.weight_decay as f32)
                    .init();
                Optimizer::Mean {
                    inner: match state {
                        Some(state) => inner.from_bytes(state).map_err(OptimizerError::from)?,
                        None => inner,
                    },
                    clip: settings.clip,
                }
            }
        };
        Ok(Self {
            model: Some(model),
            optimizer,
            device,
            share,
            loss_mean: settings.loss_mean,
        })
    }

    /// The state of the optimizer, for a checkpoint.
    ///
    /// # Errors
    ///
    /// [`Error::Optimizer`] if it cannot be serialized.
    pub fn optimizer_state(&self) -> Result<Bytes, Error> {
        Ok(match &self.optimizer {
            Optimizer::HdPissa(inner) => inner.to_record()?.into_bytes()?,
            Optimizer::Mean { inner, .. } => inner.into_bytes().map_err(OptimizerError::from)?,
        })
    }

    /// The transport.
    pub fn communicator(&self) -> &dyn Communicator {
        self.optimizer.communicator()
    }

    /// Number of values that gradients move, over all workers.
    pub fn num_trainable(&self) -> usize {
        let own = num_trainable(self.model());
        match &self.share {
            Share::Shards(_) => own * self.communicator().num_workers(),
            Share::Part { .. } => own,
        }
    }

    /// A few numbers of every worker, the same number of each, in the order of workers.
    ///
    /// # Errors
    ///
    /// [`Error::Comm`].
    pub fn gather(&self, own: &[f32]) -> Result<Vec<f32>, Error> {
        let communicator = self.communicator();
        if communicator.num_workers() == 1 {
            return Ok(own.to_vec());
        }
        let buffer = Tensor::from_floats(own, &self.device.clone().inner());
        let gathered = communicator.all_gather(buffer)?;
        Ok(gathered.into_data().iter::<f32>().collect())
    }

    /// The model.
    pub fn model(&self) -> &Llama {
        self.model.as_ref().expect("a step puts the model back")
    }

    /// Whether a run could go on from here: all parameters are finite, and so are loss and gradients
    /// of one of this worker's micro-batches, given those of all shards.
    pub fn is_sound(&self, shards: Vec<Vec<MicroBatch>>) -> bool {
        let own = self.share.of(shards, self.loss_mean);
        let micro_batch = &own[0][0];
        /// Zero as long as everything is finite.
        struct Zero(Vec<Tensor<1>>);

        impl ModuleVisitor for Zero {
            fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
                self.0.push((param.base().inner() * 0.0).sum());
            }
        }

        let mut zero = Zero(Vec::new());
        self.model().visit(&mut zero);
        if zero
            .0
            .into_iter()
            .any(|zero| zero.into_scalar::<f32>() != 0.0)
        {
            return false;
        }
        let first = self.share.first_shard();
        let total = &mut Total::default();
        let groups = [vec![micro_batch]];
        let gradients = mean_gradients(
            self.model(),
            first,
            &groups,
            usize::MAX,
            &self.device,
            total,
        );
        let is_finite = |gradients: &GradientsParams| {
            squared_gradient_norm(self.model(), gradients).is_finite()
        };
        gradients.is_ok_and(|gradients| gradients.iter().all(is_finite))
    }

    /// Ends the training.
    pub fn into_model(self) -> Llama {
        self.model.expect("a step puts the model back")
    }

    /// Takes a step on this worker's share of the micro-batches of all shards. `step` counts from 1,
    /// for messages. The report is about all shards, the same on every worker.
    ///
    /// Where shards share gradients, the number of workers must divide that of micro-batches.
    ///
    /// # Errors
    ///
    /// [`Error::NonFiniteLoss`], [`Error::NonFiniteGradient`] and [`Error::Step`]. The weights are
    /// then those from before the step.
    pub fn step(
        &mut self,
        step: usize,
        lr: f64,
        shards: Vec<Vec<MicroBatch>>,
    ) -> Result<StepReport, Error> {
        let groups = &self.share.of(shards, self.loss_mean)[..];
        let model = self.model.take().expect("a step puts the model back");
        let mut total = Total {
            step,
            ..Total::default()
        };
        let (model, norms) = match &mut self.optimizer {
            Optimizer::HdPissa(inner) => {
                let first = self.share.first_shard();
                step_of_shards(inner, model, lr, first, groups, &self.device, &mut total)
            }
            Optimizer::Mean { inner, clip } => {
                step_of_mean(inner, *clip, model, lr, groups, &self.device, &mut total)
            }
        };
        self.model = Some(model);
        let Norms {
            squared_gradients,
            update,
        } = norms?;
        // Each value is an `f32` that came from a device, and a number of tokens is far below
        // 2²⁴: nothing is rounded. Summed in the order of shards, so that the sums do not depend
        // on how many workers there are.
        let mut own = vec![total.tokens as f32];
        own.extend(squared_gradients.iter().map(|&square| square as f32));
        own.extend(&total.losses);
        let all = self.gather(&own)?;
        let (mut tokens, mut squared_norm, mut loss) = (0, 0.0, 0.0);
        for worker in all.chunks(own.len()) {
            let (squares, losses) = worker[1..].split_at(squared_gradients.len());
            tokens += worker[0] as usize;
            squared_norm = squares
                .iter()
                .fold(squared_norm, |sum, &x| sum + f64::from(x));
            loss = losses.iter().fold(loss, |sum, &x| sum + f64::from(x));
        }
        let micro_batches = total.losses.len() * (all.len() / own.len());
        Ok(StepReport {
            loss: loss / micro_batches as f64,
            gradient_norm: squared_norm.sqrt(),
            update_norm: update,
            tokens,
        })
    }
}

/// Norms of a step's gradients and update.
struct Norms {
    /// One for each hosted shard, or one for the mean gradient.
    squared_gradients: Vec<f64>,
    update: f64,
}

/// HD-PiSSA: the shards step with the mean gradients of their own micro-batches, from shard
/// `first_shard` on, or all of them with that of all.
fn step_of_shards(
    optimizer: &mut HdPissaOptimizer,
    model: Llama,
    lr: f64,
    first_shard: Option<usize>,
    groups: &[Vec<MicroBatch>],
    device: &Device,
    total: &mut Total,
) -> (Llama, Result<Norms, Error>) {
    let limit = positions_per_pass(device);
    let gradients: Result<StepGradients, Error> = match first_shard {
        Some(first) => {
            let mut gradients = ShardGradients::new(&model);
            mean_gradients(&model, Some(first), groups, limit, device, total).map(|means| {
                for (shard, mean) in (first..).zip(means) {
                    gradients.push(shard, mean);
                }
                gradients.into()
            })
        }
        None => {
            let count = groups.iter().map(Vec::len).sum();
            let mut gradients = SharedGradients::new(&model, count);
            let mut of_micro_batch = GradientsAccumulator::new();
            let add = |pass: &Pass, of_pass| {
                of_micro_batch.accumulate(&model, of_pass);
                if pass.is_last {
                    gradients.push(of_micro_batch.grads());
                }
            };
            let passes = passes(groups, limit, |_| 1);
            each_gradient(&model, None, passes, device, total, add).map(|()| gradients.into())
        }
    };
    let gradients = match gradients {
        Ok(gradients) => gradients,
        Err(error) => return (model, Err(error)),
    };
    match optimizer.step(lr, model, gradients) {
        Ok(model) => {
            let squares = optimizer.gradient_norms().iter().map(|norm| norm * norm);
            let norms = Norms {
                squared_gradients: squares.collect(),
                update: optimizer.update_norm().unwrap_or_default(),
            };
            (model, Ok(norms))
        }
        Err(refused) => {
            let error = Error::Step {
                step: total.step,
                source: refused.cause,
            };
            (refused.model, Err(error))
        }
    }
}

/// Every other method: one step with the mean gradient of all micro-batches. A pass takes a whole one,
/// since each pass of Burn's LoRA computes the adapted weights anew.
fn step_of_mean(
    optimizer: &mut ModuleOptimizer,
    clip: Option<f64>,
    model: Llama,
    lr: f64,
    groups: &[Vec<MicroBatch>],
    device: &Device,
    total: &mut Total,
) -> (Llama, Result<Norms, Error>) {
    let all = [groups.iter().flatten().collect::<Vec<_>>()];
    let mut mean = match mean_gradients(&model, None, &all, usize::MAX, device, total) {
        Ok(mut means) => means.remove(0),
        Err(error) => return (model, Err(error)),
    };
    let squared_norm = squared_gradient_norm(&model, &mean);
    let norm = squared_norm.sqrt();
    if !norm.is_finite() {
        return (
            model,
            Err(Error::NonFiniteGradient {
                step: total.step,
                norm,
            }),
        );
    }
    if let Some(clip) = clip {
        // As PyTorch's clip_grad_norm_.
        let factor = clip / (norm + 1e-6);
        if factor < 1.0 {
            scale_gradients(&model, &mut mean, factor);
        }
    }
    let before = WeightsBefore::of(&model);
    let model = optimizer.step(lr, model, mean);
    let update = before.distance(&model);
    (
        model,
        Ok(Norms {
            squared_gradients: vec![squared_norm],
            update,
        }),
    )
}

#[derive(Default)]
struct Total {
    step: usize,
    /// Of each micro-batch.
    losses: Vec<f32>,
    tokens: usize,
}

/// For each group of micro-batches the mean of the gradients of their loss per target. With HD-PiSSA
/// a group is a shard, and `first_shard` the first of them. A pass takes `limit` positions at most.
fn mean_gradients<B: Borrow<MicroBatch>>(
    model: &Llama,
    first_shard: Option<usize>,
    groups: &[Vec<B>],
    limit: usize,
    device: &Device,
    total: &mut Total,
) -> Result<Vec<GradientsParams>, Error> {
    let mut accumulators: Vec<_> = groups.iter().map(|_| GradientsAccumulator::new()).collect();
    let passes = passes(groups, limit, Vec::len);
    each_gradient(
        model,
        first_shard,
        passes,
        device,
        total,
        |pass, gradients| {
            accumulators[pass.group].accumulate(model, gradients);
        },
    )?;
    Ok(accumulators.iter_mut().map(|all| all.grads()).collect())
}

/// Positions that a pass takes at most where weights are frozen and read in place.
fn positions_per_pass(device: &Device) -> usize {
    match is_flex(device) {
        true => POSITIONS_PER_PASS,
        false => usize::MAX,
    }
}

/// A part of a micro-batch, or all of it.
struct Pass {
    group: usize,
    batch: MicroBatch,
    /// What the loss of the micro-batch per target is divided by.
    count: usize,
    /// Whether it is the first and the last of its micro-batch.
    is_first: bool,
    is_last: bool,
}

/// The passes of the micro-batches, in order, of `limit` positions at most, with the `divisor` of each
/// group.
fn passes<B: Borrow<MicroBatch>>(
    groups: &[Vec<B>],
    limit: usize,
    divisor: impl Fn(&Vec<B>) -> usize,
) -> Vec<Pass> {
    let mut passes = Vec::new();
    for (group, micro_batches) in groups.iter().enumerate() {
        let count = divisor(micro_batches);
        for micro_batch in micro_batches {
            let parts = micro_batch.borrow().parts(limit);
            let last = parts.len() - 1;
            let parts = parts.into_iter().enumerate();
            passes.extend(parts.map(|(part, batch)| Pass {
                group,
                batch,
                count,
                is_first: part == 0,
                is_last: part == last,
            }));
        }
    }
    passes
}

/// Hands the gradients of each pass to `collect`, in order. Those of the passes of a micro-batch are parts
/// of a sum.
fn each_gradient(
    model: &Llama,
    first_shard: Option<usize>,
    passes: Vec<Pass>,
    device: &Device,
    total: &mut Total,
    mut collect: impl FnMut(&Pass, GradientsParams),
) -> Result<(), Error> {
    let mut failed = None;
    side_by_side(
        model,
        passes,
        |model, pass| {
            let selected = first_shard.map(|first| {
                let selected = model.clone().select_shard(first + pass.group);
                selected.expect("each group is that of a hosted shard")
            });
            let model = selected.as_ref().unwrap_or(model);
            let loss = pass.batch.loss(model, device) / pass.batch.divisor();
            let value: f32 = loss.clone().into_scalar();
            let gradients = value.is_finite().then(|| {
                let gradients = (loss / pass.count as f64).backward();
                GradientsParams::from_grads(gradients, model)
            });
            (pass, value, gradients)
        },
        |(pass, loss, gradients)| {
            match total.losses.last_mut() {
                Some(sum) if !pass.is_first => *sum += loss,
                _ => total.losses.push(loss),
            }
            total.tokens += pass.batch.num_tokens();
            match gradients {
                Some(gradients) => collect(&pass, gradients),
                None => {
                    let (step, loss) = (total.step, f64::from(loss));
                    failed.get_or_insert(Error::NonFiniteLoss { step, loss });
                }
            }
        },
    );
    match failed {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

fn squared_gradient_norm(model: &Llama, gradients: &GradientsParams) -> f64 {
    struct Norm<'a> {
        gradients: &'a GradientsParams,
        squares: Vec<Tensor<1>>,
    }

    impl ModuleVisitor for Norm<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            if let Some(gradient) = self.gradients.get::<D>(param.id) {
                self.squares.push(gradient.square().sum());
            }
        }
    }

    let mut norm = Norm {
        gradients,
        squares: Vec::new(),
    };
    model.visit(&mut norm);
    match norm.squares.is_empty() {
        true => 0.0,
        false => Tensor::cat(norm.squares, 0).sum().into_scalar(),
    }
}

fn scale_gradients(model: &Llama, gradients: &mut GradientsParams, factor: f64) {
    struct Scale<'a> {
        gradients: &'a mut GradientsParams,
        factor: f64,
    }

    impl ModuleVisitor for Scale<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            if let Some(gradient) = self.gradients.remove::<D>(param.id) {
                self.gradients.register(param.id, gradient * self.factor);
            }
        }
    }

    model.visit(&mut Scale { gradients, factor });
}
