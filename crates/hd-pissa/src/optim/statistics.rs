//! Statistics of packed matrices for a step, on their device.

use burn::tensor::Tensor;

use super::factors::WeightFactors;
use crate::ops::{join, row_statistics};

/// Statistics of the rows of all weights, `[weights, shards, 4]`; see
/// [`HdPissaOps::hd_pissa_row_statistics`](crate::ops::HdPissaOps::hd_pissa_row_statistics).
#[derive(Clone, Debug)]
pub(super) struct Statistics(Tensor<3>);

impl Statistics {
    /// Statistics of the packed matrix of each of `weights`, `[shards, row_len]`.
    pub(super) fn of(packed: &[Tensor<2>], weights: &[WeightFactors]) -> Self {
        let [shards, _] = packed[0].dims();
        let statistics = packed
            .iter()
            .zip(weights)
            .map(|(packed, weight)| row_statistics(packed.clone(), weight.split()));
        Self(join(statistics.collect()).reshape([packed.len(), shards, 4]))
    }

    /// The number of NaN and infinite values in each row, `[weights, shards]`.
    pub(super) fn non_finite(&self) -> Tensor<2> {
        self.column(0)
    }

    /// The sum of squares of all rows of each shard, `[shards]`; infinite above the range of `f32`.
    pub(super) fn squares(&self) -> Tensor<1> {
        sum_over_weights(self.column(1) + self.column(2))
    }

    /// The sum of squares of all rows of each shard divided by `2^80`, `[shards]`; always finite.
    pub(super) fn scaled_squares(&self) -> Tensor<1> {
        sum_over_weights(self.column(3))
    }

    /// For each weight the Frobenius norms of all `a` and of all `b` together, `[weights]` each.
    pub(super) fn norms(&self) -> (Tensor<1>, Tensor<1>) {
        let norm = |column| self.column(column).sum_dim(1).sqrt().flatten(0, 1);
        (norm(1), norm(2))
    }

    /// `[weights, shards]`
    fn column(&self, index: usize) -> Tensor<2> {
        self.0.clone().narrow(2, index, 1).squeeze_dim(2)
    }
}

/// In the order of weights, for any number of shards.
fn sum_over_weights(values: Tensor<2>) -> Tensor<1> {
    let [weights, _] = values.dims();
    let rows = (0..weights).map(|weight| values.clone().narrow(0, weight, 1));
    let sum = rows.reduce(|sum, row| sum + row);
    sum.expect("there is a weight").flatten(0, 1)
}
