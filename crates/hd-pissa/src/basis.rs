//! Random orthonormal directions that depend only on a name.

use std::f64::consts::TAU;

use faer::{Mat, MatRef};
use hd_pissa_bits::splitmix;

use crate::path::hash;

/// `count` random orthonormal columns that are orthogonal to the orthonormal columns of `given`.
/// All columns together are at most as many as the rows. They are uniformly distributed: the
/// orthonormal factor of a Gaussian matrix, with signs that make the other factor's diagonal
/// positive.
///
/// The Gaussian values depend only on `name` and their position.
pub(crate) fn random_columns(given: MatRef<'_, f64>, count: usize, name: &str) -> Mat<f64> {
    let (rows, start) = (given.nrows(), given.ncols());
    let drawn: Vec<f64> = Normal::new(hash(name)).take(rows * count).collect();
    let matrix = Mat::from_fn(rows, start + count, |row, col| {
        match col.checked_sub(start) {
            None => given[(row, col)],
            Some(col) => drawn[col * rows + row],
        }
    });
    let qr = matrix.qr();
    let (columns, triangle) = (qr.compute_thin_Q(), qr.thin_R());
    Mat::from_fn(rows, count, |row, col| {
        let col = start + col;
        columns[(row, col)] * triangle[(col, col)].signum()
    })
}

/// Standard normal values: Box and Muller's transform of SplitMix64.
struct Normal {
    state: u64,
    /// The second value of a pair.
    next: Option<f64>,
}

impl Normal {
    fn new(seed: u64) -> Self {
        Self {
            state: seed,
            next: None,
        }
    }

    /// A multiple of 2⁻⁵³ from 0 to below 1.
    fn uniform(&mut self) -> f64 {
        (splitmix(&mut self.state) >> 11) as f64 / (1u64 << 53) as f64
    }
}

impl Iterator for Normal {
    type Item = f64;

    fn next(&mut self) -> Option<f64> {
        if let Some(value) = self.next.take() {
            return Some(value);
        }
        // The logarithm of a number above 0.
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        let (sin, cos) = (TAU * self.uniform()).sin_cos();
        self.next = Some(radius * sin);
        Some(radius * cos)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn normal_values_have_the_moments_of_the_normal_distribution() {
        let values: Vec<f64> = Normal::new(hash("moments")).take(200_001).collect();
        let mean = |power: i32| {
            values.iter().map(|value| value.powi(power)).sum::<f64>() / values.len() as f64
        };
        for (power, expected) in [(1, 0.0), (2, 1.0), (3, 0.0), (4, 3.0)] {
            assert!(
                (mean(power) - expected).abs() < 0.05,
                "{power}: {}",
                mean(power)
            );
        }
    }

    #[test]
    fn columns_are_orthonormal_also_to_given_ones() {
        let none = Mat::<f64>::zeros(7, 0);
        let given = random_columns(none.as_ref(), 3, "given");
        let more = random_columns(given.as_ref(), 4, "more");
        let all = Mat::from_fn(7, 7, |row, col| match col {
            0..3 => given[(row, col)],
            _ => more[(row, col - 3)],
        });
        let gram = all.transpose() * &all;
        for row in 0..7 {
            for col in 0..7 {
                let expected = f64::from(u8::from(row == col));
                assert!((gram[(row, col)] - expected).abs() < 1e-14);
            }
        }
        // Only the name decides.
        assert_eq!(random_columns(none.as_ref(), 3, "given"), given);
        assert_ne!(random_columns(none.as_ref(), 3, "other"), given);
    }

    /// Columns are spread over all directions: the mean of `Q Qᵀ` over many names is `m/d` times
    /// the identity.
    #[test]
    fn directions_are_uniform() {
        let none = Mat::<f64>::zeros(3, 0);
        let mut sum = Mat::<f64>::zeros(3, 3);
        for index in 0..4000 {
            let column = random_columns(none.as_ref(), 1, &format!("{index}"));
            sum += &column * column.transpose();
        }
        for row in 0..3 {
            for col in 0..3 {
                let expected = f64::from(u8::from(row == col)) / 3.0;
                assert!((sum[(row, col)] / 4000.0 - expected).abs() < 0.02);
            }
        }
    }
}
