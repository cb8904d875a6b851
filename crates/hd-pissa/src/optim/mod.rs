//! The distributed optimizer: a Burn optimizer for the factors of every shard, and the merge of
//! all shards' deltas into the weights.

mod checks;
mod clip;
mod commit;
mod communication;
mod config;
mod dense;
mod error;
mod exchange;
mod factors;
mod fingerprint;
mod frames;
mod gradients;
mod inner;
mod layout;
mod optimizer;
mod packed;
mod param_list;
mod probe;
mod range;
mod record;
mod reduce;
mod rows;
mod shared_gradients;
mod slots;
mod statistics;
mod step;

pub use communication::CommunicationDtype;
pub use config::HdPissaOptimizerConfig;
pub use error::{OptimizerError, StepError};
#[cfg(feature = "learner")]
pub(crate) use factors::Factors;
pub use gradients::{ShardGradients, StepGradients};
pub use optimizer::HdPissaOptimizer;
pub use record::HdPissaOptimizerRecord;
pub use shared_gradients::SharedGradients;
