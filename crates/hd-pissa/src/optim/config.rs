//! The settings of the optimizer.

use std::num::{NonZeroU64, NonZeroUsize};

use burn::config::Config;

use super::communication::CommunicationDtype;

/// Settings of a [`HdPissaOptimizer`](crate::HdPissaOptimizer), the same on every worker.
///
/// ```
/// use burn::config::Config;
/// use burn::optim::AdamConfig;
/// use hd_pissa::{CommunicationDtype, HdPissaOptimizerConfig, comm::Solo};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let config = HdPissaOptimizerConfig::new()
///     .with_max_grad_norm(Some(1.0))
///     .with_communication_dtype(CommunicationDtype::Bf16);
/// let optim = config.init(AdamConfig::new().with_epsilon(1e-8).init(), Solo)?;
/// # let _ = (optim, config.to_string());
/// # Ok(())
/// # }
/// ```
#[derive(Config, Debug)]
pub struct HdPissaOptimizerConfig {
    /// Scales each shard's factor gradients down to this global (2-)norm if theirs is larger.
    /// Finite and above 0.
    ///
    /// The norm runs over all factors of one shard, or of all shards with
    /// [`GradientMode::Shared`](crate::GradientMode::Shared). Gradients of dense parameters, which
    /// are outside the adapters, are not clipped.
    #[config(default = "None")]
    pub max_grad_norm: Option<f64>,
    /// Interval in steps at which workers compare all frames, and every parameter that steps move,
    /// by a hash of 64 bits; `None` for never.
    ///
    /// A single worker compares nothing. Devices compute the hashes, and workers read back two
    /// words for each tensor.
    #[config(default = "NonZeroU64::new(50)")]
    pub fingerprint_every: Option<NonZeroU64>,
    /// The precision in which deltas travel.
    ///
    /// A worker rounds its own deltas as those that it receives, even if it is the only worker. Any
    /// layout of workers thus gives the same weights. Frames, and gradients of dense parameters,
    /// travel in `f32`.
    #[config(default = "CommunicationDtype::F32")]
    pub communication_dtype: CommunicationDtype,
    /// The largest number of buckets of weights, of about the same size, in which deltas are
    /// gathered. While one bucket travels, the inner optimizer steps the next.
    ///
    /// The weights do not depend on it. A single worker gathers nothing. Four buckets have most of
    /// the gain of a larger number (see the book's chapter on workers). Each bucket is one more
    /// pass of the inner optimizer.
    #[config(default = "NonZeroUsize::new(4).expect(\"4 is not 0\")")]
    pub buckets: NonZeroUsize,
    /// Measures the norms of every step's update and gradients; see
    /// [`update_norm`](crate::HdPissaOptimizer::update_norm) and
    /// [`gradient_norms`](crate::HdPissaOptimizer::gradient_norms).
    ///
    /// A merge sums the squares of the values that it adds. No tensor of the weight's size is made.
    #[config(default = false)]
    pub measure_norms: bool,
    /// Whether the inner optimizer may see the factors of all hosted shards of a weight as one
    /// parameter. Its kernel launches then do not grow with the number of shards.
    ///
    /// It does so if a trial before the first step gives the same bits both ways. That needs an
    /// optimizer that works element by element, with the same settings and learning rate for all
    /// factors of the weight. Adafactor, Muon and parameter groups that separate the factors of a
    /// weight keep one parameter for each factor. Turn it off for your own optimizer if its
    /// elements depend on each other only sometimes: the trial may miss that.
    ///
    /// The weights and the records are the same either way.
    #[config(default = true)]
    pub pack_factors: bool,
}
