//! The options of a search for learning rates.

use std::path::PathBuf;

use clap::Args;

use super::parse::{at_least, cores};
use crate::evidence::children::{self, Children};
use crate::evidence::results;
use crate::evidence::row::Row;
use crate::evidence::sweep::Sweep;
use crate::evidence::task::Task;
use crate::{Error, device};

#[derive(Args, Debug)]
pub(super) struct SweepOptions {
    /// Tasks
    #[arg(long, value_delimiter = ',', default_values_t = Task::COMPARED)]
    tasks: Vec<Task>,
    /// Methods
    #[arg(long, value_delimiter = ',', default_values_t = Row::swept())]
    rows: Vec<Row>,
    /// Seeds by which learning rates are chosen
    #[arg(long, value_delimiter = ',', default_values_t = [1])]
    tuning_seeds: Vec<u64>,
    /// Seeds of the results
    #[arg(long, value_delimiter = ',', default_values_t = [2, 3, 4])]
    seeds: Vec<u64>,
    /// Trainings at a time [default: as many as cores]
    #[arg(long, value_name = "N", value_parser = at_least(1))]
    threads: Option<usize>,
    /// Backend
    #[arg(long)]
    device: Option<String>,
    /// Folder with a file for each training
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    /// Folder of table, picture and best learning rates [default: that of --output]
    #[arg(long, value_name = "DIR")]
    results: Option<PathBuf>,
    /// Few steps and few test problems or facts
    #[arg(long)]
    quick: bool,
}

impl SweepOptions {
    pub(super) fn run(self) -> Result<(), Error> {
        let device = device::parse(self.device.as_deref())?;
        let children = Children {
            folder: self.output,
            processes: self.threads.unwrap_or_else(cores),
            device: self.device,
            files: None,
            record: false,
            until: None,
            program: children::this_program,
        };
        let sweep = Sweep {
            tasks: self.tasks,
            rows: self.rows,
            tuning_seeds: self.tuning_seeds,
            seeds: self.seeds,
            rank: 4,
            shards: 8,
            quick: self.quick,
        };
        let findings = sweep.run(&children)?;
        let mut base = Vec::new();
        for &task in &sweep.tasks {
            base.push((task, sweep.base(task, &device)?));
        }
        let folder = self.results.unwrap_or(children.folder);
        results::write(&folder, &sweep, &findings, &base)
    }
}
