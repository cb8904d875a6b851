//! Errors of input from outside.

use std::io::Write;
use std::path::{Path, PathBuf};

use hd_pissa::checkpoint::CheckpointError;
use hd_pissa::comm::CommError;
use hd_pissa::export::ExportError;
use hd_pissa::{HdPissaError, OptimizerError};

/// Why a run stopped. Every message about a file names it, and the field at fault.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The content of a file cannot be used.
    #[error("{}: {field}: {reason}", path.display())]
    Field {
        /// The file.
        path: PathBuf,
        /// Key, tensor name or line.
        field: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A command-line option cannot be used.
    #[error("--{option}: {reason}")]
    Option {
        /// Name of the option, without dashes.
        option: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// Options that contradict each other or cannot be read: a usage error.
    #[error("--{option}: {reason}")]
    Usage {
        /// Name of the option, without dashes.
        option: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// An environment variable, or a limit of the system, cannot be used.
    #[error("{variable}: {reason}")]
    Environment {
        /// The variable or limit.
        variable: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// The model refuses the adapters.
    #[error(transparent)]
    Adapter(#[from] HdPissaError),
    /// The optimizer refuses a step.
    #[error("step {step}: {source}")]
    Step {
        /// The step, counted from 1.
        step: usize,
        /// Why.
        source: OptimizerError,
    },
    /// The loss is NaN or infinite.
    #[error("step {step}: the loss is {loss} (a smaller --lr may help)")]
    NonFiniteLoss {
        /// The step, counted from 1.
        step: usize,
        /// The loss.
        loss: f64,
    },
    /// A gradient is NaN or infinite.
    #[error("step {step}: the gradient norm is {norm} (a smaller --lr may help)")]
    NonFiniteGradient {
        /// The step, counted from 1.
        step: usize,
        /// The norm.
        norm: f64,
    },
    /// After a step the weights, or the loss that they give, are NaN or infinite.
    #[error("step {step}: the training has diverged (a smaller --lr may help)")]
    NonFiniteWeights {
        /// The step, counted from 1.
        step: usize,
    },
    /// The training ended early.
    #[error("{source}; {left}")]
    Ended {
        /// Why.
        source: Box<Error>,
        /// What is left of it.
        left: String,
    },
    /// The optimizer could not be set up.
    #[error(transparent)]
    Optimizer(#[from] OptimizerError),
    /// A checkpoint could not be written or used.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The change of a weight could not be found, written or applied.
    #[error(transparent)]
    Export(#[from] ExportError),
    /// The exchange between workers failed.
    #[error(transparent)]
    Comm(#[from] CommError),
    /// A worker panicked.
    #[error("worker {worker} panicked: {reason}")]
    Panic {
        /// Index of the worker.
        worker: usize,
        /// Its message.
        reason: String,
    },
    /// The report of any worker except the first.
    #[error("worker {worker}: {source}")]
    Worker {
        /// Index of the worker.
        worker: usize,
        /// Its error.
        source: Box<Error>,
    },
    /// Another worker could not start; its own error says why.
    #[error("worker {worker} could not start")]
    OtherWorker {
        /// Index of the worker.
        worker: usize,
    },
    /// Workers were started with different inputs or options.
    #[error("{setting} is {ours} here and {theirs} on worker 0")]
    WorkerMismatch {
        /// What differs.
        setting: String,
        /// Its value on this worker.
        ours: String,
        /// Its value on worker 0.
        theirs: String,
    },
    /// An output is written, but could not be moved to its place.
    #[error("{}: {source}; {}", target.display(), whereabouts(target, kept))]
    NotMoved {
        /// Where it should be.
        target: PathBuf,
        /// Where it is.
        kept: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A child process failed.
    #[error("the run {trial} failed: {reason}")]
    Child {
        /// The trial it ran.
        trial: String,
        /// Its exit status or what is wrong with its result.
        reason: String,
    },
    /// The picture of the loss curves could not be drawn.
    #[error("{}: the picture could not be drawn: {reason}", path.display())]
    Picture {
        /// The file.
        path: PathBuf,
        /// What failed.
        reason: String,
    },
}

fn whereabouts(target: &Path, kept: &Path) -> String {
    match kept == target {
        true => "the complete output is there, but the disk may not have all of it yet".into(),
        false => format!(
            "the complete output is in {}, move it to where it should be",
            kept.display()
        ),
    }
}

impl Error {
    /// Shorthand for [`Error::Field`].
    pub fn field(
        path: impl AsRef<Path>,
        field: impl Into<String>,
        reason: impl Into<String>,
    ) -> Self {
        Self::Field {
            path: path.as_ref().into(),
            field: field.into(),
            reason: reason.into(),
        }
    }

    /// For `map_err` on operations on `path`.
    pub fn io(path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.as_ref().to_path_buf();
        move |source| Self::Io { path, source }
    }

    /// Whether loss, gradients or weights were not finite.
    pub(crate) fn is_divergence(&self) -> bool {
        match self {
            Self::NonFiniteLoss { .. }
            | Self::NonFiniteGradient { .. }
            | Self::NonFiniteWeights { .. }
            | Self::Step {
                source:
                    OptimizerError::NonFiniteGradient { .. } | OptimizerError::NonFiniteUpdate { .. },
                ..
            } => true,
            Self::Ended { source, .. } => source.is_divergence(),
            _ => false,
        }
    }

    /// Whether this worker failed only because another one did.
    pub fn is_of_another_worker(&self) -> bool {
        if let Self::Worker { source, .. } | Self::Ended { source, .. } = self {
            return source.is_of_another_worker();
        }
        matches!(
            self,
            Self::Comm(_)
                | Self::Adapter(HdPissaError::Comm(_) | HdPissaError::OtherWorker { .. })
                | Self::OtherWorker { .. }
                | Self::Optimizer(OptimizerError::Comm(_))
                | Self::Step {
                    source: OptimizerError::Comm(_),
                    ..
                }
                | Self::Checkpoint(CheckpointError::Comm(_) | CheckpointError::OtherWorker { .. })
        )
    }

    /// The error in the form that worker `worker` reports: the first worker without its index, like
    /// a run with a single worker.
    pub fn on_worker(self, worker: usize) -> Self {
        match worker {
            0 => self,
            _ => Self::Worker {
                worker,
                source: Box::new(self),
            },
        }
    }

    /// 2 for a usage error, 1 for everything else.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Usage { .. } => 2,
            Self::Worker { source, .. } | Self::Ended { source, .. } => source.exit_code(),
            _ => 1,
        }
    }

    /// Prints it on standard error, unless another worker does, and returns the exit code.
    pub fn report(&self) -> u8 {
        let cause = match self {
            Self::Worker { source, .. } => source,
            error => error,
        };
        if !matches!(cause, Self::OtherWorker { .. }) {
            // Written in one piece, so the lines of several processes do not mix. If standard error
            // is closed, the failure cannot be reported.
            let _ = std::io::stderr().write_all(format!("error: {self}\n").as_bytes());
        }
        self.exit_code()
    }
}
