//! Fine-tunes Llama-family models on word problems, with HD-PiSSA and its baselines.
//!
//! `cargo run --release --example llama_math` runs it; this library holds its parts.

pub mod batch;
pub mod checkpoint;
pub mod config;
pub mod data;
mod error;
pub mod evaluate;
pub mod method;
pub mod model;
pub mod output;
pub mod pretrain;
pub mod problems;
pub mod progress;
pub mod rope;
pub mod schedule;
pub mod spectrum;
pub mod tiny;
pub mod tokenize;
pub mod train;

pub use checkpoint::Checkpoint;
pub use config::LlamaConfig;
pub use error::Error;
pub use model::{Cache, Llama};
