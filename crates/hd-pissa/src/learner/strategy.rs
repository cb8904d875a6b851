//! The strategy that a user hands to Burn's training loop, and its settings.

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
/// makes the `Learner`. `examples/learner` is a complete program, and the book has a chapter.
///
/// # Micro-batches
///
/// A batch of the training loader is one micro-batch, one item to the metrics, and one iteration in the
/// logs. The data is cut into neighbouring parts, whose sizes differ by one item at most, and each part
/// is a loader of its own (`DataLoader::slice`):
///
/// | gradients | parts | micro-batches of a step |
/// |---|---|---|
/// | [`PerShard`](crate::GradientMode::PerShard) | one for each shard: its own data | `grads_accumulation` (1 by default) from each part |
/// | [`Shared`](crate::GradientMode::Shared) | `grads_accumulation` (by default the number of devices) | one from each part |
///
/// A step takes the mean over its micro-batches, of each shard or of all; Burn's own strategies take
/// their sum. The scheduler advances once per step. An epoch ends when one part has no batch left: at
/// most a step's worth of batches is left out. So a part may give its last step fewer micro-batches
/// than the others.
///
/// # Workers
///
/// Each [device](Self::with_devices) has a worker, a thread with a copy of the model and an even share
/// of the shards. The weights do not depend on the number of workers (per shard), or not as long as it
/// is a power of two (shared): bit for bit on Flex. On a CPU a worker computes the micro-batches of a
/// step side by side, as [`side_by_side`](crate::side_by_side) does: a model that draws random numbers
/// while it trains, as dropout does, then draws them in no fixed order. Worker 0 validates.
///
/// # Checkpoints
///
/// Burn's checkpoints hold everything that training depends on: the weights with the residual bits of
/// half precision, all frames, the moments of all shards, the scheduler, and the number of steps.
/// A run that resumes after epoch `n`
/// (`SupervisedTraining::checkpoint(n)`), on any number of devices that divides the shards, ends with
/// the weights of an uninterrupted one, bit for bit on Flex. Shuffled loaders go on with the order of
/// epoch `n + 1`, if they are built anew with the same seed and without threads of their own, which
/// hand out batches in no fixed order. Burn panics on a
/// checkpoint that it cannot read, or of other shards or frames, before the strategy sees it;
/// [`newest_checkpoint`](Self::newest_checkpoint) finds one that fits, or says what is wrong.
///
/// # Errors
///
/// They end the training: `LearningResult::error` is then
/// [`TrainingError::Workers`](burn::train::TrainingError::Workers) (or `Dataset`, `Checkpoint`, ..., as Burn has them), and
/// [`error`](Self::error) the cause by its type. The model has the weights of the last step.
///
/// `SupervisedTraining::gradient_checkpointing` reaches Burn's own strategies only; put the model on a
/// device with `autodiff_checkpointed`.
pub struct HdPissaStrategy {
    pub(super) optimizer: ModuleOptimizer,
    scheduler: ModuleLrScheduler,
    pub(super) config: HdPissaOptimizerConfig,
    devices: Vec<Device>,
    time_limit: Duration,
    error: FirstError,
}

impl HdPissaStrategy {
    /// With an optimizer as [`HdPissaOptimizerConfig::init`] takes it, and a scheduler or a constant
    /// learning rate; one worker, on the device of the model.
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

    /// One worker on each of `devices`; a device may occur several times. Their number divides that of
    /// the shards. None: the device of the model.
    pub fn with_devices(mut self, devices: Vec<Device>) -> Self {
        self.devices = devices;
        self
    }

    /// How long workers wait for each other in a step; 10 minutes by default.
    pub fn with_time_limit(mut self, time_limit: Duration) -> Self {
        self.time_limit = time_limit;
        self
    }

    /// A learner of `model` with the strategy's optimizer and scheduler, for
    /// `SupervisedTraining::launch`. The strategy refuses any other, whose optimizer it could not
    /// see.
    pub fn learner<M: LearnerModel>(&self, model: M) -> Learner<M> {
        Learner::new(
            model,
            self.optimizer.clone(),
            state::counting(self.scheduler.clone()),
        )
    }

    /// What ended the last training, if an error did that Burn has no type for.
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

/// What a training starts from, beside the model.
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
        // It would hold on to the weights, which are written in place.
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

/// The model on each device. The first is the model itself where it is on that device already.
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
