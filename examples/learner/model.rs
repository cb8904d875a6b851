//! A classifier, with the steps that Burn's training loop needs.

use burn::module::Module;
use burn::nn::Relu;
use burn::nn::loss::CrossEntropyLossConfig;
use burn::tensor::{Device, Tensor};
use burn::train::{ClassificationOutput, InferenceStep, TrainOutput, TrainStep};
use hd_pissa::{HdPissaLinear, HdPissaLinearConfig};

use crate::data::{Batch, CLASSES, SIDE};

const HIDDEN: usize = 192;

/// Without adapters its layers work as Burn's `Linear`.
#[derive(Module, Debug)]
pub struct Classifier {
    first: HdPissaLinear,
    second: HdPissaLinear,
    head: HdPissaLinear,
    activation: Relu,
}

impl Classifier {
    pub fn new(device: &Device) -> Self {
        Self {
            first: HdPissaLinearConfig::new(SIDE * SIDE, HIDDEN).init(device),
            second: HdPissaLinearConfig::new(HIDDEN, HIDDEN).init(device),
            head: HdPissaLinearConfig::new(HIDDEN, CLASSES).init(device),
            activation: Relu::new(),
        }
    }

    /// Logits `[pictures, CLASSES]` of pictures `[pictures, SIDE · SIDE]`.
    fn forward(&self, pixels: Tensor<2>) -> Tensor<2> {
        let hidden = self.activation.forward(self.first.forward(pixels));
        let hidden = self.activation.forward(self.second.forward(hidden));
        self.head.forward(hidden)
    }

    fn classify(&self, batch: Batch) -> ClassificationOutput {
        let logits = self.forward(batch.pixels);
        let loss = CrossEntropyLossConfig::new().init(&logits.device());
        let loss = loss.forward(logits.clone(), batch.digits.clone());
        ClassificationOutput::new(loss, logits, batch.digits)
    }
}

// ANCHOR: steps
impl TrainStep for Classifier {
    type Input = Batch;
    type Output = ClassificationOutput;

    fn step(&self, batch: Batch) -> TrainOutput<ClassificationOutput> {
        let output = self.classify(batch);
        TrainOutput::new(self, output.loss.backward(), output)
    }
}

impl InferenceStep for Classifier {
    type Input = Batch;
    type Output = ClassificationOutput;

    fn step(&self, batch: Batch) -> ClassificationOutput {
        self.classify(batch)
    }
}
// ANCHOR_END: steps
