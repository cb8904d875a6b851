//! Changes in one file, from which a trained model is rebuilt.

use std::path::Path;

use super::tensors::{self, Names};
use super::{ExportError, WeightChange};

/// Writes changes to one safetensors file, complete or not at all: for each path two tensors in `f32`,
/// `PATH.left` of shape `[d_input, rank]` and `PATH.right` of shape `[rank, d_output]`, and in the metadata
/// (`hd_pissa`) the digest of its base and its relative error.
///
/// # Errors
///
/// [`ExportError::Empty`], [`ExportError::Io`], and [`ExportError::Content`] for a path that is given
/// twice.
pub fn write_delta(file: &Path, changes: &[WeightChange]) -> Result<(), ExportError> {
    tensors::write(file, changes, |change| Ok(names(change.path())))
}

/// Reads what [`write_delta`] wrote, in the order of paths.
///
/// # Errors
///
/// [`ExportError::Io`] and [`ExportError::Content`].
pub fn read_delta(file: &Path) -> Result<Vec<WeightChange>, ExportError> {
    tensors::read(file, |path| Some(names(path)))
}

fn names(path: &str) -> Names {
    Names {
        left: format!("{path}.left"),
        right: format!("{path}.right"),
        transposed: false,
    }
}
