//! What workers tell each other: who hosts which shard, the frames once, the deltas every step.

use burn::tensor::Tensor;
use hd_pissa_comm::Communicator;

use super::OptimizerError;
use super::factors::Factors;
use crate::message::Messages;

/// The factors, or their deltas, of one shard of one weight.
#[derive(Clone, Debug)]
pub(super) struct Pair {
    /// `[d_input, rank]`
    pub(super) a: Tensor<2>,
    /// `[rank, d_output]`
    pub(super) b: Tensor<2>,
}

/// One shard's share of a gather: a pair and a count of bad values for each weight.
pub(super) struct ShardDeltas {
    pub(super) pairs: Vec<Pair>,
    /// Number of NaN and infinite values in the gradients and deltas of each weight, `[1]`.
    pub(super) non_finite: Vec<Tensor<1>>,
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
        communicator: &dyn Communicator,
        model_hash: impl FnOnce() -> u64,
    ) -> Result<Self, OptimizerError> {
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
            let rows = own.iter().map(|pairs| flatten(pairs, &[])).collect();
            let gathered = roster.gather_rows(rows, communicator)?;
            roster.frames = gathered
                .into_iter()
                .map(|row| unflatten(row, factors, 0).pairs)
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

    /// The deltas of every shard by index, from those of the hosted ones.
    pub(super) fn gather_deltas(
        &self,
        hosted: Vec<ShardDeltas>,
        factors: &Factors,
        communicator: &dyn Communicator,
    ) -> Result<Vec<ShardDeltas>, OptimizerError> {
        if communicator.num_workers() == 1 {
            return Ok(hosted);
        }
        let rows = hosted
            .iter()
            .map(|shard| flatten(&shard.pairs, &shard.non_finite))
            .collect();
        let gathered = self.gather_rows(rows, communicator)?;
        Ok(gathered
            .into_iter()
            .map(|row| unflatten(row, factors, factors.weights.len()))
            .collect())
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
        let len = rows[0].dims()[0];
        let gathered = communicator.all_gather(Tensor::cat(rows, 0))?;
        Ok((0..self.order.len())
            .map(|shard| {
                let position = self.order.iter().position(|&s| s == shard);
                let start = len * position.expect("the roster holds every shard");
                gathered.clone().narrow(0, start, len)
            })
            .collect())
    }
}

fn flatten(pairs: &[Pair], counts: &[Tensor<1>]) -> Tensor<1> {
    let pairs = pairs
        .iter()
        .flat_map(|pair| [pair.a.clone().flatten(0, 1), pair.b.clone().flatten(0, 1)]);
    Tensor::cat(pairs.chain(counts.iter().cloned()).collect(), 0)
}

fn unflatten(row: Tensor<1>, factors: &Factors, counts: usize) -> ShardDeltas {
    let mut start = 0;
    let mut take = |len: usize| {
        let part = row.clone().narrow(0, start, len);
        start += len;
        part
    };
    let pairs = factors
        .weights
        .iter()
        .map(|weight| {
            let (rank, d_input, d_output) = (weight.rank(), weight.d_input(), weight.d_output());
            Pair {
                a: take(d_input * rank).reshape([d_input, rank]),
                b: take(rank * d_output).reshape([rank, d_output]),
            }
        })
        .collect();
    let non_finite = (0..counts).map(|_| take(1)).collect();
    ShardDeltas { pairs, non_finite }
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
