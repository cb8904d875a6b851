//! Gradient clipping by the global norm of each shard, or of all shards together.

use burn::tensor::Tensor;
use hd_pissa_comm::Communicator;

use super::OptimizerError;
use super::layout::ShardLayout;
use super::statistics::Statistics;
use crate::GradientMode;

/// `2^80`, by which [`Statistics::scaled_squares`] divides.
const SCALE: f64 = (1u128 << 80) as f64;

/// Scales the factor gradients of each hosted shard to a norm of at most `max_norm` over all
/// weights. With shared gradients the norm is over all weights and shards, and every worker calls
/// this at the same time.
///
/// `statistics` are those of the packed `gradients`, `[hosted shards, row_len]` for each weight.
/// NaN and infinite values do not count in the norm and stay in the gradients.
pub(super) fn clip(
    gradients: Vec<Tensor<2>>,
    statistics: &Statistics,
    max_norm: f64,
    mode: GradientMode,
    layout: &ShardLayout,
    communicator: &dyn Communicator,
) -> Result<Vec<Tensor<2>>, OptimizerError> {
    let sums = [statistics.squares(), statistics.scaled_squares()];
    let [squares, scaled_squares] = match mode {
        GradientMode::PerShard => sums,
        GradientMode::Shared => sum_over_shards(sums, layout, communicator)?,
    };
    let scaled_norm = scaled_squares.sqrt();
    // If the sum of squares exceeds the range of f32, gradients are divided by 2^80 first. This
    // loses only values that are negligible next to the norm.
    let is_huge = squares.clone().is_inf();
    let first = squares.ones_like().mask_fill(is_huge.clone(), 1.0 / SCALE);
    // The small term is that of PyTorch's clip_grad_norm_.
    let second = ((squares.sqrt() + 1e-6).recip() * max_norm).clamp_max(1.0);
    let huge = (scaled_norm.recip() * max_norm).clamp_max(SCALE);
    let second = second.mask_where(is_huge, huge);
    let by_row = |factor: Tensor<1>| factor.unsqueeze_dim::<2>(1);
    let (first, second) = (by_row(first), by_row(second));
    let clipped = gradients
        .into_iter()
        .map(|gradient| gradient * first.clone() * second.clone());
    Ok(clipped.collect())
}

/// The sums over the shards of all workers, repeated for each of the hosted shards: `[hosted]`
/// before and after. The order of shards determines the sums, for any layout of workers.
fn sum_over_shards(
    own: [Tensor<1>; 2],
    layout: &ShardLayout,
    communicator: &dyn Communicator,
) -> Result<[Tensor<1>; 2], OptimizerError> {
    let hosted = own[0].dims()[0];
    let mut rows = Tensor::stack::<2>(own.to_vec(), 1);
    let workers = communicator.num_workers();
    if workers > 1 {
        let gathered = communicator.all_gather(rows.flatten(0, 1))?;
        rows = layout.sorted(gathered.reshape([workers * hosted, 2]));
    }
    let total = |column| {
        let column: Tensor<1> = rows.clone().narrow(1, column, 1).flatten(0, 1);
        column.sum().repeat_dim(0, hosted)
    };
    Ok([total(0), total(1)])
}
