//! The strategy for Burn's training loop, and its settings.

use std::fmt::{self, Debug, Formatter};
use std::time::Duration;

use burn::lr_scheduler::module_lr_scheduler::ModuleLrScheduler;
use burn::optim::ModuleOptimizer;
use burn::tensor::Device;
use burn::train::metric::store::EventStoreClient;
use burn::train::{
    Learner, LearnerModel, SupervisedLearningStrategy, SupervisedTrainingEventProcessor,
    TrainLoader, TrainingComponents, ValidLoader,
};
use hd_pissa_comm::thread_group;

use super::crew::{Crew, Worker};
use super::epochs::Run;
use super::error::{FirstError, LearnerError};
use super::layout::Layout;
use super::parts::Parts;
use super::state::{self, LearnerState};
use crate::optimizer_state::OptimizerState;
use crate::parallel::fork;
use crate::{HdPissaOptimizer, HdPissaOptimizerConfig, HdPissaOptimizerRecord, OptimizerError};

/// Trains a model with HD-PiSSA adapters in Burn's own loop: `TrainingStrategy::Custom` of
/// [`SupervisedTraining`](burn::train::SupervisedTraining), with its metrics, dashboard,
/// checkpoints, early stopping and interruption.
///
/// The model has the adapters of all shards (`apply_hd_pissa(&config, 0..shards)`) and implements
/// Burn's `TrainStep` and `InferenceStep` as for any other training. [`learner`](Self::learner)
/// makes the `Learner`. `examples/learner` is a complete program, and the book has a chapter about
/// it.
///
/// # Micro-batches
///
/// A batch of the training loader is one micro-batch, one item to the metrics, and one iteration in
/// the logs. The data is cut into neighbouring parts, whose sizes differ by one item at most. Each
/// part has its own loader (`DataLoader::slice`):
///
/// | gradients | parts | micro-batches of a step |
/// |---|---|---|
/// | [`PerShard`](crate::GradientMode::PerShard) | one for each shard: its own data | `grads_accumulation` (1 by default) from each part |
/// | [`Shared`](crate::GradientMode::Shared) | `grads_accumulation` (by default the number of devices) | one from each part |
///
/// A step takes the mean over its micro-batches, of each shard or of all; Burn's own strategies
/// take their sum. The scheduler advances once per step. An epoch ends when one part has no batch
/// left, and leaves out at most a step's worth of batches. A part may give the last step fewer
/// micro-batches than the others.
///
/// # Workers
///
/// Each [device](Self::with_devices) has a worker, a thread with a copy of the model and an even
/// share of the shards. With gradients per shard, the weights are the same on any number of
/// workers; with shared gradients, on any power of two. On Flex they are the same bit for bit. On a
/// CPU a worker computes the micro-batches of a step in parallel, as
/// [`side_by_side`](crate::side_by_side) does. A model that draws random numbers while it trains,
/// for example with dropout, then draws them in no fixed order. Worker 0 validates.
///
/// # Checkpoints
///
/// Burn's checkpoints hold everything that training depends on: the weights with the residual bits
/// of half precision, all frames, the moments of all shards, the scheduler, and the number of
/// steps. A run that resumes after epoch `n` (`SupervisedTraining::checkpoint(n)`), on any number
/// of devices that divides the shards, ends with the weights of an uninterrupted one, bit for bit
/// on Flex. Shuffled loaders continue with the order of epoch `n + 1` if you build them again with
/// the same seed. They must have no threads of their own, which hand out batches in no fixed order.
/// Burn panics on a checkpoint that it cannot read, or of other shards or frames, before the
/// strategy sees it. [`newest_checkpoint`](Self::newest_checkpoint) finds one that fits, or returns a
/// typed error.
///
/// # Errors
///
/// Errors end the training. `LearningResult::error` is then
/// [`TrainingError::Workers`](burn::train::TrainingError::Workers) (or another of Burn's variants,
/// such as `Dataset` or `Checkpoint`), and [`error`](Self::error) returns the typed cause. The
/// model has the weights of the last step.
///
/// `SupervisedTraining::gradient_checkpointing` affects only Burn's own strategies. Put the model
/// on a device with `autodiff_checkpointed` instead.
pub struct HdPissaStrategy {
    pub(super) optimizer: ModuleOptimizer,
    scheduler: ModuleLrScheduler,
    pub(super) config: HdPissaOptimizerConfig,
    devices: Vec<Device>,
    time_limit: Duration,
    error: FirstError,
}

impl HdPissaStrategy {
    /// Takes an optimizer that [`HdPissaOptimizerConfig::init`] accepts, and a scheduler or a
    /// constant learning rate. There is one worker, on the device of the model.
    pub fn new(optimizer: ModuleOptimizer, scheduler: impl Into<ModuleLrScheduler>) -> Self {
        Self {
            optimizer,
            scheduler: scheduler.into(),
            config: HdPissaOptimizerConfig::new(),
            devices: Vec::new(),
            time_limit: Duration::from_secs(600),
            error: FirstError::default(),
        }
    }

    /// Settings of every worker's [`HdPissaOptimizer`].
    pub fn with_optimizer_config(mut self, config: HdPissaOptimizerConfig) -> Self {
        self.config = config;
        self
    }

    /// One worker on each of `devices`; a device may occur several times. The number of devices
    /// must divide the number of shards. Without devices, one worker uses the device of the model.
    pub fn with_devices(mut self, devices: Vec<Device>) -> Self {
        self.devices = devices;
        self
    }

    /// How long workers wait for each other in a step. The default is 10 minutes.
    pub fn with_time_limit(mut self, time_limit: Duration) -> Self {
        self.time_limit = time_limit;
        self
    }

    /// A learner of `model` with the strategy's optimizer and scheduler, for
    /// `SupervisedTraining::launch`. The strategy refuses any other learner, because it cannot see
    /// its optimizer.
    pub fn learner<M: LearnerModel>(&self, model: M) -> Learner<M> {
        Learner::new(
            model,
            self.optimizer.clone(),
            state::counting(self.scheduler.clone()),
        )
    }

    /// The error that ended the last training, if Burn has no type for it.
    pub fn error(&self) -> Option<LearnerError> {
        self.error.get()
    }

    fn prepare<M: LearnerModel>(
        &self,
        learner: &Learner<M>,
        micro_batches: Option<usize>,
        store: &EventStoreClient,
    ) -> Result<Prepared, LearnerError> {
        let steps = state::steps_taken(learner).ok_or(LearnerError::ForeignLearner)?;
        let workers = self.devices.len().max(1);
        let layout = Layout::of(&learner.model(), micro_batches, workers)?;
        let mut scheduler = state::counting(self.scheduler.clone());
        let refused = |worker| move |cause| LearnerError::Optimizer { worker, cause };
        let mut resumed = None;
        if steps > 0 {
            let LearnerState {
                optimizer,
                scheduler: record,
            } = LearnerState::of(learner, store);
            scheduler = scheduler.load_record(record);
            let read = || -> Result<_, OptimizerError> {
                Ok(OptimizerState::from_bytes(optimizer.into_bytes()?)?)
            };
            resumed = Some(read().map_err(refused(0))?);
        }
        let optimizer = |(worker, communicator)| {
            let build = || {
                let mut optimizer = self.config.init(self.optimizer.clone(), communicator)?;
                if let Some(state) = &resumed {
                    let state = state::part(state, |id| layout.keeps(worker, id));
                    optimizer.load_record(HdPissaOptimizerRecord { state, steps })?;
                }
                Ok(optimizer)
            };
            build().map_err(refused(worker))
        };
        let group = thread_group(workers, self.time_limit).into_iter();
        let optimizers: Result<_, _> = group.enumerate().map(optimizer).collect();
        Ok(Prepared {
            optimizers: optimizers?,
            scheduler,
            layout,
        })
    }

    /// The device of each worker.
    fn devices<M: LearnerModel>(&self, model: &M) -> Vec<Device> {
        let devices = match self.devices.is_empty() {
            true => model.devices().into_iter().take(1).collect(),
            false => self.devices.clone(),
        };
        devices.into_iter().map(Device::autodiff).collect()
    }
}

impl Debug for HdPissaStrategy {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.debug_struct("HdPissaStrategy")
            .field("config", &self.config)
            .field("devices", &self.devices)
            .field("time_limit", &self.time_limit)
            .field("error", &self.error())
            .finish_non_exhaustive()
    }
}

/// The inputs of a training, besides the model.
struct Prepared {
    /// One for each worker.
    optimizers: Vec<HdPissaOptimizer>,
    scheduler: ModuleLrScheduler,
    layout: Layout,
}

impl<M: LearnerModel> SupervisedLearningStrategy<M> for HdPissaStrategy {
    fn fit(
        &self,
        components: TrainingComponents<M>,
        learner: Learner<M>,
        dataloader_train: TrainLoader<M>,
        dataloader_valid: ValidLoader<M>,
        starting_epoch: usize,
    ) -> (M, SupervisedTrainingEventProcessor<M>) {
        self.error.forget();
        let prepared = self.prepare(
            &learner,
            components.grad_accumulation,
            &components.event_store,
        );
        let model = learner.model();
        // It would hold the weights, which steps write in place.
        drop(learner);
        let Prepared {
            optimizers,
            scheduler,
            layout,
        } = match prepared {
            Ok(prepared) => prepared,
            Err(error) => {
                self.error.end_on(Err(error), &components.interrupter);
                return (model, components.event_processor);
            }
        };
        let devices = self.devices(&model);
        let part_devices = (0..layout.workers).flat_map(|worker| {
            let device = &devices[worker];
            layout.parts_of(worker).map(move |_| device.clone())
        });
        let part_devices: Vec<Device> = part_devices.collect();
        let train = Parts::of(&*dataloader_train, &part_devices, layout.per_part);
        train.skip(starting_epoch - 1);
        let valid = dataloader_valid.to_device(&devices[0].clone().inner());

        let models = copies(model, &devices).into_iter();
        let workers = models.zip(optimizers).enumerate();
        let workers = workers
            .map(|(index, (model, optimizer))| Worker::new(index, model, optimizer, layout.mode))
            .collect();
        std::thread::scope(|scope| {
            let run = Run {
                optimizer: self.optimizer.clone(),
                error: &self.error,
                crew: Crew::start(scope, workers),
                layout,
                scheduler,
                events: components.event_processor,
                interrupter: components.interrupter,
                checkpointer: components.checkpointer,
                early_stopping: components.early_stopping,
                store: components.event_store,
            };
            let (model, events) = run.epochs(
                starting_epoch..=components.num_epochs,
                &train,
                dataloader_train.num_items(),
                &*valid,
            );
            match model {
                Ok(model) => (model, events),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }
}

/// The model on each device. The first is the model itself if it is already on that device.
fn copies<M: LearnerModel>(model: M, devices: &[Device]) -> Vec<M> {
    let home = model.devices();
    let is_home = |device: &Device| home.iter().all(|other| other == device);
    let mut copies: Vec<M> = devices[1..]
        .iter()
        .map(|device| match is_home(device) {
            true => fork(&model),
            false => model.clone().fork(device),
        })
        .collect();
    let first = match is_home(&devices[0]) {
        true => model,
        false => model.fork(&devices[0]),
    };
    copies.insert(0, first);
    copies
}
