//! A sweep: a search over the methods that the run without arguments compares, and more.

use burn::tensor::Device;

use super::children::Children;
use super::row::Row;
use super::search::{Entry, Finding, Search};
use super::task::{Exam, Task};
use super::trial::TrialResult;
use crate::console::say;
use crate::{Error, tiny};

/// Settings of a sweep.
#[derive(Clone, Debug)]
pub struct Sweep {
    /// Tasks.
    pub tasks: Vec<Task>,
    /// Rows.
    pub rows: Vec<Row>,
    /// Seeds by which rates are chosen.
    pub tuning_seeds: Vec<u64>,
    /// Seeds of the results.
    pub seeds: Vec<u64>,
    /// Rank of a shard.
    pub rank: usize,
    /// Number of shards.
    pub shards: usize,
    /// Few steps, and few test problems or facts.
    pub quick: bool,
}

impl Sweep {
    /// Runs what has no result yet.
    ///
    /// # Errors
    ///
    /// Those of the trials.
    pub fn run(&self, children: &Children) -> Result<Vec<Finding>, Error> {
        let entry = |task: Task, row| {
            let (steps, items) = task.length(self.quick);
            Entry {
                task,
                row,
                steps,
                items,
                rank: self.rank,
                shards: self.shards,
            }
        };
        let of_task = |&task| self.rows.iter().map(move |&row| (entry(task, row), None));
        let search = Search {
            entries: self.tasks.iter().flat_map(of_task).collect(),
            tuning_seeds: self.tuning_seeds.clone(),
            seeds: self.seeds.clone(),
        };
        let findings = search.run(children)?;
        for finding in &findings {
            say!("{}", line(finding));
        }
        Ok(findings)
    }

    /// The share of right answers of the model before any training, with the first of the seeds.
    ///
    /// # Errors
    ///
    /// None for the embedded model.
    pub fn base(&self, task: Task, device: &Device) -> Result<f64, Error> {
        let (_, items) = task.length(self.quick);
        let mut seeds = self.seeds.iter().chain(&self.tuning_seeds);
        let seed = seeds.next().copied().unwrap_or_default();
        let model = tiny::pretrained()?.load(device)?;
        let grade = Exam::new(task, seed, items, None)?.grade(&model)?;
        Ok(grade.correct as f64 / items as f64)
    }
}

fn line(finding: &Finding) -> String {
    let shown = |results: &[TrialResult]| {
        let each = results.iter().map(|result| {
            let (lr, score, loss) = (result.trial.lr, 100.0 * result.score(), result.loss());
            format!("{lr:e}: {score:.1} % ({loss:.3})")
        });
        each.collect::<Vec<_>>().join(", ")
    };
    let Finding {
        entry: Entry { task, row, .. },
        tried,
        fresh,
        ..
    } = finding;
    format!("{task} {row}: {} | {}", shown(tried), shown(fresh))
}
