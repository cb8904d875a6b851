//! The hosts of all shards, on which all workers agree.

use burn::tensor::{DType, Int, Tensor};
use hd_pissa_comm::{Communicator, Disagreement, agree, gather_integers};

use super::factors::{Factors, WeightFactors};
use super::{CommunicationDtype, OptimizerError};

/// The shards of all workers.
#[derive(Clone, Debug)]
pub(super) struct ShardLayout {
    /// The hosted shards of all workers, worker by worker.
    order: Vec<usize>,
    /// The adapters of this layout: [`Factors::structure`] and the shards of this worker.
    structure: (String, Vec<usize>),
}

/// Settings that workers must share, besides their adapters.
pub(super) struct RunSettings {
    pub(super) communication_dtype: CommunicationDtype,
    pub(super) buckets: usize,
}

impl ShardLayout {
    /// Compares the runs of all workers, and gathers which worker hosts which shard.
    pub(super) fn agree(
        factors: &Factors,
        settings: RunSettings,
        communicator: &dyn Communicator,
        model_hash: impl FnOnce() -> u64,
    ) -> Result<Self, OptimizerError> {
        let RunSettings {
            communication_dtype,
            buckets,
        } = settings;
        communication_dtype.check(&factors.device())?;
        let structure = factors.structure();
        let order = if communicator.num_workers() == 1 {
            factors.hosted.clone()
        } else {
            let version = env!("CARGO_PKG_VERSION");
            let (shards, hosted) = (factors.num_shards, factors.hosted.len());
            let hash = model_hash();
            let description = format!(
                "a step of hd-pissa {version}\n{shards} shards\n{hosted} hosted shards\n\
                 communication_dtype {communication_dtype}\n{buckets} buckets\n{structure}\
                 parameters with the fingerprint {hash:016x}"
            );
            agree(communicator, &description)?;
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
            structure: (structure, factors.hosted.clone()),
        })
    }

    /// The hosted shards of each worker, by the worker's index. All workers host the same number.
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

    /// Rows in the order of workers, sorted by the index of the shard.
    pub(super) fn sorted(&self, rows: Tensor<2>) -> Tensor<2> {
        if self.order.is_sorted() {
            return rows;
        }
        let position = |shard| self.order.iter().position(|&other| other == shard);
        let positions: Vec<i32> = (0..self.order.len())
            .map(|shard| position(shard).expect("the layout holds every shard") as i32)
            .collect();
        let positions = Tensor::<1, Int>::from_data(&positions[..], (&rows.device(), DType::I32));
        rows.select(0, positions)
    }
}

impl From<Disagreement> for OptimizerError {
    fn from(disagreement: Disagreement) -> Self {
        let or_end = |line: Option<String>| line.unwrap_or("nothing more".into());
        match disagreement {
            Disagreement::Line {
                worker,
                ours,
                theirs,
            } => Self::WorkerMismatch {
                worker,
                ours: or_end(ours),
                theirs: or_end(theirs),
            },
            Disagreement::Comm(error) => error.into(),
        }
    }
}
