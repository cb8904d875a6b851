//! What workers tell each other: who hosts which shard, the frames once, the deltas every step.

use burn::tensor::Tensor;
use hd_pissa_comm::{Communicator, PendingGather};

use super::factors::{Factors, WeightFactors};
use super::{OptimizerError, WireDtype};
use crate::message::Messages;

/// The factors, or their deltas, of one shard of one weight.
#[derive(Clone, Debug)]
pub(super) struct Pair {
    /// `[d_input, rank]`
    pub(super) a: Tensor<2>,
    /// `[rank, d_output]`
    pub(super) b: Tensor<2>,
}

/// The deltas of one shard: a pair and a count of bad values for each weight.
pub(super) struct ShardDeltas {
    pub(super) pairs: Vec<Pair>,
    /// Number of NaN and infinite values in the gradients and deltas of each weight, `[n]` in
    /// pieces.
    pub(super) non_finite: Vec<Tensor<1>>,
}

/// The deltas of some weights, on their way to every worker.
pub(super) enum PendingDeltas<'a> {
    /// A single worker has them all.
    Here(Vec<ShardDeltas>),
    UnderWay {
        gather: Box<dyn PendingGather + 'a>,
        weights: &'a [WeightFactors],
        wire: WireDtype,
    },
}

/// Who hosts what, agreed on at the first step.
pub(super) struct Roster {
    /// The hosted shards of all workers, worker by worker.
    order: Vec<usize>,
    /// Frames of every shard by index, then by weight; empty for a single worker, which has them
    /// in its adapters.
    frames: Vec<Vec<Pair>>,
}

impl Roster {
    /// Compares the workers' layouts and shares the frames.
    pub(super) fn agree(
        factors: &Factors,
        wire: WireDtype,
        groups: usize,
        communicator: &dyn Communicator,
        model_hash: impl FnOnce() -> u64,
    ) -> Result<Self, OptimizerError> {
        wire.check(&factors.device())?;
        let workers = communicator.num_workers();
        let messages = Messages::new(communicator, factors.device());
        let order = if workers == 1 {
            factors.hosted.clone()
        } else {
            let settings = [
                (
                    "the version of hd-pissa, major · 10⁶ + minor · 10³ + patch,",
                    version(),
                ),
                ("the number of shards", factors.num_shards as u64),
                ("the number of hosted shards", factors.hosted.len() as u64),
                (
                    "the number of adapted weights",
                    factors.weights.len() as u64,
                ),
                (
                    "a fingerprint of paths, shapes, ranks and rounding",
                    fingerprint(factors),
                ),
                ("a fingerprint of the model's parameters", model_hash()),
                ("the number of bits of a delta on the wire", wire.bits()),
                ("the number of gathers per step", groups as u64),
            ];
            let own = settings.map(|(_, value)| value);
            for (worker, theirs) in messages.gather(&own)?.into_iter().enumerate() {
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
            let gathered = messages.gather(&hosted)?.into_iter().flatten();
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
        let mut roster = Self {
            order,
            frames: Vec::new(),
        };
        if workers > 1 {
            let own = (0..factors.hosted.len())
                .map(|position| {
                    let shards = factors.weights.iter().map(|w| &w.shards[position]);
                    shards
                        .map(|shard| Pair {
                            a: shard.a.value.clone().inner(),
                            b: shard.b.value.clone().inner(),
                        })
                        .collect::<Vec<_>>()
                })
                .collect::<Vec<_>>();
            let rows = own.iter().map(|pairs| flatten(pairs)).collect();
            let gathered = roster.gather_rows(rows, communicator)?;
            roster.frames = gathered
                .into_iter()
                .map(|row| unflatten(row, &factors.weights))
                .collect();
        }
        Ok(roster)
    }

    /// The frames of every shard of weight `weight`, by index.
    pub(super) fn frames<'a>(
        &'a self,
        factors: &'a Factors,
        weight: usize,
    ) -> impl Iterator<Item = Pair> + 'a {
        (0..factors.num_shards).map(move |shard| match self.frames.get(shard) {
            Some(frames) => frames[weight].clone(),
            // A single worker hosts every shard, in order.
            None => {
                let shard = &factors.weights[weight].shards[shard];
                Pair {
                    a: shard.a.value.clone().inner(),
                    b: shard.b.value.clone().inner(),
                }
            }
        })
    }

    /// Sends the deltas of the hosted shards of `weights` on their way.
    pub(super) fn start_deltas<'a>(
        &self,
        hosted: Vec<ShardDeltas>,
        weights: &'a [WeightFactors],
        wire: WireDtype,
        communicator: &'a dyn Communicator,
    ) -> Result<PendingDeltas<'a>, OptimizerError> {
        if communicator.num_workers() == 1 {
            return Ok(PendingDeltas::Here(hosted));
        }
        let rows = hosted.into_iter().map(|shard| shard.encode(wire)).collect();
        Ok(PendingDeltas::UnderWay {
            gather: communicator.start_all_gather(Tensor::cat(rows, 0))?,
            weights,
            wire,
        })
    }

    /// The deltas of every shard by index, once all are there; of all weights, which come in
    /// groups.
    pub(super) fn finish_deltas(
        &self,
        groups: Vec<PendingDeltas>,
    ) -> Result<Vec<ShardDeltas>, OptimizerError> {
        let mut all: Vec<ShardDeltas> = Vec::new();
        for group in groups {
            let group = match group {
                PendingDeltas::Here(shards) => shards,
                PendingDeltas::UnderWay {
                    gather,
                    weights,
                    wire,
                } => self
                    .by_shard(gather.wait()?)
                    .into_iter()
                    .map(|row| ShardDeltas::decode(row, weights, wire))
                    .collect(),
            };
            if all.is_empty() {
                all = group;
                continue;
            }
            for (all, group) in all.iter_mut().zip(group) {
                all.pairs.extend(group.pairs);
                all.non_finite.extend(group.non_finite);
            }
        }
        Ok(all)
    }

    /// One row of equal length per hosted shard becomes one row per shard, by index.
    pub(super) fn gather_rows(
        &self,
        rows: Vec<Tensor<1>>,
        communicator: &dyn Communicator,
    ) -> Result<Vec<Tensor<1>>, OptimizerError> {
        if communicator.num_workers() == 1 {
            return Ok(rows);
        }
        Ok(self.by_shard(communicator.all_gather(Tensor::cat(rows, 0))?))
    }

    /// Cuts what was gathered into the rows of the shards, by index.
    fn by_shard(&self, gathered: Tensor<1>) -> Vec<Tensor<1>> {
        let len = gathered.dims()[0] / self.order.len();
        (0..self.order.len())
            .map(|shard| {
                let position = self.order.iter().position(|&s| s == shard);
                let start = len * position.expect("the roster holds every shard");
                gathered.clone().narrow(0, start, len)
            })
            .collect()
    }
}

impl ShardDeltas {
    fn encode(self, wire: WireDtype) -> Tensor<1> {
        wire.encode(flatten(&self.pairs), Tensor::cat(self.non_finite, 0))
    }

    fn decode(row: Tensor<1>, weights: &[WeightFactors], wire: WireDtype) -> Self {
        let (deltas, counts) = wire.decode(row, weights.len());
        Self {
            pairs: unflatten(deltas, weights),
            non_finite: vec![counts],
        }
    }
}

fn flatten(pairs: &[Pair]) -> Tensor<1> {
    let parts = pairs
        .iter()
        .flat_map(|pair| [pair.a.clone().flatten(0, 1), pair.b.clone().flatten(0, 1)]);
    Tensor::cat(parts.collect(), 0)
}

fn unflatten(row: Tensor<1>, weights: &[WeightFactors]) -> Vec<Pair> {
    let mut start = 0;
    let mut take = |len: usize| {
        let part = row.clone().narrow(0, start, len);
        start += len;
        part
    };
    weights
        .iter()
        .map(|weight| {
            let (rank, d_input, d_output) = (weight.rank(), weight.d_input(), weight.d_output());
            Pair {
                a: take(d_input * rank).reshape([d_input, rank]),
                b: take(rank * d_output).reshape([rank, d_output]),
            }
        })
        .collect()
}

/// Compares what workers say of the same parameters.
pub(super) fn compare(
    fingerprints: &[(String, u64)],
    factors: &Factors,
    communicator: &dyn Communicator,
) -> Result<(), OptimizerError> {
    let own: Vec<u64> = fingerprints.iter().map(|&(_, value)| value).collect();
    let gathered = Messages::new(communicator, factors.device()).gather(&own)?;
    for (worker, theirs) in gathered.into_iter().enumerate() {
        for ((path, ours), theirs) in fingerprints.iter().zip(theirs) {
            if theirs != *ours {
                return Err(OptimizerError::Drift {
                    path: path.clone(),
                    worker,
                    ours: *ours,
                    theirs,
                });
            }
        }
    }
    Ok(())
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

fn fingerprint(factors: &Factors) -> u64 {
    let text: Vec<String> = factors
        .weights
        .iter()
        .map(|w| {
            let (path, rank, seed) = (&w.path, w.rank(), w.rounding_seed);
            format!("{path} {}x{} {rank} {seed:?}", w.d_input(), w.d_output())
        })
        .collect();
    crate::adapter::path::hash(&text.join("\n"))
}
