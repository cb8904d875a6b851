//! How the losses of a step's micro-batches become one.

use clap::ValueEnum;

use crate::batch::MicroBatch;

/// Over what the loss of a step is the mean.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LossMean {
    /// Over all targets: every token counts alike, and how a step is cut into micro-batches changes
    /// nothing. Where shards have gradients of their own, over all targets of the shard.
    #[default]
    Tokens,
    /// Over the micro-batches' means, as published: a token of a short answer counts for more than one
    /// of a long answer.
    MicroBatches,
}

impl LossMean {
    /// The name of the setting.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tokens => "tokens",
            Self::MicroBatches => "micro-batches",
        }
    }

    /// Lets the mean loss of these micro-batches be the one of a step.
    pub(crate) fn apply<'a>(self, micro_batches: impl Iterator<Item = &'a mut MicroBatch>) {
        if self == Self::MicroBatches {
            return;
        }
        let all: Vec<&mut MicroBatch> = micro_batches.collect();
        let targets: usize = all
            .iter()
            .map(|micro_batch| micro_batch.targets().len())
            .sum();
        let mean = targets as f64 / all.len() as f64;
        all.into_iter()
            .for_each(|micro_batch| micro_batch.set_divisor(mean));
    }
}
