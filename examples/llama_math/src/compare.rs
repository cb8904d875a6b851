//! The run without arguments: four methods on the tiny model and generated problems, each in a
//! process of its own.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use burn::module::Module;
use burn::tensor::Device;
use hd_pissa::{FrameScale, GradientMode, Windows};
use serde::{Deserialize, Serialize};

use crate::batch::FeedConfig;
use crate::console::say;
use crate::data::Record;
use crate::evaluate::{Solver, mean_loss};
use crate::method::{Adaptation, Method};
use crate::output::Staged;
use crate::problems::problems;
use crate::progress::Progress;
use crate::run::{Length, RunConfig};
use crate::schedule::Decay;
use crate::spectrum::{mean_ranks, projections};
use crate::tokenize::Tokens;
use crate::train::OptimizerSettings;
use crate::{Error, Llama, picture, tiny};

/// Longest sequence and longest answer, in tokens.
const MAX_LENGTH: usize = 128;
const MAX_NEW_TOKENS: usize = 48;
const TRAIN_PROBLEMS: usize = 6000;
/// Test problems shown with their answers.
const SHOWN: usize = 3;

/// Settings of the comparison.
#[derive(Clone, Debug)]
pub struct Comparison {
    /// Seed of problems, order and random adapters.
    pub seed: u64,
    /// Steps of each method.
    pub steps: usize,
    /// Rank of adapters; with HD-PiSSA of each shard's.
    pub rank: usize,
    /// Shards of HD-PiSSA, and groups of micro-batches per step of every method.
    pub shards: usize,
    /// Largest learning rate of every method; each its own where `None`.
    pub lr: Option<f64>,
    /// Test problems that are answered.
    pub test_problems: usize,
    /// Name of the device, for the child processes.
    pub device: Option<String>,
}

/// What a child process reports of its method.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MethodResult {
    /// The method.
    pub method: Method,
    /// Largest learning rate.
    pub lr: f64,
    /// Loss of each step.
    pub losses: Vec<f64>,
    /// Mean loss per target token on the test problems.
    pub test_loss: f64,
    /// Test problems answered with the right number.
    pub correct: usize,
    /// Mean numeric rank of the update of a projection.
    pub numeric_rank: f64,
    /// Mean effective rank of the update of a projection.
    pub effective_rank: f64,
    /// Parameters that gradients moved.
    pub trainable: usize,
    /// Seconds of preparation and steps.
    pub seconds: f64,
    /// Tokens per second of the steps.
    pub tokens_per_second: f64,
    /// Peak memory of the process up to the last step, in bytes.
    pub peak_memory: Option<u64>,
    /// The first answers.
    pub answers: Vec<(String, bool)>,
}

impl Comparison {
    /// The default run, or a short one.
    pub fn new(quick: bool) -> Self {
        let (steps, test_problems) = if quick { (12, 10) } else { (250, 200) };
        Self {
            seed: 1,
            steps,
            rank: 4,
            shards: 8,
            lr: None,
            test_problems,
            device: None,
        }
    }

    /// Runs every method in a child process of this program and writes table and picture.
    ///
    /// # Errors
    ///
    /// [`Error::Child`] if a method fails, and those of the output.
    pub fn run(&self, device: &Device, output: &Path, overwrite: bool) -> Result<(), Error> {
        let start = Instant::now();
        let staged = Staged::new(output, overwrite)?;
        let (_, test) = self.problems();
        say!(
            "tiny Llama, {} steps of {} micro-batches, rank {}, {} shards, {} test problems",
            self.steps,
            self.shards,
            self.rank,
            self.shards,
            test.len()
        );
        let checkpoint = tiny::checkpoint()?;
        let model = checkpoint.load(device)?;
        let (base_loss, base_answers) = self.evaluate(&model, "base model")?;
        drop(model);

        let mut results = Vec::with_capacity(Method::ALL.len());
        for method in Method::ALL {
            results.push(self.child(method, staged.path())?);
        }

        let table = self.table(base_loss, &base_answers, &results);
        say!("\n{table}");
        self.show_answers(&test, &base_answers, &results);
        let path = staged.path().join("table.txt");
        std::fs::write(&path, table).map_err(Error::io(&path))?;
        let curves: Vec<(String, Vec<f64>)> = results
            .iter()
            .map(|result| (result.method.to_string(), result.losses.clone()))
            .collect();
        picture::losses(
            &staged.path().join("loss.svg"),
            "Generated problems, tiny Llama",
            &curves,
        )?;
        staged.commit()?;
        say!(
            "{:.0} s in all; table, losses and picture (loss.svg) are in {}",
            start.elapsed().as_secs_f64(),
            output.display()
        );
        Ok(())
    }

    /// Runs one method in this process and writes its result as JSON: the child's side.
    ///
    /// # Errors
    ///
    /// Those of the training.
    pub fn run_method(&self, method: Method, device: &Device, result: &Path) -> Result<(), Error> {
        let checkpoint = tiny::checkpoint()?;
        let tokens = Tokens::of(&checkpoint)?;
        let (train, _) = self.problems();
        let sequences = tokens
            .sequences(&train, &tiny::template(), MAX_LENGTH)?
            .usable;
        device.seed(self.seed);
        let config = self.config(method);
        let model = checkpoint.load(&device.clone().autodiff())?;
        let trained = config.train(model, sequences, &method.to_string())?;

        let model = trained.model.valid().materialize();
        let before = projections(&checkpoint.load(device)?);
        let (numeric_rank, effective_rank) = mean_ranks(&before, &projections(&model));
        let (test_loss, answers) = self.evaluate(&model, &format!("{method} test"))?;
        let report = MethodResult {
            method,
            lr: config.lr,
            losses: trained.metrics.iter().map(|metrics| metrics.loss).collect(),
            test_loss,
            correct: answers.iter().filter(|(_, correct)| *correct).count(),
            numeric_rank,
            effective_rank,
            trainable: trained.trainable,
            seconds: trained.preparation + trained.seconds,
            tokens_per_second: trained.tokens_per_second,
            peak_memory: trained.peak_memory,
            answers: answers.into_iter().take(SHOWN).collect(),
        };
        let json = serde_json::to_vec(&report)
            .map_err(|error| Error::field(result, "content", error.to_string()))?;
        std::fs::write(result, json).map_err(Error::io(result))
    }

    fn problems(&self) -> (Vec<Record>, Vec<Record>) {
        problems(self.seed, TRAIN_PROBLEMS, self.test_problems)
    }

    fn config(&self, method: Method) -> RunConfig {
        RunConfig {
            adaptation: Adaptation {
                method,
                rank: self.rank,
                shards: self.shards,
                windows: Windows::Leading,
                frame_scale: FrameScale::Balanced,
                alpha: None,
                targets: None,
                gradients: GradientMode::PerShard,
            },
            optimizer: OptimizerSettings::default(),
            feed: FeedConfig {
                shards: self.shards,
                accumulation: 1,
                batch_size: 4,
                shuffle: Some(self.seed),
            },
            length: Length::Steps(self.steps),
            lr: self.lr.unwrap_or(learning_rate(method)),
            decay: Decay::Cosine,
            warmup_ratio: 0.05,
        }
    }

    /// Test loss, and each test problem's answer with whether it is right.
    fn evaluate(&self, model: &Llama, label: &str) -> Result<(f64, Vec<(String, bool)>), Error> {
        let tokens = Tokens::of(&tiny::checkpoint()?)?;
        let template = tiny::template();
        let (_, test) = self.problems();
        let sequences = tokens.sequences(&test, &template, MAX_LENGTH)?.usable;
        let loss = mean_loss(model, &sequences, || ());
        let solver = Solver {
            model,
            tokens: &tokens,
            template: &template,
            max_new_tokens: MAX_NEW_TOKENS,
        };
        let progress = Progress::new(label, test.len());
        let mut answers = Vec::with_capacity(test.len());
        for record in &test {
            let answer = solver.answer(record)?;
            answers.push((answer.text, answer.correct == Some(true)));
            progress.tick();
        }
        progress.finish();
        Ok((loss, answers))
    }

    fn child(&self, method: Method, folder: &Path) -> Result<MethodResult, Error> {
        let failed = |reason: String| Error::Child {
            method: method.to_string(),
            reason,
        };
        let program = std::env::current_exe().map_err(|error| failed(error.to_string()))?;
        let result: PathBuf = folder.join(format!("{method}.json"));
        let mut command = Command::new(program);
        command
            .arg("compare-method")
            .args(["--method", &method.to_string()])
            .arg("--result")
            .arg(&result)
            .args(["--seed", &self.seed.to_string()])
            .args(["--steps", &self.steps.to_string()])
            .args(["--rank", &self.rank.to_string()])
            .args(["--shards", &self.shards.to_string()])
            .args(["--test-problems", &self.test_problems.to_string()]);
        if let Some(lr) = self.lr {
            command.args(["--lr", &lr.to_string()]);
        }
        if let Some(device) = &self.device {
            command.args(["--device", device]);
        }
        // The child's bars and messages go where this process's go. It ends when its input does,
        // which is when this process ends, however it ends.
        let mut child = command
            .stdin(Stdio::piped())
            .spawn()
            .map_err(|error| failed(error.to_string()))?;
        let alive = child.stdin.take();
        let status = child.wait().map_err(|error| failed(error.to_string()))?;
        drop(alive);
        if !status.success() {
            return Err(failed(status.to_string()));
        }
        let bytes = std::fs::read(&result).map_err(Error::io(&result))?;
        serde_json::from_slice(&bytes).map_err(|error| failed(error.to_string()))
    }

    fn table(&self, base_loss: f64, base: &[(String, bool)], results: &[MethodResult]) -> String {
        let mut table = format!(
            "{:9} {:>8} {:>10} {:>10} {:>12} {:>8} {:>9} {:>10} {:>8} {:>9} {:>9}\n",
            "method",
            "lr",
            "train loss",
            "test loss",
            "exact match",
            "rank",
            "eff. rank",
            "trainable",
            "seconds",
            "tokens/s",
            "peak MiB"
        );
        let percent =
            |correct: usize| format!("{:.1} %", 100.0 * correct as f64 / base.len() as f64);
        let base_correct = base.iter().filter(|(_, correct)| *correct).count();
        table += &format!(
            "{:9} {:>8} {:>10} {base_loss:>10.4} {:>12}\n",
            "base",
            "",
            "",
            percent(base_correct)
        );
        for result in results {
            // The last tenth, as in the picture's smoothed curves.
            let tail = &result.losses[result.losses.len() - result.losses.len().div_ceil(10)..];
            let train_loss = tail.iter().sum::<f64>() / tail.len() as f64;
            let memory = match result.peak_memory {
                Some(bytes) => format!("{:.0}", bytes as f64 / f64::from(1 << 20)),
                None => "-".into(),
            };
            table += &format!(
                "{:9} {:>8} {train_loss:>10.4} {:>10.4} {:>12} {:>8.1} {:>9.1} {:>10} {:>8.1} \
                 {:>9.0} {memory:>9}\n",
                result.method.to_string(),
                format!("{:.0e}", result.lr),
                result.test_loss,
                percent(result.correct),
                result.numeric_rank,
                result.effective_rank,
                result.trainable,
                result.seconds,
                result.tokens_per_second
            );
        }
        table += "rank and eff. rank: numeric and effective rank of the update of a projection, \
                  mean over all;\ntrain loss: mean of the last tenth of the steps; peak MiB: of \
                  the method's process up to its last step\n";
        table
    }

    fn show_answers(&self, test: &[Record], base: &[(String, bool)], results: &[MethodResult]) {
        for (index, record) in test.iter().take(SHOWN).enumerate() {
            say!("{}", record.instruction);
            let rows = results
                .iter()
                .map(|result| (result.method.to_string(), &result.answers[index]));
            for (label, (text, correct)) in
                [("base".to_string(), &base[index])].into_iter().chain(rows)
            {
                let mark = if *correct { "right" } else { "wrong" };
                let text = text.trim().replace('\n', " ");
                say!("  {label:9} {mark}  {text}");
            }
            say!("");
        }
    }
}

/// Ends this process when its standard input does: with the process that started it.
pub(crate) fn end_with_parent() {
    std::thread::spawn(|| {
        let mut input = std::io::stdin();
        while input.read(&mut [0; 64]).is_ok_and(|read| read > 0) {}
        std::process::exit(1);
    });
}

/// Chosen by hand, not searched for: an adapter that starts at zero needs a larger rate, and the
/// deltas of eight shards add up.
fn learning_rate(method: Method) -> f64 {
    match method {
        Method::Lora => 5e-3,
        Method::Pissa => 2e-3,
        Method::HdPissa => 1e-3,
        Method::Full => 1e-3,
    }
}
