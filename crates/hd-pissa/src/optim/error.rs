//! Errors of a refused step, record or optimizer.

use std::fmt::{self, Debug, Display, Formatter};
use std::path::{Path, PathBuf};

use burn::store::RecordError;
use burn::tensor::DType;
use hd_pissa_comm::CommError;

use crate::GradientMode;
use crate::cause::Cause;

/// Why the optimizer refused to be built, to step or to load.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum OptimizerError {
    /// The inner optimizer's update depends on the value of the parameter.
    #[error(
        "the inner optimizer reads the value of the parameter it updates{}, as weight decay, Lamb \
         and Adafactor's parameter scale do: the factors are fixed frames of the weight, and \
         their value says nothing about it; turn that off or choose Adam, AdamW or Lion without \
         decay, SGD, RMSProp or Adagrad",
        path.as_ref().map(|path| format!(" (`{path}`)")).unwrap_or_default()
    )]
    ReadsParameter {
        /// The parameter, if the problem is in one parameter group.
        path: Option<String>,
    },
    /// The inner optimizer clips gradients tensor by tensor.
    #[error(
        "the inner optimizer clips each tensor's gradient on its own; build it without clipping \
         and use HdPissaOptimizerConfig::max_grad_norm, which clips by the global norm of a shard"
    )]
    ClipsPerTensor,
    /// The model has no HD-PiSSA adapter.
    #[error("the model has no HD-PiSSA adapter; call apply_hd_pissa first")]
    NoAdapter,
    /// The weights of the model do not all have the same shards.
    #[error("`{path}` has the shards {found}, other weights have {expected}")]
    UnevenShards {
        /// Path of the first weight that differs.
        path: String,
        /// Its shards.
        found: String,
        /// The shards of the weights before it.
        expected: String,
    },
    /// No gradients were given for a hosted shard.
    #[error(
        "no gradients for shard {shard}, which this worker hosts; each step needs a backward pass \
         of every hosted shard: select_shard({shard}), forward, backward, push({shard}, ..)"
    )]
    MissingShard {
        /// Index of the shard.
        shard: usize,
    },
    /// Gradients were given for a shard that this worker does not host.
    #[error("gradients for shard {shard}, but this worker hosts {hosted:?}")]
    UnknownShard {
        /// Index of the shard.
        shard: usize,
        /// The hosted shards.
        hosted: Vec<usize>,
    },
    /// One set of gradients holds those of several shards, or of none.
    #[error(
        "the gradients belong to the shards {shards:?}, not to exactly one; collect the gradients \
         of several shards with ShardGradients::push"
    )]
    AmbiguousShard {
        /// The shards that have gradients in the set.
        shards: Vec<usize>,
    },
    /// Gradients pushed for one shard hold those of another.
    #[error(
        "gradients pushed for shard {shard} include gradients of shard {found}; call \
         select_shard({shard}) before its forward pass"
    )]
    WrongShard {
        /// The shard given to `push`.
        shard: usize,
        /// The shard whose factors have gradients.
        found: usize,
    },
    /// Gradients were collected in a form that the model's adapters do not take.
    #[error(
        "the model's adapters were made with GradientMode::{model:?}: collect the gradients of a \
         step with {}",
        match model {
            GradientMode::PerShard => "ShardGradients, shard by shard",
            GradientMode::Shared => "SharedGradients, for all shards at once",
        }
    )]
    OtherGradientMode {
        /// The mode of the adapters.
        model: GradientMode,
    },
    /// More or fewer micro-batches were pushed than announced.
    #[error(
        "{pushed} micro-batches were pushed, and SharedGradients::new was given {expected}; push each \
         micro-batch of this worker once"
    )]
    WrongNumberOfMicroBatches {
        /// Calls of `push`.
        pushed: u64,
        /// The number given to `new`.
        expected: u64,
    },
    /// The workers cannot host the same number of shards each.
    #[error(
        "{workers} workers cannot host {shards} shards evenly; choose a number of shards that is a \
         multiple of the number of workers"
    )]
    UnevenWorkers {
        /// Number of shards.
        shards: usize,
        /// Number of workers.
        workers: usize,
    },
    /// A weight that carries an adapter requires gradients itself, as after `unfreeze()`.
    #[error(
        "`{path}` carries an adapter and requires gradients of its own, but a step moves it only \
         through its adapter; freeze it, and unfreeze what lies outside the adapters with \
         set_require_grad_group"
    )]
    UnfrozenWeight {
        /// Path of the weight.
        path: String,
    },
    /// A factor of a hosted shard has no gradient.
    #[error(
        "no gradient for `{path}`: either select_shard({shard}) was not called before the forward \
         pass, or the loss does not depend on the weight; leave such a weight out of the targets, \
         or register a gradient of zeros"
    )]
    MissingGradient {
        /// Index of the shard.
        shard: usize,
        /// Path of the first factor without a gradient.
        path: String,
    },
    /// Gradients were pushed for parameters that the collection does not know.
    #[error(
        "the gradients pushed{} hold {count} tensors of parameters that the model given to \
         `new` does not have",
        shard.map(|shard| format!(" for shard {shard}")).unwrap_or_default()
    )]
    UnknownGradients {
        /// Index of the shard, if they were pushed for one.
        shard: Option<usize>,
        /// Number of tensors.
        count: usize,
    },
    /// A gradient is NaN or infinite. Every worker refuses the step.
    #[error(
        "`{path}`: the gradient holds {count} NaN or infinite values; skip this batch, and lower the \
         learning rate if this happens again"
    )]
    NonFiniteGradient {
        /// Path of a dense parameter, or of a shard of a weight.
        path: String,
        /// How many values.
        count: usize,
    },
    /// Finite gradients lead to an update that is NaN or infinite. Every worker refuses the step.
    #[error(
        "`{path}`: the gradient is finite, but the optimizer's update holds {count} NaN or infinite \
         values; lower the learning rate"
    )]
    NonFiniteUpdate {
        /// Path of a dense parameter, or of a shard of a weight.
        path: String,
        /// How many values.
        count: usize,
    },
    /// The update is so large that the weight may leave the range of its dtype. Every worker refuses
    /// the step.
    #[error(
        "`{path}`: the update is so large that the weight may leave the range of {dtype:?}; lower \
         the learning rate, or keep the weight in a dtype of a wider range"
    )]
    UpdateOutOfRange {
        /// Path of the weight.
        path: String,
        /// Its dtype.
        dtype: DType,
    },
    /// The device does not support the dtype in which deltas travel.
    #[error(
        "{device} does not support {dtype:?}, the dtype in which deltas should travel; use \
         CommunicationDtype::F32"
    )]
    UnsupportedCommunicationDtype {
        /// The requested precision.
        dtype: DType,
        /// The device, in Burn's words.
        device: String,
    },
    /// The workers together do not host every shard exactly once.
    #[error("the workers host the shards {hosted:?}; together they must host each of 0..{shards}")]
    IncompleteShards {
        /// The hosted shards in the order of workers.
        hosted: Vec<usize>,
        /// Number of shards of the adapters.
        shards: usize,
    },
    /// The loaded record belongs to adapters with other shards, frames or gradients.
    #[error(
        "the optimizer's record was made for `{recorded}`, the model has `{given}`: attach adapters \
         with the number of shards, windows, frame_scale and gradients of the record"
    )]
    RecordOfOthers {
        /// Name of a shard in the record.
        recorded: String,
        /// Name of the same shard in the model.
        given: String,
    },
    /// Workers disagree about the run.
    #[error("worker {worker} has {theirs}, this worker {ours}")]
    WorkerMismatch {
        /// Index of the other worker.
        worker: usize,
        /// The first difference, on this worker.
        ours: String,
        /// The same on the other worker.
        theirs: String,
    },
    /// The copies of a parameter on two workers differ.
    #[error(
        "`{path}` differs between workers: its fingerprint is {theirs:016x} on worker {worker} and \
         {ours:016x} on this worker; stop, and resume from a checkpoint"
    )]
    Drift {
        /// Path of the parameter.
        path: String,
        /// Index of the other worker.
        worker: usize,
        /// Fingerprint of this worker's copy.
        ours: u64,
        /// Fingerprint of the other worker's copy.
        theirs: u64,
    },
    /// The exchange between workers failed.
    #[error(transparent)]
    Comm(#[from] CommError),
    /// The clipping threshold is NaN, infinite, zero or negative.
    #[error("the largest gradient norm is {value}; it must be a finite number above 0")]
    InvalidMaxGradNorm {
        /// The value given.
        value: f64,
    },
    /// A file or buffer is not a record of this optimizer.
    #[error("not a record of an HD-PiSSA optimizer: {reason}")]
    InvalidRecord {
        /// What is wrong with it.
        reason: String,
        /// Burn's error behind it, if any.
        #[source]
        source: Option<Cause>,
    },
    /// A record was written by a version of this crate with another format.
    #[error(
        "the optimizer record has format version {found}; this build reads version {supported}"
    )]
    UnsupportedVersion {
        /// Version of the record.
        found: u64,
        /// Version that can be read.
        supported: u64,
    },
    /// Reading or writing a record failed.
    #[error("optimizer record `{}`: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: Cause,
    },
}

impl OptimizerError {
    pub(super) fn invalid_record(reason: impl Into<String>) -> Self {
        Self::InvalidRecord {
            reason: reason.into(),
            source: None,
        }
    }

    pub(super) fn io(path: &Path, error: std::io::Error) -> Self {
        Self::Io {
            path: path.into(),
            source: error.into(),
        }
    }
}

impl From<RecordError> for OptimizerError {
    fn from(error: RecordError) -> Self {
        Self::InvalidRecord {
            reason: error.to_string(),
            source: Some(error.into()),
        }
    }
}

impl From<burn_pack::Error> for OptimizerError {
    fn from(error: burn_pack::Error) -> Self {
        Self::InvalidRecord {
            reason: error.to_string(),
            source: Some(error.into()),
        }
    }
}

/// A refused step, which returns the unchanged model.
pub struct StepError<M> {
    /// The model: weights and frames are those from before the step.
    pub model: M,
    /// Why the step was refused.
    pub cause: OptimizerError,
}

impl<M> Debug for StepError<M> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.debug_struct("StepError")
            .field("cause", &self.cause)
            .finish_non_exhaustive()
    }
}

impl<M> Display for StepError<M> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "step refused: {}", self.cause)
    }
}

impl<M> std::error::Error for StepError<M> {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.cause)
    }
}

impl<M> From<StepError<M>> for OptimizerError {
    fn from(error: StepError<M>) -> Self {
        error.cause
    }
}
