//! From token sequences to the micro-batches of a step.

use std::ops::Range;
use std::sync::Arc;

use burn::tensor::{Device, Int, Tensor, TensorData};
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;

use crate::dealing::Dealing;
use crate::lengths::group;
use crate::{Error, Llama};

/// One record as tokens. Some of them are targets.
#[derive(Clone, Debug, PartialEq)]
pub struct Sequence {
    /// All tokens.
    pub tokens: Vec<u32>,
    /// The tokens that are predicted, as ranges of their positions, in order. The first token of a
    /// sequence never is one.
    pub targets: Vec<Range<usize>>,
}

impl Sequence {
    /// A prompt of `prompt_len` tokens and an answer, whose tokens are the targets.
    pub fn new(tokens: Vec<u32>, prompt_len: usize) -> Self {
        let answer = prompt_len..tokens.len();
        Self::with_targets(tokens, vec![answer])
    }

    /// Tokens with their targets, which stand in order and do not overlap.
    pub fn with_targets(tokens: Vec<u32>, targets: Vec<Range<usize>>) -> Self {
        let mut sequence = Self { tokens, targets };
        sequence.truncate(usize::MAX);
        sequence
    }

    /// Cuts what exceeds `max_length` tokens on the right, and says whether anything did.
    pub fn truncate(&mut self, max_length: usize) -> bool {
        let is_cut = self.tokens.len() > max_length;
        self.tokens.truncate(max_length);
        for range in &mut self.targets {
            *range = range.start.max(1)..range.end.min(self.tokens.len());
        }
        self.targets.retain(|range| !range.is_empty());
        is_cut
    }

    /// Number of tokens that are predicted.
    pub fn num_targets(&self) -> usize {
        self.targets.iter().map(Range::len).sum()
    }
}

/// Positions that one pass on a CPU takes of a micro-batch. More take more memory and little less time: the
/// passes stand side by side.
pub(crate) const POSITIONS_PER_PASS: usize = 256;

/// Sequences of one forward pass, below each other and padded on the right to the longest, or packed into
/// one row without padding.
#[derive(Clone, Debug, PartialEq)]
pub struct MicroBatch {
    tokens: Vec<u32>,
    shape: [usize; 2],
    /// Of the sequences, without padding.
    lengths: Vec<usize>,
    is_packed: bool,
    /// Flattened position and the token that follows there.
    targets: Vec<(usize, u32)>,
    /// What the sum over targets is divided by.
    divisor: f64,
}

impl MicroBatch {
    /// # Panics
    ///
    /// If `rows` is empty.
    pub fn new(rows: &[&Sequence]) -> Self {
        let width = rows.iter().map(|row| row.tokens.len()).max();
        Self::padded(rows, width.expect("a micro-batch has at least one row"))
    }

    /// What stands in the padding has no influence: nothing attends to it.
    fn padded(rows: &[&Sequence], width: usize) -> Self {
        let mut batch = Self::of(rows, |index| index * width);
        batch.shape = [rows.len(), width];
        batch
    }

    /// The sequences one after the other in one row. None attends to another, and each has its positions
    /// from 0 on, so that losses and gradients are those of [`new`](Self::new).
    ///
    /// # Panics
    ///
    /// If `rows` is empty.
    pub fn packed(rows: &[&Sequence]) -> Self {
        assert!(!rows.is_empty(), "a micro-batch has at least one row");
        let lengths: Vec<usize> = rows.iter().map(|row| row.tokens.len()).collect();
        let mut batch = Self::of(rows, |index| lengths[..index].iter().sum());
        batch.shape = [1, batch.num_tokens()];
        batch.is_packed = true;
        batch
    }

    /// The sequences, each from the place on that `start` gives it.
    fn of(rows: &[&Sequence], start: impl Fn(usize) -> usize) -> Self {
        let mut tokens = Vec::new();
        let mut targets = Vec::new();
        for (index, row) in rows.iter().enumerate() {
            let start = start(index);
            tokens.resize(start, 0);
            tokens.extend_from_slice(&row.tokens);
            for position in row.targets.iter().cloned().flatten() {
                targets.push((start + position - 1, row.tokens[position]));
            }
        }
        Self {
            tokens,
            shape: [0, 0],
            lengths: rows.iter().map(|row| row.tokens.len()).collect(),
            is_packed: false,
            divisor: targets.len() as f64,
            targets,
        }
    }

    /// The tokens, `[rows, width]`.
    fn tokens(&self, device: &Device) -> Tensor<2, Int> {
        let mut tokens: Vec<i64> = self.tokens.iter().map(|&token| i64::from(token)).collect();
        tokens.resize(self.shape[0] * self.shape[1], 0);
        Tensor::from_data(TensorData::new(tokens, self.shape), device)
    }

    /// Sum over the targets of the negative log-likelihood that `model` gives them, `[1]`.
    pub fn loss(&self, model: &Llama, device: &Device) -> Tensor<1> {
        let tokens = self.tokens(device);
        match self.is_packed {
            true => model.packed_target_loss(tokens, &self.lengths, &self.targets),
            false => model.target_loss(tokens, &self.targets),
        }
    }

    /// The sequences in parts, each of `limit` positions at most or of one sequence. The sum of the parts'
    /// losses is the loss, and their [`divisor`](Self::divisor) is that of the whole.
    pub(crate) fn parts(&self, limit: usize) -> Vec<Self> {
        let rows = self.rows();
        let positions = |rows: &[Sequence]| match self.is_packed {
            true => rows.iter().map(|row| row.tokens.len()).sum(),
            false => rows.len() * self.shape[1],
        };
        let mut parts = Vec::new();
        let mut rest = &rows[..];
        while !rest.is_empty() {
            let fitting = (2..=rest.len()).take_while(|&count| positions(&rest[..count]) <= limit);
            let (part, others) = rest.split_at(fitting.last().unwrap_or(1));
            rest = others;
            let part: Vec<&Sequence> = part.iter().collect();
            let mut part = match self.is_packed {
                true => Self::packed(&part),
                // As wide as the whole: frequencies can depend on it.
                false => Self::padded(&part, self.shape[1]),
            };
            part.divisor = self.divisor;
            parts.push(part);
        }
        parts
    }

    fn rows(&self) -> Vec<Sequence> {
        let mut start = 0;
        let mut targets = self.targets.iter().peekable();
        let rows = self.lengths.iter().map(|&length| {
            let end = start + length;
            let mut row = Sequence {
                tokens: self.tokens[start..end].to_vec(),
                targets: Vec::new(),
            };
            while let Some((position, _)) = targets.next_if(|(position, _)| *position < end) {
                let place = position + 1 - start;
                row.targets.push(place..place + 1);
            }
            start = match self.is_packed {
                true => end,
                false => start + self.shape[1],
            };
            row
        });
        rows.collect()
    }

    /// The targets: flattened positions, and the tokens that follow there.
    pub fn targets(&self) -> &[(usize, u32)] {
        &self.targets
    }

    /// What [`loss`](Self::loss) is divided by in a step: the number of targets, unless the step's mean
    /// is over tokens.
    pub fn divisor(&self) -> f64 {
        self.divisor
    }

    pub(crate) fn set_divisor(&mut self, divisor: f64) {
        self.divisor = divisor;
    }

    /// Number of tokens without padding.
    pub fn num_tokens(&self) -> usize {
        self.lengths.iter().sum()
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
    /// Whether the records of a micro-batch stand in one row, without padding.
    pub packing: bool,
    /// Whether micro-batches have records of about the same length.
    pub by_length: bool,
}

/// Steps whose records are sorted by length together. More would leave less padding, and less chance.
const STEPS: usize = 16;

impl BatcherConfig {
    fn dealing(&self) -> Dealing {
        Dealing {
            shards: self.shards,
            batch_size: self.batch_size,
        }
    }
}

impl Default for BatcherConfig {
    fn default() -> Self {
        Self {
            shards: 1,
            accumulation: 1,
            batch_size: 1,
            shuffle: None,
            packing: false,
            by_length: false,
        }
    }
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
        Ok(Self {
            order: order(&sequences, &config, 0),
            sequences,
            config,
            steps_per_epoch,
            epoch: 0,
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
            self.order = order(&self.sequences, &self.config, epoch);
            self.epoch = epoch;
        }
        let BatcherConfig {
            shards,
            accumulation,
            packing,
            ..
        } = self.config;
        let dealing = self.config.dealing();
        let first = step % self.steps_per_epoch * accumulation;
        let micro_batch = |index: usize| {
            let rows: Vec<&Sequence> = dealing
                .places(index)
                .map(|place| &self.sequences[self.order[place]])
                .collect();
            match packing {
                true => MicroBatch::packed(&rows),
                false => MicroBatch::new(&rows),
            }
        };
        let of_shard = |shard: usize| {
            let all = first..first + accumulation;
            all.map(|index| micro_batch(index * shards + shard))
                .collect()
        };
        (0..shards).map(of_shard).collect()
    }
}

/// The records of an epoch in the order in which shards take them.
fn order(sequences: &[Sequence], config: &BatcherConfig, epoch: usize) -> Vec<usize> {
    let mut order = shuffled(sequences.len(), config.shuffle, epoch);
    if config.by_length {
        let seed = seed_of(config.shuffle.unwrap_or_default(), epoch);
        let window = STEPS * config.accumulation * config.dealing().round();
        let length = |record: usize| sequences[record].tokens.len();
        group(&mut order, config.dealing(), window, !seed, length);
    }
    order
}

fn shuffled(len: usize, seed: Option<u64>, epoch: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..len).collect();
    if let Some(seed) = seed {
        order.shuffle(&mut StdRng::seed_from_u64(seed_of(seed, epoch)));
    }
    order
}

/// Epochs of neighbouring seeds share no stream.
fn seed_of(seed: u64, epoch: usize) -> u64 {
    seed.wrapping_mul(0x9E37_79B9_7F4A_7C15)
        .wrapping_add(epoch as u64)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn sequences(count: u32) -> Vec<Sequence> {
        (0..count)
            .map(|id| Sequence::new(vec![id, id + 100], 1))
            .collect()
    }

    fn ids(micro_batch: &MicroBatch) -> Vec<u32> {
        micro_batch.tokens.chunks(2).map(|row| row[0]).collect()
    }

    #[test]
    fn parts_have_every_sequence_and_target_once() {
        let rows = [3, 5, 2, 9, 2, 4].map(|length| {
            let tokens = (0..length).map(|token| 10 * length + token).collect();
            Sequence::new(tokens, 1)
        });
        let rows: Vec<&Sequence> = rows.iter().collect();
        let padded: fn(&[_]) -> _ = |rows| MicroBatch::padded(rows, 9);
        for (of, limit, expected) in [
            (padded, 20, &[2, 2, 2][..]),
            (padded, 8, &[1; 6]),
            (MicroBatch::packed, 10, &[3, 1, 2]),
        ] {
            let parts = of(&rows).parts(limit);
            assert_eq!(parts.len(), expected.len());
            let mut rest = &rows[..];
            for (part, &count) in parts.iter().zip(expected) {
                let (own, others) = rest.split_at(count);
                rest = others;
                let expected = MicroBatch {
                    divisor: 19.0,
                    ..of(own)
                };
                assert_eq!(part, &expected);
            }
            assert!(rest.is_empty());
        }
    }

    #[test]
    fn shards_take_every_kth_record_in_order() {
        let config = BatcherConfig {
            shards: 3,
            accumulation: 2,
            batch_size: 2,
            shuffle: None,
            ..BatcherConfig::default()
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
            ..BatcherConfig::default()
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
            ..BatcherConfig::default()
        };
        assert!(matches!(
            Batcher::new(sequences(7), config),
            Err(Error::Option { .. })
        ));
    }

    #[test]
    fn targets_are_the_tokens_after_the_prompt() {
        let rows = [
            Sequence::new(vec![1, 2, 3, 4], 2),
            Sequence::new(vec![5, 6], 0),
        ];
        let batch = MicroBatch::new(&[&rows[0], &rows[1]]);
        assert_eq!(
            (&batch.tokens[..], batch.shape),
            (&[1, 2, 3, 4, 5, 6][..], [2, 4])
        );
        assert_eq!(batch.targets(), [(1, 3), (2, 4), (4, 6)]);
        assert_eq!(batch.num_tokens(), 6);
        let packed = MicroBatch::packed(&[&rows[0], &rows[1]]);
        assert_eq!(
            (&packed.tokens[..], packed.shape),
            (&[1, 2, 3, 4, 5, 6][..], [1, 6])
        );
        assert_eq!(packed.targets(), [(1, 3), (2, 4), (4, 6)]);
    }

    #[test]
    fn micro_batches_by_length_hold_every_record_once_and_little_padding() {
        // Lengths that the order of the file tells nothing of.
        let sequence = |id: u32| Sequence::new(vec![id; 2 + (id as usize * 37) % 50], 1);
        let sequences: Vec<Sequence> = (0..250).map(sequence).collect();
        let padding = |by_length: bool| {
            let config = BatcherConfig {
                shards: 3,
                accumulation: 2,
                batch_size: 4,
                shuffle: Some(3),
                by_length,
                ..BatcherConfig::default()
            };
            let mut batcher = Batcher::new(sequences.clone(), config).unwrap();
            let (mut seen, mut padding, mut widths) = (HashSet::new(), 0, Vec::new());
            for step in 0..batcher.steps_per_epoch() {
                for batch in batcher.step(step).into_iter().flatten() {
                    let [rows, width] = batch.shape;
                    padding += rows * width - batch.num_tokens();
                    widths.push(width);
                    for row in 0..rows {
                        assert!(seen.insert(batch.tokens[row * width]));
                    }
                }
            }
            assert_eq!(seen.len(), 240);
            (padding, widths)
        };
        let ((plain, _), (grouped, widths)) = (padding(false), padding(true));
        assert!(5 * grouped < plain, "{grouped} of {plain}");
        // Long ones come early and late.
        assert!(!widths.is_sorted());
    }
}
