//! What is measured between steps.

use std::fmt::{self, Display, Formatter};

use serde::{Deserialize, Serialize};

use super::step::number;
use crate::data::Record;
use crate::evaluate::Answer;

/// What was measured after a step: a line of `measurements.jsonl`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Measurement {
    /// Steps taken before; 0 for the pretrained model.
    pub step: usize,
    /// What was measured.
    #[serde(flatten)]
    pub measures: Measures,
}

/// In a line, for people; answers in several.
impl Display for Measurement {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "step {}: ", self.step)?;
        match &self.measures {
            Measures::HeldOut { loss, records, .. } => {
                write!(f, "held-out loss {loss:.4} ({records} records)")
            }
            Measures::Changes { weights, .. } => {
                let mean = |of: fn(&Change) -> f64| {
                    weights.iter().map(of).sum::<f64>() / weights.len().max(1) as f64
                };
                write!(
                    f,
                    "the changes of {} weights have rank {:.1} and effective rank {:.1} on average",
                    weights.len(),
                    mean(|change| change.rank as f64),
                    mean(|change| change.effective_rank),
                )
            }
            Measures::Answers { answers, .. } => {
                let scored = answers.iter().filter_map(|answer| answer.correct);
                let correct = scored.clone().filter(|&correct| correct).count();
                write!(
                    f,
                    "{correct} of {} logged answers are right",
                    scored.count()
                )?;
                answers.iter().try_for_each(|answer| {
                    let text = answer.text.trim().replace('\n', " ");
                    write!(f, "\n  -> {text}")
                })
            }
        }
    }
}

/// The kinds of measurements.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Measures {
    /// The loss on held-out records.
    HeldOut {
        /// Mean loss per target token.
        #[serde(deserialize_with = "number")]
        loss: f64,
        /// Number of records.
        records: usize,
        /// Whether the weights are those of the output, rounded as they are written there.
        of_output: bool,
    },
    /// The change of weights since the start.
    Changes {
        /// The weights, in the order of the model.
        weights: Vec<Change>,
        /// The singular values of one of the changes.
        spectrum: Option<Spectrum>,
    },
    /// Answers to the first held-out records.
    Answers {
        /// One for each record.
        answers: Vec<LoggedAnswer>,
        /// Whether the weights are those of the output.
        of_output: bool,
    },
}

/// The change of a weight since the start.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Change {
    /// Name of the weight.
    pub path: String,
    /// Frobenius norm of the change, relative to that of the weight at the start.
    #[serde(deserialize_with = "number")]
    pub relative: f64,
    /// Numeric rank; see [`Ranks::numeric`](crate::spectrum::Ranks::numeric).
    pub rank: usize,
    /// Effective rank; see [`Ranks::effective`](crate::spectrum::Ranks::effective).
    #[serde(deserialize_with = "number")]
    pub effective_rank: f64,
    /// Share of the squared norm that the sketch has missed. Where it is not 0, both ranks are lower
    /// bounds.
    #[serde(deserialize_with = "number")]
    pub missed: f64,
}

/// The singular values of a change.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Spectrum {
    /// Name of the weight.
    pub path: String,
    /// Singular values, largest first.
    pub values: Vec<f32>,
}

/// An answer to a held-out record.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LoggedAnswer {
    /// What was asked.
    pub prompt: String,
    /// The answer of the data.
    pub reference: String,
    /// The answer of the model.
    pub text: String,
    /// Whether its final number is that of the reference; `None` if the reference has none.
    pub correct: Option<bool>,
}

impl LoggedAnswer {
    /// An answer to a record.
    pub(crate) fn new(record: &Record, answer: Answer) -> Self {
        Self {
            prompt: match record.input.is_empty() {
                true => record.instruction.clone(),
                false => format!("{}\n{}", record.instruction, record.input),
            },
            reference: record.answer.clone(),
            text: answer.text,
            correct: answer.correct,
        }
    }
}
