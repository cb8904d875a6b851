//! The workers of a training: threads that each hold a copy of the model and an optimizer.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc;
use std::thread::{Scope, ScopedJoinHandle};

use burn::lr_scheduler::module_lr_scheduler::ModuleLearningRate;
use burn::optim::GradientsParams;
use burn::train::{InferenceStep, ItemLazy, LearnerModel, TrainStep};

use super::error::LearnerError;
use crate::parallel::pools;
use crate::{
    GradientMode, HdPissaModule, HdPissaOptimizer, HdPissaOptimizerRecord, OptimizerError,
    ShardGradients, SharedGradients, StepGradients, side_by_side,
};

/// The state of one thread.
pub(super) struct Worker<M> {
    index: usize,
    /// Taken out during a step, so the weights can be written in place.
    model: Option<M>,
    optimizer: HdPissaOptimizer,
    mode: GradientMode,
    /// The gradients of the next step.
    gradients: Option<StepGradients>,
    /// The model in validation mode, during a validation.
    valid: Option<M>,
}

impl<M: LearnerModel> Worker<M> {
    pub(super) fn new(
        index: usize,
        model: M,
        optimizer: HdPissaOptimizer,
        mode: GradientMode,
    ) -> Self {
        Self {
            index,
            model: Some(model),
            optimizer,
            mode,
            gradients: None,
            valid: None,
        }
    }

    pub(super) fn model(&self) -> &M {
        self.model.as_ref().expect("only a step takes the model")
    }

    /// Forward and backward passes of micro-batches, each with the position of its part of the data:
    /// the shard that it trains, unless shards share gradients.
    ///
    /// Outputs leave the autodiff graph here, because the graph holds the weights.
    pub(super) fn train(
        &mut self,
        batches: Vec<(usize, <M as TrainStep>::Input)>,
    ) -> Result<Vec<<M as TrainStep>::Output>, LearnerError> {
        let (model, mode) = (self.model(), self.mode);
        let mut gradients = Collected::new(model, mode, batches.len());
        let (mut outputs, mut failed) = (Vec::new(), None);
        side_by_side(
            model,
            batches,
            |model, (part, item)| {
                catch(|| {
                    let trained = match mode {
                        GradientMode::PerShard => {
                            let model = model.clone().select_shard(part);
                            TrainStep::step(&model.expect("the layout has all shards"), item)
                        }
                        GradientMode::Shared => TrainStep::step(model, item),
                    };
                    (part, trained.grads, trained.item.sync())
                })
            },
            |result| match result {
                Ok((part, of_batch, Ok(output))) => {
                    gradients.push(part, of_batch);
                    outputs.push(output);
                }
                Ok((_, _, Err(error))) => failed = failed.take().or(Some(error.to_string())),
                Err(message) => failed = failed.take().or(Some(message)),
            },
        );
        match failed {
            Some(message) => Err(self.model_failed(message)),
            None => {
                self.gradients = Some(gradients.finish());
                Ok(outputs)
            }
        }
    }

    /// An optimizer step with the gradients of [`train`](Self::train). All workers step together.
    pub(super) fn step(&mut self, lr: ModuleLearningRate) -> Result<(), LearnerError> {
        let model = self.model.take().expect("only a step takes the model");
        let gradients = self.gradients.take().expect("train comes first");
        let (model, result) = match self.optimizer.step(lr, model, gradients) {
            Ok(model) => (model, Ok(())),
            Err(refused) => (refused.model, Err(self.refused(refused.cause))),
        };
        self.model = Some(model);
        result
    }

    pub(super) fn start_validation(&mut self) {
        self.valid = Some(self.model().valid());
    }

    pub(super) fn validate(
        &mut self,
        item: <M as InferenceStep>::Input,
    ) -> Result<<M as InferenceStep>::Output, LearnerError> {
        let model = self.valid.as_ref().expect("the validation has started");
        catch(|| InferenceStep::step(model, item)).map_err(|message| self.model_failed(message))
    }

    /// The weights can be written in place again.
    pub(super) fn end_validation(&mut self) {
        self.valid = None;
    }

    /// The state of the optimizer for the shards that this worker hosts.
    pub(super) fn state(&self) -> Result<HdPissaOptimizerRecord, LearnerError> {
        self.optimizer
            .to_record()
            .map_err(|cause| self.refused(cause))
    }

    fn refused(&self, cause: OptimizerError) -> LearnerError {
        let worker = self.index;
        LearnerError::Optimizer { worker, cause }
    }

    fn model_failed(&self, message: String) -> LearnerError {
        let worker = self.index;
        LearnerError::Model { worker, message }
    }
}

/// The gradients of a step so far.
enum Collected {
    PerShard(ShardGradients),
    Shared(SharedGradients),
}

impl Collected {
    fn new<M: LearnerModel>(model: &M, mode: GradientMode, micro_batches: usize) -> Self {
        match mode {
            GradientMode::PerShard => Self::PerShard(ShardGradients::new(model)),
            GradientMode::Shared => Self::Shared(SharedGradients::new(model, micro_batches)),
        }
    }

    fn push(&mut self, shard: usize, of_batch: GradientsParams) {
        match self {
            Self::PerShard(gradients) => gradients.push(shard, of_batch),
            Self::Shared(gradients) => gradients.push(of_batch),
        }
    }

    /// The mean over micro-batches, of each shard or of all.
    fn finish(self) -> StepGradients {
        match self {
            Self::PerShard(gradients) => gradients.into_mean().into(),
            Self::Shared(gradients) => gradients.into(),
        }
    }
}

/// The result of `work`, or the message of its panic.
fn catch<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(work)).map_err(|payload| {
        let text = payload.downcast_ref::<&str>().map(|text| text.to_string());
        let text = text.or_else(|| payload.downcast_ref::<String>().cloned());
        text.unwrap_or_else(|| "a panic without a message".into())
    })
}

type Job<M> = Box<dyn FnOnce(&mut Worker<M>) + Send>;

/// The queue of a worker's jobs, and its state at the end.
type Thread<'scope, M> = (mpsc::Sender<Job<M>>, ScopedJoinHandle<'scope, Worker<M>>);

/// All workers at work.
pub(super) struct Crew<'scope, M> {
    threads: Vec<Thread<'scope, M>>,
}

impl<'scope, M: LearnerModel> Crew<'scope, M> {
    /// A thread for each worker. Together they have the compute threads of the current rayon pool.
    pub(super) fn start<'env>(scope: &'scope Scope<'scope, 'env>, workers: Vec<Worker<M>>) -> Self {
        let pools = pools(workers.len());
        let start = |(mut worker, pool): (Worker<M>, rayon::ThreadPool)| {
            let (sender, jobs) = mpsc::channel::<Job<M>>();
            let thread = scope.spawn(move || {
                pool.install(move || {
                    jobs.iter().for_each(|job| job(&mut worker));
                    worker
                })
            });
            (sender, thread)
        };
        Self {
            threads: workers.into_iter().zip(pools).map(start).collect(),
        }
    }

    /// The results of `job` on every worker, with an input for each.
    pub(super) fn each<T: Send + 'static, R: Send + 'static>(
        &self,
        inputs: Vec<T>,
        job: fn(&mut Worker<M>, T) -> Result<R, LearnerError>,
    ) -> Result<Vec<R>, LearnerError> {
        let inputs = self.threads.iter().zip(inputs);
        let pending: Vec<_> = inputs
            .map(|((jobs, _), input)| {
                let (sender, result) = mpsc::channel();
                // An ended thread sends no result.
                let _ = jobs.send(Box::new(move |worker| {
                    let _ = sender.send(job(worker, input));
                }));
                result
            })
            .collect();
        let results: Vec<_> = pending
            .into_iter()
            .enumerate()
            .map(|(worker, result)| {
                let gone = LearnerError::WorkerGone { worker };
                result.recv().unwrap_or(Err(gone))
            })
            .collect();
        let mut failures = results.iter().filter_map(|result| result.as_ref().err());
        let first = failures.clone().next();
        match failures.find(|failure| !failure.is_consequence()).or(first) {
            Some(failure) => Err(failure.clone()),
            None => results.into_iter().collect(),
        }
    }

    /// The result of `job` on worker 0.
    pub(super) fn first<T: Send + 'static, R: Send + 'static>(
        &self,
        input: T,
        job: fn(&mut Worker<M>, T) -> Result<R, LearnerError>,
    ) -> Result<R, LearnerError> {
        // `each` pairs inputs with threads and stops at the shorter of the two.
        let mut results = self.each(vec![input], job)?;
        Ok(results.remove(0))
    }

    pub(super) fn len(&self) -> usize {
        self.threads.len()
    }

    /// Ends all threads. The model of worker 0, or of the first that has not panicked; the panic if
    /// all have.
    pub(super) fn dismiss(self) -> Result<M, Box<dyn Any + Send>> {
        let (senders, threads): (Vec<_>, Vec<_>) = self.threads.into_iter().unzip();
        drop(senders);
        let ended = threads.into_iter().map(|thread| {
            let worker = thread.join()?;
            Ok(worker.model.expect("only a step takes the model"))
        });
        let ended: Vec<Result<M, _>> = ended.collect();
        ended
            .into_iter()
            .reduce(|first, other| first.or(other))
            .expect("there is a worker")
    }
}
