//! The quick start's program: a model gets adapters, trains, is saved, and is served as a plain
//! model.

use std::error::Error;
use std::path::Path;

use burn::nn::{Linear, LinearConfig, Relu};
use burn::optim::{AdamConfig, GradientsParams};
use burn::prelude::*;
use burn::tensor::Distribution;
use hd_pissa::comm::Solo;
use hd_pissa::{HdPissaConfig, HdPissaModule, HdPissaOptimizerConfig, ShardGradients};

const SHARDS: usize = 4;

/// Any Burn model will do. This one stands for yours.
#[derive(Module, Debug)]
pub struct Mlp {
    pub up: Linear,
    pub down: Linear,
}

impl Mlp {
    pub fn new(device: &Device) -> Self {
        Self {
            up: LinearConfig::new(32, 96).init(device),
            down: LinearConfig::new(96, 32).init(device),
        }
    }

    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        self.down.forward(Relu::new().forward(self.up.forward(x)))
    }
}

/// Settings of the adapters: 4 shards of rank 2 for every linear layer.
pub fn config() -> HdPissaConfig {
    HdPissaConfig::new().with_rank(2).with_shards(SHARDS)
}

/// Trains the model to return its input. Returns it without adapters, and the loss of every step.
pub fn fine_tune(
    model: Mlp,
    steps: usize,
    device: &Device,
) -> Result<(Mlp, Vec<f32>), Box<dyn Error>> {
    let mut model = model.apply_hd_pissa(&config(), 0..SHARDS)?; // this worker hosts all shards
    // The published script has this epsilon. Burn's default, 1e-5, slows small gradients down.
    let adam = AdamConfig::new().with_epsilon(1e-8).init();
    let mut optimizer = HdPissaOptimizerConfig::new().init(adam, Solo)?;
    let mut losses = Vec::new();

    for _step in 0..steps {
        let mut gradients = ShardGradients::new(&model);
        let mut mean = 0.0;
        for shard in 0..SHARDS {
            model = model.select_shard(shard)?;
            // The shard's own data.
            let x = Tensor::<2>::random([16, 32], Distribution::Default, device);
            let loss = (model.forward(x.clone()) - x).square().mean();
            mean += loss.clone().into_scalar::<f32>() / SHARDS as f32;
            gradients.push(shard, GradientsParams::from_grads(loss.backward(), &model));
        }
        model = optimizer.step(1e-2, model, gradients)?;
        losses.push(mean);
    }
    Ok((model.valid().materialize(), losses))
}

/// Loads the weights into the plain model: serving needs nothing of `hd_pissa`.
pub fn serve(file: &Path, input: Tensor<2>) -> Result<Tensor<2>, Box<dyn Error>> {
    let model = Mlp::new(&input.device()).try_load_file(file)?;
    Ok(model.forward(input))
}

pub fn main() -> Result<(), Box<dyn Error>> {
    let device = Device::flex().autodiff();
    device.seed(7);
    let model = Mlp::new(&device); // or your pre-trained model

    println!("{}", config().plan(&model)?);
    let (trained, losses) = fine_tune(model, 100, &device)?;
    println!("loss {:.3} -> {:.3}", losses[0], losses[losses.len() - 1]);

    let file = std::env::temp_dir().join("quick_start.bpk");
    trained.save_file(&file)?;
    let answer = serve(&file, Tensor::ones([1, 32], &Device::flex()))?;
    println!(
        "mean answer to ones: {:.2}",
        answer.mean().into_scalar::<f32>()
    );
    Ok(())
}
