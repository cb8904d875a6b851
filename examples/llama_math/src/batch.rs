//! From token sequences to the micro-batches of a step.

use std::sync::Arc;

use burn::tensor::{Device, Int, Tensor, TensorData};
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;

use crate::Error;

/// One record as tokens: prompt and answer, of which the prompt is not a target.
#[derive(Clone, Debug, PartialEq)]
pub struct Sequence {
    /// Prompt and answer.
    pub tokens: Vec<u32>,
    /// Number of leading tokens that are not targets.
    pub prompt_len: usize,
}

impl Sequence {
    /// Number of tokens that are predicted; the first token of a sequence never is.
    pub fn num_targets(&self) -> usize {
        self.tokens.len().saturating_sub(self.prompt_len.max(1))
    }
}

/// Sequences of one forward pass, padded on the right to the longest.
#[derive(Clone, Debug)]
pub struct MicroBatch {
    tokens: Vec<u32>,
    shape: [usize; 2],
    /// Flattened position and the token that follows there.
    targets: Vec<(usize, u32)>,
    /// Tokens without padding.
    num_tokens: usize,
}

impl MicroBatch {
    /// # Panics
    ///
    /// If `rows` is empty.
    pub fn new(rows: &[&Sequence]) -> Self {
        let width = rows.iter().map(|row| row.tokens.len()).max();
        let width = width.expect("a micro-batch has at least one row");
        let mut tokens = Vec::with_capacity(rows.len() * width);
        let mut targets = Vec::new();
        for (index, row) in rows.iter().enumerate() {
            for position in row.prompt_len.max(1)..row.tokens.len() {
                targets.push((index * width + position - 1, row.tokens[position]));
            }
            tokens.extend_from_slice(&row.tokens);
            // What stands in the padding has no influence: nothing attends to it.
            tokens.resize((index + 1) * width, 0);
        }
        Self {
            tokens,
            shape: [rows.len(), width],
            targets,
            num_tokens: rows.iter().map(|row| row.tokens.len()).sum(),
        }
    }

    /// The tokens, `[rows, width]`.
    pub fn tokens(&self, device: &Device) -> Tensor<2, Int> {
        let tokens: Vec<i64> = self.tokens.iter().map(|&token| i64::from(token)).collect();
        Tensor::from_data(TensorData::new(tokens, self.shape), device)
    }

    /// The targets, for [`Llama::target_loss`](crate::Llama::target_loss).
    pub fn targets(&self) -> &[(usize, u32)] {
        &self.targets
    }

    /// Number of tokens without padding.
    pub fn num_tokens(&self) -> usize {
        self.num_tokens
    }
}

/// How records are dealt to shards and steps.
#[derive(Clone, Copy, Debug)]
pub struct BatcherConfig {
    /// Number of shards, each with its own records.
    pub shards: usize,
    /// Micro-batches per shard and step.
    pub accumulation: usize,
    /// Records per micro-batch.
    pub batch_size: usize,
    /// Seed of the shuffle of every epoch; `None` keeps the order of the file.
    pub shuffle: Option<u64>,
}

/// The micro-batches of every step.
///
/// Shard `k` takes records `k`, `k + K`, ... of the epoch's order. An epoch has whole steps only
/// and no record twice; records left over are skipped.
#[derive(Clone, Debug)]
pub struct Batcher {
    sequences: Arc<[Sequence]>,
    config: BatcherConfig,
    steps_per_epoch: usize,
    /// The epoch that `order` is for.
    epoch: usize,
    order: Vec<usize>,
}

impl Batcher {
    /// # Errors
    ///
    /// [`Error::Option`] if there are too few sequences for one step.
    pub fn new(
        sequences: impl Into<Arc<[Sequence]>>,
        config: BatcherConfig,
    ) -> Result<Self, Error> {
        let sequences = sequences.into();
        let per_step = config.shards * config.accumulation * config.batch_size;
        let steps_per_epoch = match per_step {
            0 => 0,
            _ => sequences.len() / config.shards / (config.accumulation * config.batch_size),
        };
        if steps_per_epoch == 0 {
            let reason = format!(
                "a step takes {per_step} records ({} shards x {} micro-batches x {}), but the \
                 data has {} with a target token",
                config.shards,
                config.accumulation,
                config.batch_size,
                sequences.len()
            );
            return Err(Error::Option {
                option: "data",
                reason,
            });
        }
        let order = shuffled(sequences.len(), config.shuffle, 0);
        Ok(Self {
            sequences,
            config,
            steps_per_epoch,
            epoch: 0,
            order,
        })
    }

    /// Steps of one pass over the data.
    pub fn steps_per_epoch(&self) -> usize {
        self.steps_per_epoch
    }

    /// The micro-batches of `step`, counted from 0 over all epochs: `[shard][micro-batch]`.
    pub fn step(&mut self, step: usize) -> Vec<Vec<MicroBatch>> {
        let epoch = step / self.steps_per_epoch;
        if epoch != self.epoch {
            self.order = shuffled(self.sequences.len(), self.config.shuffle, epoch);
            self.epoch = epoch;
        }
        let BatcherConfig {
            shards,
            accumulation,
            batch_size,
            ..
        } = self.config;
        let first = step % self.steps_per_epoch * accumulation;
        (0..shards)
            .map(|shard| {
                (first..first + accumulation)
                    .map(|micro_batch| {
                        let rows: Vec<&Sequence> = (0..batch_size)
                            .map(|row| (micro_batch * batch_size + row) * shards + shard)
                            .map(|place| &self.sequences[self.order[place]])
                            .collect();
                        MicroBatch::new(&rows)
                    })
                    .collect()
            })
            .collect()
    }
}

fn shuffled(len: usize, seed: Option<u64>, epoch: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..len).collect();
    if let Some(seed) = seed {
        // Epochs of neighbouring seeds share no stream.
        let seed = seed
            .wrapping_mul(0x9E37_79B9_7F4A_7C15)
            .wrapping_add(epoch as u64);
        order.shuffle(&mut StdRng::seed_from_u64(seed));
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sequences(count: u32) -> Vec<Sequence> {
        (0..count)
            .map(|id| Sequence {
                tokens: vec![id, id + 100],
                prompt_len: 1,
            })
            .collect()
    }

    fn ids(micro_batch: &MicroBatch) -> Vec<u32> {
        micro_batch.tokens.chunks(2).map(|row| row[0]).collect()
    }

    #[test]
    fn shards_take_every_kth_record_in_order() {
        let config = BatcherConfig {
            shards: 3,
            accumulation: 2,
            batch_size: 2,
            shuffle: None,
        };
        // 3 shards of 9 records each, of which a step takes 4; one record of 28 has no shard.
        let mut batcher = Batcher::new(sequences(28), config).unwrap();
        assert_eq!(batcher.steps_per_epoch(), 2);
        let step = batcher.step(1);
        let seen: Vec<Vec<Vec<u32>>> = step
            .iter()
            .map(|shard| shard.iter().map(ids).collect())
            .collect();
        assert_eq!(seen[0], [[12, 15], [18, 21]]);
        assert_eq!(seen[2], [[14, 17], [20, 23]]);
        assert_eq!(ids(&batcher.step(2)[1][0]), [1, 4]);
    }

    #[test]
    fn a_shuffled_epoch_has_no_record_twice_and_differs_from_the_next() {
        let config = BatcherConfig {
            shards: 2,
            accumulation: 1,
            batch_size: 2,
            shuffle: Some(7),
        };
        let mut batcher = Batcher::new(sequences(12), config).unwrap();
        let mut epoch = |epoch: usize| -> Vec<u32> {
            (0..3)
                .flat_map(|step| batcher.step(epoch * 3 + step))
                .flatten()
                .flat_map(|micro_batch| ids(&micro_batch))
                .collect()
        };
        let (first, second, again) = (epoch(0), epoch(1), epoch(0));
        let mut sorted = first.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..12).collect::<Vec<u32>>());
        assert_ne!(first, second);
        assert_eq!(first, again);
    }

    #[test]
    fn too_few_records_for_a_step_are_refused() {
        let config = BatcherConfig {
            shards: 4,
            accumulation: 1,
            batch_size: 2,
            shuffle: None,
        };
        assert!(matches!(
            Batcher::new(sequences(7), config),
            Err(Error::Option { .. })
        ));
    }

    #[test]
    fn targets_are_the_tokens_after_the_prompt() {
        let rows = [
            Sequence {
                tokens: vec![1, 2, 3, 4],
                prompt_len: 2,
            },
            Sequence {
                tokens: vec![5, 6],
                prompt_len: 0,
            },
        ];
        let batch = MicroBatch::new(&[&rows[0], &rows[1]]);
        assert_eq!(batch.tokens, [1, 2, 3, 4, 5, 6, 0, 0]);
        assert_eq!(batch.targets(), [(1, 3), (2, 4), (4, 6)]);
        assert_eq!(batch.num_tokens(), 6);
    }
}
