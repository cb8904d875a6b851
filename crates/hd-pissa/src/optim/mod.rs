//! The distributed optimizer: a Burn optimizer for the factors of every shard, and the merge of
//! all shards' deltas into the weights.

mod checks;
mod clip;
mod commit;
mod dense;
mod error;
mod exchange;
mod factors;
mod fingerprint;
mod frames;
mod gradients;
mod layout;
mod optimizer;
mod packed;
mod probe;
mod range;
mod record;
mod reduce;
mod shared;
mod slots;
mod wire;

pub use error::{OptimizerError, StepError};
pub use gradients::{ShardGradients, StepGradients};
pub use optimizer::HdPissaOptimizer;
pub use shared::SharedGradients;
pub use wire::WireDtype;
