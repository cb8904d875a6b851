//! Rotary position embeddings in the half-split layout of Hugging Face checkpoints.

use burn::tensor::{Device, Tensor, TensorData};

use crate::config::{LlamaConfig, RopeScaling};

/// The frequency of each pair of dimensions, after scaling.
pub fn frequencies(config: &LlamaConfig) -> Vec<f64> {
    let half = config.head_dim / 2;
    (0..half)
        .map(|pair| {
            let exponent = pair as f64 / half as f64;
            scale(config.rope_theta.powf(-exponent), config.rope_scaling)
        })
        .collect()
}

fn scale(frequency: f64, scaling: RopeScaling) -> f64 {
    match scaling {
        RopeScaling::Default => frequency,
        RopeScaling::Linear { factor } => frequency / factor,
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_context,
        } => {
            // Turns within the original context: at most `low` turns is a low frequency, at least
            // `high` turns a high one, with a linear blend between.
            let turns = original_context * frequency / (2.0 * std::f64::consts::PI);
            let blend = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
            let blend = blend.clamp(0.0, 1.0);
            frequency * (blend + (1.0 - blend) / factor)
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
    /// The rotation of positions `start..start + len`.
    pub fn new(frequencies: &[f64], start: usize, len: usize, device: &Device) -> Self {
        let angles = (start..start + len)
            .flat_map(|position| frequencies.iter().map(move |f| position as f64 * f));
        let (cos, sin): (Vec<f32>, Vec<f32>) = angles
            .map(|angle| (angle.cos() as f32, angle.sin() as f32))
            .unzip();
        let table =
            |values| Tensor::from_data(TensorData::new(values, [len, frequencies.len()]), device);
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
