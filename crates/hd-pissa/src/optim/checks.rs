//! The conditions of a merge, computed on the device and read back once.

use burn::tensor::Tensor;

use super::OptimizerError;
use super::exchange::Deltas;
use super::factors::Factors;
use super::frames::Frames;
use super::range::Ranges;
use super::statistics::Statistics;
use crate::ops::join;

/// Numbers that are all zero if a step may be merged.
pub(super) struct Checks {
    /// The numbers of each subject, in the order in which findings are reported. A matrix holds one
    /// number for each weight and shard.
    numbers: Vec<Tensor<2>>,
    subjects: Vec<Subject>,
    /// Numbers from here on mean nothing if the frames are stale.
    range_start: usize,
}

/// The subject of a tensor of numbers.
enum Subject {
    /// Bad values in the gradients, weight by weight and shard by shard.
    Gradients,
    /// Bad values in the mean gradient of a dense parameter.
    DenseGradient(String),
    /// Bad values in the deltas, weight by weight and shard by shard.
    Updates,
    /// Bad values in a dense parameter after the step.
    DenseUpdate(String),
    /// Frames that other workers know with different values.
    Frames,
    /// For each weight 1 if it may leave the range of its dtype.
    Ranges,
}

/// The result of the checks, and the sum of the squares of all updates.
pub(super) enum Verdict {
    Merged {
        squared_norm: f64,
        squared_gradients: Vec<f64>,
    },
    StaleFrames,
}

/// Paths of dense parameters, each with a count, `[1]`.
pub(super) type DenseCounts = Vec<(String, Tensor<1>)>;

impl Checks {
    pub(super) fn of(
        factors: &Factors,
        frames: &Frames,
        deltas: &Deltas,
        dense_gradients: &DenseCounts,
        dense_values: &DenseCounts,
        ranges: &Ranges,
    ) -> Self {
        let mut checks = Self {
            numbers: Vec::new(),
            subjects: Vec::new(),
            range_start: 0,
        };
        for counts in &deltas.bad_gradients {
            checks.push(Subject::Gradients, counts.clone());
        }
        for (path, count) in dense_gradients {
            checks.push(
                Subject::DenseGradient(path.clone()),
                count.clone().unsqueeze(),
            );
        }
        let statistics = Statistics::of(&deltas.packed, &factors.weights);
        checks.push(Subject::Updates, statistics.non_finite());
        for (path, count) in dense_values {
            checks.push(
                Subject::DenseUpdate(path.clone()),
                count.clone().unsqueeze(),
            );
        }
        for stale in &deltas.stale {
            checks.push(Subject::Frames, stale.clone().unsqueeze());
        }
        checks.range_start = checks.subjects.len();
        let may_leave = ranges.may_be_left(frames.norms(), &statistics);
        checks.push(Subject::Ranges, may_leave.unsqueeze());
        checks
    }

    fn push(&mut self, subject: Subject, numbers: Tensor<2>) {
        self.subjects.push(subject);
        self.numbers.push(numbers);
    }

    /// Zero if and only if the step may be merged, `[1]`.
    pub(super) fn gate(&self) -> Tensor<1> {
        join(self.numbers.clone()).sum()
    }

    /// The step's one read-back. `squares` are those of each weight's update, `[1]`, and
    /// `squared_gradients` those of each shard's gradients, if requested.
    pub(super) fn read(
        self,
        factors: &Factors,
        squares: Vec<Tensor<1>>,
        squared_gradients: Option<Tensor<1>>,
    ) -> Result<Verdict, OptimizerError> {
        let lengths = self.numbers.iter().map(|n| n.shape().num_elements());
        let lengths: Vec<usize> = lengths.collect();
        let updates = squares.len();
        let mut all = self.numbers;
        all.extend(
            squares
                .into_iter()
                .chain(squared_gradients)
                .map(Tensor::unsqueeze),
        );
        let all: Vec<f32> = join(all).into_data().iter::<f32>().collect();
        let shards = factors.num_shards;
        let mut stale = false;
        let mut start = 0;
        // The first weight of the gradients that come next.
        let mut first_weight = 0;
        for (position, (subject, len)) in self.subjects.into_iter().zip(lengths).enumerate() {
            if position == self.range_start && stale {
                return Ok(Verdict::StaleFrames);
            }
            let numbers = &all[start..start + len];
            start += len;
            let first = first_weight;
            if let Subject::Gradients = subject {
                first_weight += len / shards;
            }
            let Some(position) = numbers.iter().position(|&number| number != 0.0) else {
                continue;
            };
            let count = numbers[position] as usize;
            let shard_path =
                |first: usize| factors.shard_path(first + position / shards, position % shards);
            return Err(match subject {
                Subject::Gradients => OptimizerError::NonFiniteGradient {
                    path: shard_path(first),
                    count,
                },
                Subject::DenseGradient(path) => OptimizerError::NonFiniteGradient { path, count },
                Subject::Updates => OptimizerError::NonFiniteUpdate {
                    path: shard_path(0),
                    count,
                },
                Subject::DenseUpdate(path) => OptimizerError::NonFiniteUpdate { path, count },
                Subject::Frames => {
                    stale = true;
                    continue;
                }
                Subject::Ranges => OptimizerError::UpdateOutOfRange {
                    path: factors.weights[position].path.clone(),
                    dtype: factors.weights[position].dtype,
                },
            });
        }
        let (updates, gradients) = all[start..].split_at(updates);
        let [updates, gradients] = [updates, gradients]
            .map(|squares| squares.iter().copied().map(f64::from).collect::<Vec<f64>>());
        Ok(Verdict::Merged {
            squared_norm: updates.iter().sum(),
            squared_gradients: gradients,
        })
    }
}
