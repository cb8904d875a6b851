//! Errors of exports.

use std::path::{Path, PathBuf};

use crate::Cause;

/// An error while a change of a weight is computed, written, read or applied.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ExportError {
    /// A limit on the rank keeps nothing.
    #[error("{setting} is {value}; it must be {allowed}")]
    InvalidLimit {
        /// The field of [`RankLimit`](super::RankLimit).
        setting: &'static str,
        /// Its value.
        value: String,
        /// What it may be.
        allowed: &'static str,
    },
    /// The shapes of base, trained weight and frames do not fit.
    #[error("{what} of `{path}` has the shape {found:?}; the base is {expected:?}")]
    ShapeMismatch {
        /// Path of the weight.
        path: String,
        /// What has the wrong shape.
        what: &'static str,
        /// Its shape.
        found: [usize; 2],
        /// Shape of the weight before the training.
        expected: [usize; 2],
    },
    /// The weight holds NaN or infinite values, before or after the training.
    #[error("the change of `{path}` holds NaN or infinite values")]
    NonFinite {
        /// Path of the weight.
        path: String,
    },
    /// The decomposition that finds the leading components of a change did not converge.
    #[error("the singular value decomposition of the change of `{path}` did not converge")]
    NoConvergence {
        /// Path of the weight.
        path: String,
    },
    /// The given weight is not the base of the change.
    #[error(
        "`{path}` is not the weight that was trained: its SHA-256 is {found}, that of the base \
         {expected}; take the base model of the training"
    )]
    WrongBase {
        /// Path of the weight.
        path: String,
        /// Digest of the weight that was trained, before the training.
        expected: String,
        /// Digest of the weight that was given.
        found: String,
    },
    /// The parameter is not called `weight`. PEFT adapts layers by their names.
    #[error("`{path}` is not called `weight`, so that PEFT has no adapter for it")]
    NoLayer {
        /// Path of the parameter.
        path: String,
    },
    /// There is nothing to write.
    #[error("{}: there is no change to write", file.display())]
    Empty {
        /// The file.
        file: PathBuf,
    },
    /// A file could not be read or written.
    #[error("{}: {cause}", file.display())]
    Io {
        /// The file.
        file: PathBuf,
        /// What the system said.
        cause: Cause,
    },
    /// The content of a file cannot be used.
    #[error("{}: {field}: {reason}", file.display())]
    Content {
        /// The file.
        file: PathBuf,
        /// Key or name of the tensor.
        field: String,
        /// What is wrong with it.
        reason: String,
    },
}

impl ExportError {
    pub(super) fn io(file: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let file = file.to_path_buf();
        move |error| Self::Io {
            file,
            cause: error.into(),
        }
    }

    pub(super) fn content(
        file: &Path,
        field: impl Into<String>,
        reason: impl Into<String>,
    ) -> Self {
        Self::Content {
            file: file.into(),
            field: field.into(),
            reason: reason.into(),
        }
    }
}
