//! Principal components that each worker computes only a share of.

use std::collections::HashMap;

use burn::module::Module;
use hd_pissa_comm::Communicator;

use super::apply::{Selected, adapter, decompose};
use super::path::hash;
use super::{HdPissa, LayerProgress};
use crate::message::{Messages, read};
use crate::plan::Target;
use crate::svd::TruncatedSvd;
use crate::{HdPissaConfig, HdPissaError};

impl HdPissa {
    /// As [`prepare`](Self::prepare), with the decompositions dealt out to the workers that
    /// `communicator` connects: each weight is decomposed by one of them, which sends its factors to
    /// the others. Every worker calls it with the same model and configuration, and its own hosted
    /// shards. The factors are those of `prepare`, bit for bit (of the processor that computed
    /// them, where processors of several types take part).
    ///
    /// Weights are taken by falling cost, one for each worker at a time, and exchanged before the
    /// next ones are taken. A worker thus waits for no longer than one decomposition takes,
    /// which is what the communicator's time limit must allow. `progress` is called after each
    /// weight that this worker decomposes.
    ///
    /// Values of weights are not compared here; the first optimizer step does that.
    ///
    /// # Errors
    ///
    /// Those of `prepare`. What one worker finds reaches the others as
    /// [`HdPissaError::OtherWorker`]; workers that disagree on what to prepare get
    /// [`HdPissaError::WorkerMismatch`], and a failed exchange is [`HdPissaError::Comm`].
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
        let device = model.devices().into_iter().next().unwrap_or_default();
        let messages = Messages::new(communicator, device);
        let selected = Selected::of(model, config, hosted_shards);
        let Selected { hosted, targets } = all_or_none(selected, &messages)?;
        agree(&description(config, &targets), worker, &messages)?;

        let mut adapters = HashMap::with_capacity(targets.len());
        for round in by_falling_cost(&targets).chunks(workers) {
            let own = round
                .get(worker)
                .map(|&index| decompose(&targets, index, config))
                .transpose();
            let own = all_or_none(own, &messages)?;
            let mut factors = Vec::new();
            if let Some((svd, layer)) = own {
                factors = flatten(&svd, layer.index, &targets, config.shards);
                progress(layer);
            }
            for (root, &index) in round.iter().enumerate() {
                let own = match root == worker {
                    true => std::mem::take(&mut factors),
                    false => Vec::new(),
                };
                let received = read(communicator.broadcast(messages.tensor(own), root)?);
                let target = &targets[index];
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

/// Positions of the targets, those whose decomposition takes longest first.
fn by_falling_cost(targets: &[Target]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..targets.len()).collect();
    order.sort_by_key(|&index| {
        let [rows, cols] = targets[index].weight.dims();
        std::cmp::Reverse(rows as u128 * cols as u128 * rows.min(cols) as u128)
    });
    order
}

/// The factors of every shard, one after the other: `a`, then `b`.
fn flatten(svd: &TruncatedSvd, index: usize, targets: &[Target], shards: usize) -> Vec<f32> {
    let rank = targets[index].rank;
    (0..shards)
        .flat_map(|shard| {
            let (a, b) = svd.window(shard * rank, rank, 1.0);
            [a, b]
        })
        .flatten()
        .collect()
}

/// A worker's result if all workers have one; else its own error, or that of the first worker with
/// one.
fn all_or_none<T>(own: Result<T, HdPissaError>, messages: &Messages) -> Result<T, HdPissaError> {
    let exchange = || -> Result<(), HdPissaError> {
        let failed = messages.gather(&[own.is_err().into()])?;
        let Some(worker) = failed.iter().position(|failed| failed[0] != 0) else {
            return Ok(());
        };
        let text = own.as_ref().err().map(HdPissaError::to_string);
        let reason = messages.broadcast(&text.unwrap_or_default(), worker)?;
        Err(HdPissaError::OtherWorker { worker, reason })
    };
    let exchanged = exchange();
    let own = own?;
    exchanged.map(|()| own)
}

/// What a worker is about to prepare, line by line.
fn description(config: &HdPissaConfig, targets: &[Target]) -> String {
    let version = env!("CARGO_PKG_VERSION");
    let (shards, alpha, svd, precision) =
        (config.shards, config.alpha, config.svd, config.precision);
    let head = format!(
        "adapters of hd-pissa {version}\n{shards} shards\nadapters with alpha {alpha:?}\n\
         decompositions by {svd:?}\nmerges by {precision:?}\n{} weights\n",
        targets.len()
    );
    let weights = targets.iter().map(|target| {
        let Target { path, rank, weight } = target;
        let (shape, dtype) = (weight.dims(), weight.dtype());
        format!("`{path}` of shape {shape:?} and dtype {dtype:?} with rank {rank}\n")
    });
    head + &weights.collect::<String>()
}

/// Compares what the workers are about to prepare with that of worker 0.
fn agree(own: &str, worker: usize, messages: &Messages) -> Result<(), HdPissaError> {
    let hashes = messages.gather(&[hash(own)])?;
    let Some(odd) = hashes.iter().position(|hash| *hash != hashes[0]) else {
        return Ok(());
    };
    let first = messages.broadcast(own, 0)?;
    let other = messages.broadcast(own, odd)?;
    let (other_worker, theirs) = match hashes[worker] == hashes[0] {
        true => (odd, other),
        false => (0, first),
    };
    let mut lines = (own.lines(), theirs.lines());
    let (ours, theirs) = loop {
        match (lines.0.next(), lines.1.next()) {
            (Some(ours), Some(theirs)) if ours == theirs => {}
            (ours, theirs) => break (ours, theirs),
        }
    };
    let or_nothing = |line: Option<&str>| line.unwrap_or("nothing more").to_string();
    Err(HdPissaError::WorkerMismatch {
        worker: other_worker,
        ours: or_nothing(ours),
        theirs: or_nothing(theirs),
    })
}
