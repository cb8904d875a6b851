//! The training data in parts, one for each shard or micro-batch of a step.

use std::sync::Arc;

use burn::data::dataloader::{DataLoader, DataLoaderIterator, Progress};
use burn::data::dataset::DatasetError;
use burn::tensor::Device;

/// Loaders of neighbouring parts of the data. Their sizes differ by one item at most.
pub(super) struct Parts<I> {
    loaders: Vec<Arc<dyn DataLoader<I>>>,
    /// Micro-batches that a step takes from each.
    per_step: usize,
}

impl<I> Parts<I> {
    /// One part for each of `devices`, whose batches are made there.
    pub(super) fn of(loader: &dyn DataLoader<I>, devices: &[Device], per_step: usize) -> Self {
        let (items, parts) = (loader.num_items(), devices.len());
        let bound = |part: usize| items * part / parts;
        let loaders = devices.iter().enumerate().map(|(part, device)| {
            let part = loader.slice(bound(part), bound(part + 1));
            part.to_device(device)
        });
        let loaders = loaders.collect();
        Self { loaders, per_step }
    }

    /// Advances shuffled loaders by `epochs` passes: each pass draws an order.
    pub(super) fn skip(&self, epochs: usize) {
        for loader in &self.loaders {
            (0..epochs).for_each(|_| drop(loader.iter()));
        }
    }

    /// A pass over all parts side by side.
    pub(super) fn pass(&self) -> Pass<'_, I> {
        Pass {
            iterators: self.loaders.iter().map(|loader| loader.iter()).collect(),
            per_step: self.per_step,
        }
    }
}

pub(super) struct Pass<'a, I> {
    iterators: Vec<Box<dyn DataLoaderIterator<I> + 'a>>,
    per_step: usize,
}

impl<I> Pass<'_, I> {
    /// The micro-batches of the next step: at least one of each part, at most `per_step`. `None` once a
    /// part has none left.
    pub(super) fn next_step(&mut self) -> Option<Result<Vec<Vec<I>>, DatasetError>> {
        let step = self.iterators.iter_mut().map(|iterator| {
            let batches: Result<Vec<I>, _> = iterator.take(self.per_step).collect();
            match batches {
                Ok(batches) if batches.is_empty() => None,
                batches => Some(batches),
            }
        });
        step.collect()
    }

    /// The progress of all parts together.
    pub(super) fn progress(&self) -> Progress {
        let parts = self.iterators.iter().map(|iterator| iterator.progress());
        let sum = |sum: Progress, part: Progress| {
            Progress::new(
                sum.items_processed + part.items_processed,
                sum.items_total + part.items_total,
                part.unit,
            )
        };
        parts
            .reduce(sum)
            .unwrap_or_else(|| Progress::new(0, 0, None))
    }
}
