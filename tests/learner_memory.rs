//! The allocations of a training in Burn's own loop on Flex, counted by the global allocator.

#[path = "allocator.rs"]
mod allocator;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use burn::data::dataloader::DataLoaderBuilder;
use burn::data::dataloader::batcher::Batcher;
use burn::data::dataset::InMemDataset;
use burn::module::Module;
use burn::optim::AdamConfig;
use burn::tensor::{Device, Tensor};
use burn::train::checkpoint::{Checkpoint, Checkpointer, CheckpointerError};
use burn::train::renderer::CliMetricsRenderer;
use burn::train::{
    InferenceStep, RegressionOutput, SupervisedTraining, TrainOutput, TrainStep, TrainingStrategy,
};
use hd_pissa::learner::HdPissaStrategy;
use hd_pissa::{
    FrameScale, HdPissaConfig, HdPissaLinear, HdPissaLinearConfig, HdPissaModule, Windows,
};

use allocator::{LIVE, measure, one_at_a_time};

// A thread that multiplies matrices on the CPU keeps a buffer of 64 MiB, and may end after the training. The
// bounds below, from half a weight on, are above it.
const D_INPUT: usize = 6144;
const D_OUTPUT: usize = 6400;
const WEIGHT_BYTES: usize = 4 * D_INPUT * D_OUTPUT;

#[derive(Module, Debug)]
struct Net {
    layer: HdPissaLinear,
}

impl Net {
    fn output(&self, x: Tensor<2>) -> RegressionOutput {
        let y = self.layer.forward(x);
        let zeros = y.zeros_like();
        RegressionOutput::new(y.clone().square().mean(), y, zeros)
    }
}

impl TrainStep for Net {
    type Input = Tensor<2>;
    type Output = RegressionOutput;

    fn step(&self, x: Tensor<2>) -> TrainOutput<RegressionOutput> {
        let output = self.output(x);
        TrainOutput::new(self, output.loss.backward(), output)
    }
}

impl InferenceStep for Net {
    type Input = Tensor<2>;
    type Output = RegressionOutput;

    fn step(&self, x: Tensor<2>) -> RegressionOutput {
        self.output(x)
    }
}

struct Values;

impl Batcher<f32, Tensor<2>> for Values {
    fn batch(&self, items: Vec<f32>, device: &Device) -> Tensor<2> {
        Tensor::ones([items.len(), D_INPUT], device) * items[0]
    }
}

/// Drops everything that Burn saves.
struct Forget;

impl<R: Checkpoint> Checkpointer<R> for Forget {
    fn save(&self, _: usize, _: R) -> Result<(), CheckpointerError> {
        Ok(())
    }

    fn delete(&self, _: usize) -> Result<(), CheckpointerError> {
        Ok(())
    }

    fn restore(&self, _: usize) -> Result<R, CheckpointerError> {
        Err(CheckpointerError::Unknown("nothing was kept".into()))
    }
}

/// From the first step on, nothing holds the weights while a step writes them, as in a plain loop.
/// A checkpoint leaves no memory behind.
#[test]
fn the_weight_is_updated_in_place() {
    let _guard = one_at_a_time();
    let bytes = |epochs: usize, saves: bool| {
        let device = Device::flex().autodiff();
        // Random directions, because a weight of this size takes long to decompose.
        let config = HdPissaConfig::new()
            .with_rank(4)
            .with_shards(2)
            .with_windows(Windows::Random { seed: 1 })
            .with_frame_scale(FrameScale::Unit);
        let layer = HdPissaLinearConfig::new(D_INPUT, D_OUTPUT).init(&device);
        let layer = layer.apply_hd_pissa(&config, 0..2).unwrap();
        let data = || {
            let items = (1..=8).map(|item| item as f32 / 8.0).collect();
            let builder = DataLoaderBuilder::new(Values).batch_size(2);
            builder.build(InMemDataset::new(items))
        };
        let strategy = HdPissaStrategy::new(AdamConfig::new().init(), 1e-4);
        let learner = strategy.learner(Net { layer });
        let folder = tempfile::tempdir().unwrap();
        let mut training = SupervisedTraining::new(folder.path(), data(), data())
            .renderer(Box::new(CliMetricsRenderer::new()))
            .with_application_logger(None)
            .num_epochs(epochs)
            .with_training_strategy(TrainingStrategy::Custom(Arc::new(strategy)));
        if saves {
            training = training.with_custom_checkpointers(Forget, Forget, Forget);
        }
        let before = LIVE.load(Ordering::Relaxed);
        let (result, _, peak) = measure(|| training.launch(learner));
        assert!(result.error.is_none());
        (peak, LIVE.load(Ordering::Relaxed) - before)
    };
    // Two steps in each epoch, with a validation in between.
    let (training, _) = bytes(2, false);
    assert!(
        training < WEIGHT_BYTES,
        "{training} of {WEIGHT_BYTES} bytes"
    );
    // Burn's records are temporary copies. None is left, and no handle that would make a step copy.
    let (saving, left) = bytes(3, true);
    assert!(saving >= WEIGHT_BYTES, "{saving} of {WEIGHT_BYTES} bytes");
    assert!(
        left < WEIGHT_BYTES as isize / 2,
        "{left} of {WEIGHT_BYTES} bytes"
    );
}
