//! Checks of the checkpoints of Burn's loop, before the loop reads them.

use std::path::{Path, PathBuf};

use burn::lr_scheduler::LrSchedulerRecord;
use burn::optim::OptimizerRecord;
use burn::store::{ModuleRecord, RecordError};
use burn::train::LearnerModel;
use hd_pissa_comm::Solo;

use super::error::LearnerError;
use super::state;
use super::strategy::HdPissaStrategy;
use crate::optimizer_state::OptimizerState;
use crate::{Cause, HdPissaOptimizerRecord, OptimizerError};

/// Where Burn's default checkpointers save, and the name of each part.
const FOLDER: &str = "checkpoint";
const MODEL: &str = "model";
const OPTIMIZER: &str = "optim";
const SCHEDULER: &str = "scheduler";

impl HdPissaStrategy {
    /// Checks that a training of `model` can resume with `SupervisedTraining::checkpoint(epoch)`, which
    /// panics on a checkpoint that does not fit. `folder` is the folder of the `SupervisedTraining`, with Burn's
    /// default checkpointers. `model` has its adapters; its values do not matter.
    ///
    /// # Errors
    ///
    /// [`LearnerError::Unreadable`] for a file that is missing or damaged, as a killed training may leave the
    /// one that it was writing; [`LearnerError::Mismatch`] for a checkpoint of another model, of other
    /// shards, ranks, frames or gradients, or of another strategy; and [`LearnerError::Optimizer`] for
    /// the state of an optimizer that this one cannot take.
    pub fn check_checkpoint<M: LearnerModel>(
        &self,
        folder: &Path,
        epoch: usize,
        model: &M,
    ) -> Result<(), LearnerError> {
        let file = |part: &str| folder.join(FOLDER).join(format!("{part}-{epoch}.bpk"));
        let [of_model, of_optimizer, of_scheduler] = [MODEL, OPTIMIZER, SCHEDULER].map(file);
        let record = read(&of_model, ModuleRecord::load)?;
        let optimizer = read(&of_optimizer, OptimizerRecord::load)?;
        let scheduler = read(&of_scheduler, LrSchedulerRecord::load)?;

        let mismatch = |file: PathBuf, cause: Cause| LearnerError::Mismatch { file, cause };
        let restored = model.clone().try_load_record(record);
        let restored = restored.map_err(|error| mismatch(of_model, error.into()))?;
        let mut learner = self.learner(restored);
        learner.load_scheduler(scheduler);
        let steps = match state::steps_taken(&learner) {
            Some(steps) if steps > 0 => steps,
            _ => {
                let reason = "it counts no steps, so that another strategy has saved it";
                return Err(mismatch(of_scheduler, std::io::Error::other(reason).into()));
            }
        };
        let load = || -> Result<(), OptimizerError> {
            let state = OptimizerState::from_bytes(optimizer.into_bytes()?)?;
            let mut optimizer = self.config.init(self.optimizer.clone(), Solo)?;
            optimizer.load_record(HdPissaOptimizerRecord { state, steps })
        };
        load().map_err(|cause| LearnerError::Optimizer { worker: 0, cause })
    }

    /// The newest epoch in `folder` from which a training of `model` can resume; `None` if there is no
    /// checkpoint. Skips checkpoints that cannot be read.
    ///
    /// # Errors
    ///
    /// As [`check_checkpoint`](Self::check_checkpoint), but [`LearnerError::Unreadable`] only if no
    /// checkpoint can be read.
    pub fn newest_checkpoint<M: LearnerModel>(
        &self,
        folder: &Path,
        model: &M,
    ) -> Result<Option<usize>, LearnerError> {
        let names = std::fs::read_dir(folder.join(FOLDER)).into_iter().flatten();
        let epoch = |name: &str| {
            let name = name.strip_prefix(MODEL)?.strip_prefix('-')?;
            name.strip_suffix(".bpk")?.parse().ok()
        };
        let names = names.flatten();
        let epochs = names.filter_map(|entry| epoch(entry.file_name().to_str()?));
        let mut epochs: Vec<usize> = epochs.collect();
        epochs.sort_unstable();
        let mut unreadable = None;
        for epoch in epochs.into_iter().rev() {
            match self.check_checkpoint(folder, epoch, model) {
                Ok(()) => return Ok(Some(epoch)),
                Err(error @ LearnerError::Unreadable { .. }) => {
                    log::warn!("skipped the checkpoint of epoch {epoch}: {error}");
                    unreadable.get_or_insert(error);
                }
                Err(error) => return Err(error),
            }
        }
        unreadable.map_or(Ok(None), Err)
    }
}

fn read<R>(
    file: &Path,
    load: impl FnOnce(PathBuf) -> Result<R, RecordError>,
) -> Result<R, LearnerError> {
    load(file.into()).map_err(|error| LearnerError::Unreadable {
        file: file.into(),
        cause: error.into(),
    })
}
