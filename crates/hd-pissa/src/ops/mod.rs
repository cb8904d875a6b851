//! The backend extension behind the adapter: [`HdPissaOps`] is the contract, one file per backend
//! implements it, and the functions re-exported here apply it to tensors.

mod autodiff;
mod contract;
#[cfg(feature = "cubecl-backend")]
mod cubecl;
#[cfg(feature = "flex")]
mod fingerprint;
#[cfg(feature = "flex")]
mod flex;
mod rounding;
mod tensor;
#[cfg(feature = "flex")]
mod thin_product;

pub use contract::{FactorProduct, HdPissaOps};
pub use rounding::{Rounding, StochasticKey};
pub(crate) use tensor::{
    MergeInputs, fingerprint, fingerprint_int, identity, is_cpu, is_supported, join, max_abs,
    merge_rounded, merge_split, row_statistics,
};
pub use tensor::{adapter_linear, adapter_weight, merge};
