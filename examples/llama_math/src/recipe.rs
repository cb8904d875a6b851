//! A fine-tuning run as a file: its options, and what it would take, without the model's weights.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::module::ParamGroup;
use burn::tensor::Device;
use hd_pissa::{Decomposition, GradientMode, HdPissaPlan, MergePrecision, PlannedWeight};
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::console::conclude;
use crate::finetune::FineTuning;
use crate::method::{Adaptation, DEFAULT_TARGETS, Method};
use crate::run::Length;
use crate::{Error, Llama, LlamaConfig};

/// A recipe.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// What it is for.
    pub about: String,
    /// MPI processes that it is made for, one worker each; 1 for a run without MPI.
    pub processes: usize,
    /// Options of the command line by name, without dashes. `true` stands for one without a value.
    pub options: Map<String, Value>,
    /// The model's `config.json`, for a dry run.
    pub architecture: Value,
    /// Mean length of a record, for a dry run.
    pub tokens_per_record: f64,
}

impl Recipe {
    /// Reads a recipe.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] and [`Error::Field`].
    pub fn read(path: &Path) -> Result<Self, Error> {
        let text = crate::files::text(path)?;
        let recipe: Self = serde_json::from_str(&text)
            .map_err(|error| Error::field(path, "content", error.to_string()))?;
        if recipe.processes == 0 {
            return Err(Error::field(path, "processes", "is 0; name 1 at least"));
        }
        for (name, value) in &recipe.options {
            if !(value.is_string() || value.is_number() || *value == Value::Bool(true)) {
                let reason = format!("is {value}; a text, a number or true is needed");
                return Err(Error::field(path, format!("options / {name}"), reason));
            }
        }
        Ok(recipe)
    }

    /// The options as a command line has them, after the program's name. With more than one process
    /// `--mpi` is among them.
    pub fn arguments(&self) -> Vec<String> {
        let mut arguments = Vec::new();
        for (name, value) in &self.options {
            arguments.push(format!("--{name}"));
            match value {
                Value::Bool(_) => {}
                Value::String(text) => arguments.push(text.clone()),
                other => arguments.push(other.to_string()),
            }
        }
        if self.processes > 1 {
            arguments.push("--mpi".into());
        }
        arguments
    }

    /// Prints what the run would take, from the shapes of the model alone.
    ///
    /// # Errors
    ///
    /// [`Error::Field`] for an architecture that is not supported, and [`Error::Usage`] for another
    /// method than HD-PiSSA or workers that cannot share out the work.
    pub fn dry_run(&self, fine_tuning: &FineTuning, tokens_per_second: f64) -> Result<(), Error> {
        let run = &fine_tuning.run;
        let Adaptation {
            method,
            rank,
            shards,
            gradients,
            ..
        } = run.adaptation;
        if method != Method::HdPissa {
            return Err(Error::Usage {
                option: "dry-run",
                reason: format!("plans HD-PiSSA alone, and the recipe's method is {method}"),
            });
        }
        run.check_workers("processes", self.processes)?;
        let json = self.architecture.to_string();
        let config = LlamaConfig::from_json(json.as_bytes(), &PathBuf::from("architecture"))?;
        // Nothing is drawn: weights are made when they are first read.
        let model = Llama::new(&config, &Device::default());
        let pattern = run.adaptation.targets.as_deref().unwrap_or(DEFAULT_TARGETS);
        let targets = ParamGroup::from_regex(pattern).map_err(|error| Error::Option {
            option: "targets",
            reason: format!("`{pattern}`: {error:?}"),
        })?;
        let (mut parameters, mut weights) = (0, Vec::new());
        for (path, weight) in model.matrices() {
            let shape: [usize; 2] = weight.lazy_shape().dims();
            parameters += shape[0] * shape[1];
            if targets.matches(&weight.id, Some(&path)) {
                weights.push(PlannedWeight {
                    path,
                    shape,
                    dtype: fine_tuning.dtype.dtype(),
                    rank,
                    explained_variance: Vec::new(),
                    decomposition: Decomposition::None,
                });
            }
        }
        let plan = HdPissaPlan {
            weights,
            left_out: Vec::new(),
            shards,
            gradients,
            precision: MergePrecision::Compensated,
            parameters,
        };
        conclude!("{}", self.report(&plan, fine_tuning, tokens_per_second));
        Ok(())
    }

    fn report(
        &self,
        plan: &HdPissaPlan,
        fine_tuning: &FineTuning,
        tokens_per_second: f64,
    ) -> String {
        let FineTuning { run, dtype, .. } = fine_tuning;
        let workers = self.processes;
        let mut shapes: BTreeMap<[usize; 2], usize> = BTreeMap::new();
        for weight in &plan.weights {
            *shapes.entry(weight.shape).or_default() += 1;
        }
        let mut text = format!("{}\n\n", self.about);
        for ([rows, cols], count) in shapes {
            text += &format!(
                "{count} weights of {rows} x {cols}: {} shards of rank {}, an update of rank up to {}\n",
                plan.shards,
                run.adaptation.rank,
                2 * plan.shards * run.adaptation.rank
            );
        }
        let memory = plan.memory_per_worker(workers);
        let megabytes = |bytes: usize| format!("{:.1} MB", bytes as f64 / 1e6);
        let batcher = &run.batcher;
        let records = batcher.shards * batcher.accumulation * batcher.batch_size;
        let tokens = records as f64 * self.tokens_per_record;
        text += &format!(
            "trainable values: {} of {}\n\
             memory of each of {workers} GPUs: weights in {dtype} {}; {memory}; activations on top\n\
             each GPU sends {} in a step\n\
             a step: {records} records, about {tokens:.0} tokens at {} tokens a record\n",
            plan.trainable_parameters(),
            plan.parameters,
            megabytes(dtype.dtype().size() * plan.parameters),
            megabytes(plan.bytes_sent_per_step(workers)),
            self.tokens_per_record
        );
        let passes = match plan.gradients {
            GradientMode::PerShard => "each shard has records of its own",
            GradientMode::Shared => "all shards learn from all records",
        };
        text += &match run.length {
            Length::Steps(steps) => format!(
                "{steps} steps, {} records; {passes}. At {tokens_per_second} tokens/s on each GPU: {:.2} \
                 hours, the evaluation not included",
                steps * records,
                steps as f64 * tokens / (tokens_per_second * workers as f64) / 3600.0
            ),
            Length::Epochs(epochs) => format!(
                "{epochs} passes over the data; {passes}. At {tokens_per_second} tokens/s on each GPU: \
                 {:.2} hours for each thousand steps",
                1000.0 * tokens / (tokens_per_second * workers as f64) / 3600.0
            ),
        };
        text
    }
}
