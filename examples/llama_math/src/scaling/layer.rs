//! One square layer with more and more shards, and a planted change that it has to learn.
//!
//! Every shard takes the gradient of the whole problem, so numbers of shards differ in the rank of
//! a step, not in the data.

use std::time::Instant;

use burn::module::Param;
use burn::nn::{Linear, LinearConfig};
use burn::optim::{AdamConfig, GradientsParams};
use burn::tensor::{Device, Distribution, Tensor};
use hd_pissa::comm::Solo;
use hd_pissa::{
    HdPissaAdapter, HdPissaConfig, HdPissaLinear, HdPissaModule, HdPissaOptimizerConfig,
    ShardGradients,
};
use serde::Serialize;

use super::cost::{Sample, StepTime, Work};
use super::{median, time_of_merges};
use crate::Error;
use crate::progress::Progress;
use crate::schedule::{Decay, Schedule};
use crate::spectrum::Ranks;

/// The planted change, relative to the norm of the weight.
const CHANGE: f64 = 0.1;
/// Tokens of the timed forward and backward pass.
const TOKENS: usize = 512;

/// Settings of the simulation.
#[derive(Clone, Debug, Serialize)]
pub struct LayerScaling {
    /// Seed of weight and change.
    pub seed: u64,
    /// Number of rows, and of columns.
    pub size: usize,
    /// Rank of each shard.
    pub rank: usize,
    /// Steps with each number of shards.
    pub steps: usize,
    /// The numbers of shards.
    pub shards: Vec<usize>,
}

/// The results of a number of shards.
#[derive(Clone, Debug, Serialize)]
pub struct LayerRow {
    /// Number of shards.
    pub shards: usize,
    /// Squared norm of the missing part of the change, relative to the change.
    pub loss: f64,
    /// The share of the change that is orthogonal to the rows and columns that the shards can
    /// reach: `(1 − K·r/d)²` for a change without a preferred direction.
    pub out_of_reach: f64,
    /// Numeric rank of the update.
    pub numeric_rank: usize,
    /// Effective rank of the update.
    pub effective_rank: f64,
    /// Median times; forward and backward are `K` times one pass of the work's tokens.
    pub measured: Sample,
}

/// The results, and what was done.
#[derive(Clone, Debug, Serialize)]
pub struct LayerReport {
    /// The settings.
    pub settings: LayerScaling,
    /// The weight, and the tokens of the timed pass.
    pub work: Work,
    /// One row for each number of shards.
    pub rows: Vec<LayerRow>,
}

impl LayerScaling {
    /// Trains the layer anew with each number of shards.
    ///
    /// # Errors
    ///
    /// Those of the adapters and the steps.
    pub fn run(&self, device: &Device) -> Result<LayerReport, Error> {
        device.seed(self.seed);
        let size = self.size;
        let draw = |rows: usize, cols: usize, deviation: f64| {
            let distribution = Distribution::Normal(0.0, deviation);
            Tensor::<2>::random([rows, cols], distribution, device)
        };
        // Entries of deviation 1/√d, as layers start with, and a change of half of the full rank.
        let deviation = (size as f64).sqrt().recip();
        let weight = draw(size, size, deviation);
        let inner = size / 2;
        let change = draw(size, inner, CHANGE * deviation).matmul(draw(
            inner,
            size,
            (inner as f64).sqrt().recip(),
        ));
        let target = weight.clone() + change;
        let work = Work {
            shapes: vec![([size, size], 1)],
            rank: self.rank,
            tokens: TOKENS as f64,
        };
        let pass = time_of_pass(&weight, self.rank, device)?;
        let mut rows = Vec::with_capacity(self.shards.len());
        for &shards in &self.shards {
            rows.push(self.train(&weight, &target, &work, pass, shards, device)?);
        }
        Ok(LayerReport {
            settings: self.clone(),
            work,
            rows,
        })
    }

    fn train(
        &self,
        weight: &Tensor<2>,
        target: &Tensor<2>,
        work: &Work,
        pass: f64,
        shards: usize,
        device: &Device,
    ) -> Result<LayerRow, Error> {
        let layer = with_weight(weight, device);
        let begin = Instant::now();
        let config = HdPissaConfig::new()
            .with_rank(self.rank)
            .with_shards(shards);
        let mut layer = layer.apply_hd_pissa(&config, 0..shards)?;
        let start = begin.elapsed().as_secs_f64();
        let adam = AdamConfig::new().with_epsilon(1e-12).init();
        let mut optimizer = HdPissaOptimizerConfig::new().init(adam, Solo)?;
        // Adam moves every entry of a factor by about the rate. The weight's coordinate along a
        // component moves by that times the root of its singular value, which is near 1. This is
        // enough to cover the change several times.
        let entry = CHANGE / (self.size as f64).sqrt();
        let rate = 4.0 * entry / self.steps as f64;
        let schedule = Schedule::new(rate, Decay::Cosine, 0.0, self.steps);
        let progress = Progress::new(&format!("K = {shards}"), self.steps);
        let missing = |layer: &Linear| target.clone() - layer.weight.base().inner();
        let whole = squared_norm(&missing(&layer));
        let mut steps = Vec::new();
        for step in 0..self.steps {
            let missing = missing(&layer);
            progress.step(squared_norm(&missing) / whole, 0);
            let gradients = gradients(&layer, -missing, self.rank);
            let begin = Instant::now();
            let stepped = optimizer.step(schedule.at(step), layer, gradients);
            layer = stepped.map_err(|refused| Error::Step {
                step: step + 1,
                source: refused.cause,
            })?;
            device.sync().expect("the device works");
            steps.push(begin.elapsed().as_secs_f64());
        }
        progress.finish();
        let update = layer.weight.base().inner() - weight.clone();
        let update: Vec<f32> = update.into_data().iter().collect();
        let ranks = Ranks::of(&update, self.size, self.size);
        let merge = time_of_merges(work, shards, device);
        let reach = (shards * self.rank) as f64 / self.size as f64;
        Ok(LayerRow {
            shards,
            loss: squared_norm(&missing(&layer)) / whole,
            out_of_reach: (1.0 - reach).powi(2),
            numeric_rank: ranks.numeric,
            effective_rank: ranks.effective,
            measured: Sample {
                shards,
                time: StepTime {
                    forward_backward: shards as f64 * pass,
                    optimizer: (median(steps) - merge).max(0.0),
                    exchange: 0.0,
                    merge,
                },
                start,
            },
        })
    }
}

/// A linear layer without a bias that holds a copy of this weight.
pub fn with_weight(weight: &Tensor<2>, device: &Device) -> Linear {
    let [rows, cols] = weight.dims();
    let device = device.clone().autodiff();
    let mut layer = LinearConfig::new(rows, cols).with_bias(false).init(&device);
    layer.weight = Param::from_data(weight.to_data(), &device);
    layer
}

fn squared_norm(matrix: &Tensor<2>) -> f64 {
    matrix.clone().square().sum().into_scalar()
}

/// The gradients of every shard's factors, from that of the weight: `G·bᵀ` and `aᵀ·G`, for all
/// shards in two products.
fn gradients(layer: &Linear, gradient: Tensor<2>, rank: usize) -> ShardGradients {
    let adapter = layer.weight.reparameterization::<HdPissaAdapter>();
    let shards = &adapter.expect("attached before the first step").shards;
    let left: Vec<Tensor<2>> = shards.iter().map(|shard| shard.a.val().inner()).collect();
    let right: Vec<Tensor<2>> = shards.iter().map(|shard| shard.b.val().inner()).collect();
    let of_left = gradient.clone().matmul(Tensor::cat(right, 0).transpose());
    let of_right = Tensor::cat(left, 1).transpose().matmul(gradient);
    let mut gradients = ShardGradients::new(layer);
    for (position, shard) in shards.iter().enumerate() {
        let mut own = GradientsParams::new();
        own.register(shard.a.id, of_left.clone().narrow(1, position * rank, rank));
        own.register(
            shard.b.id,
            of_right.clone().narrow(0, position * rank, rank),
        );
        gradients.push(shard.index, own);
    }
    gradients
}

/// Seconds of forward and backward of `TOKENS` tokens, with the gradient of the input.
fn time_of_pass(weight: &Tensor<2>, rank: usize, device: &Device) -> Result<f64, Error> {
    let config = HdPissaConfig::new().with_rank(rank).with_shards(1);
    let layer = with_weight(weight, device).apply_hd_pissa(&config, 0..1)?;
    let layer: HdPissaLinear = layer.into();
    let autodiff = device.clone().autodiff();
    let shape = [TOKENS, weight.dims()[0]];
    let input = Tensor::<2>::random(shape, Distribution::Default, &autodiff);
    let times = (0..15).map(|_| {
        let input = input.clone().detach().require_grad();
        let begin = Instant::now();
        let gradients = layer.forward(input).sum().backward();
        device.sync().expect("the device works");
        drop(gradients);
        begin.elapsed().as_secs_f64()
    });
    Ok(median(times.collect()))
}
