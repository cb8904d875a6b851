//! Bounds on the effect of rounding on a result.
//!
//! `u` is the unit roundoff of a type, half the distance of 1 and the next larger number. A sum of
//! `n` products in `f32`, in any order, is within `n·u` of the sum of the absolute values of its
//! terms, for any values (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1).
//! Roundings to nearest go both ways. If they are independent, the sum is within `λ·√n·u`, except
//! with a probability of `2·exp(−λ²/2)` for each rounding (Higham and Mary, 2019, theorem 2.4).
//! Here `λ` is 8, for a probability of 3e-14. The smaller of the two is the bound.
//!
//! [`Arithmetic`] has other deviations of a device.

use burn::tensor::DType;

/// Unit roundoff of `f32`.
pub const F32: f64 = 1.0 / (1u64 << 24) as f64;

/// The error of a sum of independent roundings, in standard deviations.
const LAMBDA: f64 = 8.0;

/// Unit roundoff of a float dtype.
///
/// # Panics
///
/// For another dtype than `f32`, `f16` and `bf16`.
pub fn unit(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => F32,
        DType::F16 => 2f64.powi(-11),
        DType::BF16 => 2f64.powi(-8),
        other => panic!("{other:?} is no dtype of weights"),
    }
}

/// The error of a number below the normal range of a dtype, which a device may replace by zero.
///
/// # Panics
///
/// As [`unit()`].
pub fn smallest(dtype: DType) -> f64 {
    match dtype {
        DType::F16 => 2f64.powi(-14),
        _ => {
            let _ = unit(dtype);
            2f64.powi(-126)
        }
    }
}

/// How a device multiplies and adds.
#[derive(Clone, Copy, Debug)]
pub struct Arithmetic {
    is_flex: bool,
    /// Burn's products may run on matrix units. These read `f32` operands as `tf32`, with 11 bits, and
    /// round sums toward zero, each by up to `2·u` and always the same way.
    matrix_units: bool,
}

impl Arithmetic {
    /// That of the backend with the name of a feature.
    pub fn of(backend: &str) -> Self {
        Self {
            is_flex: backend == "flex",
            matrix_units: !matches!(backend, "flex" | "cpu" | "wgpu"),
        }
    }

    /// A sum of `terms` products in `f32` by a kernel of ours or by Flex, as a share of the sum of
    /// the absolute values of its terms.
    pub fn sum(self, terms: usize) -> f64 {
        F32 * roundings(terms)
    }

    /// The same of Burn's product of operands of `dtype` that are exact, rounded to `dtype`: a matrix
    /// of `shape`.
    ///
    /// Products of halves are rounded twice: blocks of the inner dimension may be added in the
    /// output's own type. Flex adds each term of a matrix times a vector in `f16`, if the output is
    /// that (the gemm crate's `mixed_gemv_colmajor`).
    pub fn product(self, terms: usize, shape: [usize; 2], dtype: DType) -> f64 {
        let sums = match self.matrix_units {
            true => 2.0 * F32 * terms as f64,
            false => self.sum(terms),
        };
        match dtype {
            DType::F32 if self.matrix_units => sums + 2.0 * 2f64.powi(-11),
            DType::F32 => sums,
            DType::F16 if self.is_flex && shape.contains(&1) => unit(dtype) * roundings(terms + 1),
            dtype => sums + 2.0 * unit(dtype),
        }
    }

    /// The typical error of an `f32` product of `terms` terms, as a share of the sum of their
    /// absolute values.
    pub fn typical(self, terms: usize) -> f64 {
        let sums = F32 * (terms as f64).sqrt();
        match self.matrix_units {
            true => sums + 2f64.powi(-11),
            false => sums,
        }
    }

    /// The bound of `Σ_t x_t·q_t` with each `q_t` itself a product of `terms` terms in `f32`, for which
    /// `inner` has `(|x_t|, the sum of the absolute values of the terms of q_t)`, without the rounding
    /// of the outer sum.
    ///
    /// Errors of different `q_t` come from different roundings: their sum is within `λ` times the root
    /// of the sum of their squares. Matrix units always round the same way, and the errors add up.
    pub fn chain(self, terms: usize, inner: impl Iterator<Item = (f64, f64)> + Clone) -> f64 {
        let sum: f64 = inner.clone().map(|(x, magnitude)| x * magnitude).sum();
        let all = self.product(terms, [2, 2], DType::F32) * sum;
        if self.matrix_units {
            return all;
        }
        let squares: f64 = inner.map(|(x, magnitude)| (x * magnitude).powi(2)).sum();
        all.min(LAMBDA * F32 * (terms as f64).sqrt() * squares.sqrt())
    }

    /// Whether squares of updates come from Gram matrices.
    pub fn has_gram_matrices(self) -> bool {
        self.is_flex
    }
}

/// The error of a sum in units after this many roundings.
fn roundings(count: usize) -> f64 {
    let n = count as f64;
    n.min(LAMBDA * n.sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sums in `f32` of random terms, by hand: within the bound, and not by a factor that would hide
    /// a wrong digit.
    #[test]
    fn sums_of_random_terms_are_within_the_bound_and_16_bits_are_not() {
        use rand::{RngExt, SeedableRng};

        let mut random = rand::rngs::StdRng::seed_from_u64(1);
        let arithmetic = Arithmetic::of("flex");
        for terms in [1, 2, 17, 300, 4096] {
            let (mut rounded, mut short, mut exact, mut magnitude) = (0f32, 0f64, 0f64, 0f64);
            for _ in 0..terms {
                let [x, y] = [(); 2].map(|()| random.random_range(-1f32..1.0));
                rounded += x * y;
                short += f64::from(half::bf16::from_f32(x).to_f32()) * f64::from(y);
                exact += f64::from(x) * f64::from(y);
                magnitude += (f64::from(x) * f64::from(y)).abs();
            }
            let bound = arithmetic.sum(terms + 1) * magnitude;
            assert!((f64::from(rounded) - exact).abs() <= bound, "{terms}");
            // Over very many terms, roundings of the operands cancel as far as the bound allows.
            if terms <= 300 {
                assert!((short - exact).abs() > bound, "{terms}");
            }
        }
    }

    #[test]
    fn the_bound_of_a_sum_is_the_smaller_of_two() {
        let arithmetic = Arithmetic::of("flex");
        assert_eq!(arithmetic.sum(10), 10.0 * F32);
        assert_eq!(arithmetic.sum(64), 64.0 * F32);
        assert_eq!(arithmetic.sum(6400), 640.0 * F32);
        assert!(Arithmetic::of("cuda").product(10, [2, 2], DType::F32) > 2f64.powi(-10));
    }
}
