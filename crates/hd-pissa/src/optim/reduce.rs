//! The sum of shared gradients over workers. Each worker keeps the gradients of the shards that it
//! hosts.

use burn::module::Module;
use burn::optim::GradientsParams;
use burn::tensor::Tensor;
use hd_pissa_comm::{Communicator, gather_integers};

use super::OptimizerError;
use super::dense::{MeanGradients, take_rows};
use super::factors::{Factors, ShardFactors, WeightFactors};
use super::layout::ShardLayout;
use super::packed::pack;
use crate::ops::join;

/// The mean gradients over the micro-batches of all workers: those of the hosted shards, packed for
/// each weight, `[hosted shards, row_len]`, and those of dense parameters.
///
/// `sum` is the sum over this worker's `micro_batches`. Every worker calls it at the same time.
pub(super) fn reduce_shared<M: Module>(
    model: &M,
    mut sum: GradientsParams,
    micro_batches: u64,
    factors: &Factors,
    layout: &ShardLayout,
    communicator: &dyn Communicator,
) -> Result<(Vec<Tensor<2>>, MeanGradients), OptimizerError> {
    let workers = communicator.num_workers();
    let counts = gather_integers(communicator, &[micro_batches])?;
    let total: u64 = counts.into_iter().flatten().sum();
    let factor = 1.0 / total as f64;

    let packed = if workers == 1 {
        let take = |weight: &WeightFactors| take_packed(&mut sum, weight, &factors.hosted) * factor;
        factors.weights.iter().map(take).collect()
    } else {
        let mut parts = Vec::new();
        for hosted in layout.by_worker(workers) {
            for weight in &factors.weights {
                parts.push(take_packed(&mut sum, weight, hosted));
            }
        }
        let own = communicator.reduce_scatter(join(parts))? * factor;
        let mut start = 0;
        let unjoin = |weight: &WeightFactors| {
            let [rows, row_len] = [weight.shards.len(), weight.row_len()];
            let packed = own.clone().narrow(0, start, rows * row_len);
            start += rows * row_len;
            packed.reshape([rows, row_len])
        };
        factors.weights.iter().map(unjoin).collect()
    };

    let mut rows = take_rows(model, std::slice::from_mut(&mut sum));
    let dense = match rows.pop() {
        Some(row) => MeanGradients::of_row(model, all_reduce(row, communicator)? * factor),
        None => MeanGradients::default(),
    };
    Ok((packed, dense))
}

/// The gradients of some shards of a weight, packed: `[shards, row_len]`.
fn take_packed(sum: &mut GradientsParams, weight: &WeightFactors, shards: &[usize]) -> Tensor<2> {
    let is_wanted = |shard: &&ShardFactors| shards.contains(&shard.name.index);
    let wanted = weight.known.iter().filter(is_wanted);
    pack(wanted, |shard| {
        let ids = [shard.a.id, shard.b.id];
        ids.map(|id| sum.remove::<2>(id).expect("no gradient is missing"))
    })
}

/// The sum over all workers, `[n]`, in the order of `reduce_scatter`.
fn all_reduce(
    own: Tensor<1>,
    communicator: &dyn Communicator,
) -> Result<Tensor<1>, OptimizerError> {
    let (workers, [len]) = (communicator.num_workers(), own.dims());
    if workers == 1 {
        return Ok(own);
    }
    let missing = len.next_multiple_of(workers) - len;
    let padding = Tensor::zeros([missing], (&own.device(), own.dtype()));
    let part = communicator.reduce_scatter(Tensor::cat(vec![own, padding], 0))?;
    Ok(communicator.all_gather(part)?.narrow(0, 0, len))
}
