//! One training run, from a model and sequences to a trained model and its metrics, on one worker
//! or several, from the start or from a checkpoint.

use std::any::Any;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use burn::module::Module;
use burn::tensor::Device;
use hd_pissa::checkpoint::{Checkpoint, Checkpoints, Snapshot};
use hd_pissa::comm::{Communicator, Solo, thread_group};

use crate::batch::{Batcher, BatcherConfig, Sequence};
use crate::history::{Elapsed, History, Measurement, StepMetrics};
use crate::method::Adaptation;
use crate::panics::message;
use crate::progress::Progress;
use crate::schedule::{Decay, Schedule};
use crate::stop::Stop;
use crate::team::Team;
use crate::train::{OptimizerSettings, Trainer};
use crate::{Error, Llama, device, memory};

/// The length of a run.
#[derive(Clone, Copy, Debug)]
pub enum Length {
    /// Passes over the data, in whole steps.
    Epochs(usize),
    /// Steps, over as many passes as they need.
    Steps(usize),
}

/// Settings of a run.
#[derive(Clone, Debug)]
pub struct RunConfig {
    /// The trained parameters.
    pub adaptation: Adaptation,
    /// Settings of the optimizer.
    pub optimizer: OptimizerSettings,
    /// The distribution of records over shards and steps.
    pub batcher: BatcherConfig,
    /// The length of the run.
    pub length: Length,
    /// Largest learning rate.
    pub lr: f64,
    /// The decay after the warm-up.
    pub decay: Decay,
    /// Share of the steps that warm up.
    pub warmup_ratio: f64,
}

impl RunConfig {
    /// Refuses a number of workers that cannot divide a step's work evenly.
    ///
    /// # Errors
    ///
    /// [`Error::Usage`] for `option`, which chooses the number.
    pub fn check_workers(&self, option: &'static str, workers: usize) -> Result<(), Error> {
        let micro_batches = self.batcher.shards * self.batcher.accumulation;
        self.adaptation
            .check_workers(option, workers, micro_batches)
    }
}

/// The result of a run.
pub struct Trained {
    /// The model, adapters attached.
    pub model: Llama,
    /// What every step did, and what was measured between steps.
    pub history: History,
    /// Parameters that gradients moved, on all workers.
    pub trainable: usize,
    /// Seconds of the preparation of the adapters.
    pub preparation: f64,
    /// Seconds of all steps, those before a checkpoint included.
    pub seconds: f64,
    /// Tokens per second over all steps, without padding.
    pub tokens_per_second: f64,
    /// Peak memory of the process up to the last step, in bytes.
    pub peak_memory: Option<u64>,
}

/// How a run ended.
pub enum Outcome {
    /// After its last step.
    Finished(Box<Trained>),
    /// After an earlier step, on request.
    Stopped {
        /// Number of steps taken.
        step: usize,
        /// Number of all steps.
        total: usize,
        /// The checkpoint it left.
        checkpoint: PathBuf,
    },
}

/// The place and times of checkpoints.
#[derive(Clone, Debug)]
pub struct Saving {
    /// The folder.
    pub checkpoints: Checkpoints,
    /// The interval in steps.
    pub every: Option<usize>,
    /// The interval in time. A checkpoint is due after the step in which it has passed since the
    /// last one.
    pub interval: Option<Duration>,
    /// The settings that a resumed run must share with this one.
    pub settings: BTreeMap<String, String>,
}

impl Saving {
    /// Whether a checkpoint is due after `done` of `total` steps. The last step counts like others,
    /// because the work after it may take long.
    fn is_due(&self, done: usize, total: usize, last: Instant) -> bool {
        let every = self.every.is_some_and(|every| done.is_multiple_of(every));
        let interval = self.interval.is_some_and(|time| last.elapsed() >= time);
        let regularly = self.every.is_some() || self.interval.is_some();
        every || interval || (regularly && done == total)
    }
}

/// A run that is ready to start, on any number of workers.
pub struct Training<'a> {
    config: &'a RunConfig,
    label: &'a str,
    batcher: Batcher,
    total: usize,
    /// The place and times of checkpoints; without them the run cannot stop early.
    pub saving: Option<Saving>,
    /// The checkpoint to continue from.
    pub resume: Option<Checkpoint>,
    /// Read after every step.
    pub stop: Stop,
    /// Sees the model after every step, with the number of steps taken. Its time does not count.
    pub observe: Option<Box<Observer<'a>>>,
    /// Measures the model between steps. Its time does not count either.
    pub watch: Option<Arc<dyn Watch>>,
    /// What was measured before the first step of a run from the start.
    pub before: Vec<Measurement>,
}

/// A function that sees the model after a step.
pub type Observer<'a> = dyn Fn(usize, &Llama) + Sync + 'a;

/// Measures the model between steps, on the first of the workers.
pub trait Watch: Send + Sync {
    /// Whether something is to be measured after `step` of `total` steps.
    fn is_due(&self, step: usize, total: usize) -> bool;

    /// Measures `model`, in validation mode, after `step` of `total` steps. What cannot be measured is left out:
    /// the training goes on.
    fn measure(&self, step: usize, total: usize, model: &Llama) -> Vec<Measurement>;
}

impl<'a> Training<'a> {
    /// A run from the start, without checkpoints.
    ///
    /// # Errors
    ///
    /// [`Error::Option`] if there are too few sequences for one step.
    pub fn new(
        config: &'a RunConfig,
        sequences: impl Into<Arc<[Sequence]>>,
        label: &'a str,
    ) -> Result<Self, Error> {
        let batcher = Batcher::new(sequences, config.batcher)?;
        let total = match config.length {
            Length::Epochs(epochs) => epochs * batcher.steps_per_epoch(),
            Length::Steps(steps) => steps,
        };
        Ok(Self {
            config,
            label,
            batcher,
            total,
            saving: None,
            resume: None,
            stop: Stop::default(),
            observe: None,
            watch: None,
            before: Vec::new(),
        })
    }

    /// Number of all steps.
    pub fn total(&self) -> usize {
        self.total
    }

    /// Trains `model`, which must be on an autodiff device, as one worker of those that
    /// `communicator` connects. Every worker calls it with the same model. Worker 0 prints and
    /// writes; on the others the result is the same.
    ///
    /// # Errors
    ///
    /// Those of the adapters, the steps and the checkpoints.
    pub fn work(
        &self,
        model: Llama,
        communicator: impl Communicator + 'static,
    ) -> Result<Outcome, Error> {
        let config = self.config;
        let schedule = Schedule::new(config.lr, config.decay, config.warmup_ratio, self.total);
        let is_first = communicator.worker_index() == 0;

        let start = Instant::now();
        let preparing = Progress::resumed("preparing the adapters", 1, 0, !is_first);
        let saved = self.resume.as_ref();
        let mut trainer = Trainer::with_communicator(
            model,
            &config.adaptation,
            config.optimizer,
            communicator,
            saved,
        )?;
        let mut history = match saved {
            Some(saved) => History::of(saved)?,
            None => {
                let mut history = History::default();
                history.record.measurements = self.before.clone();
                history
            }
        };
        let trainable = trainer.num_trainable();
        let preparation = start.elapsed().as_secs_f64();
        preparing.finish();

        let start = Instant::now();
        let mut observing = Duration::ZERO;
        let mut last_save = Instant::now();
        let mut batcher = self.batcher.clone();
        let first = history.record.metrics.len();
        let progress = Progress::resumed(self.label, self.total, first, !is_first);
        self.stop.begin_steps();
        for step in first..self.total {
            let step_start = Instant::now();
            let lr = schedule.at(step);
            let report = trainer.step(step + 1, lr, batcher.step(step))?;
            progress.step(report.loss, report.tokens);
            history.push(StepMetrics {
                step: step + 1,
                loss: report.loss,
                lr,
                gradient_norm: report.gradient_norm,
                update_norm: report.update_norm,
                tokens_per_second: report.tokens as f64 / step_start.elapsed().as_secs_f64(),
                memory: memory::current(),
            });
            if let Some(observe) = &self.observe {
                let begun = Instant::now();
                observe(step + 1, trainer.model());
                observing += begun.elapsed();
            }
            if let Some(watch) = self.watch.as_ref()
                && watch.is_due(step + 1, self.total)
            {
                let begun = Instant::now();
                let found = self.measure(watch.clone(), step + 1, &trainer)?;
                for measurement in &found {
                    progress.say(measurement);
                }
                history.record.measurements.extend(found);
                observing += begun.elapsed();
            }
            let Some(saving) = &self.saving else {
                continue;
            };
            // Clocks and signals differ between workers. The first worker's clock counts, and a
            // signal to any worker counts.
            let due = saving.is_due(step + 1, self.total, last_save);
            let flags = [due, self.stop.requested()].map(|flag| f32::from(u8::from(flag)));
            let flags = trainer.gather(&flags)?;
            let stop = flags.chunks(2).any(|worker| worker[1] != 0.0);
            if stop || flags[0] != 0.0 {
                let elapsed = Elapsed {
                    seconds: history.elapsed.seconds + (start.elapsed() - observing).as_secs_f64(),
                    tokens: history.elapsed.tokens + progress.tokens(),
                };
                // A run that starts again from there would fail again.
                let next = batcher.step((step + 1).min(self.total - 1));
                let is_sound = trainer.is_sound(next);
                let sound = trainer.gather(&[f32::from(u8::from(is_sound))])?;
                if sound.contains(&0.0) {
                    return Err(Error::NonFiniteWeights { step: step + 1 });
                }
                let checkpoint = save(saving, &trainer, &history, &elapsed)?;
                last_save = Instant::now();
                // After the last step the model itself is written next.
                if stop && step + 1 < self.total {
                    progress.finish();
                    return Ok(Outcome::Stopped {
                        step: step + 1,
                        total: self.total,
                        checkpoint,
                    });
                }
            }
        }
        let seconds = history.elapsed.seconds + (start.elapsed() - observing).as_secs_f64();
        let tokens = history.elapsed.tokens + progress.tokens();
        progress.finish();
        Ok(Outcome::Finished(Box::new(Trained {
            model: trainer.into_model(),
            history,
            trainable,
            preparation,
            seconds,
            tokens_per_second: tokens as f64 / seconds.max(1e-9),
            peak_memory: memory::peak(),
        })))
    }

    /// What `watch` finds on the first worker; on the others nothing. They wait, however long it takes.
    fn measure(
        &self,
        watch: Arc<dyn Watch>,
        step: usize,
        trainer: &Trainer,
    ) -> Result<Vec<Measurement>, Error> {
        let team = Team::new(trainer.communicator());
        let model = team.is_first().then(|| trainer.model().clone().valid());
        let total = self.total;
        team.together(move || {
            let measured = model.map(|model| watch.measure(step, total, &model));
            Ok(measured.unwrap_or_default())
        })
    }

    /// Trains on one thread per device, each with its share of the shards.
    ///
    /// If a worker fails, the others end within `timeout`. The error is that of the first failure.
    ///
    /// # Errors
    ///
    /// Those of [`work`](Self::work), and [`Error::Panic`].
    pub fn work_in_threads(
        &self,
        model: Llama,
        devices: &[Device],
        timeout: Duration,
    ) -> Result<Outcome, Error> {
        let group = thread_group(devices.len(), timeout);
        let compute = (rayon::current_num_threads() / devices.len()).max(1);
        let mut results = std::thread::scope(|scope| {
            let threads: Vec<_> = group
                .into_iter()
                .zip(devices)
                .map(|(communicator, device)| {
                    let model = model.clone().fork(&device::training(device));
                    scope.spawn(move || {
                        let pool = rayon::ThreadPoolBuilder::new().num_threads(compute);
                        let pool = pool.build().expect("the system starts threads");
                        pool.install(|| self.work(model, communicator))
                    })
                })
                .collect();
            // Then the workers' own copies are the only ones.
            drop(model);
            let join = |(worker, thread): (usize, std::thread::ScopedJoinHandle<_>)| {
                let panicked = |panic: Box<dyn Any + Send>| Error::Panic {
                    worker,
                    reason: message(&*panic),
                };
                thread.join().unwrap_or_else(|panic| Err(panicked(panic)))
            };
            threads
                .into_iter()
                .enumerate()
                .map(join)
                .collect::<Vec<_>>()
        });
        let failed = |result: &Result<Outcome, Error>| result.is_err();
        let cause = |result: &Result<Outcome, Error>| matches!(result, Err(error) if !error.is_of_another_worker());
        let reported = results.iter().position(cause);
        let reported = reported.or_else(|| results.iter().position(failed));
        results.swap_remove(reported.unwrap_or(0))
    }
}

/// Writes a checkpoint of the trainer's state. Every worker calls it.
fn save(
    saving: &Saving,
    trainer: &Trainer,
    history: &History,
    elapsed: &Elapsed,
) -> Result<PathBuf, Error> {
    let step = history.record.metrics.len() as u64;
    let mut snapshot = Snapshot::new(step, trainer.model(), trainer.optimizer_state()?);
    snapshot.settings = saving.settings.clone();
    snapshot.progress = serde_json::json!({
        "seconds": elapsed.seconds,
        "tokens": elapsed.tokens,
    });
    snapshot.attachments.extend(history.files());
    Ok(saving.checkpoints.save(&snapshot, trainer.communicator())?)
}

impl RunConfig {
    /// Trains `model`, which must be on an autodiff device, on one worker, from the start to the
    /// end. After every step `observe` sees the model, with the number of steps taken; its time does
    /// not count.
    ///
    /// # Errors
    ///
    /// Those of the adapters, the batcher and the steps.
    pub fn train(
        &self,
        model: Llama,
        sequences: Vec<Sequence>,
        label: &str,
        observe: impl Fn(usize, &Llama) + Sync,
    ) -> Result<Trained, Error> {
        let mut training = Training::new(self, sequences, label)?;
        training.observe = Some(Box::new(observe));
        match training.work(model, Solo)? {
            Outcome::Finished(trained) => Ok(*trained),
            Outcome::Stopped { .. } => unreachable!("a run that does not save does not stop"),
        }
    }
}
