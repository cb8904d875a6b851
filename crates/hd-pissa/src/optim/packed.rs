//! The packed form of factors, their gradients and their deltas, in which they are stepped, sent,
//! checked and merged.
//!
//! One `f32` matrix `[shards, rank · (d_input + d_output)]` for each weight. Row `k` holds `a_k` row by
//! row, followed by `b_k` row by row.

use burn::optim::GradientsParams;
use burn::tensor::Tensor;

use super::factors::{ShardFactors, WeightFactors};
use crate::ops::join;

/// Packs the factors of some shards, without autodiff.
pub(super) fn pack_values(shards: &[ShardFactors]) -> Tensor<2> {
    pack(shards, |shard| {
        [&shard.a, &shard.b].map(|factor| factor.value.clone().inner())
    })
}

/// Packs the pairs `[a: [d_input, rank], b: [rank, d_output]]` of some shards, one row for each.
pub(super) fn pack<T>(
    shards: impl IntoIterator<Item = T>,
    pair: impl FnMut(T) -> [Tensor<2>; 2],
) -> Tensor<2> {
    let parts: Vec<Tensor<2>> = shards.into_iter().flat_map(pair).collect();
    let shards = parts.len() / 2;
    let all = join(parts);
    let len = all.dims()[0] / shards;
    all.reshape([shards, len])
}

/// The pair `(a: [d_input, rank], b: [rank, d_output])` of a row `[1, row_len]`.
pub(super) fn unpack(row: Tensor<2>, d_input: usize, rank: usize) -> (Tensor<2>, Tensor<2>) {
    let [_, len] = row.dims();
    let split = d_input * rank;
    let a = row.clone().narrow(1, 0, split).reshape([d_input, rank]);
    let d_output = (len - split) / rank;
    let b = row.narrow(1, split, len - split);
    (a, b.reshape([rank, d_output]))
}

/// The packed gradients of the hosted shards of each weight, `[hosted shards, row_len]`, taken out of
/// the set of each shard.
///
/// # Panics
///
/// If a gradient is missing.
pub(super) fn pack_gradients(
    weights: &[WeightFactors],
    sets: &mut [GradientsParams],
) -> Vec<Tensor<2>> {
    let of_weight = |weight: &WeightFactors| {
        pack(weight.shards.iter().zip(sets.iter_mut()), |(shard, set)| {
            let ids = [shard.a.id, shard.b.id];
            ids.map(|id| set.remove::<2>(id).expect("no gradient is missing"))
        })
    };
    weights.iter().map(of_weight).collect()
}
