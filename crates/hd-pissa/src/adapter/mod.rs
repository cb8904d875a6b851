//! The adapter: its module, how it is attached to a model, and how its parameters are found again.

mod apply;
mod joined;
mod module;
pub(crate) mod path;
mod select;
mod shared;

pub use apply::{HdPissa, HdPissaModule, LayerProgress};
pub use module::{HdPissaAdapter, HdPissaShard};
