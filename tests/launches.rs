//! The number of kernels that an optimizer step launches on a GPU.
//!
//! Runs under the conditions of `gpu.rs`. On a GPU, a step costs its products and its launches.
#![cfg(any(feature = "wgpu", feature = "cuda"))]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use burn::module::Module;
use burn::optim::{AdamWConfig, GradientsParams};
use burn::tensor::{Device, Tensor};
use cubecl_runtime::logging::{LaunchObservation, LaunchObserver};
use hd_pissa::comm::Solo;
use hd_pissa::{
    HdPissaAdapter, HdPissaConfig, HdPissaLinear, HdPissaLinearConfig, HdPissaModule,
    HdPissaOptimizerConfig, ShardGradients,
};
use hd_pissa_tests::gpu;

#[derive(Module, Debug)]
struct Layers {
    layers: Vec<HdPissaLinear>,
}

#[derive(Default)]
struct Count(AtomicUsize);

impl LaunchObserver for Count {
    fn launched(&self, _kernel: &'static str) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// Launches of the third step of a model with this many layers.
fn launches(layers: usize, shards: usize, device: &Device) -> usize {
    let device = device.clone().autodiff();
    let config = HdPissaConfig::new().with_rank(2).with_shards(shards);
    let layer = |_| {
        let config = HdPissaLinearConfig::new(48, 40).with_bias(false);
        config.init(&device)
    };
    let model = Layers {
        layers: (0..layers).map(layer).collect(),
    };
    let mut model = model.apply_hd_pissa(&config, 0..shards).unwrap();
    let adamw = AdamWConfig::new().with_weight_decay(0.0).init();
    let mut optim = HdPissaOptimizerConfig::new().init(adamw, Solo).unwrap();
    let mut launched = 0;
    for _ in 0..3 {
        let gradients = gradients(&model, shards);
        let count = Arc::new(Count::default());
        let observation = LaunchObservation::new(count.clone());
        model = optim.step(1e-4, model, gradients).unwrap();
        drop(observation);
        launched = count.0.load(Ordering::Relaxed);
    }
    launched
}

/// The factors themselves serve as values.
fn gradients(model: &Layers, shards: usize) -> ShardGradients {
    let mut gradients = ShardGradients::new(model);
    for index in 0..shards {
        let mut of_shard = GradientsParams::new();
        for layer in &model.layers {
            let adapter = layer.weight.reparameterization::<HdPissaAdapter>();
            let shard = &adapter.unwrap().shards[index];
            for factor in [&shard.a, &shard.b] {
                of_shard.register::<2>(factor.id, Tensor::clone(&factor.val()).inner());
            }
        }
        gradients.push(index, of_shard);
    }
    gradients
}

/// One more weight costs the same number of launches for any number of shards: AdamW's 14, and ten
/// others. Only launches that collect the gradients, eight factors each, depend on the shards.
#[test]
fn a_step_launches_few_kernels_for_a_weight_whatever_the_shards() {
    let Some(gpu) = gpu() else { return };
    if cfg!(feature = "fusion") {
        // Fused kernels are counted when they run, which happens later.
        return;
    }
    let per_weight = |shards: usize| {
        // More layers than one launch collects statistics for, so all launches are counted.
        let (few, many) = (launches(8, shards, &gpu), launches(24, shards, &gpu));
        (many - few) as f64 / 16.0
    };
    for shards in [1, 4, 8] {
        let launches = per_weight(shards);
        let collecting = (2 * shards).div_ceil(8);
        println!("{shards} shards: {launches} launches per weight");
        assert!(launches <= 24.0 + collecting as f64, "{shards}: {launches}");
    }
}
