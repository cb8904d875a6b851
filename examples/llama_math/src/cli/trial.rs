//! The options of one training of a sweep or of the comparison.

use std::path::PathBuf;

use clap::Args;

use crate::evidence::children;
use crate::evidence::task::Files;
use crate::{Error, device};

#[derive(Args, Debug)]
pub(super) struct FilesOptions {
    /// Folder of a checkpoint, for tasks with records
    #[arg(long, value_name = "DIR", requires_all = ["data", "test"])]
    model: Option<PathBuf>,
    /// Its training data
    #[arg(long, value_name = "FILE", requires = "model")]
    data: Option<PathBuf>,
    /// Its test data
    #[arg(long, value_name = "FILE", requires = "model")]
    test: Option<PathBuf>,
}

impl FilesOptions {
    pub(super) fn files(&self) -> Option<Files> {
        Some(Files {
            model: self.model.clone()?,
            train: self.data.clone()?,
            test: self.test.clone()?,
        })
    }
}

#[derive(Args, Debug)]
pub(super) struct TrialOptions {
    /// The trial, as JSON
    #[arg(long)]
    settings: String,
    /// File of the result
    #[arg(long)]
    result: PathBuf,
    /// Write its steps and changes into it too
    #[arg(long)]
    record: bool,
    #[command(flatten)]
    files: FilesOptions,
    /// Backend
    #[arg(long)]
    device: Option<String>,
}

impl TrialOptions {
    pub(super) fn run(self) -> Result<(), Error> {
        children::end_with_parent();
        let device = device::parse(self.device.as_deref())?;
        children::run_trial(
            &self.settings,
            &device,
            self.files.files().as_ref(),
            self.record,
            &self.result,
        )
    }
}
