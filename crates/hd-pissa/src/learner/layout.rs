//! The shards and micro-batches of each worker.

use std::collections::HashMap;
use std::ops::Range;

use burn::module::Module;
use hd_pissa_comm::Solo;

use super::error::LearnerError;
use crate::hosting::share;
use crate::optim::Factors;
use crate::{GradientMode, OptimizerError};

/// The micro-batches of a step, and their distribution over workers.
pub(super) struct Layout {
    pub(super) mode: GradientMode,
    pub(super) workers: usize,
    /// Parts of the data. Each gives a step micro-batches: one part for each shard, or for each
    /// micro-batch of a step with shared gradients.
    pub(super) parts: usize,
    /// Micro-batches of a step from each part.
    pub(super) per_part: usize,
    shards: usize,
    shard_of: HashMap<u64, usize>,
}

impl Layout {
    /// `micro_batches` is the number that the user asked for, if any.
    pub(super) fn of<M: Module>(
        model: &M,
        micro_batches: Option<usize>,
        workers: usize,
    ) -> Result<Self, LearnerError> {
        let refused = |cause| LearnerError::Optimizer { worker: 0, cause };
        let factors = Factors::of(model, &Solo).map_err(refused)?;
        let (shards, mode, shard_of) = (factors.num_shards, factors.gradients, factors.shard_of());
        if !factors.knows_all() {
            let hosted = factors.hosted;
            return Err(refused(OptimizerError::IncompleteShards { hosted, shards }));
        }
        if !shards.is_multiple_of(workers) {
            return Err(refused(OptimizerError::UnevenWorkers { shards, workers }));
        }
        let (parts, per_part) = match mode {
            GradientMode::PerShard => (shards, micro_batches.unwrap_or(1)),
            GradientMode::Shared => (micro_batches.unwrap_or(workers), 1),
        };
        if !parts.is_multiple_of(workers) {
            return Err(LearnerError::UnevenMicroBatches {
                micro_batches: parts,
                workers,
            });
        }
        Ok(Self {
            mode,
            workers,
            parts,
            per_part,
            shards,
            shard_of,
        })
    }

    /// The parts of the data that a worker learns from.
    pub(super) fn parts_of(&self, worker: usize) -> Range<usize> {
        share(self.parts, worker, self.workers)
    }

    /// Whether a worker keeps the optimizer's state of a parameter. Every worker keeps the states
    /// of parameters outside the shards, and of the shards that it hosts.
    pub(super) fn keeps(&self, worker: usize, parameter: u64) -> bool {
        let hosted = share(self.shards, worker, self.workers);
        let shard = self.shard_of.get(&parameter);
        shard.is_none_or(|shard| hosted.contains(shard))
    }

    /// Distributes the micro-batches of a step over workers, with the position of their part.
    pub(super) fn deal<I>(&self, batches: Vec<Vec<I>>) -> Vec<Vec<(usize, I)>> {
        let mut parts = batches.into_iter().enumerate();
        let of_worker = |worker| {
            let parts = parts.by_ref().take(self.parts_of(worker).len());
            parts
                .flat_map(|(part, batches)| batches.into_iter().map(move |batch| (part, batch)))
                .collect()
        };
        (0..self.workers).map(of_worker).collect()
    }
}
