//! The optimizer's state as a record, as bytes and as a file.

use std::fmt::{self, Debug, Formatter};
use std::path::Path;

use burn::tensor::Bytes;
use burn_pack::{Scalar, Writer};

use super::factors::Factors;
use super::{HdPissaOptimizer, OptimizerError};
use crate::optimizer_state::OptimizerState;

/// Version of the records that this build writes and reads.
const FORMAT_VERSION: u64 = 1;
const FORMAT_KEY: &str = "hd_pissa.format_version";
const STEPS_KEY: &str = "hd_pissa.steps";

/// The state of a [`HdPissaOptimizer`]: the inner optimizer's state for the factors of the hosted
/// shards and for dense parameters, and the number of steps.
///
/// Its bytes are in the format of Burn's [`OptimizerRecord`](burn::optim::OptimizerRecord), with a format
/// version.
pub struct HdPissaOptimizerRecord {
    pub(crate) state: OptimizerState,
    pub(crate) steps: u64,
}

impl HdPissaOptimizerRecord {
    /// Number of steps taken.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Serializes the record.
    ///
    /// # Errors
    ///
    /// [`OptimizerError::InvalidRecord`] if the state cannot be serialized.
    pub fn into_bytes(self) -> Result<Bytes, OptimizerError> {
        Ok(self.into_writer().into_bytes()?)
    }

    fn into_writer(self) -> Writer {
        let Self { mut state, steps } = self;
        state.scalars.extend([
            (FORMAT_KEY.into(), Scalar::from(FORMAT_VERSION)),
            (STEPS_KEY.into(), Scalar::from(steps)),
        ]);
        state.into_writer()
    }

    /// Reads what [`into_bytes`](Self::into_bytes) wrote.
    ///
    /// # Errors
    ///
    /// [`OptimizerError::InvalidRecord`] or [`OptimizerError::UnsupportedVersion`].
    pub fn from_bytes(bytes: Bytes) -> Result<Self, OptimizerError> {
        let state = OptimizerState::from_bytes(bytes)?;
        let scalar = |key: &str| {
            let value = state.scalars.get(key).copied();
            let value = value.and_then(|value| u64::try_from(value).ok());
            value.ok_or_else(|| OptimizerError::invalid_record(format!("it has no scalar `{key}`")))
        };
        let found = scalar(FORMAT_KEY)?;
        if found != FORMAT_VERSION {
            return Err(OptimizerError::UnsupportedVersion {
                found,
                supported: FORMAT_VERSION,
            });
        }
        let steps = scalar(STEPS_KEY)?;
        state.check().map_err(OptimizerError::invalid_record)?;
        Ok(Self { state, steps })
    }

    /// Writes the record to a new file next to the target, then renames it: the target is complete
    /// or unchanged.
    ///
    /// # Errors
    ///
    /// [`OptimizerError::Io`] with the path, and those of [`into_bytes`](Self::into_bytes).
    pub fn save(self, path: impl AsRef<Path>) -> Result<(), OptimizerError> {
        let path = path.as_ref();
        let writer = self.into_writer().auto_extension(false);
        writer.write_to_file(path).map_err(|error| match error {
            burn_pack::Error::IoError(reason) => {
                OptimizerError::io(path, std::io::Error::other(reason))
            }
            error => error.into(),
        })
    }

    /// Reads what [`save`](Self::save) wrote.
    ///
    /// # Errors
    ///
    /// [`OptimizerError::Io`] with the path, and those of [`from_bytes`](Self::from_bytes).
    pub fn load(path: impl AsRef<Path>) -> Result<Self, OptimizerError> {
        let path = path.as_ref();
        let bytes = std::fs::read(path).map_err(|error| OptimizerError::io(path, error))?;
        Self::from_bytes(Bytes::from_bytes_vec(bytes))
    }
}

impl Debug for HdPissaOptimizerRecord {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.debug_struct("HdPissaOptimizerRecord")
            .field("steps", &self.steps)
            .field("num_tensors", &self.state.tensors.len())
            .finish_non_exhaustive()
    }
}

impl HdPissaOptimizer {
    /// The state, read from the device.
    ///
    /// # Errors
    ///
    /// [`OptimizerError::InvalidRecord`] if the inner optimizer's state is not one of Burn's.
    pub fn to_record(&self) -> Result<HdPissaOptimizerRecord, OptimizerError> {
        Ok(HdPissaOptimizerRecord {
            state: self.inner.state()?,
            steps: self.steps,
        })
    }

    /// Takes over the state of a record.
    ///
    /// The next step refuses a record of other shards or frames, [`OptimizerError::RecordOfOthers`].
    ///
    /// # Errors
    ///
    /// [`OptimizerError::InvalidRecord`]; the optimizer is then unchanged.
    pub fn load_record(&mut self, record: HdPissaOptimizerRecord) -> Result<(), OptimizerError> {
        let HdPissaOptimizerRecord { state, steps } = record;
        let paths = state.metadata.clone().into_iter();
        self.inner.load(state)?;
        self.steps = steps;
        self.recorded = paths
            .filter_map(|(id, path)| Some((id.parse().ok()?, path)))
            .collect();
        Ok(())
    }

    /// Moments belong to the directions in which they were collected.
    pub(super) fn refuse_record_of_others(
        &mut self,
        factors: &Factors,
    ) -> Result<(), OptimizerError> {
        if self.recorded.is_empty() {
            return Ok(());
        }
        for (_, shard, _, factor) in factors.iter() {
            let given = shard.to_string();
            let recorded = self.recorded.get(&factor.id.val());
            // The model may now be part of a larger one, so only the shard's own name counts.
            let recorded = recorded.and_then(|path| path.rsplit('.').nth(1));
            if let Some(recorded) = recorded.filter(|&recorded| recorded != given) {
                let recorded = recorded.into();
                return Err(OptimizerError::RecordOfOthers { recorded, given });
            }
        }
        self.recorded.clear();
        Ok(())
    }
}
