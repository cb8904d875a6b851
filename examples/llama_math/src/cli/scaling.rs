//! The options of a simulation of many devices.

use std::path::PathBuf;

use clap::Args;

use super::parse::{at_least, positive};
use crate::scaling::cost::{Layout, Work};
use crate::scaling::{Question, Scaling};
use crate::{Error, device};

/// Where the simulations write unless told otherwise; replaced by the next run.
const SCALING_OUTPUT: &str = "target/scaling";
/// Queries, keys, values and outputs; gates and ups; downs.
const LLAMA_2_7B: &str = "4096x4096x128,4096x11008x64,11008x4096x32";

#[derive(Args, Debug)]
pub(super) struct ScalingOptions {
    /// Workers of the run that is predicted
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = at_least(1))]
    workers: usize,
    /// Its shards [default: as many as workers]
    #[arg(long, value_parser = at_least(1))]
    shards: Option<usize>,
    /// Rank of each shard
    #[arg(long, default_value_t = 16, value_parser = at_least(1))]
    rank: usize,
    /// Tokens of each shard in each step
    #[arg(long, default_value_t = 4096, value_parser = at_least(1))]
    tokens: usize,
    /// What reaches each worker, in GB/s
    #[arg(long, value_name = "GB/S", default_value_t = 25.0, value_parser = positive)]
    bandwidth: f64,
    /// Folder of the model that is predicted [default: the shapes of Llama 2 7B]
    #[arg(long, value_name = "DIR", conflicts_with = "shapes")]
    model: Option<PathBuf>,
    /// The adapted weights of another model, as ROWSxCOLUMNSxCOUNT,...
    #[arg(long)]
    shapes: Option<String>,
    /// Tokens per second of one worker, if known from a run of the model on such a device
    #[arg(long, value_name = "T", value_parser = positive)]
    tokens_per_second: Option<f64>,
    /// Seed of problems and weights
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Backend
    #[arg(long)]
    device: Option<String>,
    /// Folder of tables and picture [default: target/scaling, which is replaced]
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
    /// Replace an existing folder
    #[arg(long)]
    overwrite: bool,
    /// Few shards and steps
    #[arg(long)]
    quick: bool,
}

impl ScalingOptions {
    pub(super) fn run(self) -> Result<(), Error> {
        let device = device::parse(self.device.as_deref())?;
        let (model, shapes) = match (&self.model, &self.shapes) {
            (Some(folder), _) => (
                folder.display().to_string(),
                Question::shapes_of(folder, &device)?,
            ),
            (None, Some(shapes)) => ("these weights".into(), Question::parse_shapes(shapes)?),
            (None, None) => ("Llama 2 7B".into(), Question::parse_shapes(LLAMA_2_7B)?),
        };
        let question = Question {
            model,
            work: Work {
                shapes,
                rank: self.rank,
                tokens: self.tokens as f64,
            },
            layout: Layout {
                shards: self.shards.unwrap_or(self.workers),
                workers: self.workers,
            },
            bandwidth: 1e9 * self.bandwidth,
            tokens_per_second: self.tokens_per_second,
        };
        let scaling = Scaling::new(self.quick, self.seed, question);
        let report = match self.output {
            Some(output) => scaling.run(&device, &output, self.overwrite),
            None => scaling.run(&device, SCALING_OUTPUT.as_ref(), true),
        };
        report.map(drop)
    }
}
