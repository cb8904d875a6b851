//! The frames of all shards in packed form, from step to step.

use burn::tensor::{DType, Int, Tensor};
use burn_autodiff::NodeId;
use hd_pissa_comm::Communicator;

use super::OptimizerError;
use super::factors::Factors;
use super::fingerprint::Fingerprints;
use super::layout::ShardLayout;
use super::packed::pack_values;
use super::statistics::Statistics;
use crate::ops::{is_cpu, join};

/// The frames of every weight, in the form that merges read.
pub(super) struct Frames {
    /// `[shards, row_len]` for each weight, rows by the index of the shard. `None` if they are packed
    /// anew for each use.
    packed: Option<Vec<Tensor<2>>>,
    /// [`Statistics::norms`]
    norms: (Tensor<1>, Tensor<1>),
    /// The tensors of the model's factors from which the frames were packed.
    source: Option<Vec<NodeId>>,
    /// With several workers: fingerprints of this worker's frames, `[2 · weights]`.
    own: Option<Tensor<1, Int>>,
}

impl Frames {
    /// Gathers the frames of all shards from all workers, or compares them if each worker has all
    /// of them. Every worker calls it at the same time.
    ///
    /// # Errors
    ///
    /// [`OptimizerError::Drift`] for frames that differ, and those of the transport.
    pub(super) fn gather(
        factors: &Factors,
        layout: &ShardLayout,
        communicator: &dyn Communicator,
    ) -> Result<Self, OptimizerError> {
        let own = known(factors);
        let workers = communicator.num_workers();
        let fingerprints = (workers > 1).then(|| Fingerprints::of_frames(factors, &own));
        let words = fingerprints.as_ref().map(Fingerprints::words);
        let knows_all = factors.knows_all();
        if let (true, Some(fingerprints)) = (knows_all, fingerprints) {
            fingerprints.compare(communicator)?;
        }
        let has_all = workers == 1 || knows_all;
        let packed = if has_all {
            own
        } else {
            let gathered = communicator.all_gather(join(own))?;
            let len = gathered.dims()[0] / workers;
            layout.by_weight(gathered.reshape([workers, len]), &factors.weights)
        };
        // On a CPU a copy of one weight's frames costs less than memory for those of all weights.
        let is_kept = !(has_all && is_cpu(&factors.device()));
        Ok(Self {
            norms: Statistics::of(&packed, &factors.weights).norms(),
            packed: is_kept.then_some(packed),
            source: factors.identity(),
            own: words,
        })
    }

    /// Whether the frames were packed from exactly these tensors.
    pub(super) fn are_of(&self, factors: &Factors) -> bool {
        self.source.is_some() && self.source == factors.identity()
    }

    /// Zero if the other workers know the current values of this worker's factors, `[1]`. For
    /// several workers.
    pub(super) fn are_stale(&self, factors: &Factors) -> Tensor<1> {
        match &self.own {
            Some(own) if !self.are_of(factors) => {
                let now = Fingerprints::of_frames(factors, &known(factors)).words();
                let differ = now.not_equal(own.clone()).float().cast(DType::F32);
                differ.sum()
            }
            _ => Tensor::zeros([1], (&factors.device(), DType::F32)),
        }
    }

    /// Records new tensors that have the same values.
    pub(super) fn adopt(&mut self, factors: &Factors) {
        self.source = factors.identity();
    }

    /// The packed frames of a weight, `[shards, row_len]`. `factors` are those that the frames were
    /// gathered from, or others with the same values.
    pub(super) fn of(&self, weight: usize, factors: &Factors) -> Tensor<2> {
        match &self.packed {
            Some(packed) => packed[weight].clone(),
            None => pack_values(&factors.weights[weight].known),
        }
    }

    /// For each weight the norms of all `a` and of all `b`, `[weights]` each.
    pub(super) fn norms(&self) -> (Tensor<1>, Tensor<1>) {
        self.norms.clone()
    }

    /// The frames of all weights, for the comparison of workers.
    pub(super) fn all(&self, factors: &Factors) -> Vec<Tensor<2>> {
        let weights = 0..factors.weights.len();
        weights.map(|weight| self.of(weight, factors)).collect()
    }
}

/// The packed frames that the model has, of each weight.
fn known(factors: &Factors) -> Vec<Tensor<2>> {
    let weights = factors.weights.iter();
    weights.map(|weight| pack_values(&weight.known)).collect()
}
