//! What one step did.

use serde::{Deserialize, Serialize};

/// The metrics of one step: a line of `metrics.jsonl`.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct StepMetrics {
    /// Counted from 1.
    pub step: usize,
    /// Mean loss of the step's micro-batches.
    #[serde(deserialize_with = "number")]
    pub loss: f64,
    /// Learning rate.
    #[serde(deserialize_with = "number")]
    pub lr: f64,
    /// Global norm of the gradients before clipping.
    #[serde(deserialize_with = "number")]
    pub gradient_norm: f64,
    /// Frobenius norm of the change of the weight matrices.
    #[serde(deserialize_with = "number")]
    pub update_norm: f64,
    /// Tokens per second in this step.
    #[serde(deserialize_with = "number")]
    pub tokens_per_second: f64,
    /// Resident memory after the step, in bytes.
    pub memory: Option<u64>,
}

/// A number, or NaN: JSON has `null` for values that are not finite.
pub(super) fn number<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Option::<f64>::deserialize(deserializer).map(|number| number.unwrap_or(f64::NAN))
}
