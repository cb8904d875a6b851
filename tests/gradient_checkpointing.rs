//! Burn's gradient checkpointing: layers with adapters train as without it.

use burn::module::{Module, Param};
use burn::optim::{AdamConfig, GradientsParams};
use burn::tensor::{Device, Tensor, TensorData, activation::silu};
use hd_pissa::comm::Solo;
use hd_pissa::{
    GradientMode, HdPissaConfig, HdPissaLinear, HdPissaLinearConfig, HdPissaModule,
    HdPissaOptimizerConfig, ShardGradients, SharedGradients,
};
use hd_pissa_tests::{base, bits, normal};

/// The feed-forward part of a Llama layer with a residual connection.
#[derive(Module, Debug)]
struct Gated {
    gate: HdPissaLinear,
    up: HdPissaLinear,
    down: HdPissaLinear,
}

impl Gated {
    fn new(device: &Device) -> Self {
        let linear = |d_input, d_output| {
            HdPissaLinearConfig::new(d_input, d_output)
                .with_bias(false)
                .init(device)
        };
        Self {
            gate: linear(13, 29),
            up: linear(13, 29),
            down: linear(29, 13),
        }
    }

    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let hidden = silu(self.gate.forward(x.clone())) * self.up.forward(x.clone());
        x + self.down.forward(hidden)
    }
}

/// The layers, with these weights, on `device`.
fn layers(weights: &[TensorData; 3], device: &Device) -> Gated {
    let mut model = Gated::new(device);
    let layers = [&mut model.gate, &mut model.up, &mut model.down];
    for (layer, weight) in layers.into_iter().zip(weights) {
        let weight = Tensor::from_data(weight.clone(), device).require_grad();
        layer.weight = Param::from_tensor(weight);
    }
    model
}

/// The weights after three steps on `device`.
fn trained(
    weights: &[TensorData; 3],
    data: &[TensorData],
    mode: GradientMode,
    device: &Device,
) -> Vec<TensorData> {
    let config = HdPissaConfig::new()
        .with_rank(2)
        .with_shards(2)
        .with_gradients(mode);
    let model = layers(weights, device);
    let mut model = model.apply_hd_pissa(&config, 0..2).unwrap();
    let adam = AdamConfig::new().with_epsilon(1e-8).init();
    let mut optim = HdPissaOptimizerConfig::new().init(adam, Solo).unwrap();
    for _ in 0..3 {
        let gradients = |model: &Gated, x: &TensorData| {
            // Twice through the layer, so that recomputed results feed others.
            let x = Tensor::from_data(x.clone(), device);
            let loss = model.forward(model.forward(x)).square().mean();
            GradientsParams::from_grads(loss.backward(), model)
        };
        model = match mode {
            GradientMode::Shared => {
                let mut shared = SharedGradients::new(&model, data.len());
                for x in data {
                    shared.push(gradients(&model, x));
                }
                optim.step(1e-2, model, shared).unwrap()
            }
            _ => {
                let mut each = ShardGradients::new(&model);
                for (shard, x) in data.iter().enumerate() {
                    model = model.select_shard(shard).unwrap();
                    each.push(shard, gradients(&model, x));
                }
                optim.step(1e-2, model, each).unwrap()
            }
        };
    }
    let strategy = device.gradient_checkpointing_strategy();
    let weight = model.gate.weight.base();
    assert_eq!(weight.gradient_checkpointing_strategy(), strategy);
    [&model.gate, &model.up, &model.down]
        .map(|layer| bits(&base(&layer.weight)))
        .to_vec()
}

#[test]
fn training_is_the_same_with_and_without() {
    let device = Device::flex();
    let data = [[2, 7, 13], [2, 7, 13]].map(|shape| normal(shape, &device).into_data());
    let weights = [[13, 29], [13, 29], [29, 13]].map(|shape| normal(shape, &device).into_data());
    let device = device.autodiff();
    for mode in [GradientMode::PerShard, GradientMode::Shared] {
        let kept = trained(&weights, &data, mode, &device);
        let again = trained(
            &weights,
            &data,
            mode,
            &device.clone().gradient_checkpointing(),
        );
        assert_eq!(again, kept, "{mode:?}");
        assert!(
            weights
                .iter()
                .zip(&kept)
                .all(|(before, after)| before != after)
        );
    }
}
