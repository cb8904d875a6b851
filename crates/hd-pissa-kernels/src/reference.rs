//! The kernels' results in plain Rust: slow, and in `f64` where a test needs a bound.

/// A matrix product, row-major, in `f64`.
#[derive(Clone, Debug)]
pub struct Exact {
    /// The sums.
    pub value: Vec<f64>,
    /// The same sums of absolute values, which bound the rounding error.
    pub magnitude: Vec<f64>,
}

/// `left · right` for `left: [rows, inner]` and `right: [inner, columns]`, both row-major.
pub fn product(left: &[f32], right: &[f32], [rows, inner, columns]: [usize; 3]) -> Exact {
    let mut exact = Exact {
        value: vec![0.0; rows * columns],
        magnitude: vec![0.0; rows * columns],
    };
    for i in 0..rows {
        for k in 0..inner {
            for j in 0..columns {
                let term = f64::from(left[i * inner + k]) * f64::from(right[k * columns + j]);
                exact.value[i * columns + j] += term;
                exact.magnitude[i * columns + j] += term.abs();
            }
        }
    }
    exact
}

/// The factors of one shard, row-major.
#[derive(Clone, Debug)]
pub struct Shard {
    /// `a`, `[d_input, rank]`.
    pub a: Vec<f32>,
    /// `b`, `[rank, d_output]`.
    pub b: Vec<f32>,
    /// `Δa`, as `a`.
    pub delta_a: Vec<f32>,
    /// `Δb`, as `b`.
    pub delta_b: Vec<f32>,
}

/// `Σ_k (a_k + Δa_k)·Δb_k + Δa_k·b_k`, with `a + Δa` rounded to `f32` as the kernel does.
pub fn update(shards: &[Shard], [d_input, rank, d_output]: [usize; 3]) -> Exact {
    let mut total = Exact {
        value: vec![0.0; d_input * d_output],
        magnitude: vec![0.0; d_input * d_output],
    };
    for shard in shards {
        let moved: Vec<f32> = shard
            .a
            .iter()
            .zip(&shard.delta_a)
            .map(|(a, d)| a + d)
            .collect();
        for part in [
            product(&moved, &shard.delta_b, [d_input, rank, d_output]),
            product(&shard.delta_a, &shard.b, [d_input, rank, d_output]),
        ] {
            for (sum, term) in total.value.iter_mut().zip(part.value) {
                *sum += term;
            }
            for (sum, term) in total.magnitude.iter_mut().zip(part.magnitude) {
                *sum += term;
            }
        }
    }
    total
}

/// The result of [`row_statistics`](crate::row_statistics()) for one row, in `f64`.
pub fn row_statistics(row: &[f32], split: usize) -> [f64; 4] {
    let scale = 2f64.powi(-80);
    let mut statistics = [0.0; 4];
    for (column, value) in row.iter().enumerate() {
        let square = f64::from(*value).powi(2);
        if value.is_finite() {
            statistics[if column < split { 1 } else { 2 }] += square;
            statistics[3] += square * scale * scale;
        } else {
            statistics[0] += 1.0;
        }
    }
    statistics
}
