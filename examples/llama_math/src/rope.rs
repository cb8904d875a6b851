//! Rotary position embeddings in the half-split layout of Hugging Face checkpoints.

use std::f64::consts::TAU;
use std::ops::Range;

use burn::tensor::{Device, Tensor, TensorData};

use crate::config::{LlamaConfig, RopeScaling};

/// The rotary embedding of a model.
#[derive(Clone, Debug)]
pub struct Rope {
    head_dim: usize,
    theta: f64,
    scaling: RopeScaling,
    max_positions: usize,
}

impl Rope {
    /// That of a configuration.
    pub fn new(config: &LlamaConfig) -> Self {
        Self {
            head_dim: config.head_dim,
            theta: config.rope_theta,
            scaling: config.rope_scaling,
            max_positions: config.max_positions,
        }
    }

    /// The frequency of each pair of dimensions in sequences of `length` tokens, after scaling.
    pub fn frequencies(&self, length: usize) -> Vec<f64> {
        let half = self.head_dim / 2;
        let theta = match self.scaling {
            RopeScaling::Dynamic { factor } if length > self.max_positions => {
                let times = length as f64 / self.max_positions as f64;
                let dim = self.head_dim as f64;
                self.theta * (factor * times - (factor - 1.0)).powf(dim / (dim - 2.0))
            }
            _ => self.theta,
        };
        let of_pair = |pair: usize| {
            let frequency = theta.powf(-(pair as f64) / half as f64);
            self.scaled(frequency, pair as f64)
        };
        (0..half).map(of_pair).collect()
    }

    /// The factor of cosines and sines.
    pub fn magnitude(&self) -> f64 {
        match self.scaling {
            RopeScaling::Yarn { magnitude, .. } => magnitude,
            _ => 1.0,
        }
    }

    /// The frequency of a pair of dimensions after scaling.
    fn scaled(&self, frequency: f64, pair: f64) -> f64 {
        // With `blend` 1 it is kept, with 0 divided.
        let blended = |blend: f64, factor: f64| {
            let blend = blend.clamp(0.0, 1.0);
            frequency * (blend + (1.0 - blend) / factor)
        };
        match self.scaling {
            RopeScaling::Default | RopeScaling::Dynamic { .. } => frequency,
            RopeScaling::Linear { factor } => frequency / factor,
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_context,
            } => {
                // Turns within the original context: at most `low` turns is a low frequency, at least
                // `high` turns a high one, with a linear blend between.
                let turns = original_context * frequency / TAU;
                let range = high_freq_factor - low_freq_factor;
                blended((turns - low_freq_factor) / range, factor)
            }
            RopeScaling::Yarn {
                factor,
                beta_fast,
                beta_slow,
                truncate,
                original_context,
                ..
            } => {
                // The pair that turns so often within the original context.
                let dim = self.head_dim as f64;
                let pair_of = |turns: f64| {
                    dim * (original_context / (turns * TAU)).ln() / (2.0 * self.theta.ln())
                };
                let (mut first, mut last) = (pair_of(beta_fast), pair_of(beta_slow));
                if truncate {
                    (first, last) = (first.floor(), last.ceil());
                }
                (first, last) = (first.max(0.0), last.min(dim - 1.0));
                // A step, where the blend has no width.
                let width = if first == last { 0.001 } else { last - first };
                blended(1.0 - (pair - first) / width, factor)
            }
        }
    }
}

/// Cosines and sines of the positions of one forward pass, `[positions, head_dim / 2]`.
#[derive(Clone, Debug)]
pub struct Rotation {
    pub(crate) cos: Tensor<2>,
    pub(crate) sin: Tensor<2>,
}

impl Rotation {
    /// The rotation of these positions of each sequence, one after the other. The end of a range is the length of
    /// its sequence, on which the frequencies of some models depend.
    pub fn new(
        rope: &Rope,
        sequences: impl IntoIterator<Item = Range<usize>>,
        device: &Device,
    ) -> Self {
        let mut angles = Vec::new();
        let (mut len, mut pairs) = (0, 0);
        for positions in sequences {
            let frequencies = rope.frequencies(positions.end);
            (len, pairs) = (len + positions.len(), frequencies.len());
            angles.extend(positions.flat_map(|position| {
                frequencies
                    .iter()
                    .map(move |f| position as f64 * f)
                    .collect::<Vec<_>>()
            }));
        }
        let magnitude = rope.magnitude();
        let (cos, sin): (Vec<f32>, Vec<f32>) = angles
            .into_iter()
            .map(|angle| {
                (
                    (magnitude * angle.cos()) as f32,
                    (magnitude * angle.sin()) as f32,
                )
            })
            .unzip();
        let table = |values| Tensor::from_data(TensorData::new(values, [len, pairs]), device);
        Self {
            cos: table(cos),
            sin: table(sin),
        }
    }

    /// Rotates `x: [batch, heads, positions, head_dim]`; dimension `i` pairs with `i + head_dim/2`.
    pub fn apply(&self, x: Tensor<4>) -> Tensor<4> {
        let half = x.dims()[3] / 2;
        let (cos, sin) = (
            self.cos.clone().unsqueeze::<4>(),
            self.sin.clone().unsqueeze::<4>(),
        );
        let first = x.clone().narrow(3, 0, half);
        let second = x.narrow(3, half, half);
        let rotated_first = first.clone() * cos.clone() - second.clone() * sin.clone();
        let rotated_second = second * cos + first * sin;
        Tensor::cat(vec![rotated_first, rotated_second], 3)
    }
}
