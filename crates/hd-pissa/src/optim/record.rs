//! The optimizer's state as bytes and files.

use std::path::Path;

use burn::optim::OptimizerRecord;
use burn::tensor::Bytes;
use burn_pack::{Reader, Scalar, Writer};

use super::{HdPissaOptimizer, OptimizerError};
use crate::checkpoint::check_record;

/// Version of the records that this build writes and reads.
const FORMAT_VERSION: u64 = 1;
const FORMAT_KEY: &str = "hd_pissa.format_version";
const STEPS_KEY: &str = "hd_pissa.steps";

impl HdPissaOptimizer {
    /// Serializes the state of the inner optimizer (the moments of the hosted shards) in Burn's
    /// format, with the number of steps and a format version.
    ///
    /// # Errors
    ///
    /// [`OptimizerError::InvalidRecord`] if the state cannot be serialized.
    pub fn to_bytes(&self) -> Result<Bytes, OptimizerError> {
        let reader = Reader::from_bytes(self.inner.into_bytes()?).map_err(invalid_record)?;
        let scalars = reader.scalars().clone();
        let metadata = reader.metadata().clone();
        let mut writer = Writer::new(reader.into_tensors().map_err(invalid_record)?)
            .with_scalar(FORMAT_KEY, Scalar::from(FORMAT_VERSION))
            .with_scalar(STEPS_KEY, Scalar::from(self.steps));
        for (key, value) in &scalars {
            writer = writer.with_scalar(key, *value);
        }
        for (key, value) in &metadata {
            writer = writer.with_metadata(key, value);
        }
        writer.into_bytes().map_err(invalid_record)
    }

    /// Restores a state written by [`to_bytes`](Self::to_bytes).
    ///
    /// # Errors
    ///
    /// [`OptimizerError::InvalidRecord`] or [`OptimizerError::UnsupportedVersion`]; `self` is then
    /// lost, the record unread. The next step refuses a record of other shards or frames,
    /// [`OptimizerError::RecordOfOthers`].
    pub fn from_bytes(self, bytes: Bytes) -> Result<Self, OptimizerError> {
        let reader = Reader::from_bytes(bytes.clone()).map_err(invalid_record)?;
        let scalar = |key: &str| {
            let value = reader.scalars().get(key).copied();
            let value = value.and_then(|value| u64::try_from(value).ok());
            value.ok_or_else(|| OptimizerError::InvalidRecord {
                reason: format!("it has no scalar `{key}`"),
            })
        };
        let found = scalar(FORMAT_KEY)?;
        if found != FORMAT_VERSION {
            return Err(OptimizerError::UnsupportedVersion {
                found,
                supported: FORMAT_VERSION,
            });
        }
        let steps = scalar(STEPS_KEY)?;
        self.resume(bytes, steps)
    }

    /// Goes on after `steps` steps, with the state of the inner optimizer in Burn's format.
    pub(crate) fn resume(mut self, bytes: Bytes, steps: u64) -> Result<Self, OptimizerError> {
        let reader = Reader::from_bytes(bytes.clone()).map_err(invalid_record)?;
        self.steps = steps;
        let paths = reader.metadata().iter();
        self.recorded = paths
            .filter_map(|(id, path)| Some((id.parse().ok()?, path.clone())))
            .collect();
        let scalars = reader.scalars().clone();
        let tensors = reader.into_tensors().map_err(invalid_record)?;
        check_record(&tensors, &scalars)
            .map_err(|reason| OptimizerError::InvalidRecord { reason })?;
        self.inner = self.inner.load_record(OptimizerRecord::from_bytes(bytes)?);
        Ok(self)
    }

    /// Writes the state to a file, beside it first and then renamed: the file is complete or as
    /// before.
    ///
    /// # Errors
    ///
    /// [`OptimizerError::Io`] with the path, and those of [`to_bytes`](Self::to_bytes).
    pub fn save(&self, path: impl AsRef<Path>) -> Result<(), OptimizerError> {
        let path = path.as_ref();
        let bytes = self.to_bytes()?;
        let write = || -> std::io::Result<()> {
            let folder = match path.parent() {
                Some(folder) if !folder.as_os_str().is_empty() => folder,
                _ => Path::new("."),
            };
            let mut file = tempfile::NamedTempFile::new_in(folder)?;
            std::io::Write::write_all(&mut file, &bytes)?;
            file.as_file().sync_all()?;
            file.persist(path)?;
            Ok(())
        };
        write().map_err(|error| io_error(path, &error))
    }

    /// Restores a state written by [`save`](Self::save).
    ///
    /// # Errors
    ///
    /// [`OptimizerError::Io`] with the path, and those of [`from_bytes`](Self::from_bytes).
    pub fn load(self, path: impl AsRef<Path>) -> Result<Self, OptimizerError> {
        let path = path.as_ref();
        let bytes = std::fs::read(path).map_err(|error| io_error(path, &error))?;
        self.from_bytes(Bytes::from_bytes_vec(bytes))
    }
}

fn invalid_record(error: impl std::fmt::Display) -> OptimizerError {
    OptimizerError::InvalidRecord {
        reason: error.to_string(),
    }
}

fn io_error(path: &Path, error: &std::io::Error) -> OptimizerError {
    OptimizerError::Io {
        path: path.display().to_string(),
        reason: error.to_string(),
    }
}
