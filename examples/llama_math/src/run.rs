//! One training run, from a model and sequences to a trained model and its metrics.

use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::batch::{Feed, FeedConfig, Sequence};
use crate::method::{Adaptation, num_trainable};
use crate::progress::Progress;
use crate::schedule::{Decay, Schedule};
use crate::train::{OptimizerSettings, Trainer};
use crate::{Error, Llama, memory};

/// How long a run is.
#[derive(Clone, Copy, Debug)]
pub enum Length {
    /// Passes over the data, in whole steps.
    Epochs(usize),
    /// Steps, over as many passes as that takes.
    Steps(usize),
}

/// Settings of a run.
#[derive(Clone, Debug)]
pub struct RunConfig {
    /// What is trained.
    pub adaptation: Adaptation,
    /// Settings of the optimizer.
    pub optimizer: OptimizerSettings,
    /// How records are dealt to shards and steps.
    pub feed: FeedConfig,
    /// How long the run is.
    pub length: Length,
    /// Largest learning rate.
    pub lr: f64,
    /// What follows the warm-up.
    pub decay: Decay,
    /// Share of the steps that warm up.
    pub warmup_ratio: f64,
}

/// The metrics of one step: a line of `metrics.jsonl`.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct StepMetrics {
    /// Counted from 1.
    pub step: usize,
    /// Mean loss of the step's micro-batches.
    pub loss: f64,
    /// Learning rate.
    pub lr: f64,
    /// Global norm of the gradients before clipping.
    pub gradient_norm: f64,
    /// Frobenius norm of the change of the weight matrices.
    pub update_norm: f64,
    /// Tokens per second in this step.
    pub tokens_per_second: f64,
    /// Resident memory after the step, in bytes.
    pub memory: Option<u64>,
}

/// What a run leaves.
pub struct Trained {
    /// The model, adapters attached.
    pub model: Llama,
    /// One entry per step.
    pub metrics: Vec<StepMetrics>,
    /// Parameters that gradients moved.
    pub trainable: usize,
    /// Seconds of the preparation of the adapters.
    pub preparation: f64,
    /// Seconds of all steps.
    pub seconds: f64,
    /// Tokens per second over all steps, without padding.
    pub tokens_per_second: f64,
    /// Peak memory of the process up to the last step, in bytes.
    pub peak_memory: Option<u64>,
}

impl RunConfig {
    /// Trains `model`, which must be on an autodiff device.
    ///
    /// # Errors
    ///
    /// Those of the adapters, the feed and the steps.
    pub fn train(
        &self,
        model: Llama,
        sequences: Vec<Sequence>,
        label: &str,
    ) -> Result<Trained, Error> {
        let mut feed = Feed::new(sequences, self.feed)?;
        let total = match self.length {
            Length::Epochs(epochs) => epochs * feed.steps_per_epoch(),
            Length::Steps(steps) => steps,
        };
        let schedule = Schedule::new(self.lr, self.decay, self.warmup_ratio, total);

        let start = Instant::now();
        let mut trainer = Trainer::new(model, &self.adaptation, self.optimizer)?;
        let trainable = num_trainable(trainer.model());
        let preparation = start.elapsed().as_secs_f64();

        let start = Instant::now();
        let progress = Progress::new(label, total);
        let mut metrics = Vec::with_capacity(total);
        for step in 0..total {
            let step_start = Instant::now();
            let lr = schedule.at(step);
            let report = trainer.step(step + 1, lr, &feed.step(step))?;
            progress.step(report.loss, report.tokens);
            metrics.push(StepMetrics {
                step: step + 1,
                loss: report.loss,
                lr,
                gradient_norm: report.gradient_norm,
                update_norm: report.update_norm,
                tokens_per_second: report.tokens as f64 / step_start.elapsed().as_secs_f64(),
                memory: memory::current(),
            });
        }
        let tokens_per_second = progress.tokens_per_second();
        progress.finish();
        Ok(Trained {
            model: trainer.into_model(),
            metrics,
            trainable,
            preparation,
            seconds: start.elapsed().as_secs_f64(),
            tokens_per_second,
            peak_memory: memory::peak(),
        })
    }
}
