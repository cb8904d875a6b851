//! The backend extension behind the adapter: [`HdPissaOps`] is the contract, one file per backend
//! implements it, and the functions re-exported here apply it to tensors.

mod autodiff;
// Without a backend there is nothing to dispatch to.
#[cfg_attr(
    not(any(feature = "flex", feature = "cubecl-backend")),
    allow(unused_variables)
)]
mod contract;
#[cfg(feature = "cubecl-backend")]
mod cubecl;
#[cfg(feature = "flex")]
mod flex;
mod tensor;
#[cfg(feature = "flex")]
mod thin_product;

pub use contract::{HdPissaOps, ProductKernels};
pub use hd_pissa_bits::{Rounding, StochasticKey};
pub(crate) use tensor::{
    MergeInputs, Origin, fingerprint, fingerprint_int, identity, is_cpu, is_supported, join,
    max_abs, merge_compensated, merge_rounded, part_of, row_statistics,
};
pub use tensor::{adapter_linear, adapter_weight, merge};
