//! The factors of a model: read, replaced by zeros, and put back.

use std::collections::HashMap;
use std::ops::Range;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::tensor::{Device, Int, Tensor};

use super::OptimizerError;
use crate::adapter::path::{PathTracker, Place, Side, hash, track_path};
use crate::ops::{self, MergeInputs, Rounding, StochasticKey};

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
    pub(super) shards: Vec<ShardFactors>,
    num_shards: usize,
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

    /// How optimizer step `step` is rounded to the weight, where no companion takes the rest.
    fn rounding(&self, step: u64) -> Rounding {
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
            half: None,
            weights: Vec::new(),
        };
        model.visit(&mut collector);
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

    /// The device of the factors, without autodiff.
    pub(super) fn device(&self) -> Device {
        self.weights[0].shards[0].a.value.device().inner()
    }

    /// The weights in at most `count` groups of neighbours, of about the same size.
    pub(super) fn groups(&self, count: usize) -> Vec<Range<usize>> {
        let size = |weight: &WeightFactors| weight.rank() * (weight.d_input() + weight.d_output());
        let total: usize = self.weights.iter().map(size).sum();
        let (mut groups, mut start, mut sum) = (Vec::with_capacity(count), 0, 0);
        for (position, weight) in self.weights.iter().enumerate() {
            sum += size(weight);
            // The last weight completes the last group.
            if sum * count >= total * (groups.len() + 1) {
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
    /// `a` of the shard being visited, whose `b` comes next.
    half: Option<Factor>,
    weights: Vec<WeightFactors>,
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
        let Place::Shard {
            weight,
            index,
            shards,
            side: Some(side),
        } = self.path.place()
        else {
            return;
        };
        let factor = Factor {
            id: param.id,
            value: Tensor::from_dispatch(param.base().into_dispatch()),
        };
        match (side, self.half.take()) {
            (Side::A, _) => self.half = Some(factor),
            (Side::B, Some(a)) => {
                if self.weights.last().is_none_or(|last| last.path != weight) {
                    self.weights.push(WeightFactors {
                        path: weight,
                        shards: Vec::new(),
                        num_shards: shards,
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

/// The companions of half-precision weights, by the weight's path.
pub(super) type Companions = HashMap<String, Tensor<2, Int>>;

/// Replaces every factor by zeros, so that an optimizer step leaves exactly its delta there, and
/// takes the companions out.
pub(super) struct ZeroFactors {
    path: PathTracker,
    companions: Companions,
}

impl ZeroFactors {
    pub(super) fn apply<M: Module>(model: M) -> (M, Companions) {
        let mut mapper = Self {
            path: PathTracker::default(),
            companions: Companions::new(),
        };
        let model = model.map(&mut mapper);
        (model, mapper.companions)
    }
}

impl ModuleMapper for ZeroFactors {
    track_path!(path);

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        match self.path.place() {
            Place::Shard { side: Some(_), .. } => {
                let (id, value, mapper) = param.consume();
                let zeros = value.clone().inner().zeros_like();
                Param::from_mapped_value(id, like_parameter(zeros, &value), mapper)
            }
            _ => param,
        }
    }

    fn map_int<const D: usize>(&mut self, param: Param<Tensor<D, Int>>) -> Param<Tensor<D, Int>> {
        match self.path.place() {
            Place::Companion { weight } => {
                let (id, value, mapper) = param.consume();
                // In its place something that holds no memory of the weight's size.
                let placeholder = Tensor::zeros([1; D], (&value.device(), value.dtype()));
                let value = Tensor::from_dispatch(value.into_dispatch());
                self.companions.insert(weight, value);
                Param::from_mapped_value(id, placeholder, mapper)
            }
            _ => param,
        }
    }
}

/// Puts the frames back and merges the updates into the weights and their companions.
pub(super) struct Commit<'a, F> {
    path: PathTracker,
    frames: HashMap<ParamId, Tensor<2>>,
    /// The adapted weights with their positions.
    weights: HashMap<&'a str, (usize, &'a WeightFactors)>,
    companions: Companions,
    step: u64,
    inputs: F,
    squares: Vec<Tensor<1>>,
}

impl<'a, F: Fn(usize) -> MergeInputs> Commit<'a, F> {
    /// The model after optimizer step `step`, and for each weight the sum of the squares of its
    /// update, `[1]`.
    ///
    /// `inputs` is called with the position of each weight when its turn comes, so that the
    /// buffers of one weight at a time are live.
    pub(super) fn apply<M: Module>(
        model: M,
        factors: &'a Factors,
        companions: Companions,
        step: u64,
        inputs: F,
    ) -> (M, Vec<Tensor<1>>) {
        let frame = |factor: &Factor| (factor.id, factor.value.clone());
        let weights = factors.weights.iter().enumerate();
        let mut mapper = Self {
            path: PathTracker::default(),
            frames: factors.iter().map(|(_, _, _, f)| frame(f)).collect(),
            weights: weights
                .map(|(position, weight)| (weight.path.as_str(), (position, weight)))
                .collect(),
            companions,
            step,
            inputs,
            squares: Vec::with_capacity(factors.weights.len()),
        };
        let model = model.map(&mut mapper);
        (model, mapper.squares)
    }
}

impl<F: Fn(usize) -> MergeInputs> ModuleMapper for Commit<'_, F> {
    track_path!(path);

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        match self.path.place() {
            Place::Shard { side: Some(_), .. } => match self.frames.remove(&param.id) {
                Some(frame) => {
                    let (id, _, mapper) = param.consume();
                    let frame = Tensor::from_dispatch(frame.into_dispatch());
                    Param::from_mapped_value(id, frame, mapper)
                }
                None => param,
            },
            Place::Other(path) => match self.weights.get(path.as_str()) {
                Some(&(position, weight)) => {
                    let (id, value, mapper) = param.consume();
                    // A handle of the storage would make the merge copy: keep only the settings.
                    let settings = Settings::of(&value);
                    let value = Tensor::<2>::from_dispatch(value.inner().into_dispatch());
                    let inputs = (self.inputs)(position);
                    let (merged, squares) = match self.companions.remove(&path) {
                        Some(companion) => {
                            let (merged, companion, squares) =
                                ops::merge_split(value, companion, inputs);
                            // A traversal comes to the companion after the weight.
                            self.companions.insert(path, companion);
                            (merged, squares)
                        }
                        None => ops::merge_rounded(value, inputs, weight.rounding(self.step)),
                    };
                    self.squares.push(squares);
                    let merged = Tensor::<D>::from_dispatch(merged.into_dispatch());
                    Param::from_mapped_value(id, settings.restore(merged), mapper)
                }
                None => param,
            },
            _ => param,
        }
    }

    fn map_int<const D: usize>(&mut self, param: Param<Tensor<D, Int>>) -> Param<Tensor<D, Int>> {
        let companion = match self.path.place() {
            Place::Companion { weight } => self.companions.remove(&weight),
            _ => None,
        };
        match companion {
            Some(companion) => {
                let (id, _, mapper) = param.consume();
                let companion = Tensor::from_dispatch(companion.into_dispatch());
                Param::from_mapped_value(id, companion, mapper)
            }
            None => param,
        }
    }
}

/// `value`, which has no autodiff association, with that of `parameter`.
fn like_parameter<const D: usize>(value: Tensor<D>, parameter: &Tensor<D>) -> Tensor<D> {
    Settings::of(parameter).restore(value)
}

/// What a parameter's tensor carries besides its values.
struct Settings {
    autodiff: bool,
    require_grad: bool,
    checkpointing: Option<burn::backend::GradientCheckpointingStrategy>,
}

impl Settings {
    fn of<const D: usize>(parameter: &Tensor<D>) -> Self {
        Self {
            autodiff: parameter.is_autodiff(),
            require_grad: parameter.is_require_grad(),
            checkpointing: parameter.gradient_checkpointing_strategy(),
        }
    }

    fn restore<const D: usize>(self, value: Tensor<D>) -> Tensor<D> {
        if !self.autodiff {
            return value;
        }
        let value = Tensor::from_inner(value);
        let value = match self.checkpointing {
            Some(strategy) => value.with_gradient_checkpointing_strategy(strategy),
            None => value,
        };
        value.set_require_grad(self.require_grad)
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
                shards: vec![ShardFactors {
                    index: 0,
                    a: factor([size - 1, 1]),
                    b: factor([1, 1]),
                }],
                num_shards: 1,
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
        let uneven = factors(&[2, 90, 2, 2, 4]);
        assert_eq!(uneven.groups(2), [0..2, 2..5]);
        assert_eq!(uneven.groups(4), [0..2, 2..3, 3..4, 4..5]);
    }
}
