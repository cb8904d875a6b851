//! The gradients of a step that all shards learn from.

use std::fmt::{self, Debug, Formatter};

use burn::module::Module;
use burn::optim::GradientsParams;

use super::OptimizerError;
use super::slots::Slots;

/// The gradients of one step with [`GradientMode::Shared`](crate::GradientMode::Shared): a sum over
/// the micro-batches of this worker. The step divides it by the number of micro-batches of all
/// workers.
///
/// Of `2^j · m` micro-batches with an odd `m`, runs of `m` are summed in order, and then these sums
/// in pairs. If `2^k` workers divide the micro-batches in order, they therefore get the same bits
/// as one worker. At most `j + 2` sets of gradients are kept.
///
/// ```
/// # use burn::nn::{Linear, LinearConfig};
/// # use burn::optim::{AdamConfig, GradientsParams};
/// # use burn::tensor::{Device, Distribution, Tensor};
/// # use hd_pissa::{GradientMode, HdPissaConfig, HdPissaModule, HdPissaOptimizerConfig, SharedGradients};
/// # use hd_pissa::comm::Solo;
/// # let device = Device::flex().autodiff();
/// let config = HdPissaConfig::new()
///     .with_rank(2)
///     .with_shards(2)
///     .with_gradients(GradientMode::Shared);
/// let mut model = LinearConfig::new(8, 8).init(&device).apply_hd_pissa(&config, 0..2).unwrap();
/// let mut optim = HdPissaOptimizerConfig::new().init(AdamConfig::new().init(), Solo).unwrap();
///
/// # let batch = || Tensor::<2>::random([4, 8], Distribution::Default, &device);
/// let mut gradients = SharedGradients::new(&model, 4);
/// for _micro_batch in 0..4 {
///     let loss = model.forward(batch()).square().mean();
///     gradients.push(GradientsParams::from_grads(loss.backward(), &model));
/// }
/// model = optim.step(1e-4, model, gradients).unwrap();
/// ```
pub struct SharedGradients {
    slots: Slots,
    /// Expected number of micro-batches.
    expected: u64,
    pushed: u64,
    /// Micro-batches in each run, the largest odd divisor of `expected`.
    run: u64,
    /// Sums of `2^level` runs, levels descending; on top the run that is being summed.
    sums: Vec<(u32, GradientsParams)>,
    /// Gradients of parameters that the model does not have.
    unknown: usize,
}

impl SharedGradients {
    /// An empty set for the gradients of `micro_batches` micro-batches, those of this worker.
    ///
    /// # Panics
    ///
    /// If `micro_batches` is 0.
    pub fn new<M: Module>(model: &M, micro_batches: usize) -> Self {
        assert!(micro_batches > 0, "a step needs at least one micro-batch");
        let expected = micro_batches as u64;
        Self {
            slots: Slots::of(model),
            expected,
            pushed: 0,
            run: expected >> expected.trailing_zeros(),
            sums: Vec::new(),
            unknown: 0,
        }
    }

    /// Adds the gradients of the next micro-batch.
    pub fn push(&mut self, mut gradients: GradientsParams) {
        let is_new_run = self.pushed.is_multiple_of(self.run);
        if is_new_run {
            self.sums.push((0, GradientsParams::new()));
        }
        let (_, sum) = self.sums.last_mut().expect("a run was started");
        self.slots.add(sum, &mut gradients);
        self.unknown += gradients.len();
        self.pushed += 1;
        if self.pushed.is_multiple_of(self.run) {
            self.join();
        }
    }

    /// Adds neighbours of equal level.
    fn join(&mut self) {
        while let [.., (left, _), (right, _)] = self.sums[..]
            && left == right
        {
            let (level, mut right) = self.sums.pop().expect("two sums");
            let (_, mut left) = self.sums.pop().expect("two sums");
            self.slots.add(&mut left, &mut right);
            self.sums.push((level + 1, left));
        }
    }

    /// The sum, with the number of its micro-batches.
    pub(super) fn finish(mut self) -> Result<(GradientsParams, u64), OptimizerError> {
        if self.pushed != self.expected {
            return Err(OptimizerError::WrongNumberOfMicroBatches {
                pushed: self.pushed,
                expected: self.expected,
            });
        }
        if self.unknown > 0 {
            return Err(OptimizerError::UnknownGradients {
                shard: None,
                count: self.unknown,
            });
        }
        let (_, sum) = self.sums.pop().expect("all runs are joined");
        Ok((sum, self.expected))
    }
}

impl Debug for SharedGradients {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedGradients")
            .field("expected", &self.expected)
            .field("pushed", &self.pushed)
            .finish_non_exhaustive()
    }
}
