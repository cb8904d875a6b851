//! The size of the change of the weights by training, and its number of directions.

use burn::module::Param;
use burn::tensor::{Tensor, TensorData};
use faer::Mat;

use crate::Llama;

/// The weight matrices of a model before training.
pub struct WeightsBefore(Vec<Matrix>);

enum Matrix {
    Dense(Box<Tensor<2>>),
    LowRank(Box<Factors>),
}

/// Factors and scale of a low-rank adapter, whose base is frozen.
struct Factors {
    a: Tensor<2>,
    b: Tensor<2>,
    scale: f64,
}

impl Factors {
    fn squared_distance(self, new: Self) -> Tensor<1> {
        // new_a·new_b − a·b = [new_a − a | a] · [new_b ; new_b − b], whose norm needs only the
        // small Gram matrices of both sides.
        let left = Tensor::cat(vec![new.a - self.a.clone(), self.a], 1);
        let right = Tensor::cat(vec![new.b.clone(), new.b - self.b], 0);
        let left = left.clone().transpose().matmul(left);
        let right = right.clone().matmul(right.transpose());
        (left * right).sum() * (new.scale * new.scale)
    }
}

impl Matrix {
    fn of(weight: &Param<Tensor<2>>) -> Self {
        match weight.adapter() {
            Some(lora) => Self::LowRank(Box::new(Factors {
                a: lora.a.val().inner(),
                b: lora.b.val().inner(),
                scale: lora.scale,
            })),
            None => Self::Dense(Box::new(weight.base().inner())),
        }
    }

    fn squared_distance(self, new: Self) -> Tensor<1> {
        match (self, new) {
            (Self::Dense(old), Self::Dense(new)) => (*new - *old).square().sum(),
            (Self::LowRank(old), Self::LowRank(new)) => old.squared_distance(*new),
            _ => unreachable!("adapters are neither attached nor removed during training"),
        }
    }
}

impl WeightsBefore {
    /// The current matrices of `model`. Holds the tensors themselves, not copies.
    pub fn of(model: &Llama) -> Self {
        Self(
            model
                .matrices()
                .into_iter()
                .map(|(_, weight)| Matrix::of(weight))
                .collect(),
        )
    }

    /// Frobenius norm of the change since then, over all matrices.
    pub fn distance(self, model: &Llama) -> f64 {
        let after = model
            .matrices()
            .into_iter()
            .map(|(_, weight)| Matrix::of(weight));
        let squares: Vec<Tensor<1>> = self
            .0
            .into_iter()
            .zip(after)
            .map(|(before, after)| before.squared_distance(after))
            .collect();
        let sum: f64 = Tensor::cat(squares, 0).sum().into_scalar();
        sum.max(0.0).sqrt()
    }
}

/// Ranks of a matrix.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ranks {
    /// Number of singular values above `max(rows, cols) · eps` of the largest, with the machine
    /// epsilon of `f32`. Rounding of `f32` weights cannot cause such values.
    pub numeric: usize,
    /// Exponential of the entropy of the singular values' shares of their sum: between 1 and the
    /// numeric rank, large if many directions matter.
    pub effective: f64,
}

impl Ranks {
    /// The ranks of a row-major matrix; zero for a matrix of zeros.
    pub fn of(values: &[f32], rows: usize, cols: usize) -> Self {
        let matrix = Mat::from_fn(rows, cols, |row, col| f64::from(values[row * cols + col]));
        // Fails only on values that are not finite.
        let singular = matrix.singular_values().unwrap_or_default();
        Self::of_values(&singular, rows, cols)
    }

    /// The ranks of a matrix of `rows` and `cols` with these singular values.
    pub fn of_values(singular: &[f64], rows: usize, cols: usize) -> Self {
        Self::above(singular, Self::threshold(singular, rows, cols))
    }

    /// `max(rows, cols) · eps` of the largest singular value.
    pub fn threshold(singular: &[f64], rows: usize, cols: usize) -> f64 {
        let largest = singular.iter().copied().fold(0.0, f64::max);
        largest * rows.max(cols) as f64 * f64::from(f32::EPSILON)
    }

    /// The ranks from the singular values above `threshold`.
    pub fn above(singular: &[f64], threshold: f64) -> Self {
        let above = singular.iter().copied().filter(|&value| value > threshold);
        let kept: Vec<f64> = above.collect();
        let sum: f64 = kept.iter().sum();
        let entropy: f64 = kept
            .iter()
            .map(|value| -(value / sum) * (value / sum).ln())
            .sum();
        Self {
            numeric: kept.len(),
            effective: if kept.is_empty() { 0.0 } else { entropy.exp() },
        }
    }
}

/// Mean ranks of the change from `before` to `after`, over the matrices that changed.
pub fn mean_ranks(before: &[TensorData], after: &[TensorData]) -> (f64, f64) {
    let ranks: Vec<Ranks> = before
        .iter()
        .zip(after)
        .map(|(before, after)| {
            let difference: Vec<f32> = after
                .iter::<f32>()
                .zip(before.iter::<f32>())
                .map(|(x, y)| x - y)
                .collect();
            Ranks::of(&difference, before.shape()[0], before.shape()[1])
        })
        .filter(|ranks| ranks.numeric > 0)
        .collect();
    let count = ranks.len().max(1) as f64;
    let numeric = ranks.iter().map(|ranks| ranks.numeric as f64).sum::<f64>() / count;
    let effective = ranks.iter().map(|ranks| ranks.effective).sum::<f64>() / count;
    (numeric, effective)
}

/// The values of the projections of attention and feed-forward layers, adapters merged.
pub fn projections(model: &Llama) -> Vec<TensorData> {
    model
        .matrices()
        .into_iter()
        .filter(|(path, _)| path.ends_with("_proj.weight"))
        .map(|(_, weight)| weight.val().into_data())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_distance_of_factors_is_that_of_their_products() {
        let device = burn::tensor::Device::flex();
        let draw = |shape: [usize; 2]| {
            Tensor::<2>::random(shape, burn::tensor::Distribution::Default, &device)
        };
        let [a, b] = [draw([7, 3]), draw([3, 5])];
        let (new_a, new_b) = (
            a.clone() + draw([7, 3]) * 0.1,
            b.clone() + draw([3, 5]) * 0.1,
        );
        let change = (new_a.clone().matmul(new_b.clone()) - a.clone().matmul(b.clone())) * 2.0;
        let expected: f64 = change.square().sum().into_scalar();
        let old = Factors { a, b, scale: 2.0 };
        let new = Factors {
            a: new_a,
            b: new_b,
            scale: 2.0,
        };
        let squared: f64 = old.squared_distance(new).into_scalar();
        assert!(
            (squared - expected).abs() < 1e-4 * expected,
            "{squared} {expected}"
        );
    }

    #[test]
    fn ranks_of_known_matrices() {
        let identity: Vec<f32> = (0..12).map(|i| f32::from(u8::from(i % 5 == 0))).collect();
        let ranks = Ranks::of(&identity, 3, 4);
        assert_eq!(ranks.numeric, 3);
        assert!((ranks.effective - 3.0).abs() < 1e-9);

        let outer: Vec<f32> = (0..12)
            .map(|i| ((i / 4 + 1) * (i % 4 + 1)) as f32)
            .collect();
        let ranks = Ranks::of(&outer, 3, 4);
        assert_eq!(ranks.numeric, 1);
        assert!((ranks.effective - 1.0).abs() < 1e-9);

        assert_eq!(
            Ranks::of(&[0.0; 6], 2, 3),
            Ranks {
                numeric: 0,
                effective: 0.0
            }
        );
    }
}
