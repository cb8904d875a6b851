//! The factors of a model, collected by a traversal.

use std::ops::Range;

use burn::module::{Module, ModuleVisitor, Param, ParamId};
use burn::tensor::{DType, Device, Tensor};
use burn_autodiff::NodeId;
use hd_pissa_comm::Communicator;

use super::OptimizerError;
use crate::GradientMode;
use crate::hosting::hosted_shards;
use crate::ops::{Rounding, StochasticKey, identity};
use crate::path::{PathTracker, Place, ShardName, Side, hash};

/// A factor of the model.
#[derive(Clone, Debug)]
pub(super) struct Factor {
    pub(super) id: ParamId,
    /// With its autodiff association.
    pub(super) value: Tensor<2>,
}

/// The two factors of a shard of one weight.
#[derive(Clone, Debug)]
pub(super) struct ShardFactors {
    pub(super) name: ShardName,
    pub(super) a: Factor,
    pub(super) b: Factor,
}

impl ShardFactors {
    pub(super) fn parts(&self) -> [(Side, &Factor); 2] {
        [(Side::A, &self.a), (Side::B, &self.b)]
    }
}

/// The shards of one weight, by ascending index.
#[derive(Clone, Debug)]
pub(super) struct WeightFactors {
    pub(super) path: String,
    /// The dtype of the weight itself.
    pub(super) dtype: DType,
    /// The shards that this worker hosts.
    pub(super) shards: Vec<ShardFactors>,
    /// The shards whose factors the model has: those that this worker hosts, or all.
    pub(super) known: Vec<ShardFactors>,
    /// Seed of stochastic rounding, if the adapter asks for it.
    pub(super) rounding_seed: Option<u64>,
}

impl WeightFactors {
    pub(super) fn d_input(&self) -> usize {
        self.known[0].a.value.dims()[0]
    }

    pub(super) fn d_output(&self) -> usize {
        self.known[0].b.value.dims()[1]
    }

    pub(super) fn rank(&self) -> usize {
        self.known[0].a.value.dims()[1]
    }

    /// Values of `a` in a packed row, which come before those of `b`.
    pub(super) fn split(&self) -> usize {
        self.rank() * self.d_input()
    }

    /// Values of a packed row, `rank · (d_input + d_output)`.
    pub(super) fn row_len(&self) -> usize {
        self.rank() * (self.d_input() + self.d_output())
    }

    /// Path of a factor.
    pub(super) fn factor_path(&self, shard: ShardName, side: Side) -> String {
        format!("{}.{}", shard.path(&self.path), side.name())
    }

    /// How the update of optimizer step `step` is rounded to the weight, if no residual bits take
    /// the rest.
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

    fn known_indices(&self) -> Vec<usize> {
        self.known.iter().map(|shard| shard.name.index).collect()
    }

    fn name(&self) -> ShardName {
        self.known[0].name
    }
}

/// All factors of a model, in traversal order of the weights.
#[derive(Clone, Debug)]
pub(crate) struct Factors {
    pub(super) weights: Vec<WeightFactors>,
    /// The shards that this worker hosts, the same for every weight.
    pub(crate) hosted: Vec<usize>,
    /// Number of shards over all workers.
    pub(crate) num_shards: usize,
    /// Which gradients the shards learn from, the same for every weight.
    pub(crate) gradients: GradientMode,
}

impl Factors {
    /// The factors of `model`, on the worker of `communicator`.
    pub(crate) fn of<M: Module>(
        model: &M,
        communicator: &dyn Communicator,
    ) -> Result<Self, OptimizerError> {
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
        let mut weights = collector.weights;
        let Some(first) = weights.first() else {
            return Err(OptimizerError::NoAdapter);
        };
        let known = first.known_indices();
        let ShardName {
            shards: num_shards,
            gradients,
            ..
        } = first.name();
        for weight in &weights {
            let name = weight.name();
            if weight.known_indices() != known
                || (name.shards, name.gradients) != (num_shards, gradients)
            {
                let describe = |w: &WeightFactors| {
                    let (known, name) = (w.known_indices(), w.name());
                    format!(
                        "{known:?} of {} with {:?} gradients",
                        name.shards, name.gradients
                    )
                };
                return Err(OptimizerError::UnevenShards {
                    path: weight.path.clone(),
                    found: describe(weight),
                    expected: describe(first),
                });
            }
        }
        let hosted = hosted_shards(&known, num_shards, communicator);
        for weight in &mut weights {
            let known = weight.known.iter();
            let is_hosted = |shard: &&ShardFactors| hosted.contains(&shard.name.index);
            weight.shards = known.filter(is_hosted).cloned().collect();
        }
        Ok(Self {
            weights,
            hosted,
            num_shards,
            gradients,
        })
    }

    /// The adapted weights and their settings, in lines. The same on every worker of a run.
    pub(super) fn structure(&self) -> String {
        let weights = self.weights.iter().map(|weight| {
            let (path, dtype, rank) = (&weight.path, weight.dtype, weight.rank());
            let shape = [weight.d_input(), weight.d_output()];
            let name = weight.name();
            let (windows, frame_scale) = (name.frames.windows, name.frames.scale);
            let (gradients, seed) = (name.gradients, weight.rounding_seed);
            format!(
                "`{path}` of shape {shape:?} and dtype {dtype:?} with rank {rank}\n\
                 windows {windows:?} of `{path}`\nframe_scale {frame_scale:?} of `{path}`\n\
                 {gradients:?} gradients of `{path}`\nrounding seed {seed:?} of `{path}`\n"
            )
        });
        let known = match self.knows_all() {
            true => "all shards",
            false => "the hosted shards alone",
        };
        // Last, because workers may know different factors because of another setting. That setting
        // is then the first difference.
        format!("{}factors of {known}\n", weights.collect::<String>())
    }

    /// Path of a shard of the weight at position `weight`, hosted here or elsewhere.
    pub(super) fn shard_path(&self, weight: usize, shard: usize) -> String {
        let weight = &self.weights[weight];
        let name = ShardName {
            index: shard,
            ..weight.name()
        };
        name.path(&weight.path)
    }

    /// The identities of the known factors' tensors, if they have any.
    pub(super) fn identity(&self) -> Option<Vec<NodeId>> {
        let factors = self.known();
        factors
            .map(|(_, _, _, factor)| identity(&factor.value))
            .collect()
    }

    /// Whether the model has the factors of every shard, as with shared gradients.
    pub(crate) fn knows_all(&self) -> bool {
        self.weights[0].known.len() == self.num_shards
    }

    /// The shard of each factor that the model has, by the id of its parameter.
    #[cfg(feature = "learner")]
    pub(crate) fn shard_of(&self) -> std::collections::HashMap<u64, usize> {
        let known = self.known();
        known
            .map(|(_, shard, _, factor)| (factor.id.val(), shard.index))
            .collect()
    }

    /// The device of the factors, without autodiff.
    pub(super) fn device(&self) -> Device {
        self.weights[0].known[0].a.value.device().inner()
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

    /// Every factor of the hosted shards, with its weight, shard and side.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&WeightFactors, ShardName, Side, &Factor)> {
        self.factors(|weight| &weight.shards)
    }

    /// Every factor that the model has.
    pub(super) fn known(&self) -> impl Iterator<Item = (&WeightFactors, ShardName, Side, &Factor)> {
        self.factors(|weight| &weight.known)
    }

    fn factors(
        &self,
        shards: fn(&WeightFactors) -> &[ShardFactors],
    ) -> impl Iterator<Item = (&WeightFactors, ShardName, Side, &Factor)> {
        self.weights.iter().flat_map(move |weight| {
            shards(weight).iter().flat_map(move |shard| {
                let parts = shard.parts();
                parts.map(|(side, factor)| (weight, shard.name, side, factor))
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
        let (weight, name, side) = match self.path.place() {
            Place::Shard {
                weight,
                name,
                side: Some(side),
            } => (weight, name, side),
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
                        known: Vec::new(),
                        rounding_seed: None,
                    });
                }
                let last = self.weights.last_mut().expect("just pushed");
                let b = factor;
                last.known.push(ShardFactors { name, a, b });
            }
            (Side::B, None) => unreachable!("a shard's fields are visited in order: a, b"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::windows::FrameChoice;

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
                shards: Vec::new(),
                known: vec![ShardFactors {
                    name: ShardName {
                        index: 0,
                        shards: 1,
                        frames: FrameChoice::published(),
                        gradients: GradientMode::PerShard,
                    },
                    a: factor([size - 1, 1]),
                    b: factor([1, 1]),
                }],
                rounding_seed: None,
            }
        };
        let factors = |sizes: &[usize]| Factors {
            weights: sizes.iter().map(|&size| weight(size)).collect(),
            hosted: vec![0],
            num_shards: 1,
            gradients: GradientMode::PerShard,
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
