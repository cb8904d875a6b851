//! The gradients of a step, shard by shard.

use std::collections::BTreeMap;
use std::fmt::{self, Debug, Formatter};

use burn::module::Module;
use burn::optim::GradientsParams;

use super::OptimizerError;
use super::factors::Factors;
use super::shared_gradients::SharedGradients;
use super::slots::Slots;
use crate::GradientMode;

/// The gradients of one step: a sum for each shard, over that shard's micro-batches.
///
/// Gradients of different shards are never added: each shard has its own data, and its own moments
/// in the optimizer.
///
/// ```
/// # use burn::nn::{Linear, LinearConfig};
/// # use burn::optim::{AdamConfig, GradientsParams};
/// # use burn::tensor::{Device, Distribution, Tensor};
/// # use hd_pissa::{HdPissaConfig, HdPissaModule, HdPissaOptimizerConfig, ShardGradients, comm::Solo};
/// # let device = Device::flex().autodiff();
/// # let config = HdPissaConfig::new().with_rank(2).with_shards(2);
/// # let mut model = LinearConfig::new(8, 8).init(&device).apply_hd_pissa(&config, 0..2).unwrap();
/// # let mut optim = HdPissaOptimizerConfig::new().init(AdamConfig::new().init(), Solo).unwrap();
/// # let batch = |_shard: usize, _micro_batch: usize| {
/// #     Tensor::<2>::random([4, 8], Distribution::Default, &device)
/// # };
/// let mut gradients = ShardGradients::new(&model);
/// for shard in 0..2 {
///     model = model.select_shard(shard).unwrap();
///     for micro_batch in 0..3 {
///         let loss = model.forward(batch(shard, micro_batch)).square().mean();
///         gradients.push(shard, GradientsParams::from_grads(loss.backward(), &model));
///     }
/// }
/// model = optim.step(1e-4, model, gradients.into_mean()).unwrap();
/// ```
pub struct ShardGradients {
    slots: Slots,
    shards: BTreeMap<usize, ShardSum>,
}

#[derive(Default)]
struct ShardSum {
    sum: GradientsParams,
    micro_batches: usize,
    /// Gradients of parameters that the model does not have.
    unknown: usize,
}

impl ShardGradients {
    /// An empty set of gradients for the parameters of `model`.
    pub fn new<M: Module>(model: &M) -> Self {
        Self {
            slots: Slots::of(model),
            shards: BTreeMap::new(),
        }
    }

    /// Adds the gradients of one micro-batch to those of `shard`.
    pub fn push(&mut self, shard: usize, mut gradients: GradientsParams) {
        let entry = self.shards.entry(shard).or_default();
        self.slots.add(&mut entry.sum, &mut gradients);
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
                self.slots.scale(&mut entry.sum, factor);
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
                    count => Err(OptimizerError::UnknownGradients {
                        shard: Some(shard),
                        count,
                    }),
                }
            })
            .collect()
    }
}

impl Debug for ShardGradients {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let shards = self.shards.iter();
        let micro_batches = shards.map(|(shard, sum)| (shard, sum.micro_batches));
        f.write_str("ShardGradients: micro-batches by shard ")?;
        f.debug_map().entries(micro_batches).finish()
    }
}

/// The gradients that a step takes: of one micro-batch ([`GradientsParams`]), or of several
/// ([`ShardGradients`] or [`SharedGradients`], by the model's
/// [`GradientMode`](crate::GradientMode)).
pub struct StepGradients(Source);

enum Source {
    /// Gradients of one micro-batch, for one shard, which the gradients show, or for all shards.
    One(GradientsParams),
    PerShard(ShardGradients),
    Shared(SharedGradients),
}

impl Debug for StepGradients {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let mut debug = f.debug_tuple("StepGradients");
        match &self.0 {
            Source::One(gradients) => debug.field(&format_args!("{} tensors", gradients.len())),
            Source::PerShard(gradients) => debug.field(gradients),
            Source::Shared(gradients) => debug.field(gradients),
        };
        debug.finish()
    }
}

/// Gradients that fit a model.
pub(super) enum Resolved {
    /// For each hosted shard, in the order of [`Factors::hosted`]: gradients of every factor of
    /// that shard and of no other.
    PerShard(Vec<GradientsParams>),
    /// The sum over this many micro-batches, with a gradient for every factor of the model.
    Shared(GradientsParams, u64),
}

impl From<GradientsParams> for StepGradients {
    fn from(gradients: GradientsParams) -> Self {
        Self(Source::One(gradients))
    }
}

impl From<ShardGradients> for StepGradients {
    fn from(gradients: ShardGradients) -> Self {
        Self(Source::PerShard(gradients))
    }
}

impl From<SharedGradients> for StepGradients {
    fn from(gradients: SharedGradients) -> Self {
        Self(Source::Shared(gradients))
    }
}

impl StepGradients {
    pub(super) fn resolve(self, factors: &Factors) -> Result<Resolved, OptimizerError> {
        match (factors.gradients, self.0) {
            (GradientMode::PerShard, source) => source.per_shard(factors).map(Resolved::PerShard),
            (GradientMode::Shared, Source::PerShard(_)) => Err(OptimizerError::OtherGradientMode {
                model: GradientMode::Shared,
            }),
            (GradientMode::Shared, Source::One(gradients)) => shared(gradients, 1, factors),
            (GradientMode::Shared, Source::Shared(gradients)) => {
                let (sum, micro_batches) = gradients.finish()?;
                shared(sum, micro_batches, factors)
            }
        }
    }
}

impl Source {
    fn per_shard(self, factors: &Factors) -> Result<Vec<GradientsParams>, OptimizerError> {
        match self {
            Source::PerShard(gradients) => gradients.resolve(factors),
            Source::Shared(_) => Err(OptimizerError::OtherGradientMode {
                model: GradientMode::PerShard,
            }),
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

/// `sum`, if no factor lacks a gradient.
fn shared(
    sum: GradientsParams,
    micro_batches: u64,
    factors: &Factors,
) -> Result<Resolved, OptimizerError> {
    for (weight, shard, side, factor) in factors.known() {
        if sum.get::<2>(factor.id).is_none() {
            return Err(OptimizerError::MissingGradient {
                shard: shard.index,
                path: weight.factor_path(shard, side),
            });
        }
    }
    Ok(Resolved::Shared(sum, micro_batches))
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
    let own = factors.iter().filter(|(_, name, ..)| name.index == shard);
    for (weight, name, side, factor) in own {
        if gradients.get::<2>(factor.id).is_none() {
            let path = weight.factor_path(name, side);
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
        .map(|(_, shard, ..)| shard.index)
        .collect();
    shards.sort_unstable();
    shards.dedup();
    shards
}
