//! Fine-tunes a small classifier with HD-PiSSA in Burn's own training loop.
//!
//! `cargo run --release --example learner --features learner` generates pictures of digits, trains a
//! classifier on them with Burn alone, then fine-tunes it with HD-PiSSA on digits that lie on their
//! side. On a terminal Burn's dashboard shows both; elsewhere each epoch is a line.

mod data;
mod lines;
mod model;

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use burn::data::dataloader::{DataLoader, DataLoaderBuilder};
use burn::lr_scheduler::cosine::CosineAnnealingLrSchedulerConfig;
use burn::module::Module;
use burn::optim::AdamConfig;
use burn::tensor::{Device, Int, Tensor};
use burn::train::metric::store::{Aggregate, Direction, Split};
use burn::train::metric::{AccuracyMetric, LearningRateMetric, LossMetric};
use burn::train::{
    InferenceStep, Learner, MetricEarlyStoppingStrategy, StoppingCondition, SupervisedTraining,
    TrainingStrategy,
};
use clap::Parser;
use hd_pissa::learner::HdPissaStrategy;
use hd_pissa::{GradientMode, HdPissaConfig, HdPissaModule, HdPissaOptimizerConfig};

use data::{Batch, Batches, Task, pictures};
use model::Classifier;

#[derive(Parser)]
struct Options {
    /// Worker threads, which share the shards
    #[arg(long, default_value_t = 1)]
    workers: usize,
    /// Every shard learns from every micro-batch, not from its own part of the data
    #[arg(long)]
    shared: bool,
    /// Epochs of fine-tuning
    #[arg(long, default_value_t = 8)]
    epochs: usize,
    /// Highest learning rate of fine-tuning
    #[arg(long, default_value_t = 3e-3)]
    rate: f64,
    /// Goes on after this epoch of an earlier run with the same options
    #[arg(long)]
    resume: Option<usize>,
    /// Logs and checkpoints
    #[arg(long, default_value = "target/learner")]
    folder: PathBuf,
}

const SHARDS: usize = 4;
const RANK: usize = 8;
const BATCH: usize = 16;
const PICTURES: usize = 8000;

type Result<T = ()> = std::result::Result<T, Box<dyn std::error::Error>>;

fn main() -> Result {
    let options = Options::parse();
    let device = Device::flex().autodiff();
    device.seed(1);

    let pretrained = pretrain(&device, &options.folder.join("pretraining"))?;
    let mut table = vec![("pre-trained", accuracies(&pretrained))];

    let gradients = match options.shared {
        true => GradientMode::Shared,
        false => GradientMode::PerShard,
    };
    // ANCHOR: apply
    let config = HdPissaConfig::new()
        .with_rank(RANK)
        .with_shards(SHARDS)
        .with_gradients(gradients);
    let model = pretrained.train().apply_hd_pissa(&config, 0..SHARDS)?;
    // ANCHOR_END: apply
    let tuned = fine_tune(model, &options, &device)?;
    table.push(("fine-tuned", accuracies(&tuned)));

    println!("\naccuracy       upright   turned");
    for (name, [upright, turned]) in table {
        println!("{name:12} {upright:8.1}% {turned:7.1}%");
    }
    Ok(())
}

/// Trains on upright digits with Burn's own strategy.
fn pretrain(device: &Device, folder: &Path) -> Result<Classifier> {
    let training = SupervisedTraining::new(
        folder,
        loader(PICTURES, Task::Upright, 10),
        loader(500, Task::Upright, 11),
    );
    let optimizer = AdamConfig::new().init();
    let learner = Learner::new(Classifier::new(device), optimizer, 1e-3);
    let result = with_metrics(training, "pre-training")
        .num_epochs(4)
        .launch(learner);
    match result.error {
        Some(error) => Err(error.to_string().into()),
        None => Ok(result.model),
    }
}

/// Fine-tunes on turned digits with HD-PiSSA.
fn fine_tune(model: Classifier, options: &Options, device: &Device) -> Result<Classifier> {
    let training = SupervisedTraining::new(
        &options.folder,
        loader(PICTURES, Task::Turned, 20),
        loader(500, Task::Turned, 21),
    );
    // ANCHOR: strategy
    let optimizer = AdamConfig::new().with_epsilon(1e-8).init();
    // A step takes 4 batches of 16 pictures: one for each shard, or four for all.
    let steps = options.epochs * PICTURES.div_ceil(SHARDS * BATCH);
    let scheduler = CosineAnnealingLrSchedulerConfig::new(options.rate, steps).init()?;
    let strategy = HdPissaStrategy::new(optimizer, scheduler)
        .with_devices(vec![device.clone(); options.workers])
        .with_optimizer_config(HdPissaOptimizerConfig::new().with_max_grad_norm(Some(1.0)));
    let strategy = Arc::new(strategy);
    let learner = strategy.learner(model);
    // ANCHOR_END: strategy

    let stopping = MetricEarlyStoppingStrategy::new(
        &LossMetric::new(),
        Aggregate::Mean,
        Direction::Lowest,
        Split::Valid,
        StoppingCondition::NoImprovementSince { n_epochs: 3 },
    );
    // ANCHOR: training
    let mut training = with_metrics(training, "fine-tuning")
        .metric_train_numeric(LearningRateMetric::new())
        .num_epochs(options.epochs)
        .with_default_checkpointers()
        .early_stopping(stopping)
        .summary()
        .with_training_strategy(TrainingStrategy::Custom(strategy));
    if options.shared {
        training = training.grads_accumulation(SHARDS);
    }
    if let Some(epoch) = options.resume {
        training = training.checkpoint(epoch);
    }
    let result = training.launch(learner);
    // ANCHOR_END: training
    match result.error {
        Some(error) => Err(error.to_string().into()),
        None => Ok(result.model),
    }
}

fn loader(count: usize, task: Task, seed: u64) -> Arc<dyn DataLoader<Batch>> {
    DataLoaderBuilder::new(Batches)
        .batch_size(BATCH)
        .shuffle(seed)
        .build(pictures(count, task, seed))
}

fn with_metrics(
    training: SupervisedTraining<Classifier>,
    label: &str,
) -> SupervisedTraining<Classifier> {
    let training = training
        .label(label)
        .metrics((LossMetric::new(), AccuracyMetric::new()));
    match std::io::stdout().is_terminal() {
        true => training,
        false => training.renderer(Box::new(lines::Lines::default())),
    }
}

/// Percent of test pictures that are classified right, upright and turned.
fn accuracies(model: &Classifier) -> [f64; 2] {
    let of = |task| {
        let (mut right, mut all) = (0.0, 0.0);
        let loader = loader(1000, task, 99).to_device(&Device::flex());
        for batch in loader.iter() {
            let batch = batch.expect("generated pictures are in memory");
            let count = batch.digits.dims()[0] as f64;
            let output = InferenceStep::step(model, batch);
            let classes: Tensor<1, Int> = output.output.argmax(1).squeeze_dim(1);
            let hits = classes.equal(output.targets).int().sum();
            right += f64::from(hits.into_scalar::<i32>());
            all += count;
        }
        100.0 * right / all
    };
    [of(Task::Upright), of(Task::Turned)]
}
