mod adapter;
mod config;
mod error;
mod linear;
pub mod ops;
mod optim;
mod pissa;
mod plan;
mod svd;

pub use hd_pissa_comm as comm;

pub use adapter::{HdPissa, HdPissaAdapter, HdPissaModule, HdPissaShard, LayerProgress};
pub use config::{HdPissaConfig, SvdMethod, SvdPrecision, TargetRank};
pub use error::HdPissaError;
pub use linear::{HdPissaLinear, HdPissaLinearConfig};
pub use optim::{HdPissaOptimizer, OptimizerError, ShardGradients, StepError};
pub use pissa::{Pissa, PissaConfig, PissaModule};
pub use plan::{HdPissaPlan, PlannedWeight};
