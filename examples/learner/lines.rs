//! The text log of a training without a terminal for Burn's dashboard: a line for each epoch.

use std::collections::BTreeMap;
use std::fmt::Write;

use burn::train::logger::{EvaluationProgressLogger, TrainingProgressLogger};
use burn::train::metric::{MetricDefinition, MetricId};
use burn::train::renderer::{
    EvaluationName, MetricState, MetricsRenderer, MetricsRendererEvaluation,
    MetricsRendererTraining,
};

#[derive(Default)]
pub struct Lines {
    label: String,
    names: BTreeMap<String, String>,
    /// The last value of each metric, for training and for validation.
    shown: BTreeMap<(&'static str, String), String>,
    epochs: usize,
}

impl Lines {
    fn show(&mut self, split: &'static str, state: MetricState) {
        let (MetricState::Generic(entry) | MetricState::Numeric(entry, _)) = state;
        let name = self.names.get(&key(&entry.metric_id)).cloned();
        let shown = entry.serialized_entry.formatted;
        // "epoch 0.5 - batch 0.4": the mean of the epoch counts.
        let epoch = shown.strip_prefix("epoch ").unwrap_or(&shown);
        let epoch = epoch.split(" - ").next().unwrap_or_default().to_string();
        self.shown.insert((split, name.unwrap_or_default()), epoch);
    }
}

fn key(id: &MetricId) -> String {
    format!("{id:?}")
}

impl MetricsRendererTraining for Lines {
    fn update_train(&mut self, state: MetricState) {
        self.show("train", state);
    }

    fn update_valid(&mut self, state: MetricState) {
        self.show("valid", state);
    }
}

impl MetricsRendererEvaluation for Lines {
    fn update_test(&mut self, _name: EvaluationName, _state: MetricState) {}
}

impl TrainingProgressLogger for Lines {
    fn start(&mut self, epochs: usize, _: usize, _: Option<usize>, label: Option<&str>) {
        self.epochs = epochs;
        self.label = label.unwrap_or("training").into();
    }

    fn update_epoch(&mut self, epoch: usize) {
        let mut line = format!("{}, epoch {epoch} of {}:", self.label, self.epochs);
        for ((split, name), shown) in &self.shown {
            let _ = write!(line, "  {split} {} {shown}", name.to_lowercase());
        }
        println!("{line}");
    }

    fn start_split(&mut self, _split: &str, _items: usize) {}
    fn update_split(&mut self, _items: usize) {}
    fn end_split(&mut self) {}
    fn end(&mut self) {}
    fn log_event_training(&mut self, _event: String) {}
}

impl EvaluationProgressLogger for Lines {
    fn start_global_progress(&mut self, _tests: usize) {}
    fn start_test(&mut self, _name: &str, _items: usize) {}
    fn update_test_progress(&mut self, _items: usize) {}
    fn end_test(&mut self) {}
    fn end_global_progress(&mut self) {}
    fn log_event_evaluation(&mut self, _event: String) {}
}

impl MetricsRenderer for Lines {
    fn manual_close(&mut self) {}

    fn register_metric(&mut self, definition: MetricDefinition) {
        let name = definition.name.to_string();
        self.names.insert(key(&definition.metric_id), name);
    }
}
