//! Who hosts which shard, agreed on by all workers.

use burn::tensor::Tensor;
use hd_pissa_comm::{Communicator, gather_integers};

use super::factors::{Factors, WeightFactors};
use super::{OptimizerError, WireDtype};
use crate::GradientMode;

/// The shards of all workers.
#[derive(Clone, Debug)]
pub(super) struct ShardLayout {
    /// The hosted shards of all workers, worker by worker.
    order: Vec<usize>,
    /// What it holds for: [`Factors::structure`] and the shards of this worker.
    structure: (u64, Vec<usize>),
}

/// What workers must have in common besides their adapters.
pub(super) struct RunSettings {
    pub(super) wire: WireDtype,
    pub(super) gathers: usize,
}

impl ShardLayout {
    /// Compares the workers' layouts and settings.
    pub(super) fn agree(
        factors: &Factors,
        settings: RunSettings,
        communicator: &dyn Communicator,
        model_hash: impl FnOnce() -> u64,
    ) -> Result<Self, OptimizerError> {
        let RunSettings { wire, gathers } = settings;
        wire.check(&factors.device())?;
        let order = if communicator.num_workers() == 1 {
            factors.hosted.clone()
        } else {
            let [windows, seed, scale] = factors.frames().numbers();
            let settings = [
                (
                    "the version of hd-pissa, major · 10⁶ + minor · 10³ + patch,",
                    version(),
                ),
                ("the number of shards", factors.num_shards as u64),
                ("the number of hosted shards", factors.hosted.len() as u64),
                (
                    "factors of all shards, 0 no, 1 yes:",
                    u64::from(factors.knows_all()),
                ),
                (
                    "the number of adapted weights",
                    factors.weights.len() as u64,
                ),
                windows,
                seed,
                scale,
                (
                    "gradients, 0 PerShard, 1 Shared:",
                    match factors.gradients {
                        GradientMode::PerShard => 0,
                        GradientMode::Shared => 1,
                    },
                ),
                (
                    "a fingerprint of paths, shapes, dtypes, ranks, rounding, frames and gradients",
                    factors.structure(),
                ),
                ("a fingerprint of the model's parameters", model_hash()),
                ("the number of bits of a delta on the wire", wire.bits()),
                ("the number of gathers per step", gathers as u64),
            ];
            let own = settings.map(|(_, value)| value);
            for (worker, theirs) in gather_integers(communicator, &own)?.into_iter().enumerate() {
                for (&(setting, ours), theirs) in settings.iter().zip(theirs) {
                    if theirs != ours {
                        return Err(OptimizerError::WorkerMismatch {
                            worker,
                            setting,
                            ours: ours.to_string(),
                            theirs: theirs.to_string(),
                        });
                    }
                }
            }
            let hosted: Vec<u64> = factors.hosted.iter().map(|&shard| shard as u64).collect();
            let gathered = gather_integers(communicator, &hosted)?;
            let gathered = gathered.into_iter().flatten();
            gathered.map(|shard| shard as usize).collect()
        };
        let mut sorted = order.clone();
        sorted.sort_unstable();
        if !sorted.iter().copied().eq(0..factors.num_shards) {
            return Err(OptimizerError::IncompleteShards {
                hosted: order,
                shards: factors.num_shards,
            });
        }
        Ok(Self {
            order,
            structure: (factors.structure(), factors.hosted.clone()),
        })
    }

    /// The hosted shards of each worker, by the worker's index; as many of each.
    pub(super) fn by_worker(&self, workers: usize) -> impl Iterator<Item = &[usize]> {
        self.order.chunks(self.order.len() / workers)
    }

    /// Whether the workers agreed on adapters like these.
    pub(super) fn fits(&self, factors: &Factors) -> bool {
        self.structure == (factors.structure(), factors.hosted.clone())
    }

    /// The packed matrix `[shards, row_len]` of each weight, rows by the index of the shard.
    ///
    /// - gathered: `[workers, n]`, in each row the packed matrices of that worker's shards, weight by
    ///   weight
    pub(super) fn by_weight(
        &self,
        gathered: Tensor<2>,
        weights: &[WeightFactors],
    ) -> Vec<Tensor<2>> {
        let workers = gathered.dims()[0];
        let hosted = self.order.len() / workers;
        let mut start = 0;
        weights
            .iter()
            .map(|weight| {
                let len = hosted * weight.row_len();
                let rows = gathered.clone().narrow(1, start, len);
                start += len;
                self.sorted(rows.reshape([self.order.len(), weight.row_len()]))
            })
            .collect()
    }

    /// Rows that come worker by worker, by the index of the shard.
    pub(super) fn sorted(&self, rows: Tensor<2>) -> Tensor<2> {
        if self.order.is_sorted() {
            return rows;
        }
        let position = |shard| self.order.iter().position(|&other| other == shard);
        let sorted = (0..self.order.len()).map(|shard| {
            let position = position(shard).expect("the layout holds every shard");
            rows.clone().narrow(0, position, 1)
        });
        Tensor::cat(sorted.collect(), 0)
    }
}

/// Version of this crate as one number.
fn version() -> u64 {
    env!("CARGO_PKG_VERSION")
        .split(['.', '-'])
        .take(3)
        .fold(0, |version, part| {
            version * 1000 + part.parse().unwrap_or(0)
        })
}
