//! The adapter: its module, and its attachment to a model.

mod apply;
mod joined;
mod module;
mod select;
mod shared;

pub use apply::{HdPissa, HdPissaModule, LayerProgress};
pub use module::{HdPissaAdapter, HdPissaShard};
