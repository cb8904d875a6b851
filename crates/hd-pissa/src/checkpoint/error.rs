//! Errors of writing and using checkpoints.

use std::error::Error;
use std::fmt::{self, Debug, Display, Formatter};
use std::path::{Path, PathBuf};

use hd_pissa_comm::{CommError, Failure};

use crate::Cause;

use crate::HdPissaError;

/// Why a checkpoint could not be written, or cannot be used.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// The system refused to read or write a file or folder.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The system's error.
        source: Cause,
    },
    /// A file is missing, cut off or changed, or holds something else.
    #[error("{}: {reason}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
        /// The error of the system or of Burn behind it, if any.
        #[source]
        source: Option<Cause>,
    },
    /// A checkpoint was written by a version of this crate with another format.
    #[error(
        "{}: format version {found}, written by {by}; this build reads version {supported}",
        path.display()
    )]
    UnsupportedVersion {
        /// The manifest.
        path: PathBuf,
        /// Its format version.
        found: u64,
        /// Name and version of the crate that wrote it.
        by: String,
        /// The format version that can be read.
        supported: u64,
    },
    /// A parameter of the model and the checkpoint do not fit.
    #[error("{}: `{name}`: {reason}", path.display())]
    Parameter {
        /// The file.
        path: PathBuf,
        /// Path of the parameter in the model.
        name: String,
        /// What differs.
        reason: String,
    },
    /// A setting differs from that of the checkpointed run.
    #[error(
        "{}: made with {setting} {saved}, this run has {given}; resume with the settings it was \
         made with",
        path.display()
    )]
    SettingMismatch {
        /// The checkpoint.
        path: PathBuf,
        /// Name of the setting.
        setting: String,
        /// Its value in the checkpoint.
        saved: String,
        /// Its value now.
        given: String,
    },
    /// The given optimizer state is not one of Burn's records.
    #[error("the state of the optimizer cannot be saved: {reason}")]
    InvalidState {
        /// What is wrong with it.
        reason: String,
        /// The error behind it.
        source: Cause,
    },
    /// Another worker could not write its files.
    #[error("the checkpoint was not written: worker {worker} could not write its part: {reason}")]
    OtherWorker {
        /// Index of the worker.
        worker: usize,
        /// The text of its error.
        reason: String,
    },
    /// Adapters cannot be attached to the model.
    #[error(transparent)]
    Adapter(#[from] HdPissaError),
    /// The exchange between workers failed.
    #[error(transparent)]
    Comm(#[from] CommError),
}

impl CheckpointError {
    pub(super) fn io(path: impl AsRef<Path>, error: impl Into<Cause>) -> Self {
        Self::Io {
            path: path.as_ref().into(),
            source: error.into(),
        }
    }

    pub(super) fn damaged(path: impl AsRef<Path>, reason: impl Into<String>) -> Self {
        Self::Damaged {
            path: path.as_ref().into(),
            reason: reason.into(),
            source: None,
        }
    }

    /// Damaged, with another error as the reason.
    pub(super) fn damaged_by(path: impl AsRef<Path>, error: impl Into<Cause>) -> Self {
        let source = error.into();
        Self::Damaged {
            path: path.as_ref().into(),
            reason: source.to_string(),
            source: Some(source),
        }
    }
}

/// Why a model could not be restored, and the model.
pub struct RestoreError<M> {
    /// The unchanged model. `None` if some parameters were already replaced, which happens only if
    /// files change while they are read.
    pub model: Option<M>,
    /// The cause.
    pub cause: CheckpointError,
}

impl<M> Debug for RestoreError<M> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.debug_struct("RestoreError")
            .field("cause", &self.cause)
            .finish_non_exhaustive()
    }
}

impl<M> Display for RestoreError<M> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        Display::fmt(&self.cause, f)
    }
}

impl<M> Error for RestoreError<M> {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.cause.source()
    }
}

impl<M> From<RestoreError<M>> for CheckpointError {
    fn from(error: RestoreError<M>) -> Self {
        error.cause
    }
}

impl From<Failure<CheckpointError>> for CheckpointError {
    fn from(failure: Failure<CheckpointError>) -> Self {
        match failure {
            Failure::Own(error) => error,
            Failure::Other { worker, reason } => Self::OtherWorker { worker, reason },
            Failure::Comm(error) => error.into(),
        }
    }
}

impl From<burn_pack::Error> for CheckpointError {
    fn from(error: burn_pack::Error) -> Self {
        Self::InvalidState {
            reason: error.to_string(),
            source: error.into(),
        }
    }
}
