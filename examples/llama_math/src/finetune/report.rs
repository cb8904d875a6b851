//! What a run tells its user.

use std::path::Path;

use super::inputs::Inputs;
use super::options::{Change, FineTuning};
use crate::console::{complain, conclude, say};
use crate::export::{Exported, Rounding};
use crate::history::StepMetrics;
use crate::picture;
use crate::run::Trained;

impl FineTuning {
    /// Before the first step: data, model and workers, and where the run goes on.
    pub(super) fn announce(&self, inputs: &Inputs, workers: usize) {
        say!(
            "{}: {} within {} tokens",
            self.data_name(|path| path.display().to_string()),
            inputs.summary,
            inputs.max_length
        );
        let pretrained = &inputs.pretrained;
        if inputs.writes_by_default {
            say!(
                "{}: has no chat template; turns are written as `<|user|>`, a line break, and what is \
                 said",
                pretrained.folder.display()
            );
        }
        if pretrained.is_untied {
            say!(
                "{}: lm_head.weight differs from the embedding that tie_word_embeddings names; it is \
                 used, as transformers does, and the output says that nothing is tied",
                pretrained.folder.display()
            );
        }
        if pretrained.is_rounded_as(self.dtype) {
            say!(
                "--dtype bf16: the steps see weights rounded to bf16, where the files may hold more; the output \
                 has their change added to the weights of the files"
            );
        }
        if !pretrained.left_out.is_empty() {
            let names = pretrained.left_out.join(", ");
            say!("not carried over to the output: {names}");
        }
        if workers > 1 {
            let shards = self.run.adaptation.shards;
            say!(
                "{workers} processes, {} of {shards} shards each",
                shards / workers
            );
        }
        if let Some(saved) = &inputs.saved {
            say!(
                "resumed: {} of {} steps are taken ({})",
                saved.step(),
                inputs.settings["--steps"],
                saved.path().display()
            );
            for change in Change::ALL.map(Change::setting) {
                let before = saved.settings().get(change);
                if let Some(before) = before.filter(|&before| *before != inputs.settings[change]) {
                    say!(
                        "changed: {change} from {before} to {}",
                        inputs.settings[change]
                    );
                }
            }
        }
    }

    /// What is written, and how much of the update it holds.
    pub(super) fn print_written(&self, exported: &Exported) {
        conclude!("written: {}", self.output.display());
        if !exported.left_out.is_empty() {
            complain!(
                "not carried over, or not known: {}",
                exported.left_out.join(", ")
            );
        }
        if let Some(share) = exported.survived {
            conclude!(
                "{}{}",
                exported.figure().unwrap_or_default(),
                match share < 0.99 && self.export.rounding == Rounding::Nearest {
                    true => "; --output-dtype f32 keeps all of it, --rounding stochastic its mean",
                    false => "",
                }
            );
        }
    }

    /// The data, by the name of the first file or folder.
    pub(super) fn data_name(&self, name: impl Fn(&Path) -> String) -> String {
        match &self.data[..] {
            [one] => name(one),
            [first, rest @ ..] => format!("{} and {} more", name(first), rest.len()),
            [] => String::new(),
        }
    }

    /// Draws the losses beside the weights.
    pub(super) fn draw_losses(&self, metrics: &[StepMetrics]) {
        let losses: Vec<f64> = metrics.iter().map(|metrics| metrics.loss).collect();
        let method = self.run.adaptation.method.to_string();
        let title = format!("{method} on {}", self.data_name(file_name));
        let picture = self.output.join("loss.svg");
        if let Err(error) = picture::losses(&picture, &title, &losses) {
            complain!("without a picture: {error}");
        }
    }
}

/// What the steps took, and what they did to the loss.
pub(super) fn summary(trained: &Trained) -> Vec<String> {
    let metrics = &trained.history.record.metrics;
    let mut lines = vec![format!(
        "{} steps in {:.1} s after {:.1} s of preparation, {:.0} tokens/s, {} trainable \
         parameters, peak memory {}",
        metrics.len(),
        trained.seconds,
        trained.preparation,
        trained.tokens_per_second,
        trained.trainable,
        mebibytes(trained.peak_memory)
    )];
    if let (Some(first), Some(last)) = (metrics.first(), metrics.last()) {
        lines.push(format!(
            "training loss: {:.4} in the first step, {:.4} in the last",
            first.loss, last.loss
        ));
    }
    lines
}

/// A number of bytes, for people.
pub(super) fn mebibytes(bytes: Option<u64>) -> String {
    match bytes {
        Some(bytes) => format!("{:.0} MiB", bytes as f64 / f64::from(1 << 20)),
        None => "unknown".into(),
    }
}

pub(super) fn file_name(path: &Path) -> String {
    path.file_name()
        .unwrap_or(path.as_os_str())
        .to_string_lossy()
        .into_owned()
}
