//! The options of the experiments of a settings file.

use std::path::PathBuf;
use std::time::Instant;

use clap::Args;

use super::parse::{at_least, cores, minutes, not_negative};
use super::trial::FilesOptions;
use crate::Error;
use crate::evidence::children::{self, Children};
use crate::evidence::report;
use crate::evidence::reproduce::Settings;

/// The settings of the results in the book, seen from the root of the repository.
const REPRODUCE_SETTINGS: &str = "examples/llama_math/reproduce.json";
#[derive(Args, Debug)]
pub(super) struct ReproduceOptions {
    /// What is run
    #[arg(long, value_name = "FILE", default_value = REPRODUCE_SETTINGS)]
    settings: PathBuf,
    /// Folder with a file for each training
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    /// Folder of tables, pictures and numbers [default: that of --output]
    #[arg(long, value_name = "DIR")]
    results: Option<PathBuf>,
    #[command(flatten)]
    files: FilesOptions,
    /// Start no training after so many minutes, and write what there is; 0 runs nothing
    #[arg(long, value_name = "M", value_parser = not_negative)]
    minutes: Option<f64>,
    /// Trainings at a time [default: as many as cores]
    #[arg(long, value_name = "N", value_parser = at_least(1))]
    threads: Option<usize>,
    /// Backend
    #[arg(long)]
    device: Option<String>,
}

impl ReproduceOptions {
    pub(super) fn run(self) -> Result<(), Error> {
        let settings = Settings::read(&self.settings)?;
        let children = Children {
            folder: self.output,
            processes: self.threads.unwrap_or_else(cores),
            device: self.device,
            files: self.files.files(),
            record: false,
            until: self.minutes.map(|number| Instant::now() + minutes(number)),
            program: children::this_program,
        };
        let answers = settings.run(&children)?;
        let folder = self.results.unwrap_or(children.folder);
        report::write(&folder, &settings, &answers)
    }
}
