//! The record as lines of JSON, in checkpoints and outputs.

use std::collections::BTreeMap;
use std::path::Path;

use hd_pissa::checkpoint::Checkpoint;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::measurement::Measurement;
use super::step::StepMetrics;
use crate::Error;

/// File of the steps, in outputs and checkpoints.
pub const METRICS: &str = "metrics.jsonl";
/// File of what was measured between steps, in outputs and checkpoints.
pub const MEASUREMENTS: &str = "measurements.jsonl";

/// What a run did.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Record {
    /// One entry per step.
    pub metrics: Vec<StepMetrics>,
    /// What was measured between steps, in order.
    pub measurements: Vec<Measurement>,
}

/// What a run has done so far, besides the state of the model. A checkpoint holds it, so that a run that
/// goes on has the record of all its steps.
#[derive(Clone, Debug, Default)]
pub struct History {
    /// The steps, and what was measured between them.
    pub record: Record,
    /// The steps as lines of JSON; lines from before a checkpoint are unchanged.
    lines: String,
    /// Time and tokens of the steps before a checkpoint.
    pub(crate) elapsed: Elapsed,
}

/// Data in a checkpoint besides the state of model and optimizer. The step determines the place in
/// the data, and the seed the order of each epoch.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Elapsed {
    pub(crate) seconds: f64,
    pub(crate) tokens: usize,
}

impl History {
    /// That of a checkpoint. A checkpoint from before there were measurements has none.
    pub(crate) fn of(checkpoint: &Checkpoint) -> Result<Self, Error> {
        let text = |name: &str| {
            let path = checkpoint.path().join(name);
            String::from_utf8(checkpoint.attachment(name)?)
                .map_err(|_| Error::field(path, "content", "is not UTF-8 text"))
        };
        let path = checkpoint.path().join(METRICS);
        let lines = text(METRICS)?;
        let metrics: Vec<StepMetrics> = parsed(&lines, &path)?;
        if metrics.len() as u64 != checkpoint.step() {
            let reason = format!(
                "has {} lines for {} steps",
                metrics.len(),
                checkpoint.step()
            );
            return Err(Error::field(&path, "content", reason));
        }
        let path = checkpoint.path().join(MEASUREMENTS);
        let measurements = match path.exists() {
            true => parsed(&text(MEASUREMENTS)?, &path)?,
            false => Vec::new(),
        };
        let elapsed = Elapsed::deserialize(checkpoint.progress()).map_err(|error| {
            let path = checkpoint.path().join("manifest.json");
            Error::field(path, "progress", error.to_string())
        })?;
        Ok(Self {
            record: Record {
                metrics,
                measurements,
            },
            lines,
            elapsed,
        })
    }

    pub(crate) fn push(&mut self, metrics: StepMetrics) {
        push_line(&mut self.lines, &metrics);
        self.record.metrics.push(metrics);
    }

    /// The files of the record, by name, for a checkpoint or an output.
    pub(crate) fn files(&self) -> BTreeMap<String, Vec<u8>> {
        let mut measurements = String::new();
        for measurement in &self.record.measurements {
            push_line(&mut measurements, measurement);
        }
        [(METRICS, self.lines.clone()), (MEASUREMENTS, measurements)]
            .map(|(name, text)| (name.into(), text.into_bytes()))
            .into()
    }
}

fn push_line(lines: &mut String, entry: &impl Serialize) {
    *lines += &serde_json::to_string(entry).expect("an entry has a JSON form");
    lines.push('\n');
}

fn parsed<T: DeserializeOwned>(lines: &str, path: &Path) -> Result<Vec<T>, Error> {
    let line = |(index, line): (usize, &str)| {
        serde_json::from_str(line)
            .map_err(|error| Error::field(path, format!("line {}", index + 1), error.to_string()))
    };
    lines.lines().enumerate().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::super::measurement::{Change, Measures, Spectrum};
    use super::*;

    #[test]
    fn measurements_come_back_from_their_lines_also_those_that_are_no_numbers() {
        let change = Change {
            path: "a.weight".into(),
            relative: 1e-3,
            rank: 3,
            effective_rank: f64::NAN,
            missed: 0.0,
        };
        let kinds = [
            Measures::HeldOut {
                loss: f64::INFINITY,
                records: 2,
                of_output: true,
            },
            Measures::Changes {
                weights: vec![change],
                spectrum: Some(Spectrum {
                    path: "a.weight".into(),
                    values: vec![2.0, 0.1],
                }),
            },
        ];
        let mut history = History::default();
        history.record.measurements = kinds
            .map(|measures| Measurement { step: 7, measures })
            .into();
        let files = history.files();
        let text = std::str::from_utf8(&files[MEASUREMENTS]).unwrap();
        let back: Vec<Measurement> = parsed(text, Path::new("file")).unwrap();
        let Measures::HeldOut { loss, records, .. } = back[0].measures else {
            panic!("{back:?}");
        };
        assert!(loss.is_nan() && records == 2 && back[0].step == 7);
        let Measures::Changes { weights, spectrum } = &back[1].measures else {
            panic!("{back:?}");
        };
        assert!(weights[0].effective_rank.is_nan() && weights[0].rank == 3);
        assert_eq!(spectrum.as_ref().unwrap().values, [2.0, 0.1]);
        let error = parsed::<Measurement>("{\"step\": 1}", Path::new("file")).unwrap_err();
        assert!(error.to_string().contains("line 1"), "{error}");
    }
}
