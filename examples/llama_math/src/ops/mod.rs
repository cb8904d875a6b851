//! The model's small operations, each in one pass over memory on the CPU: [`LlamaOps`] is the
//! contract, and the functions re-exported here apply it to tensors if it is faster.

mod autodiff;
mod contract;
#[cfg(feature = "flex")]
mod flex;
#[cfg(feature = "flex")]
mod rows;
mod tensor;

pub use contract::{Causal, LlamaOps};
pub use tensor::{attention, head_loss, is_flex, rms_norm, rotate_heads, swiglu, target_loss};
