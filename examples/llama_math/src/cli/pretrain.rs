//! The options of a pre-training.

use std::path::PathBuf;

use clap::Args;

use super::parse::at_least;
use crate::pretrain::Pretraining;
use crate::{Error, device};

#[derive(Args, Debug)]
pub(super) struct PretrainOptions {
    /// Folder of the checkpoint
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    /// Seed of weights and texts
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Steps
    #[arg(long, default_value_t = 2500, value_parser = at_least(1))]
    steps: usize,
    /// Backend
    #[arg(long)]
    device: Option<String>,
    /// Replace an existing folder
    #[arg(long)]
    overwrite: bool,
}

impl PretrainOptions {
    pub(super) fn run(self) -> Result<(), Error> {
        let device = device::parse(self.device.as_deref())?;
        let pretraining = Pretraining {
            seed: self.seed,
            steps: self.steps,
            batch_size: 32,
            lr: 2e-3,
        };
        pretraining.run(&device, &self.output, self.overwrite)
    }
}
