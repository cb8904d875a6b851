//! The command line.

use std::path::PathBuf;

use clap::Parser;

/// Compares this device's results with Flex and plain references.
///
/// Exit codes: 0 if everything is within its bound, 1 if something is not, 2 if nothing could be
/// compared.
#[derive(Clone, Debug, Parser)]
pub struct Options {
    /// A backend, which is also the feature to build with: flex, cuda, wgpu, vulkan, metal, rocm or
    /// cpu; `cuda:1` is the second CUDA device.
    #[arg(long)]
    pub device: String,
    /// Write everything to this file, too.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Time for each piece of work that is timed; 0 times nothing.
    #[arg(long, default_value_t = 0.5)]
    pub seconds: f64,
    /// The folder of recorded runs.
    #[arg(long, value_name = "FOLDER", default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/data"))]
    pub data: PathBuf,
}
