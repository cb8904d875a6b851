//! The shards that a worker hosts: it keeps their moments and computes their deltas.

use std::ops::Range;

use hd_pissa_comm::Communicator;

/// The hosted ones among the shards whose factors a worker's model has: the worker's share if the
/// model has all `shards`, else all that the model has.
pub(crate) fn hosted_shards(
    known: &[usize],
    shards: usize,
    communicator: &dyn Communicator,
) -> Vec<usize> {
    if known.len() < shards {
        return known.to_vec();
    }
    let (worker, workers) = (communicator.worker_index(), communicator.num_workers());
    known[share(known.len(), worker, workers)].to_vec()
}

/// The worker's part of `count` things, in the order of workers. Parts differ in size by 1 at most.
pub(crate) fn share(count: usize, worker: usize, workers: usize) -> Range<usize> {
    count * worker / workers..count * (worker + 1) / workers
}

#[cfg(test)]
mod tests {
    use super::share;

    #[test]
    fn shares_are_a_partition() {
        for (count, workers) in [(8, 1), (8, 4), (8, 3), (2, 5), (0, 2)] {
            let all = (0..workers).flat_map(|worker| share(count, worker, workers));
            assert!(all.eq(0..count), "{count} over {workers}");
        }
    }
}
