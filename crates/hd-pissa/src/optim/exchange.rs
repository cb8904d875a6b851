//! The gather of deltas: each worker sends those of its shards, one group of weights after the
//! other.

use std::ops::Range;

use burn::tensor::Tensor;
use hd_pissa_comm::{Communicator, PendingGather};

use super::factors::{Factors, WeightFactors};
use super::layout::ShardLayout;
use super::{CommunicationDtype, OptimizerError};
use crate::ops::join;

/// One worker's message about some weights in a step.
pub(super) struct OwnDeltas {
    /// `[hosted shards, row_len]` for each weight, rounded to the precision in which they travel.
    pub(super) packed: Vec<Tensor<2>>,
    /// The number of NaN and infinite values in the gradients, `[weights, hosted shards]`.
    pub(super) bad_gradients: Tensor<2>,
    /// [`Frames::are_stale`](super::frames::Frames::are_stale), `[1]`.
    pub(super) stale: Tensor<1>,
}

/// The messages of all workers about all weights in a step.
#[derive(Default)]
pub(super) struct Deltas {
    /// `[shards, row_len]` for each weight.
    pub(super) packed: Vec<Tensor<2>>,
    /// `[weights, shards]` for each group of weights.
    pub(super) bad_gradients: Vec<Tensor<2>>,
    /// Zero if no worker's frames are stale, `[n]` each.
    pub(super) stale: Vec<Tensor<1>>,
}

/// The deltas of some weights, on their way to every worker.
pub(super) enum PendingDeltas<'a> {
    /// A single worker already has all of them.
    Here(Box<OwnDeltas>),
    UnderWay {
        gather: Box<dyn PendingGather + 'a>,
        weights: Range<usize>,
    },
}

impl<'a> PendingDeltas<'a> {
    /// Sends this worker's deltas of `weights` on their way.
    pub(super) fn start(
        own: OwnDeltas,
        weights: Range<usize>,
        dtype: CommunicationDtype,
        communicator: &'a dyn Communicator,
    ) -> Result<Self, OptimizerError> {
        if communicator.num_workers() == 1 {
            return Ok(Self::Here(Box::new(own)));
        }
        let OwnDeltas {
            packed,
            bad_gradients,
            stale,
        } = own;
        let counts = join(vec![bad_gradients, stale.unsqueeze()]);
        let buffer = dtype.encode(join(packed), counts);
        Ok(Self::UnderWay {
            gather: communicator.start_all_gather(buffer)?,
            weights,
        })
    }
}

impl Deltas {
    /// Waits for groups of weights, in order, which together are all weights.
    pub(super) fn finish(
        groups: Vec<PendingDeltas>,
        factors: &Factors,
        layout: &ShardLayout,
        dtype: CommunicationDtype,
    ) -> Result<Self, OptimizerError> {
        let mut all = Self::default();
        for group in groups {
            match group {
                PendingDeltas::Here(own) => {
                    all.packed.extend(own.packed);
                    all.bad_gradients.push(own.bad_gradients);
                    all.stale.push(own.stale);
                }
                PendingDeltas::UnderWay { gather, weights } => {
                    let weights = &factors.weights[weights];
                    all.push(gather.wait()?, weights, factors.hosted.len(), layout, dtype);
                }
            }
        }
        Ok(all)
    }

    /// Call this once every worker has the current frames of all others.
    pub(super) fn stale_is_settled(&mut self) {
        self.stale.clear();
    }

    fn push(
        &mut self,
        gathered: Tensor<1>,
        weights: &[WeightFactors],
        hosted: usize,
        layout: &ShardLayout,
        dtype: CommunicationDtype,
    ) {
        let values: usize = weights.iter().map(WeightFactors::row_len).sum::<usize>() * hosted;
        let counts = weights.len() * hosted + 1;
        let len = values + counts * dtype.count_len();
        let workers = gathered.dims()[0] / len;
        let (deltas, counts) = dtype.decode(gathered.reshape([workers, len]), counts);
        self.packed.extend(layout.by_weight(deltas, weights));
        let bad_gradients = counts.clone().narrow(1, 0, weights.len() * hosted);
        let bad_gradients = bad_gradients.reshape([workers, weights.len(), hosted]);
        let by_shard = bad_gradients
            .swap_dims(1, 2)
            .reshape([workers * hosted, weights.len()]);
        self.bad_gradients.push(layout.sorted(by_shard).transpose());
        let stale = counts.narrow(1, weights.len() * hosted, 1);
        self.stale.push(stale.flatten(0, 1));
    }
}
