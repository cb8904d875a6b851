//! The factors of a model, as a traversal finds them.

use std::ops::Range;

use burn::module::{Module, ModuleVisitor, Param, ParamId};
use burn::tensor::{DType, Device, Tensor};
use burn_autodiff::NodeId;

use super::OptimizerError;
use super::packed::pack;
use crate::adapter::path::{PathTracker, Place, Side, hash, shard_name, shard_path};
use crate::ops::{Rounding, StochasticKey, identity};
use crate::windows::FrameChoice;

/// A factor as a traversal finds it.
#[derive(Clone, Debug)]
pub(super) struct Factor {
    pub(super) id: ParamId,
    /// With its autodiff association.
    pub(super) value: Tensor<2>,
}

/// The two factors of a hosted shard of one weight.
#[derive(Clone, Debug)]
pub(super) struct ShardFactors {
    pub(super) index: usize,
    pub(super) a: Factor,
    pub(super) b: Factor,
}

/// The hosted shards of one weight, by ascending index.
#[derive(Clone, Debug)]
pub(super) struct WeightFactors {
    pub(super) path: String,
    /// The dtype of the weight itself.
    pub(super) dtype: DType,
    pub(super) shards: Vec<ShardFactors>,
    num_shards: usize,
    pub(super) frames: FrameChoice,
    /// Seed of stochastic rounding, if the adapter asks for it.
    pub(super) rounding_seed: Option<u64>,
}

impl WeightFactors {
    pub(super) fn d_input(&self) -> usize {
        self.shards[0].a.value.dims()[0]
    }

    pub(super) fn d_output(&self) -> usize {
        self.shards[0].b.value.dims()[1]
    }

    pub(super) fn rank(&self) -> usize {
        self.shards[0].a.value.dims()[1]
    }

    /// Values of `a` in a packed row, which come before those of `b`.
    pub(super) fn split(&self) -> usize {
        self.rank() * self.d_input()
    }

    /// Values of a packed row, `rank · (d_input + d_output)`.
    pub(super) fn row_len(&self) -> usize {
        self.rank() * (self.d_input() + self.d_output())
    }

    /// The hosted factors, packed: `[hosted shards, row_len]`, without autodiff.
    pub(super) fn packed(&self) -> Tensor<2> {
        pack(self.shards.iter().map(|shard| {
            let value = |factor: &Factor| factor.value.clone().inner();
            (value(&shard.a), value(&shard.b))
        }))
    }

    /// Path of a shard of this weight's adapter.
    pub(super) fn shard_path(&self, shard: usize) -> String {
        shard_path(&self.path, shard, self.num_shards, self.frames)
    }

    /// Name of a shard of this weight's adapter, the last but one of a factor's path.
    pub(super) fn shard_name(&self, shard: usize) -> String {
        shard_name(shard, self.num_shards, self.frames)
    }

    /// How optimizer step `step` is rounded to the weight, where no companion takes the rest.
    pub(super) fn rounding(&self, step: u64) -> Rounding {
        match self.rounding_seed {
            None => Rounding::Nearest,
            Some(seed) => Rounding::Stochastic(StochasticKey {
                seed,
                step,
                path: hash(&self.path),
            }),
        }
    }

    fn hosted(&self) -> Vec<usize> {
        self.shards.iter().map(|shard| shard.index).collect()
    }
}

/// All factors of a model, in traversal order of the weights.
#[derive(Clone, Debug)]
pub(super) struct Factors {
    pub(super) weights: Vec<WeightFactors>,
    /// The shards that this worker hosts, the same for every weight.
    pub(super) hosted: Vec<usize>,
    /// Number of shards over all workers.
    pub(super) num_shards: usize,
}

impl Factors {
    pub(super) fn of<M: Module>(model: &M) -> Result<Self, OptimizerError> {
        let mut collector = Collector {
            path: PathTracker::default(),
            base: None,
            half: None,
            weights: Vec::new(),
            unfrozen: None,
        };
        model.visit(&mut collector);
        if let Some(path) = collector.unfrozen {
            return Err(OptimizerError::UnfrozenWeight { path });
        }
        let weights = collector.weights;
        let Some(first) = weights.first() else {
            return Err(OptimizerError::NoAdapter);
        };
        let hosted = first.hosted();
        for weight in &weights {
            if weight.hosted() != hosted || weight.num_shards != first.num_shards {
                let describe = |w: &WeightFactors| format!("{:?} of {}", w.hosted(), w.num_shards);
                return Err(OptimizerError::UnevenShards {
                    path: weight.path.clone(),
                    found: describe(weight),
                    expected: describe(first),
                });
            }
        }
        Ok(Self {
            hosted,
            num_shards: first.num_shards,
            weights,
        })
    }

    /// A hash of what is adapted and how: paths, shapes, dtypes, ranks, frames and rounding. Equal on
    /// every worker of a run.
    pub(super) fn structure(&self) -> u64 {
        let weights = self.weights.iter().map(|w| {
            let (path, dtype, rank, seed) = (&w.path, w.dtype, w.rank(), w.rounding_seed);
            format!(
                "{path} {}x{} {dtype:?} {rank}{} {seed:?}\n",
                w.d_input(),
                w.d_output(),
                w.frames
            )
        });
        hash(&weights.collect::<String>())
    }

    /// What tells the tensors of the factors from others, if anything does.
    pub(super) fn identity(&self) -> Option<Vec<NodeId>> {
        let factors = self.iter();
        factors
            .map(|(_, _, _, factor)| identity(&factor.value))
            .collect()
    }

    /// The device of the factors, without autodiff.
    pub(super) fn device(&self) -> Device {
        self.weights[0].shards[0].a.value.device().inner()
    }

    /// The weights in at most `count` groups of neighbours, of about the same size.
    pub(super) fn groups(&self, count: usize) -> Vec<Range<usize>> {
        let count = count.min(self.weights.len()) as u128;
        let size = |weight: &WeightFactors| weight.row_len() as u128;
        let total: u128 = self.weights.iter().map(size).sum();
        let (mut groups, mut start, mut sum) = (Vec::new(), 0, 0);
        for (position, weight) in self.weights.iter().enumerate() {
            sum += size(weight);
            // The last weight completes the last group.
            if sum * count >= total * (groups.len() as u128 + 1) {
                groups.push(start..position + 1);
                start = position + 1;
            }
        }
        groups
    }

    /// Every factor, with the weight, the shard and the side it belongs to.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&WeightFactors, usize, Side, &Factor)> {
        self.weights.iter().flat_map(|weight| {
            weight.shards.iter().flat_map(move |shard| {
                [(Side::A, &shard.a), (Side::B, &shard.b)]
                    .map(|(side, factor)| (weight, shard.index, side, factor))
            })
        })
    }
}

struct Collector {
    path: PathTracker,
    /// The last parameter outside an adapter: the weight of the adapter that comes next, if any.
    base: Option<Base>,
    /// `a` of the shard being visited, whose `b` comes next.
    half: Option<Factor>,
    weights: Vec<WeightFactors>,
    /// Path of the first adapted weight that requires gradients.
    unfrozen: Option<String>,
}

struct Base {
    path: String,
    dtype: DType,
    require_grad: bool,
}

impl ModuleVisitor for Collector {
    fn enter_module(&mut self, name: &str, container_type: &str) {
        self.path.enter(name, container_type);
        // An adapter announces it after its shards.
        if let Some((weight, seed)) = self.path.stochastic()
            && let Some(last) = self.weights.last_mut()
            && last.path == weight
        {
            last.rounding_seed = Some(seed);
        }
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.exit();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let (weight, index, shards, frames, side) = match self.path.place() {
            Place::Shard {
                weight,
                index,
                shards,
                frames,
                side: Some(side),
            } => (weight, index, shards, frames, side),
            Place::Other(path) => {
                self.base = Some(Base {
                    path,
                    dtype: param.base().dtype(),
                    require_grad: param.is_require_grad(),
                });
                return;
            }
            _ => return,
        };
        let factor = Factor {
            id: param.id,
            value: Tensor::from_dispatch(param.base().into_dispatch()),
        };
        match (side, self.half.take()) {
            (Side::A, _) => self.half = Some(factor),
            (Side::B, Some(a)) => {
                if self.weights.last().is_none_or(|last| last.path != weight) {
                    let base = self.base.take().filter(|base| base.path == weight);
                    let base = base.expect("a weight is visited before its adapter");
                    if base.require_grad {
                        self.unfrozen.get_or_insert(base.path);
                    }
                    self.weights.push(WeightFactors {
                        path: weight,
                        dtype: base.dtype,
                        shards: Vec::new(),
                        num_shards: shards,
                        frames,
                        rounding_seed: None,
                    });
                }
                let last = self.weights.last_mut().expect("just pushed");
                let b = factor;
                last.shards.push(ShardFactors { index, a, b });
            }
            (Side::B, None) => unreachable!("a shard's fields are visited in order: a, b"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_of_about_the_same_size() {
        let device = Device::flex();
        let weight = |size: usize| {
            let factor = |shape| Factor {
                id: ParamId::new(),
                value: Tensor::zeros(shape, &device),
            };
            WeightFactors {
                path: String::new(),
                dtype: DType::F32,
                shards: vec![ShardFactors {
                    index: 0,
                    a: factor([size - 1, 1]),
                    b: factor([1, 1]),
                }],
                num_shards: 1,
                frames: FrameChoice::published(),
                rounding_seed: None,
            }
        };
        let factors = |sizes: &[usize]| Factors {
            weights: sizes.iter().map(|&size| weight(size)).collect(),
            hosted: vec![0],
            num_shards: 1,
        };
        let even = factors(&[2, 6, 2, 6, 2, 6]);
        assert_eq!(even.groups(1).len(), 1);
        assert_eq!(even.groups(3), [0..2, 2..4, 4..6]);
        // A small weight does not fill a group of its own.
        assert_eq!(even.groups(9), [0..2, 2..3, 3..4, 4..5, 5..6]);
        assert_eq!(even.groups(usize::MAX), even.groups(9));
        let uneven = factors(&[2, 90, 2, 2, 4]);
        assert_eq!(uneven.groups(2), [0..2, 2..5]);
        assert_eq!(uneven.groups(4), [0..2, 2..3, 3..4, 4..5]);
    }
}
