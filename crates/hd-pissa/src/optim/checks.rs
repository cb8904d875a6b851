//! What must hold before a step is merged, found out on the device and read back once.

use burn::tensor::Tensor;

use super::OptimizerError;
use super::exchange::Deltas;
use super::factors::Factors;
use super::frames::Frames;
use super::packed::RowStatistics;
use super::range::Range;

/// Numbers that are all zero if a step may be merged.
pub(super) struct Checks {
    /// `[n]` each, in the order in which findings are reported.
    numbers: Vec<Tensor<1>>,
    subjects: Vec<Subject>,
    /// Those after the frames were found to be stale say nothing.
    range_start: usize,
}

/// What a tensor of numbers is about.
enum Subject {
    /// Bad values in the gradients of a weight's shards.
    Gradient(usize),
    /// Bad values in the mean gradient of a dense parameter.
    DenseGradient(String),
    /// Bad values in the deltas of a weight's shards.
    Update(usize),
    /// Bad values in a dense parameter after the step.
    DenseUpdate(String),
    /// Frames that workers know with other values.
    Frames,
    /// 1 if a weight may leave the range of its dtype.
    Range(usize),
}

/// What the numbers say, and the sum of the squares of all updates.
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
        ranges: &[Range],
    ) -> Self {
        let mut checks = Self {
            numbers: Vec::new(),
            subjects: Vec::new(),
            range_start: 0,
        };
        for (weight, counts) in deltas.bad_gradients.iter().enumerate() {
            checks.push(Subject::Gradient(weight), counts.clone());
        }
        for (path, count) in dense_gradients {
            checks.push(Subject::DenseGradient(path.clone()), count.clone());
        }
        let statistics: Vec<RowStatistics> = deltas
            .packed
            .iter()
            .zip(&factors.weights)
            .map(|(deltas, weight)| RowStatistics::of(deltas.clone(), weight.split()))
            .collect();
        for (weight, statistics) in statistics.iter().enumerate() {
            checks.push(Subject::Update(weight), statistics.non_finite());
        }
        for (path, count) in dense_values {
            checks.push(Subject::DenseUpdate(path.clone()), count.clone());
        }
        for stale in &deltas.stale {
            checks.push(Subject::Frames, stale.clone());
        }
        checks.range_start = checks.subjects.len();
        for (weight, (statistics, range)) in statistics.iter().zip(ranges).enumerate() {
            let may_leave = range.may_be_left(frames.statistics(weight), statistics);
            checks.push(Subject::Range(weight), may_leave);
        }
        checks
    }

    fn push(&mut self, subject: Subject, numbers: Tensor<1>) {
        self.subjects.push(subject);
        self.numbers.push(numbers);
    }

    /// Zero if and only if the step may be merged, `[1]`.
    pub(super) fn gate(&self) -> Tensor<1> {
        Tensor::cat(self.numbers.clone(), 0).sum()
    }

    /// The step's one read-back. `squares` are those of each weight's update, `[1]`, and
    /// `squared_gradients` those of each shard's gradients, if wanted.
    pub(super) fn read(
        self,
        factors: &Factors,
        squares: Vec<Tensor<1>>,
        squared_gradients: Option<Tensor<1>>,
    ) -> Result<Verdict, OptimizerError> {
        let lengths: Vec<usize> = self.numbers.iter().map(|n| n.dims()[0]).collect();
        let updates = squares.len();
        let gradients = squared_gradients.into_iter().collect();
        let all = Tensor::cat([self.numbers, squares, gradients].concat(), 0).into_data();
        let all: Vec<f32> = all.iter::<f32>().collect();
        let mut stale = false;
        let mut start = 0;
        for (position, (subject, len)) in self.subjects.into_iter().zip(lengths).enumerate() {
            if position == self.range_start && stale {
                return Ok(Verdict::StaleFrames);
            }
            let numbers = &all[start..start + len];
            start += len;
            let Some(shard) = numbers.iter().position(|&number| number != 0.0) else {
                continue;
            };
            let count = numbers[shard] as usize;
            let shard_path = |weight: usize| factors.shard_path(weight, shard);
            return Err(match subject {
                Subject::Gradient(weight) => OptimizerError::NonFiniteGradient {
                    path: shard_path(weight),
                    count,
                },
                Subject::DenseGradient(path) => OptimizerError::NonFiniteGradient { path, count },
                Subject::Update(weight) => OptimizerError::NonFiniteUpdate {
                    path: shard_path(weight),
                    count,
                },
                Subject::DenseUpdate(path) => OptimizerError::NonFiniteUpdate { path, count },
                Subject::Frames => {
                    stale = true;
                    continue;
                }
                Subject::Range(weight) => OptimizerError::UpdateOutOfRange {
                    path: factors.weights[weight].path.clone(),
                    dtype: factors.weights[weight].dtype,
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
