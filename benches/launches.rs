//! The kernel launches of one optimizer step.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use burn::module::{Module, Param};
use burn::nn::LinearConfig;
use burn::optim::{AdamWConfig, GradientsParams};
use burn::tensor::Device;
use cubecl_runtime::config::{TypeNameFormatLevel, type_name_format};
use cubecl_runtime::logging::{LaunchObservation, LaunchObserver};
use hd_pissa::comm::Solo;
use hd_pissa::{
    FrameScale, HdPissaAdapter, HdPissaConfig, HdPissaLinear, HdPissaModule,
    HdPissaOptimizerConfig, ShardGradients, Windows,
};

const SHARDS: usize = 8;
const RANK: usize = 16;
/// `[d_input, d_output]` of the weights of a block of SmolLM2-135M.
const SHAPES: [[usize; 2]; 7] = [
    [576, 576],
    [576, 192],
    [576, 192],
    [576, 576],
    [576, 1536],
    [576, 1536],
    [1536, 576],
];

#[derive(Module, Debug)]
struct Blocks {
    layers: Vec<HdPissaLinear>,
}

#[derive(Default)]
struct Counts(Mutex<BTreeMap<&'static str, usize>>);

impl LaunchObserver for Counts {
    fn launched(&self, kernel: &'static str) {
        *self.0.lock().expect("no panic").entry(kernel).or_default() += 1;
    }
}

/// Prints the launches of a step of two blocks on `device`, by kernel, after a step that compiles.
///
/// # Panics
///
/// If the device is not one of CubeCL's.
pub fn print(name: &str, device: &Device) {
    let device = device.clone().autodiff();
    let shapes = [SHAPES, SHAPES].concat();
    let weights = shapes.len();
    let layers = shapes.into_iter().map(|[d_input, d_output]| {
        let layer = LinearConfig::new(d_input, d_output).with_bias(false);
        layer.init(&device).into()
    });
    let config = HdPissaConfig::new()
        .with_rank(RANK)
        .with_shards(SHARDS)
        .with_windows(Windows::Random { seed: 1 })
        .with_frame_scale(FrameScale::Unit);
    let model = Blocks {
        layers: layers.collect(),
    };
    let model = model.apply_hd_pissa(&config, 0..SHARDS);
    let mut model = model.expect("the shapes fit the rank");
    let adamw = AdamWConfig::new().with_weight_decay(0.0).init();
    let mut optim = HdPissaOptimizerConfig::new()
        .init(adamw, Solo)
        .expect("AdamW is supported");

    let mut step = |model: Blocks| {
        let gradients = gradients(&model);
        let counts = Arc::new(Counts::default());
        let observation = LaunchObservation::new(counts.clone());
        let model = optim.step(1e-4, model, gradients);
        drop(observation);
        let counts = std::mem::take(&mut *counts.0.lock().expect("no panic"));
        (model.expect("finite gradients"), counts)
    };
    // The first two steps pack the frames and make the moments.
    (model, _) = step(model);
    (model, _) = step(model);
    let (_, counts) = step(model);
    let total: usize = counts.values().sum();
    assert!(total > 0, "{name} launches no kernels of CubeCL's");

    println!("one step on {name}, {SHARDS} shards of rank {RANK}, {weights} weights:");
    let mut counts: Vec<_> = counts.into_iter().collect();
    counts.sort_by_key(|&(_, count)| std::cmp::Reverse(count));
    let per_weight = |count: usize| count as f64 / weights as f64;
    for (kernel, count) in counts {
        let kernel = type_name_format(kernel, TypeNameFormatLevel::Balanced);
        println!("{count:>7} {:>7.2} per weight  {kernel}", per_weight(count));
    }
    println!("{total:>7} {:>7.2} per weight  in all", per_weight(total));
}

/// Gradients in the form of a backward pass, with the factors as values.
fn gradients(model: &Blocks) -> ShardGradients {
    let mut gradients = ShardGradients::new(model);
    for index in 0..SHARDS {
        let mut of_shard = GradientsParams::new();
        for layer in &model.layers {
            let adapter = layer.weight.reparameterization::<HdPissaAdapter>();
            let shard = &adapter.expect("attached above").shards[index];
            let mut register = |param: &Param<burn::tensor::Tensor<2>>| {
                of_shard.register(param.id, param.val().inner());
            };
            register(&shard.a);
            register(&shard.b);
        }
        gradients.push(index, of_shard);
    }
    gradients
}
