//! The tiny Llama with ever more virtual shards: loss, rank and time.

use std::time::Instant;

use burn::module::Module;
use burn::optim::{AdamConfig, GradientsParams};
use burn::tensor::Device;
use hd_pissa::comm::Solo;
use hd_pissa::{
    FrameScale, GradientMode, HdPissaModule, HdPissaOptimizerConfig, ShardGradients, Windows,
};
use serde::Serialize;

use super::cost::{Sample, StepTime, Work};
use super::{median, time_of_merges};
use crate::batch::{Batcher, BatcherConfig, Sequence};
use crate::evaluate::mean_loss;
use crate::method::{Adaptation, Method, SvdOption};
use crate::problems::problems;
use crate::progress::Progress;
use crate::schedule::{Decay, Schedule};
use crate::spectrum::{mean_ranks, projections};
use crate::tokenize::Tokens;
use crate::{Error, Llama, Pretrained, device, tiny};

const MAX_LENGTH: usize = 128;
const TRAIN_PROBLEMS: usize = 6000;
/// The same for every number of shards.
const LEARNING_RATE: f64 = 5e-4;

/// Settings of the simulation.
#[derive(Clone, Debug, Serialize)]
pub struct LlamaScaling {
    /// Seed of problems and their order.
    pub seed: u64,
    /// Rank of each shard.
    pub rank: usize,
    /// Steps with each number of shards.
    pub steps: usize,
    /// Problems of each shard in each step.
    pub batch_size: usize,
    /// Held-out problems.
    pub test_problems: usize,
    /// The numbers of shards.
    pub shards: Vec<usize>,
}

/// What a number of shards leads to.
#[derive(Clone, Debug, Serialize)]
pub struct LlamaRow {
    /// Number of shards.
    pub shards: usize,
    /// Mean loss per target token on the held-out problems after the last step.
    pub test_loss: f64,
    /// Mean numeric rank of the update of a projection.
    pub numeric_rank: f64,
    /// Mean effective rank of the update of a projection.
    pub effective_rank: f64,
    /// Median times.
    pub measured: Sample,
}

/// The results, and what was done.
#[derive(Clone, Debug, Serialize)]
pub struct LlamaReport {
    /// The settings.
    pub settings: LlamaScaling,
    /// The adapted weights, and the mean number of tokens of a shard's step.
    pub work: Work,
    /// Loss on the held-out problems before the first step.
    pub base_loss: f64,
    /// One row for each number of shards.
    pub rows: Vec<LlamaRow>,
}

impl LlamaScaling {
    /// Trains the tiny model anew with each number of shards.
    ///
    /// # Errors
    ///
    /// Those of the adapters and the steps.
    pub fn run(&self, device: &Device) -> Result<LlamaReport, Error> {
        let pretrained = tiny::pretrained()?;
        let tokens = Tokens::of(&pretrained)?;
        let (train, test) = problems(self.seed, TRAIN_PROBLEMS, self.test_problems);
        let train = tokens
            .sequences(&train, &tiny::template(), MAX_LENGTH)?
            .usable;
        let test = tokens
            .sequences(&test, &tiny::template(), MAX_LENGTH)?
            .usable;
        let base = pretrained.load(device)?;
        let total: usize = train.iter().map(|sequence| sequence.tokens.len()).sum();
        let work = Work {
            shapes: shapes(&base),
            rank: self.rank,
            tokens: (self.batch_size * total) as f64 / train.len() as f64,
        };
        let mut rows = Vec::with_capacity(self.shards.len());
        for &shards in &self.shards {
            rows.push(self.train(&pretrained, &train, &test, &work, shards, device)?);
        }
        Ok(LlamaReport {
            settings: self.clone(),
            work,
            base_loss: mean_loss(&base, &test, || ()),
            rows,
        })
    }

    fn train(
        &self,
        pretrained: &Pretrained,
        train: &[Sequence],
        test: &[Sequence],
        work: &Work,
        shards: usize,
        device: &Device,
    ) -> Result<LlamaRow, Error> {
        let autodiff = device::training(device);
        let batcher = BatcherConfig {
            shards,
            accumulation: 1,
            batch_size: self.batch_size,
            shuffle: Some(self.seed),
            ..BatcherConfig::default()
        };
        let mut batcher = Batcher::new(train.to_vec(), batcher)?;
        let adaptation = Adaptation {
            method: Method::HdPissa,
            rank: self.rank,
            shards,
            windows: Windows::Leading,
            frame_scale: FrameScale::Balanced,
            alpha: None,
            targets: None,
            gradients: GradientMode::PerShard,
            svd: SvdOption::Exact,
            svd_cache: None,
        };
        let base = pretrained.load(&autodiff)?;
        let start = Instant::now();
        let mut model = adaptation.apply(base)?;
        let start = start.elapsed().as_secs_f64();
        let adam = AdamConfig::new().with_epsilon(1e-8).init();
        let mut optimizer = HdPissaOptimizerConfig::new().init(adam, Solo)?;
        let schedule = Schedule::new(LEARNING_RATE, Decay::Cosine, 0.05, self.steps);
        let progress = Progress::new(&format!("K = {shards}"), self.steps);
        let (mut passes, mut steps) = (Vec::new(), Vec::new());
        for step in 0..self.steps {
            let begin = Instant::now();
            let mut gradients = ShardGradients::new(&model);
            let (mut sum, mut seen) = (0.0, 0);
            for (shard, batches) in batcher.step(step).iter().enumerate() {
                model = model.select_shard(shard)?;
                let [batch] = &batches[..] else {
                    unreachable!("one micro-batch per shard");
                };
                let loss = batch.loss(&model, &autodiff) / batch.divisor();
                sum += loss.clone().into_scalar::<f64>();
                seen += batch.num_tokens();
                let backward = loss.backward();
                gradients.push(shard, GradientsParams::from_grads(backward, &model));
            }
            passes.push(begin.elapsed().as_secs_f64());
            let begin = Instant::now();
            let stepped = optimizer.step(schedule.at(step), model, gradients);
            model = stepped.map_err(|refused| Error::Step {
                step: step + 1,
                source: refused.cause,
            })?;
            device.sync().expect("the device works");
            steps.push(begin.elapsed().as_secs_f64());
            progress.step(sum / shards as f64, seen);
        }
        progress.finish();
        let merge = time_of_merges(work, shards, device);
        let model = model.valid().materialize();
        let before = projections(&pretrained.load(device)?);
        let (numeric_rank, effective_rank) = mean_ranks(&before, &projections(&model));
        Ok(LlamaRow {
            shards,
            test_loss: mean_loss(&model, test, || ()),
            numeric_rank,
            effective_rank,
            measured: Sample {
                shards,
                time: StepTime {
                    forward_backward: median(passes),
                    optimizer: (median(steps) - merge).max(0.0),
                    exchange: 0.0,
                    merge,
                },
                start,
            },
        })
    }
}

/// The shapes of the projections of attention and feed-forward layers.
pub fn shapes(model: &Llama) -> Vec<([usize; 2], usize)> {
    let mut shapes = std::collections::BTreeMap::new();
    for (path, weight) in model.matrices() {
        if path.ends_with("_proj.weight") {
            *shapes.entry(weight.lazy_shape().dims::<2>()).or_insert(0) += 1;
        }
    }
    shapes.into_iter().collect()
}
