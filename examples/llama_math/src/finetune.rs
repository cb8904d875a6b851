//! A user's checkpoint on a user's data.

use std::io::Write;
use std::path::{Path, PathBuf};

use burn::module::Module;
use burn::tensor::Device;

use crate::batch::Sequence;
use crate::data::{Fields, Record, read_records};
use crate::evaluate::{Solver, mean_loss};
use crate::output::Staged;
use crate::progress::Progress;
use crate::run::{RunConfig, StepMetrics};
use crate::tokenize::{PromptTemplate, Tokens};
use crate::{Checkpoint, Error, Llama, picture};

/// Settings of a fine-tuning run on files.
#[derive(Clone, Debug)]
pub struct FineTuning {
    /// Folder of the checkpoint.
    pub model: PathBuf,
    /// Training data.
    pub data: PathBuf,
    /// Fields of a record; found where `None`.
    pub fields: Option<Fields>,
    /// File of the prompt template; the published one where `None`.
    pub template: Option<PathBuf>,
    /// Longest sequence; 512 where `None`, or what the model was made for.
    pub max_length: Option<usize>,
    /// Held-out data, and how many of its records are answered.
    pub eval: Option<(PathBuf, usize)>,
    /// Longest generated answer, in tokens; with 0 nothing is answered.
    pub max_new_tokens: usize,
    /// The training.
    pub run: RunConfig,
    /// Where the results go.
    pub output: PathBuf,
    /// Whether an existing folder is replaced.
    pub overwrite: bool,
    /// Seed of whatever is drawn.
    pub seed: u64,
}

/// Held-out records with their sequences.
struct HeldOut {
    records: Vec<Record>,
    sequences: Vec<Sequence>,
}

impl FineTuning {
    /// Loads, trains, evaluates and writes.
    ///
    /// # Errors
    ///
    /// Whatever is wrong with the files or the settings; nothing is written then.
    pub fn run(&self, device: &Device) -> Result<(), Error> {
        let staged = Staged::new(&self.output, self.overwrite)?;
        let template = read_template(self.template.as_deref())?;
        let checkpoint = Checkpoint::open(&self.model)?;
        let tokens = Tokens::of(&checkpoint)?;
        let max_length = self.max_length(&checkpoint)?;
        let records = read_records(&self.data, self.fields.as_ref())?;
        let sequences = tokens.sequences(&records, &template, max_length)?;
        println!(
            "{}: {} records, {} with a target within {max_length} tokens",
            self.data.display(),
            records.len(),
            sequences.len()
        );
        let held_out = match &self.eval {
            Some((path, samples)) => {
                let mut records = read_records(path, self.fields.as_ref())?;
                records.truncate(*samples);
                let sequences = tokens.sequences(&records, &template, max_length)?;
                Some(HeldOut { records, sequences })
            }
            None => None,
        };

        device.seed(self.seed);
        let model = checkpoint.load(&device.clone().autodiff())?;
        if let Some(held_out) = &held_out {
            let loss = held_out_loss(&model.valid(), held_out);
            println!(
                "held-out loss before: {loss:.4} ({} records)",
                held_out.sequences.len()
            );
        }
        let method = self.run.adaptation.method;
        let trained = self.run.train(model, sequences, &method.to_string())?;
        println!(
            "{method}: {} steps in {:.1} s after {:.1} s of preparation, {:.0} tokens/s, {} \
             trainable parameters, peak memory {}",
            trained.metrics.len(),
            trained.seconds,
            trained.preparation,
            trained.tokens_per_second,
            trained.trainable,
            mebibytes(trained.peak_memory)
        );
        if let (Some(first), Some(last)) = (trained.metrics.first(), trained.metrics.last()) {
            println!(
                "training loss: {:.4} in the first step, {:.4} in the last",
                first.loss, last.loss
            );
        }
        // A merged model decodes without the cost of its adapters.
        let model = trained.model.valid().materialize();
        if let Some(held_out) = &held_out {
            println!(
                "held-out loss after: {:.4}",
                held_out_loss(&model, held_out)
            );
            if self.max_new_tokens > 0 {
                self.answer(&model, held_out, &tokens, &template)?;
            }
        }

        checkpoint.export(&model, staged.path())?;
        write_metrics(&staged.path().join("metrics.jsonl"), &trained.metrics)?;
        let losses = trained.metrics.iter().map(|metrics| metrics.loss).collect();
        let title = format!("{method} on {}", file_name(&self.data));
        picture::losses(
            &staged.path().join("loss.svg"),
            &title,
            &[(method.to_string(), losses)],
        )?;
        staged.commit()?;
        println!("written: {}", self.output.display());
        Ok(())
    }

    fn max_length(&self, checkpoint: &Checkpoint) -> Result<usize, Error> {
        let largest = checkpoint.config.max_positions;
        match self.max_length {
            Some(length) if length > largest => {
                let path = checkpoint.path("config.json");
                let reason = format!("is {largest}, less than the --max-length {length}");
                Err(Error::field(path, "max_position_embeddings", reason))
            }
            Some(length) => Ok(length),
            None => Ok(largest.min(512)),
        }
    }

    fn answer(
        &self,
        model: &Llama,
        held_out: &HeldOut,
        tokens: &Tokens,
        template: &PromptTemplate,
    ) -> Result<(), Error> {
        let solver = Solver {
            model,
            tokens,
            template,
            max_new_tokens: self.max_new_tokens,
        };
        let progress = Progress::new("answering", held_out.records.len());
        let mut correct = 0;
        let mut shown = Vec::new();
        for record in &held_out.records {
            let answer = solver.answer(record)?;
            correct += usize::from(answer.correct);
            if shown.len() < 2 {
                shown.push((record, answer));
            }
            progress.tick();
        }
        progress.finish();
        println!("exact match: {correct} of {}", held_out.records.len());
        for (record, answer) in shown {
            println!("\n{}\n-> {}", record.instruction, answer.text.trim());
        }
        println!();
        Ok(())
    }
}

fn held_out_loss(model: &Llama, held_out: &HeldOut) -> f64 {
    let progress = Progress::new("held out", held_out.sequences.len());
    let loss = mean_loss(model, &held_out.sequences, || progress.tick());
    progress.finish();
    loss
}

fn read_template(path: Option<&Path>) -> Result<PromptTemplate, Error> {
    let Some(path) = path else {
        return Ok(PromptTemplate::default());
    };
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    let text =
        String::from_utf8(bytes).map_err(|_| Error::field(path, "content", "is not UTF-8 text"))?;
    PromptTemplate::new(text)
        .ok_or_else(|| Error::field(path, "content", "has no {instruction} to replace"))
}

/// Writes one JSON object per line.
fn write_metrics(path: &Path, metrics: &[StepMetrics]) -> Result<(), Error> {
    let mut content = Vec::new();
    for line in metrics {
        serde_json::to_writer(&mut content, line)
            .map_err(|error| Error::field(path, "content", error.to_string()))?;
        content.push(b'\n');
    }
    let write = || std::fs::File::create(path)?.write_all(&content);
    write().map_err(Error::io(path))
}

/// A number of bytes, for people.
pub fn mebibytes(bytes: Option<u64>) -> String {
    match bytes {
        Some(bytes) => format!("{:.0} MiB", bytes as f64 / f64::from(1 << 20)),
        None => "unknown".into(),
    }
}

fn file_name(path: &Path) -> String {
    path.file_name()
        .unwrap_or(path.as_os_str())
        .to_string_lossy()
        .into_owned()
}
