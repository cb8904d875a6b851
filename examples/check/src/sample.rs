//! Inputs, the same on every device and in every run.

use crate::measure::sample::Host;
use burn::tensor::DType;
use half::{bf16, f16};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// The source of the values of one case.
pub struct Source(StdRng);

impl Source {
    pub fn new(seed: u64) -> Self {
        Self(StdRng::seed_from_u64(seed))
    }

    /// Values uniform in `[-scale, scale)`, rounded to `dtype`.
    pub fn matrix(&mut self, [rows, columns]: [usize; 2], scale: f32, dtype: DType) -> Host {
        let mut value = || round(self.0.random_range(-scale..scale), dtype);
        Host {
            values: (0..rows * columns).map(|_| value()).collect(),
            columns,
        }
    }
}

/// The nearest value of `dtype`.
pub fn round(value: f32, dtype: DType) -> f32 {
    match dtype {
        DType::F16 => f16::from_f32(value).to_f32(),
        DType::BF16 => bf16::from_f32(value).to_f32(),
        _ => value,
    }
}

/// All elements of a small matrix, or some of a large one.
pub fn places(shape @ [rows, columns]: [usize; 2]) -> Vec<[usize; 2]> {
    match rows * columns {
        0..=20_000 => (0..rows)
            .flat_map(|row| (0..columns).map(move |column| [row, column]))
            .collect(),
        _ => crate::measure::sample::places(shape).collect(),
    }
}
