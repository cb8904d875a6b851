//! The distributed optimizer: a Burn optimizer for the factors of every shard, and the merge of
//! all shards' deltas into the weights.

mod error;
mod exchange;
mod factors;
mod fingerprint;
mod gradients;
mod optimizer;
mod others;
mod probe;
mod wire;

pub use error::{OptimizerError, StepError};
pub use gradients::ShardGradients;
pub use optimizer::HdPissaOptimizer;
pub use wire::WireDtype;
