//! The packed form of factors, their gradients and their deltas: what travels, is checked and merges.
//!
//! One `f32` matrix `[shards, rank · (d_input + d_output)]` for each weight. Row `k` holds `a_k` row by
//! row, followed by `b_k` row by row.

use burn::tensor::Tensor;

use crate::ops::row_statistics;

/// Packs the pairs `(a: [d_input, rank], b: [rank, d_output])` of some shards, one row for each.
pub(super) fn pack(pairs: impl Iterator<Item = (Tensor<2>, Tensor<2>)>) -> Tensor<2> {
    let parts: Vec<Tensor<1>> = pairs
        .flat_map(|(a, b)| [a.flatten(0, 1), b.flatten(0, 1)])
        .collect();
    let shards = parts.len() / 2;
    let all = Tensor::cat(parts, 0);
    let len = all.dims()[0] / shards;
    all.reshape([shards, len])
}

/// The pair `(a, b)` of a row `[1, row_len]`.
pub(super) fn unpack(row: Tensor<2>, d_input: usize, rank: usize) -> (Tensor<2>, Tensor<2>) {
    let [_, len] = row.dims();
    let split = d_input * rank;
    let a = row.clone().narrow(1, 0, split).reshape([d_input, rank]);
    let d_output = (len - split) / rank;
    let b = row.narrow(1, split, len - split);
    (a, b.reshape([rank, d_output]))
}

/// The sum over all weights of one of their statistics, `[shards]`.
pub(super) fn sum_of(
    statistics: &[RowStatistics],
    of: fn(&RowStatistics) -> Tensor<1>,
) -> Tensor<1> {
    let sums = statistics.iter().map(of);
    sums.reduce(|sum, squares| sum + squares)
        .expect("there is a weight")
}

/// What a step must know of a packed matrix, on its device.
#[derive(Clone, Debug)]
pub(super) struct RowStatistics(Tensor<2>);

impl RowStatistics {
    /// Of `packed: [shards, n]`, whose first `split` columns are those of `a`.
    pub(super) fn of(packed: Tensor<2>, split: usize) -> Self {
        Self(row_statistics(packed, split))
    }

    /// The number of NaN and infinite values in each row, `[shards]`.
    pub(super) fn non_finite(&self) -> Tensor<1> {
        self.column(0)
    }

    /// The sum of squares of each row, `[shards]`; infinite above the range of `f32`.
    pub(super) fn squares(&self) -> Tensor<1> {
        self.column(1) + self.column(2)
    }

    /// The sum of squares of each row divided by `2^80`, `[shards]`; always finite.
    pub(super) fn scaled_squares(&self) -> Tensor<1> {
        self.column(3)
    }

    /// The Frobenius norms of all `a` and of all `b` together, `[1]` each.
    pub(super) fn norms(&self) -> (Tensor<1>, Tensor<1>) {
        let norm = |column| self.column(column).sum().sqrt();
        (norm(1), norm(2))
    }

    fn column(&self, index: usize) -> Tensor<1> {
        self.0.clone().narrow(1, index, 1).flatten(0, 1)
    }
}
