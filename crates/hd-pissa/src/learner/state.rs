//! The state of a training in Burn's checkpoints: reading it from a learner, and dividing it among
//! workers.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};

use burn::lr_scheduler::module_lr_scheduler::ModuleLrScheduler;
use burn::lr_scheduler::{LrScheduler, LrSchedulerRecord};
use burn::module::{ParamGroup, ParamId};
use burn::optim::OptimizerRecord;
use burn::train::checkpoint::{
    AsyncCheckpointer, Checkpoint, Checkpointer, CheckpointerError, CheckpointingAction,
    CheckpointingStrategy,
};
use burn::train::metric::store::EventStoreClient;
use burn::train::{Learner, LearnerModel, LearningCheckpointer};

use crate::optimizer_state::OptimizerState;
use crate::{HdPissaOptimizerRecord, OptimizerError};

/// Counts optimizer steps in the record of a learning rate scheduler. Stochastic rounding needs
/// their number, and Burn's record of an optimizer has no place for it.
///
/// It returns the negative count as the rate of a parameter that no model has.
#[derive(Clone, Default)]
struct StepCount(u64);

const STEPS: &str = "hd_pissa_steps";

/// FNV-1a of "hd_pissa/steps", 64 bits.
fn counted() -> ParamId {
    ParamId::from(crate::path::hash("hd_pissa/steps"))
}

impl LrScheduler for StepCount {
    fn step(&mut self) -> f64 {
        self.0 += 1;
        -(self.0 as f64)
    }

    fn to_record(&self) -> LrSchedulerRecord {
        LrSchedulerRecord::new().with_scalar(STEPS, self.0)
    }

    fn load_record(&mut self, record: LrSchedulerRecord) {
        self.0 = record.scalar(STEPS).unwrap_or(0);
    }
}

/// `scheduler`, extended to count steps.
pub(super) fn counting(scheduler: ModuleLrScheduler) -> ModuleLrScheduler {
    scheduler.with_group(ParamGroup::from_ids(vec![counted()]), StepCount::default())
}

/// The steps that `learner` has taken; `None` if its scheduler does not count.
pub(super) fn steps_taken<M: LearnerModel>(learner: &Learner<M>) -> Option<u64> {
    let mut probe = learner.clone();
    probe.lr_step();
    let count = -probe.lr_current().lr_from_param(counted(), None);
    (count > 0.0).then(|| count as u64 - 1)
}

/// The state of a learner's optimizer and scheduler.
pub(super) struct LearnerState {
    pub(super) optimizer: OptimizerRecord,
    pub(super) scheduler: LrSchedulerRecord,
}

impl LearnerState {
    /// A learner shows them only to a checkpointer.
    pub(super) fn of<M: LearnerModel>(learner: &Learner<M>, store: &EventStoreClient) -> Self {
        let (optimizer, scheduler) = (Keep::default(), Keep::default());
        let mut checkpointer = LearningCheckpointer::new(
            AsyncCheckpointer::new(Keep::default()),
            AsyncCheckpointer::new(optimizer.clone()),
            AsyncCheckpointer::new(scheduler.clone()),
            Box::new(SaveNow),
        );
        checkpointer.checkpoint(learner, 0, store);
        // Waits for its threads.
        drop(checkpointer);
        Self {
            optimizer: optimizer.take(),
            scheduler: scheduler.take(),
        }
    }
}

struct SaveNow;

impl CheckpointingStrategy for SaveNow {
    fn checkpointing(&mut self, _: usize, _: &EventStoreClient) -> Vec<CheckpointingAction> {
        vec![CheckpointingAction::Save]
    }
}

/// A checkpointer in memory.
struct Keep<R>(Arc<Mutex<Option<R>>>);

impl<R> Default for Keep<R> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<R> Clone for Keep<R> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<R> Keep<R> {
    fn take(&self) -> R {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.take().expect("the checkpointer has saved")
    }
}

impl<R: Checkpoint> Checkpointer<R> for Keep<R> {
    fn save(&self, _: usize, record: R) -> Result<(), CheckpointerError> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(record);
        Ok(())
    }

    fn delete(&self, _: usize) -> Result<(), CheckpointerError> {
        Ok(())
    }

    fn restore(&self, epoch: usize) -> Result<R, CheckpointerError> {
        let reason = format!("epoch {epoch} is not read from memory");
        Err(CheckpointerError::Unknown(reason))
    }
}

/// Merges the records of all workers into one. Parts that several workers have are equal.
pub(super) fn join(
    records: Vec<HdPissaOptimizerRecord>,
) -> Result<OptimizerRecord, OptimizerError> {
    let mut all = OptimizerState::default();
    let mut names = HashSet::new();
    for HdPissaOptimizerRecord { state, .. } in records {
        all.scalars.extend(state.scalars);
        all.metadata.extend(state.metadata);
        let tensors = state.tensors.into_iter();
        let new = tensors.filter(|tensor| names.insert(tensor.name.clone()));
        all.tensors.extend(new);
    }
    Ok(OptimizerRecord::from_bytes(all.into_bytes()?)?)
}

/// The part of a state that belongs to the parameters `of`.
pub(super) fn part(state: &OptimizerState, of: impl Fn(u64) -> bool) -> OptimizerState {
    let is_of = |id: &str| id.parse().is_ok_and(&of);
    let scalars = state.scalars.iter();
    let scalars = scalars.filter(|(key, _)| key.split('.').next().is_some_and(is_of));
    let metadata = state.metadata.iter().filter(|(id, _)| is_of(id));
    let tensors = state.tensors.iter();
    let tensors = tensors.filter(|tensor| tensor.param_id.is_some_and(&of));
    OptimizerState {
        tensors: tensors.cloned().collect(),
        scalars: scalars.map(|(key, value)| (key.clone(), *value)).collect(),
        metadata: metadata
            .map(|(id, path)| (id.clone(), path.clone()))
            .collect(),
    }
}
