//! The leading singular values of a matrix from its products with a few random vectors.

use burn::tensor::{Tensor, TensorData};
use faer::{Mat, Side};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// The singular values that a sketch finds.
#[derive(Clone, Debug)]
pub struct Sketched {
    /// Singular values, largest first; at most as many as the sketch has columns.
    pub values: Vec<f64>,
    /// Frobenius norm of the matrix.
    pub norm: f64,
    /// Share of the squared norm that the values lack: 0 where the sketch has found everything.
    pub missed: f64,
}

/// The largest missed share of a complete sketch, from the rounding of `f32` sums.
const ROUNDING: f64 = 1e-5;

/// The singular values of `matrix`, `[rows, cols]`, by a randomized range finder of `columns` columns
/// (Halko, Martinsson and Tropp 2011, algorithm 4.1).
///
/// With an orthonormal basis `Q` of `matrix · Ω`, for a random `Ω` of `[cols, columns]`, the values are
/// those of `Qᵀ · matrix`. None of them is larger than the exact one beside it.
///
/// - A matrix whose rank is below `columns` has, but for rounding, exactly these values.
/// - The same holds for any matrix with a side of at most `columns`, which is decomposed in full.
/// - Of another matrix, [`missed`](Sketched::missed) is the share of its squared norm that the values
///   lack. Numeric and effective rank are then lower bounds.
///
/// It takes `4 · rows · cols · columns` operations on the device of `matrix` and
/// `2 · (rows + cols) · columns²` on the host; a decomposition takes a multiple of
/// `rows · cols · min(rows, cols)` on the host.
pub fn sketched(matrix: Tensor<2>, columns: usize, seed: u64) -> Sketched {
    let [rows, cols] = matrix.dims();
    let thin = match columns >= rows.min(cols) {
        true if rows <= cols => matrix.clone(),
        true => matrix.clone().transpose(),
        false => {
            let mut random = StdRng::seed_from_u64(seed);
            let draws = (0..cols * columns).map(|_| random.random::<f32>() - 0.5);
            let draws = TensorData::new(draws.collect::<Vec<_>>(), [cols, columns]);
            let samples = Tensor::from_data(draws, &matrix.device());
            let samples = host(matrix.clone().matmul(samples));
            let basis = samples.qr().compute_thin_Q();
            let transposed: Vec<f32> = (0..columns)
                .flat_map(|col| (0..rows).map(move |row| (row, col)))
                .map(|(row, col)| basis[(row, col)] as f32)
                .collect();
            let basis = TensorData::new(transposed, [columns, rows]);
            Tensor::from_data(basis, &matrix.device()).matmul(matrix.clone())
        }
    };
    let thin = host(thin);
    // The smaller Gram matrix: its eigenvalues are the squares of the singular values. In `f64` that
    // costs no digit that the `f32` values have.
    let gram = &thin * thin.transpose();
    let squares = gram
        .self_adjoint_eigenvalues(Side::Lower)
        .unwrap_or_default();
    let mut values: Vec<f64> = squares
        .iter()
        .map(|square| square.max(0.0).sqrt())
        .collect();
    values.sort_by(|a, b| b.total_cmp(a));
    let found: f64 = squares.iter().sum();
    let square: f64 = matrix.square().sum().into_scalar();
    let missed = match square > 0.0 {
        true => 1.0 - found / square,
        false => 0.0,
    };
    Sketched {
        values,
        norm: square.sqrt(),
        missed: if missed > ROUNDING { missed } else { 0.0 },
    }
}

fn host(matrix: Tensor<2>) -> Mat<f64> {
    let [rows, cols] = matrix.dims();
    let values: Vec<f32> = matrix.into_data().iter().collect();
    Mat::from_fn(rows, cols, |row, col| f64::from(values[row * cols + col]))
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;
    use crate::spectrum::Ranks;

    /// A matrix with these singular values, and random directions.
    fn with_values(values: &[f64], rows: usize, cols: usize) -> Mat<f64> {
        let mut random = StdRng::seed_from_u64(11);
        let mut directions = |length: usize| {
            let random = Mat::from_fn(length, values.len(), |_, _| random.random::<f64>() - 0.5);
            random.qr().compute_thin_Q()
        };
        let (left, right) = (directions(rows), directions(cols));
        let scaled = Mat::from_fn(rows, values.len(), |row, col| {
            left[(row, col)] * values[col]
        });
        scaled * right.transpose()
    }

    /// The sketch of a matrix of `f32`, and the singular values of the same by an exact decomposition.
    fn both(matrix: &Mat<f64>, columns: usize) -> (Sketched, Vec<f64>) {
        let (rows, cols) = (matrix.nrows(), matrix.ncols());
        let values: Vec<f32> = (0..rows)
            .flat_map(|row| (0..cols).map(move |col| (row, col)))
            .map(|(row, col)| matrix[(row, col)] as f32)
            .collect();
        let rounded = Mat::from_fn(rows, cols, |row, col| f64::from(values[row * cols + col]));
        let tensor = Tensor::from_data(TensorData::new(values, [rows, cols]), &Device::flex());
        (
            sketched(tensor, columns, 5),
            rounded.singular_values().unwrap(),
        )
    }

    #[test]
    fn below_the_number_of_columns_and_of_a_thin_matrix_the_values_are_the_exact_ones() {
        let decaying: Vec<f64> = (0..24).map(|i| 0.8f64.powi(i)).collect();
        for (rows, cols, columns) in [(150, 90, 32), (90, 150, 32), (150, 30, 32), (30, 150, 32)] {
            let (found, exact) = both(&with_values(&decaying, rows, cols), columns);
            assert_eq!(found.missed, 0.0);
            for (found, exact) in found.values.iter().zip(&exact) {
                assert!((found - exact).abs() < 1e-6, "{found} {exact}");
            }
            let norm: f64 = exact.iter().map(|value| value * value).sum::<f64>().sqrt();
            assert!((found.norm - norm).abs() < 1e-5 * norm);
            let (found, exact) = (
                Ranks::of_values(&found.values, rows, cols),
                Ranks::of_values(&exact, rows, cols),
            );
            assert_eq!((found.numeric, exact.numeric), (24, 24));
            assert!((found.effective - exact.effective).abs() < 1e-4 * exact.effective);
        }
    }

    #[test]
    fn above_it_they_are_bounds_and_the_missed_share_says_by_how_much() {
        // All 80 directions, of slowly falling length.
        let falling: Vec<f64> = (1..=80).map(|i| (i as f64).powf(-0.5)).collect();
        let (found, exact) = both(&with_values(&falling, 120, 80), 24);
        assert_eq!(found.values.len(), 24);
        for (found, exact) in found.values.iter().zip(&exact) {
            assert!(*found <= exact * (1.0 + 1e-6), "{found} {exact}");
        }
        let square = |values: &[f64]| values.iter().map(|value| value * value).sum::<f64>();
        let missed = 1.0 - square(&found.values) / square(&exact);
        assert!(
            missed > 0.2 && (found.missed - missed).abs() < 1e-5,
            "{missed}"
        );
        let ranks = [&found.values, &exact].map(|values| Ranks::of_values(values, 120, 80));
        assert!(ranks[0].numeric == 24 && ranks[1].numeric == 80);
        assert!(ranks[0].effective < ranks[1].effective);
    }

    #[test]
    fn nothing_has_no_rank() {
        let found = sketched(Tensor::zeros([40, 30], &Device::flex()), 8, 5);
        assert_eq!((found.norm, found.missed), (0.0, 0.0));
        assert_eq!(Ranks::of_values(&found.values, 40, 30).numeric, 0);
    }
}
