//! Principal components, with the decompositions distributed over workers.

use std::collections::HashMap;

use burn::module::Module;
use hd_pissa_comm::{CommError, Communicator, Disagreement, Failure, agree, all_or_none};

use super::apply::{Selected, adapter, frames};
use super::{HdPissa, LayerProgress};
use crate::frames::WeightFrames;
use crate::plan::Target;
use crate::{HdPissaConfig, HdPissaError};

impl HdPissa {
    /// Works as [`prepare`](Self::prepare), but distributes the decompositions over the workers
    /// that `communicator` connects: one worker decomposes each weight and sends its factors to the
    /// others. Every worker calls it with the same model and configuration, and its own hosted
    /// shards. The factors are those of `prepare`, bit for bit. If processors of several types take
    /// part, they are those of the processor that computed them.
    ///
    /// Workers take the most expensive weights first, one for each worker at a time, and exchange
    /// them before they take the next. A worker thus waits no longer than one decomposition takes,
    /// and the communicator's time limit must allow that. `progress` is called after each weight
    /// that this worker decomposes.
    ///
    /// This function does not compare values of weights; the first optimizer step does.
    ///
    /// # Errors
    ///
    /// Those of `prepare`. An error of one worker reaches the others as
    /// [`HdPissaError::OtherWorker`]. Workers with different adapters get
    /// [`HdPissaError::WorkerMismatch`]. A failed exchange is [`HdPissaError::Comm`].
    pub fn prepare_shared<M: Module>(
        model: &M,
        config: &HdPissaConfig,
        hosted_shards: impl IntoIterator<Item = usize>,
        communicator: &dyn Communicator,
        mut progress: impl FnMut(LayerProgress),
    ) -> Result<Self, HdPissaError> {
        let (worker, workers) = (communicator.worker_index(), communicator.num_workers());
        if workers == 1 {
            return Self::prepare(model, config, hosted_shards, progress);
        }
        let selected = Selected::of(model, config, hosted_shards);
        let Selected { hosted, targets } = all_or_none(communicator, selected)?;
        agree(communicator, &description(config, &targets))?;

        let mut adapters = HashMap::with_capacity(targets.len());
        for round in by_falling_cost(&targets).chunks(workers) {
            let own = round
                .get(worker)
                .map(|&index| frames(&targets, index, config))
                .transpose();
            let own = all_or_none(communicator, own)?;
            let mut factors = Vec::new();
            if let Some((frames, layer)) = own {
                factors = flatten(&frames, config.shards);
                progress(layer);
            }
            for (root, &index) in round.iter().enumerate() {
                let own = match root == worker {
                    true => std::mem::take(&mut factors),
                    false => Vec::new(),
                };
                let target = &targets[index];
                let received = broadcast(communicator, &own, root)?;
                let [d_input, d_output] = target.weight.dims();
                let rank = target.rank;
                let window = |shard: usize| {
                    let start = shard * rank * (d_input + d_output);
                    let middle = start + rank * d_input;
                    let end = middle + rank * d_output;
                    (received[start..middle].into(), received[middle..end].into())
                };
                let adapter = adapter(target, window, config, &hosted);
                adapters.insert(target.path.clone(), adapter);
            }
        }
        Ok(Self { adapters })
    }
}

/// Positions of the targets, the longest decompositions first.
fn by_falling_cost(targets: &[Target]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..targets.len()).collect();
    order.sort_by_key(|&index| {
        let [rows, cols] = targets[index].weight.dims();
        std::cmp::Reverse(rows as u128 * cols as u128 * rows.min(cols) as u128)
    });
    order
}

/// The factors of every shard, one after the other: `a`, then `b`.
fn flatten(frames: &WeightFrames, shards: usize) -> Vec<f32> {
    (0..shards)
        .flat_map(|shard| {
            let (a, b) = frames.window(shard);
            [a, b]
        })
        .flatten()
        .collect()
}

/// The values of worker `root`, which are on the host on both sides.
fn broadcast(
    communicator: &dyn Communicator,
    own: &[f32],
    root: usize,
) -> Result<Vec<f32>, CommError> {
    let own: Vec<u8> = own.iter().flat_map(|value| value.to_le_bytes()).collect();
    let received = communicator.broadcast_bytes(&own, root)?;
    let (values, _) = received.as_chunks();
    Ok(values.iter().copied().map(f32::from_le_bytes).collect())
}

/// The adapters that a worker prepares, line by line.
fn description(config: &HdPissaConfig, targets: &[Target]) -> String {
    let version = env!("CARGO_PKG_VERSION");
    let (shards, alpha, svd, precision) =
        (config.shards, config.alpha, config.svd, config.precision);
    let (gradients, windows, frame_scale) = (config.gradients, config.windows, config.frame_scale);
    let head = format!(
        "adapters of hd-pissa {version}\n{shards} shards\nadapters with alpha {alpha:?}\n\
         windows {windows:?}\nframe_scale {frame_scale:?}\ndecompositions by {svd:?}\n\
         merges by {precision:?}\n{gradients:?} gradients\n{} weights\n",
        targets.len()
    );
    let weights = targets.iter().map(|target| {
        let Target { path, rank, weight } = target;
        let (shape, dtype) = (weight.dims(), weight.dtype());
        format!("`{path}` of shape {shape:?} and dtype {dtype:?} with rank {rank}\n")
    });
    head + &weights.collect::<String>()
}

impl From<Failure<HdPissaError>> for HdPissaError {
    fn from(failure: Failure<HdPissaError>) -> Self {
        match failure {
            Failure::Own(error) => error,
            Failure::Other { worker, reason } => Self::OtherWorker { worker, reason },
            Failure::Comm(error) => error.into(),
        }
    }
}

impl From<Disagreement> for HdPissaError {
    fn from(disagreement: Disagreement) -> Self {
        let or_end = |line: Option<String>| line.unwrap_or("nothing more".into());
        match disagreement {
            Disagreement::Line {
                worker,
                ours,
                theirs,
            } => Self::WorkerMismatch {
                worker,
                ours: or_end(ours),
                theirs: or_end(theirs),
            },
            Disagreement::Comm(error) => error.into(),
        }
    }
}
