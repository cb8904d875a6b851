//! Errors that end a training in Burn's loop.

use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use burn::train::train::WorkerFailure;
use burn::train::{Interrupter, TrainingError};

use crate::{Cause, OptimizerError};

/// The error that ended a training; see [`HdPissaStrategy::error`](super::HdPissaStrategy::error).
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum LearnerError {
    /// The learner has its own optimizer and scheduler, which the strategy cannot see.
    #[error(
        "the learner was made by Learner::new, whose optimizer and scheduler this strategy cannot \
         use; make it with HdPissaStrategy::learner"
    )]
    ForeignLearner,
    /// The optimizer refused to be built, to load a record or to step.
    #[error("{cause}")]
    Optimizer {
        /// Index of the worker.
        worker: usize,
        /// The cause.
        #[source]
        cause: OptimizerError,
    },
    /// A file of a checkpoint is missing or damaged.
    #[error("{}: {cause}; go on after an earlier epoch", file.display())]
    Unreadable {
        /// The file.
        file: PathBuf,
        /// Why it cannot be read.
        cause: Cause,
    },
    /// A checkpoint is of another model, of other adapters, or of another strategy.
    #[error(
        "{}: does not fit this training: {cause}; take the model and the adapters that it was saved \
         with",
        file.display()
    )]
    Mismatch {
        /// The file.
        file: PathBuf,
        /// What does not fit.
        cause: Cause,
    },
    /// A forward, backward or validation pass of the model panicked. The weights are those of the last
    /// step.
    #[error("the model's step panicked: {message}")]
    Model {
        /// Index of the worker.
        worker: usize,
        /// The panic's message.
        message: String,
    },
    /// The thread of a worker has ended in the middle of a step.
    #[error("worker {worker} panicked outside of the model; its message is on stderr")]
    WorkerGone {
        /// Index of the worker.
        worker: usize,
    },
    /// The micro-batches of a step are not a multiple of the workers.
    #[error(
        "{workers} workers cannot share {micro_batches} micro-batches of a step evenly; give \
         grads_accumulation a multiple of the number of devices"
    )]
    UnevenMicroBatches {
        /// Micro-batches of a step.
        micro_batches: usize,
        /// Number of workers.
        workers: usize,
    },
    /// The data cannot be divided into the parts that a step needs.
    #[error(
        "the training data has {items} items, and every step needs a micro-batch from each of \
         {parts} parts"
    )]
    TooFewItems {
        /// Number of items.
        items: usize,
        /// One for each shard, or for each micro-batch of a step with shared gradients.
        parts: usize,
    },
}

impl LearnerError {
    /// The worker where it happened.
    fn worker(&self) -> Option<usize> {
        match self {
            Self::Optimizer { worker, .. }
            | Self::Model { worker, .. }
            | Self::WorkerGone { worker } => Some(*worker),
            _ => None,
        }
    }

    /// Whether another worker's failure is behind it.
    pub(super) fn is_consequence(&self) -> bool {
        let cause = |error: &OptimizerError| matches!(error, OptimizerError::Comm(_));
        matches!(self, Self::Optimizer { cause: error, .. } if cause(error))
    }
}

/// Keeps the first error of a training. Burn's own type holds only its text.
#[derive(Debug, Default)]
pub(super) struct FirstError(Mutex<Option<LearnerError>>);

impl FirstError {
    pub(super) fn get(&self) -> Option<LearnerError> {
        self.lock().clone()
    }

    /// A new training begins.
    pub(super) fn forget(&self) {
        *self.lock() = None;
    }

    /// Ends the training if `result` is an error.
    pub(super) fn end_on(&self, result: Result<(), LearnerError>, interrupter: &Interrupter) {
        if let Err(error) = result {
            interrupter.fail(TrainingError::Workers(vec![WorkerFailure {
                device_id: error.worker().unwrap_or(0),
                message: error.to_string(),
            }]));
            self.lock().get_or_insert(error);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<LearnerError>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
