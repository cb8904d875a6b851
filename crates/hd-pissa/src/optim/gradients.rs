//! The gradients of a step, shard by shard.

use std::collections::BTreeMap;

use burn::module::{Module, ModuleVisitor, Param, ParamId};
use burn::optim::GradientsParams;
use burn::tensor::Tensor;

use super::OptimizerError;
use super::factors::Factors;

/// The gradients of one step: a sum for each shard, over that shard's micro-batches.
///
/// Gradients of different shards are never added: each shard has its own data, and its own moments
/// in the optimizer.
///
/// ```
/// # use burn::nn::{Linear, LinearConfig};
/// # use burn::optim::{AdamConfig, GradientsParams};
/// # use burn::tensor::{Device, Distribution, Tensor};
/// # use hd_pissa::{HdPissaConfig, HdPissaModule, HdPissaOptimizer, ShardGradients, comm::Solo};
/// # let device = Device::flex().autodiff();
/// # let config = HdPissaConfig::new().with_rank(2).with_shards(2);
/// # let mut model = LinearConfig::new(8, 8).init(&device).apply_hd_pissa(&config, 0..2).unwrap();
/// # let mut optim = HdPissaOptimizer::new(AdamConfig::new().init(), Solo).unwrap();
/// # let batch = |_shard: usize, _micro_batch: usize| {
/// #     Tensor::<2>::random([4, 8], Distribution::Default, &device)
/// # };
/// let mut gradients = ShardGradients::new(&model);
/// for shard in 0..2 {
///     model = model.select_shard(shard);
///     for micro_batch in 0..3 {
///         let loss = model.forward(batch(shard, micro_batch)).square().mean();
///         gradients.push(shard, GradientsParams::from_grads(loss.backward(), &model));
///     }
/// }
/// model = optim.step(1e-4, model, gradients.into_mean()).unwrap();
/// ```
pub struct ShardGradients {
    params: Vec<ParamSlot>,
    shards: BTreeMap<usize, ShardSum>,
}

#[derive(Default)]
struct ShardSum {
    sum: GradientsParams,
    micro_batches: usize,
    /// Gradients of parameters that are not among `params`.
    unknown: usize,
}

/// A float parameter, with the operations that need its number of dimensions.
#[derive(Clone, Copy)]
struct ParamSlot {
    id: ParamId,
    add: fn(&mut GradientsParams, &mut GradientsParams, ParamId),
    scale: fn(&mut GradientsParams, ParamId, f64),
}

fn add<const D: usize>(sum: &mut GradientsParams, new: &mut GradientsParams, id: ParamId) {
    if let Some(new) = new.remove::<D>(id) {
        let new = match sum.remove::<D>(id) {
            Some(sum) => sum + new,
            None => new,
        };
        sum.register(id, new);
    }
}

fn scale<const D: usize>(sum: &mut GradientsParams, id: ParamId, factor: f64) {
    if let Some(gradient) = sum.remove::<D>(id) {
        sum.register(id, gradient * factor);
    }
}

impl ShardGradients {
    /// An empty set of gradients for the parameters of `model`.
    pub fn new<M: Module>(model: &M) -> Self {
        struct Slots(Vec<ParamSlot>);

        impl ModuleVisitor for Slots {
            fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
                self.0.push(ParamSlot {
                    id: param.id,
                    add: add::<D>,
                    scale: scale::<D>,
                });
            }
        }

        let mut slots = Slots(Vec::new());
        model.visit(&mut slots);
        Self {
            params: slots.0,
            shards: BTreeMap::new(),
        }
    }

    /// Adds the gradients of one micro-batch to those of `shard`.
    pub fn push(&mut self, shard: usize, mut gradients: GradientsParams) {
        let entry = self.shards.entry(shard).or_default();
        for slot in &self.params {
            (slot.add)(&mut entry.sum, &mut gradients, slot.id);
        }
        entry.unknown += gradients.len();
        entry.micro_batches += 1;
    }

    /// Divides each shard's sum by the number of its micro-batches.
    ///
    /// With a loss that is a mean over its micro-batch, this is the gradient that the published
    /// method hands to the optimizer.
    pub fn into_mean(mut self) -> Self {
        for entry in self.shards.values_mut() {
            if entry.micro_batches > 1 {
                let factor = 1.0 / entry.micro_batches as f64;
                for slot in &self.params {
                    (slot.scale)(&mut entry.sum, slot.id, factor);
                }
                entry.micro_batches = 1;
            }
        }
        self
    }

    /// The gradients of each hosted shard, in the order of `factors.hosted`.
    fn resolve(mut self, factors: &Factors) -> Result<Vec<GradientsParams>, OptimizerError> {
        let hosted = &factors.hosted;
        if let Some(&shard) = self.shards.keys().find(|shard| !hosted.contains(shard)) {
            return Err(OptimizerError::UnknownShard {
                shard,
                hosted: hosted.clone(),
            });
        }
        hosted
            .iter()
            .map(|&shard| {
                let entry = self.shards.remove(&shard);
                let entry = entry.ok_or(OptimizerError::MissingShard { shard })?;
                match entry.unknown {
                    0 => complete(shard, entry.sum, factors),
                    count => Err(OptimizerError::UnknownGradients { shard, count }),
                }
            })
            .collect()
    }
}

/// The gradients that a step takes: of one shard ([`GradientsParams`]) or of several
/// ([`ShardGradients`]).
pub struct StepGradients(Source);

enum Source {
    /// Of one shard, which the gradients show.
    One(GradientsParams),
    Several(ShardGradients),
}

impl From<GradientsParams> for StepGradients {
    fn from(gradients: GradientsParams) -> Self {
        Self(Source::One(gradients))
    }
}

impl From<ShardGradients> for StepGradients {
    fn from(gradients: ShardGradients) -> Self {
        Self(Source::Several(gradients))
    }
}

impl StepGradients {
    /// The gradients of each hosted shard, in the order of `factors.hosted`: every factor of that
    /// shard has one, and no factor of another.
    pub(super) fn resolve(self, factors: &Factors) -> Result<Vec<GradientsParams>, OptimizerError> {
        match self.0 {
            Source::Several(gradients) => gradients.resolve(factors),
            Source::One(gradients) => {
                let shards = shards_in(&gradients, factors);
                let &[shard] = &shards[..] else {
                    return Err(OptimizerError::AmbiguousShard { shards });
                };
                match factors.hosted.iter().find(|&&hosted| hosted != shard) {
                    Some(&shard) => Err(OptimizerError::MissingShard { shard }),
                    None => Ok(vec![complete(shard, gradients, factors)?]),
                }
            }
        }
    }
}

/// `gradients`, if they are those of `shard` and none is missing.
fn complete(
    shard: usize,
    gradients: GradientsParams,
    factors: &Factors,
) -> Result<GradientsParams, OptimizerError> {
    let shards = shards_in(&gradients, factors);
    if let Some(&found) = shards.iter().find(|&&found| found != shard) {
        return Err(OptimizerError::WrongShard { shard, found });
    }
    let own = factors.iter().filter(|&(_, index, _, _)| index == shard);
    for (weight, _, side, factor) in own {
        if gradients.get::<2>(factor.id).is_none() {
            let path = format!("{}.{}", weight.shard_path(shard), side.name());
            return Err(OptimizerError::MissingGradient { shard, path });
        }
    }
    Ok(gradients)
}

/// The shards whose factors have a gradient in `gradients`.
fn shards_in(gradients: &GradientsParams, factors: &Factors) -> Vec<usize> {
    let mut shards: Vec<usize> = factors
        .iter()
        .filter(|(_, _, _, factor)| gradients.get::<2>(factor.id).is_some())
        .map(|(_, shard, _, _)| shard)
        .collect();
    shards.sort_unstable();
    shards.dedup();
    shards
}
