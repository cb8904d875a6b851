//! Compares a device's results with Flex and plain references, each within a bound from rounding.
//!
//! ```text
//! cargo run --release --features cuda --example check -- --device cuda
//! ```
//!
//! It compares every operation and kernel ([`operations`]), whole optimizer steps of each dtype and
//! precision ([`steps`]), and recorded runs ([`replays`]). Then [`times`] times the operations.
//! [`bounds`] has the source of each bound. Exit codes: 0 if all is within its bound, 1 if
//! something is not, 2 if nothing could be compared.

pub mod bounds;
pub mod case;
pub mod comparison;
mod environment;
mod error;
pub mod measure;
pub mod operations;
mod options;
pub mod recorded;
pub mod replays;
pub mod report;
mod run;
mod sample;
pub mod speed;
pub mod steps;
pub mod times;

pub use error::CheckError;
pub use options::Options;
pub use run::{run, run_with};
