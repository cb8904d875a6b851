//! HD-PiSSA in Burn's own training loop.

mod crew;
mod epochs;
mod error;
mod layout;
mod parts;
mod saved;
mod state;
mod strategy;

pub use error::LearnerError;
pub use strategy::HdPissaStrategy;
