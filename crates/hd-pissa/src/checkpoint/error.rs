//! Why a checkpoint cannot be written or used.

use std::path::{Path, PathBuf};

use hd_pissa_comm::CommError;

use crate::HdPissaError;

/// Why a checkpoint could not be written, or cannot be used.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// The system refused to read or write a file or folder.
    #[error("{}: {reason}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        reason: String,
    },
    /// A file is missing, cut off or changed, or holds something else.
    #[error("{}: {reason}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
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
    /// The optimizer's state given to be saved is no record of Burn's.
    #[error("the state of the optimizer cannot be saved: {reason}")]
    InvalidState {
        /// What is wrong with it.
        reason: String,
    },
    /// Another worker could not write its files; its own error says why.
    #[error("the checkpoint was not written: worker {worker} could not write its part")]
    OtherWorker {
        /// Index of the worker.
        worker: usize,
    },
    /// Adapters cannot be attached to the model.
    #[error(transparent)]
    Adapter(#[from] HdPissaError),
    /// The exchange between workers failed.
    #[error(transparent)]
    Comm(#[from] CommError),
}

impl CheckpointError {
    pub(super) fn io(path: impl AsRef<Path>, error: impl std::fmt::Display) -> Self {
        Self::Io {
            path: path.as_ref().into(),
            reason: error.to_string(),
        }
    }

    pub(super) fn damaged(path: impl AsRef<Path>, reason: impl Into<String>) -> Self {
        Self::Damaged {
            path: path.as_ref().into(),
            reason: reason.into(),
        }
    }
}
