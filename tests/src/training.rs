//! Training of small models: data, gradients, an optimizer, steps.

use burn::optim::{AdamConfig, GradientsParams, ModuleOptimizer};
use burn::tensor::{Device, Tensor};
use hd_pissa::comm::Solo;
use hd_pissa::{HdPissaModule, HdPissaOptimizer, HdPissaOptimizerConfig, ShardGradients};

use crate::{Lean, normal};

/// Adam with the epsilon of the published script.
pub fn adam() -> ModuleOptimizer {
    AdamConfig::new().with_epsilon(1e-8).init()
}

/// The optimizer of a worker that hosts all shards.
pub fn optimizer(inner: ModuleOptimizer) -> HdPissaOptimizer {
    HdPissaOptimizerConfig::new().init(inner, Solo).unwrap()
}

/// `[step][shard]` batches of 5 rows for [`Lean`].
pub fn data(steps: usize, shards: usize, device: &Device) -> Vec<Vec<Tensor<2>>> {
    let batches = || (0..shards).map(|_| normal([5, 13], device)).collect();
    (0..steps).map(|_| batches()).collect()
}

/// The gradients of all shards, each for its batch.
pub fn gradients(model: Lean, batches: &[Tensor<2>]) -> (Lean, ShardGradients) {
    gradients_by(model, Lean::forward, batches.iter().cloned().enumerate())
}

/// The gradients of these shards, each for its batch. The loss is the mean square of the outputs.
pub fn gradients_by<M: HdPissaModule>(
    mut model: M,
    forward: impl Fn(&M, Tensor<2>) -> Tensor<2>,
    batches: impl IntoIterator<Item = (usize, Tensor<2>)>,
) -> (M, ShardGradients) {
    let mut gradients = ShardGradients::new(&model);
    for (shard, batch) in batches {
        model = model.select_shard(shard).unwrap();
        let loss = forward(&model, batch).square().mean();
        gradients.push(shard, GradientsParams::from_grads(loss.backward(), &model));
    }
    (model, gradients)
}

/// A step of the hosted shards, each with its batch of all shards' `batches`.
pub fn step(
    model: Lean,
    optim: &mut HdPissaOptimizer,
    hosted: impl IntoIterator<Item = usize>,
    batches: &[Tensor<2>],
) -> Lean {
    let hosted = hosted.into_iter();
    let own = hosted.map(|shard| (shard, batches[shard].clone()));
    let (model, gradients) = gradients_by(model, Lean::forward, own);
    optim.step(1e-2, model, gradients).unwrap()
}

/// Steps of a worker that hosts all shards.
pub fn steps(mut model: Lean, optim: &mut HdPissaOptimizer, data: &[Vec<Tensor<2>>]) -> Lean {
    for batches in data {
        model = step(model, optim, 0..batches.len(), batches);
    }
    model
}
