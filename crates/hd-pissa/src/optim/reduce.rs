//! The sum of shared gradients over workers. Each worker keeps the part of the shards that it hosts.

use burn::module::Module;
use burn::optim::GradientsParams;
use burn::tensor::Tensor;
use hd_pissa_comm::{Communicator, gather_integers};

use super::OptimizerError;
use super::dense::{MeanGradients, take_rows};
use super::factors::{Factors, ShardFactors, WeightFactors};
use super::layout::ShardLayout;
use super::packed::{pack, unpack};

/// The mean gradients over the micro-batches of all workers: of the hosted shards, in the order of
/// [`Factors::hosted`], and of dense parameters.
///
/// `sum` is that of this worker's `micro_batches`. Every worker calls it at the same time.
pub(super) fn reduce_shared<M: Module>(
    model: &M,
    mut sum: GradientsParams,
    micro_batches: u64,
    factors: &Factors,
    layout: &ShardLayout,
    communicator: &dyn Communicator,
) -> Result<(Vec<GradientsParams>, MeanGradients), OptimizerError> {
    let workers = communicator.num_workers();
    let counts = gather_integers(communicator, &[micro_batches])?;
    let total: u64 = counts.into_iter().flatten().sum();
    let factor = 1.0 / total as f64;

    let mut shards: Vec<GradientsParams> = Vec::new();
    shards.resize_with(factors.hosted.len(), GradientsParams::new);
    if workers == 1 {
        for weight in &factors.weights {
            for (shard, gradients) in weight.shards.iter().zip(&mut shards) {
                for id in [shard.a.id, shard.b.id] {
                    let gradient = sum.remove::<2>(id).expect("no gradient is missing");
                    gradients.register(id, gradient * factor);
                }
            }
        }
    } else {
        let mut parts = Vec::new();
        for hosted in layout.by_worker(workers) {
            for weight in &factors.weights {
                parts.push(take_packed(&mut sum, weight, hosted).flatten::<1>(0, 1));
            }
        }
        let own = communicator.reduce_scatter(Tensor::cat(parts, 0))? * factor;
        let mut start = 0;
        for weight in &factors.weights {
            let [rows, row_len] = [weight.shards.len(), weight.row_len()];
            let packed = own.clone().narrow(0, start, rows * row_len);
            start += rows * row_len;
            let packed = packed.reshape([rows, row_len]);
            for (row, (shard, gradients)) in weight.shards.iter().zip(&mut shards).enumerate() {
                let row = packed.clone().narrow(0, row, 1);
                let (a, b) = unpack(row, weight.d_input(), weight.rank());
                gradients.register(shard.a.id, a);
                gradients.register(shard.b.id, b);
            }
        }
    }

    let mut rows = take_rows(model, std::slice::from_mut(&mut sum));
    let dense = match rows.pop() {
        Some(row) => MeanGradients::of_row(model, all_reduce(row, communicator)? * factor),
        None => MeanGradients::default(),
    };
    Ok((shards, dense))
}

/// The gradients of some shards of a weight, packed: `[shards, row_len]`.
fn take_packed(sum: &mut GradientsParams, weight: &WeightFactors, shards: &[usize]) -> Tensor<2> {
    let is_wanted = |shard: &&ShardFactors| shards.contains(&shard.name.index);
    let wanted: Vec<_> = weight.known.iter().filter(is_wanted).collect();
    let mut take = |id| sum.remove::<2>(id).expect("no gradient is missing");
    pack(
        wanted
            .into_iter()
            .map(|shard| (take(shard.a.id), take(shard.b.id))),
    )
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
