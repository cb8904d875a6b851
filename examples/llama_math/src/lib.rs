//! Fine-tunes Llama-family models on word problems, with HD-PiSSA and its baselines.
//!
//! `cargo run --example llama_math` runs it; this library holds its parts. In reading
//! order: [`config`], [`rope`], [`model`] and [`pretrained`]; [`data`], [`tokenize`], [`prompt`],
//! [`chat`] and [`batch`]; [`method`], [`schedule`], [`train`] and [`run`]; [`evaluate`], [`spectrum`], [`history`] and
//! [`report`]; and
//! what the command line offers: [`finetune`], [`compare`], [`scaling`] and [`pretrain`].

pub mod batch;
pub mod changes;
pub mod chart;
pub mod chat;
pub mod cli;
pub mod compare;
pub mod config;
mod console;
pub mod data;
mod dealing;
mod decompositions;
pub mod device;
mod error;
pub mod evaluate;
pub mod evidence;
pub mod export;
pub mod facts;
pub mod families;
mod files;
pub mod finetune;
mod heartbeat;
pub mod history;
pub mod hub;
mod lengths;
mod lock;
pub mod loss;
pub mod machine;
pub mod memory;
pub mod method;
pub mod model;
pub mod model_dtype;
pub mod mpi;
mod ops;
pub mod output;
mod panics;
pub mod picture;
pub mod pretrain;
pub mod pretrained;
pub mod problems;
pub mod progress;
pub mod prompt;
pub mod recipe;
pub mod report;
pub mod rope;
pub mod run;
pub mod scaling;
pub mod schedule;
pub mod score;
pub mod sketch;
pub mod spectrum;
pub mod stop;
pub mod team;
pub mod tiny;
pub mod token_cache;
pub mod tokenize;
pub mod train;
mod unrounded;
pub mod user_cache;
mod weights;

pub use config::LlamaConfig;
pub use error::Error;
pub use model::{Continued, Llama};
pub use pretrained::Pretrained;
