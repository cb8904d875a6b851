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
    /// Scales each shard's factor gradients down to this global (2-)norm where it is larger. Finite
    /// and above 0.
    ///
    /// The norm runs over all factors of one shard; with
    /// [`GradientMode::Shared`](crate::GradientMode::Shared) over those of all shards. Gradients of
    /// dense parameters, those outside the adapters, are not clipped.
    #[config(default = "None")]
    pub max_grad_norm: Option<f64>,
    /// Before every so many steps, compares every parameter that steps move, and all frames, with the
    /// other workers' copies by a hash of 64 bits; `None` for never.
    ///
    /// A single worker compares nothing. Devices compute the hashes; two words for each tensor are
    /// read back.
    #[config(default = "NonZeroU64::new(50)")]
    pub fingerprint_every: Option<NonZeroU64>,
    /// In what precision deltas travel.
    ///
    /// A worker's own deltas are rounded as those that it receives, also where it is the only one:
    /// any layout of workers gives the same weights. Frames, and gradients of dense parameters,
    /// travel in `f32`.
    #[config(default = "CommunicationDtype::F32")]
    pub communication_dtype: CommunicationDtype,
    /// Gathers the deltas in up to so many buckets of weights, of about the same size: while one is on
    /// its way, the inner optimizer steps the next.
    ///
    /// The weights come out the same. A single worker gathers nothing. Four buckets bring most of what
    /// more of them gain (the book's chapter on workers); each is one more pass of the inner optimizer.
    #[config(default = "NonZeroUsize::new(4).expect(\"4 is not 0\")")]
    pub buckets: NonZeroUsize,
    /// Measures the norms of every step's update and gradients; see
    /// [`update_norm`](crate::HdPissaOptimizer::update_norm) and
    /// [`gradient_norms`](crate::HdPissaOptimizer::gradient_norms).
    ///
    /// The GPU backends compute that of the update with every merge anyway; on Flex it costs about
    /// half of a merge for each weight. No tensor of the weight's size is made.
    #[config(default = false)]
    pub measure_norms: bool,
    /// Whether the inner optimizer may see the factors of all hosted shards of a weight as one
    /// parameter. Its kernel launches then do not grow with the number of shards.
    ///
    /// It sees them so where a trial before the first step gives the same bits both ways: that takes
    /// an optimizer that works element by element, with the same settings and learning rate for all
    /// factors of the weight. Adafactor, Muon and groups that tell the factors of a weight apart keep
    /// one parameter for each factor. Turn it off for an optimizer of your own whose elements depend
    /// on each other only now and then, which a trial may not show.
    ///
    /// The weights and the records are the same either way.
    #[config(default = true)]
    pub pack_factors: bool,
}
