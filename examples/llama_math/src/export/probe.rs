//! A few logits of a trained model, by which a copy of it is recognized.

use std::path::Path;

use burn::tensor::{Int, Tensor, TensorData};
use serde::{Deserialize, Serialize};

use crate::{Error, Llama, files};

/// Name of the file with the logits.
pub(crate) const PROBE: &str = "probe.json";
/// Most positions, and most logits of each.
const POSITIONS: usize = 16;
const LOGITS: usize = 256;

/// Logits of a trained model for a fixed text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Probe {
    /// The text.
    tokens: Vec<u32>,
    /// Logits of every so many tokens of the vocabulary are kept.
    every: usize,
    /// For each position the logits that are kept.
    logits: Vec<Vec<f32>>,
}

impl Probe {
    /// Of a model for at most `max_positions` positions.
    pub fn new(model: &Llama, max_positions: usize) -> Self {
        let vocabulary = model.model.embed_tokens.weight.lazy_shape()[0];
        // A stride that is no divisor of common sizes: tokens from all over the vocabulary.
        let tokens = (0..max_positions.min(POSITIONS)).map(|i| (7919 * i + 1) % vocabulary);
        let tokens: Vec<u32> = tokens.map(|token| token as u32).collect();
        Self::with(model, tokens, vocabulary.div_ceil(LOGITS))
    }

    /// The logits of another model for the same text.
    fn of(&self, model: &Llama) -> Self {
        Self::with(model, self.tokens.clone(), self.every)
    }

    fn with(model: &Llama, tokens: Vec<u32>, every: usize) -> Self {
        let ids: Vec<i64> = tokens.iter().map(|&token| token.into()).collect();
        let data = TensorData::new(ids, [1, tokens.len()]);
        let input = Tensor::<2, Int>::from_data(data, &model.device());
        let logits = model.forward(input);
        let vocabulary = logits.dims()[2];
        let values: Vec<f32> = logits.into_data().iter().collect();
        let kept = |row: &[f32]| row.iter().copied().step_by(every).collect();
        Self {
            logits: values.chunks(vocabulary).map(kept).collect(),
            tokens,
            every,
        }
    }

    /// The largest difference between the logits of `model` and these, and the largest of these.
    pub fn compare(&self, model: &Llama) -> (f32, f32) {
        let other = self.of(model);
        let pairs = self.logits.iter().zip(&other.logits);
        let pairs = pairs.flat_map(|(own, other)| own.iter().zip(other));
        // The maximum passes over NaN, as no logit that is kept may be.
        pairs.fold((0.0, 0.0), |(difference, largest), (own, other)| {
            let apart = (own - other).abs();
            let apart = if apart.is_nan() { f32::INFINITY } else { apart };
            (apart.max(difference), own.abs().max(largest))
        })
    }

    /// What [`compare`](Self::compare) finds, in words.
    pub(super) fn difference(&self, model: &Llama) -> String {
        let (difference, largest) = self.compare(model);
        format!(
            "logits: largest difference from the trained model {difference:.2e} at {} positions, where \
             the largest logit is {largest:.1}",
            self.tokens.len()
        )
    }

    /// Writes it into a folder.
    ///
    /// # Errors
    ///
    /// [`Error::Io`].
    pub fn write(&self, folder: &Path) -> Result<(), Error> {
        let path = folder.join(PROBE);
        let text = serde_json::to_string(self).expect("numbers have a JSON form");
        std::fs::write(&path, format!("{text}\n")).map_err(Error::io(&path))
    }

    /// That of a folder, for a model with so many tokens in its vocabulary.
    pub(super) fn read(folder: &Path, vocabulary: usize) -> Result<Option<Self>, Error> {
        let path = folder.join(PROBE);
        if !path.exists() {
            return Ok(None);
        }
        let probe: Self = serde_json::from_str(&files::text(&path)?)
            .map_err(|error| Error::field(&path, "content", error.to_string()))?;
        let kept = vocabulary.div_ceil(probe.every.max(1));
        let fits = probe.every > 0
            && !probe.tokens.is_empty()
            && probe.logits.len() == probe.tokens.len()
            && probe
                .tokens
                .iter()
                .all(|&token| (token as usize) < vocabulary)
            && probe.logits.iter().all(|row| row.len() == kept);
        match fits {
            true => Ok(Some(probe)),
            false => {
                let reason = format!("are not those of a model with {vocabulary} tokens");
                Err(Error::field(&path, "logits", reason))
            }
        }
    }
}
