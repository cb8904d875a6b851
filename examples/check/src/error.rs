//! Errors that prevent any comparison.

use std::path::PathBuf;

use crate::measure::DeviceError;

use crate::recorded::ReplayError;

/// Why `check` could not run, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// `--device` cannot be used.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// `--data` has no recorded runs.
    #[error("--data {}: {source}; it should be the folder tests/data of the repository", folder.display())]
    Data {
        folder: PathBuf,
        source: std::io::Error,
    },
    /// A recorded run cannot be read.
    #[error(transparent)]
    Recorded(#[from] ReplayError),
    /// `--json` cannot be written.
    #[error("--json {}: {source}", file.display())]
    Json {
        file: PathBuf,
        source: std::io::Error,
    },
}
