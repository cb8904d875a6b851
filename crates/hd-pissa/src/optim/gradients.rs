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
#[derive(Default)]
pub struct ShardGradients {
    params: Vec<ParamSlot>,
    shards: BTreeMap<usize, ShardSum>,
    /// One set of gradients whose shard is not known yet.
    unassigned: Option<GradientsParams>,
}

struct ShardSum {
    sum: GradientsParams,
    micro_batches: usize,
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
            ..Self::default()
        }
    }

    /// Adds the gradients of one micro-batch to those of `shard`.
    pub fn push(&mut self, shard: usize, mut gradients: GradientsParams) {
        match self.shards.get_mut(&shard) {
            Some(entry) => {
                for slot in &self.params {
                    (slot.add)(&mut entry.sum, &mut gradients, slot.id);
                }
                entry.micro_batches += 1;
            }
            None => {
                let entry = ShardSum {
                    sum: gradients,
                    micro_batches: 1,
                };
                self.shards.insert(shard, entry);
            }
        }
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
    pub(super) fn resolve(
        mut self,
        factors: &Factors,
    ) -> Result<Vec<GradientsParams>, OptimizerError> {
        if let Some(gradients) = self.unassigned.take() {
            let shards = shards_in(&gradients, factors);
            match shards[..] {
                [shard] => self.push(shard, gradients),
                _ => return Err(OptimizerError::AmbiguousShard { shards }),
            }
        }
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
                let sum = entry.ok_or(OptimizerError::MissingShard { shard })?.sum;
                match shards_in(&sum, factors).into_iter().find(|&s| s != shard) {
                    Some(found) => Err(OptimizerError::WrongShard { shard, found }),
                    None => Ok(sum),
                }
            })
            .collect()
    }
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

/// The gradients of the one shard that they were computed for.
impl From<GradientsParams> for ShardGradients {
    fn from(gradients: GradientsParams) -> Self {
        Self {
            unassigned: Some(gradients),
            ..Self::default()
        }
    }
}
