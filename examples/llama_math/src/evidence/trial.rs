//! One training: a row on a task at one learning rate and seed.

use std::path::Path;
use std::sync::Mutex;

use burn::module::Module;
use burn::tensor::Device;
use serde::{Deserialize, Serialize};

use super::forgetting;
use super::planted::{LayerTraining, Planted};
use super::row::Row;
use super::task::{Exam, Files, Grade, Kind, Task};
use crate::batch::BatcherConfig;
use crate::changes::Changes;
use crate::history::{Measurement, Measures, Record};
use crate::loss::LossMean;
use crate::run::{Length, RunConfig};
use crate::schedule::Decay;
use crate::spectrum::{mean_ranks, projections};
use crate::train::OptimizerSettings;
use crate::{Error, Llama, device, files, memory};

/// Answers that are kept.
const SHOWN: usize = 3;
/// How often the loss is measured during the training.
const WATCHED: usize = 10;

/// Everything that the result of a training depends on, but for the content of files.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Trial {
    /// What is trained on.
    pub task: Task,
    /// What is trained.
    pub row: Row,
    /// Largest learning rate.
    pub lr: f64,
    /// Seed of data, order, and random adapters and directions.
    pub seed: u64,
    /// Steps.
    pub steps: usize,
    /// Test problems, facts, or the rank of a planted change.
    pub items: usize,
    /// Rank of a shard.
    pub rank: usize,
    /// Number of shards.
    pub shards: usize,
    /// Whether nothing but a loss is measured, on records that are no test problems: enough to choose a
    /// learning rate by, where methods are compared by their loss.
    #[serde(default, skip_serializing_if = "is_false")]
    pub loss_only: bool,
}

fn is_false(value: &bool) -> bool {
    !value
}

/// What became of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TrialResult {
    /// The settings.
    pub trial: Trial,
    /// How it ended.
    pub outcome: Outcome,
}

/// How a training ended.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// After its last step.
    Trained(Box<Measured>),
    /// With a loss, gradients or weights that are not numbers; the message says where.
    Diverged(String),
}

/// What was measured.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Measured {
    /// Training loss of each step.
    pub losses: Vec<f64>,
    /// Mean loss per target token on the test problems, or on the facts; for a layer the share of the
    /// change that is missing; on other records where nothing else was measured.
    pub loss: f64,
    /// Right answers; 0 for a layer, which gives none, and where only the loss was measured.
    pub correct: usize,
    /// Mean numeric rank of the update of a projection; 0 where only the loss was measured.
    pub numeric_rank: f64,
    /// Mean effective rank of the update of a projection; 0 where only the loss was measured.
    pub effective_rank: f64,
    /// Step and effective rank, every few steps of a layer.
    pub ranks: Vec<(usize, f64)>,
    /// Mean loss per token on texts of the tiny model's pre-training; none for others.
    pub text_loss: Option<f64>,
    /// Parameters that gradients moved.
    pub trainable: usize,
    /// Seconds of preparation and steps.
    pub seconds: f64,
    /// Tokens per second of the steps.
    pub tokens_per_second: f64,
    /// Peak memory of the process up to the last step, in bytes.
    pub peak_memory: Option<u64>,
    /// How many of the records to train on were used, those that are not too long, and how many there
    /// were, if a file had them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub used: Option<(usize, usize)>,
    /// The first answers to problems, with whether they are right.
    pub answers: Vec<(String, bool)>,
    /// Every step, and loss and change of the weights every few steps, for a report.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub record: Option<Record>,
}

impl Trial {
    /// A name for files and messages, of everything that it depends on.
    pub fn name(&self) -> String {
        let Self {
            task,
            row,
            lr,
            seed,
            steps,
            items,
            rank,
            shards,
            loss_only,
        } = self;
        let measured = if *loss_only { "-loss-only" } else { "" };
        format!(
            "{task}-{row}-lr{lr:e}-seed{seed}-of{items}-steps{steps}-k{shards}-r{rank}{measured}"
        )
    }

    /// The settings of the training. In every step every method sees the same sequences.
    pub fn config(&self) -> RunConfig {
        let adaptation = self.row.adaptation(self.rank, self.shards, self.seed);
        let groups = match self.row.splits_data() {
            true => self.shards,
            false => self.task.micro_batches(self.shards),
        };
        let sequences = self.task.sequences_per_step();
        assert!(
            sequences.is_multiple_of(groups),
            "{groups} shards do not divide a step's sequences"
        );
        RunConfig {
            adaptation,
            optimizer: OptimizerSettings {
                // As the results of the book were measured.
                loss_mean: LossMean::MicroBatches,
                ..OptimizerSettings::default()
            },
            batcher: BatcherConfig {
                shards: groups,
                accumulation: 1,
                batch_size: sequences / groups,
                shuffle: Some(self.seed),
                ..BatcherConfig::default()
            },
            length: Length::Steps(self.steps),
            lr: self.lr,
            decay: Decay::Cosine,
            warmup_ratio: 0.05,
        }
    }

    /// Trains the tiny model, the layer or the checkpoint of `files`, and measures it.
    ///
    /// # Errors
    ///
    /// Those of the training, but no divergence, and those of the files.
    ///
    /// # Panics
    ///
    /// If the number of shards does not divide [`Task::sequences_per_step`].
    pub fn run(&self, device: &Device, files: Option<&Files>) -> Result<TrialResult, Error> {
        self.run_with(device, files, false)
    }

    /// The same, with a record in the result if it is the training of a model.
    ///
    /// # Errors
    ///
    /// Those of [`run`](Self::run).
    ///
    /// # Panics
    ///
    /// As [`run`](Self::run).
    pub fn run_recorded(
        &self,
        device: &Device,
        files: Option<&Files>,
    ) -> Result<TrialResult, Error> {
        self.run_with(device, files, true)
    }

    fn run_with(
        &self,
        device: &Device,
        files: Option<&Files>,
        recorded: bool,
    ) -> Result<TrialResult, Error> {
        let outcome = match self.measure(device, files, recorded) {
            Ok(measured) if measured.loss.is_finite() => Outcome::Trained(Box::new(measured)),
            Ok(measured) => Outcome::Diverged(format!("the final loss is {}", measured.loss)),
            Err(error) if error.is_divergence() => Outcome::Diverged(error.to_string()),
            Err(error) => return Err(error),
        };
        Ok(TrialResult {
            trial: *self,
            outcome,
        })
    }

    fn measure(
        &self,
        device: &Device,
        files: Option<&Files>,
        recorded: bool,
    ) -> Result<Measured, Error> {
        if let Kind::Layer(planted) = self.task.kind() {
            return self.measure_layer(planted, device);
        }
        let exam = Exam::new(self.task, self.seed, self.items, files)?;
        device.seed(self.seed);
        let model = exam.pretrained.load(&device::training(device))?;
        let config = self.config();
        let changes = match recorded {
            true => Some(Changes::new(
                exam.pretrained.clone(),
                &config.adaptation,
                None,
            )?),
            false => None,
        };
        let measurements = Mutex::new(Vec::new());
        // Only a record has a place for what is measured between steps.
        let watch = |step: usize, model: &Llama| {
            let Some(changes) = &changes else { return };
            if step.is_multiple_of((self.steps / WATCHED).max(1)) {
                let model = model.clone().valid();
                let held_out = Measures::HeldOut {
                    loss: exam.loss(&model),
                    records: exam.watched(),
                    of_output: false,
                };
                let measured = [Ok(held_out), changes.measure(step, &model)];
                let mut measurements = measurements.lock().expect("one thread trains");
                measurements.extend(measured.map(|measures| (step, measures)));
            }
        };
        let trained = config.train(model, exam.train.clone(), &self.name(), watch)?;
        let mut record = recorded.then(|| trained.history.record.clone());
        if let Some(record) = &mut record {
            for (step, measures) in measurements.into_inner().expect("one thread trains") {
                let measures = measures?;
                record.measurements.push(Measurement { step, measures });
            }
        }

        let model = trained.model.valid().materialize();
        let (grade, (numeric_rank, effective_rank)) = match self.loss_only {
            true => (Grade::of_loss(exam.loss_on_others(&model)), (0.0, 0.0)),
            false => {
                let before = projections(&exam.pretrained.load(device)?);
                let ranks = mean_ranks(&before, &projections(&model));
                (exam.grade(&model)?, ranks)
            }
        };
        Ok(Measured {
            losses: {
                let steps = trained.history.record.metrics.iter();
                steps.map(|metrics| metrics.loss).collect()
            },
            loss: grade.loss,
            correct: grade.correct,
            numeric_rank,
            effective_rank,
            ranks: Vec::new(),
            text_loss: match self.task.kind().is_of_tiny_model() {
                true => Some(forgetting::text_loss(&model)?),
                false => None,
            },
            trainable: trained.trainable,
            seconds: trained.preparation + trained.seconds,
            tokens_per_second: trained.tokens_per_second,
            peak_memory: trained.peak_memory,
            used: exam.used(),
            answers: grade.answers.into_iter().take(SHOWN).collect(),
            record,
        })
    }

    fn measure_layer(&self, planted: Planted, device: &Device) -> Result<Measured, Error> {
        let training = LayerTraining {
            planted,
            change: self.items,
            adaptation: self.row.adaptation(self.rank, self.shards, self.seed),
            lr: self.lr,
            steps: self.steps,
            seed: self.seed,
        };
        let learned = training.run(device)?;
        Ok(Measured {
            losses: learned.losses,
            loss: learned.missed,
            correct: 0,
            numeric_rank: learned.last.numeric as f64,
            effective_rank: learned.last.effective,
            ranks: learned.ranks,
            text_loss: None,
            trainable: learned.trainable,
            seconds: learned.seconds,
            tokens_per_second: learned.rows_per_second,
            peak_memory: memory::peak(),
            used: None,
            answers: Vec::new(),
            record: None,
        })
    }
}

impl TrialResult {
    /// Share of right answers, or of a planted change that was learned; none after a divergence.
    pub fn score(&self) -> f64 {
        match &self.outcome {
            Outcome::Trained(measured) if matches!(self.trial.task.kind(), Kind::Layer(_)) => {
                1.0 - measured.loss
            }
            Outcome::Trained(measured) => measured.correct as f64 / self.trial.items as f64,
            Outcome::Diverged(_) => 0.0,
        }
    }

    /// Mean loss per target token; infinite after a divergence.
    pub fn loss(&self) -> f64 {
        match &self.outcome {
            Outcome::Trained(measured) => measured.loss,
            Outcome::Diverged(_) => f64::INFINITY,
        }
    }

    /// What methods are compared by; more is better.
    pub fn gain(&self) -> f64 {
        let judge = self.trial.task.judge();
        judge.gain(self.score(), self.loss())
    }

    /// Writes the result as JSON. The file is complete or absent.
    ///
    /// # Errors
    ///
    /// [`Error::Io`].
    pub fn write(&self, path: &Path) -> Result<(), Error> {
        let json = serde_json::to_vec(self)
            .map_err(|error| Error::field(path, "content", error.to_string()))?;
        files::replace(path, &json)
    }

    /// The result of `trial` in a file, if there is one.
    ///
    /// # Errors
    ///
    /// [`Error::Io`], and [`Error::Field`] for a file that holds something else.
    pub fn read(path: &Path, trial: &Trial) -> Result<Option<Self>, Error> {
        if !path.exists() {
            return Ok(None);
        }
        let invalid = |reason: String| Error::field(path, "content", reason);
        let text = files::text(path)?;
        let result: Self = serde_json::from_str(&text)
            .map_err(|error| invalid(format!("is no result of a trial: {error}; delete it")))?;
        if result.trial != *trial {
            return Err(invalid(format!(
                "is the result of other settings, {:?}; delete it, or choose another folder",
                result.trial
            )));
        }
        Ok(Some(result))
    }
}
