//! A sweep: the best learning rate of every row on every task by its tuning seeds, then other
//! seeds at that rate.

use burn::tensor::Device;

use super::children::Children;
use super::rates::{self, Rate};
use super::row::Row;
use super::task::{Exam, Task};
use super::trial::{Trial, TrialResult};
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

/// What a sweep found about a row on a task.
#[derive(Clone, Debug)]
pub struct Finding {
    /// The task.
    pub task: Task,
    /// The row.
    pub row: Row,
    /// The results of the tuning seeds, by rate.
    pub tried: Vec<TrialResult>,
    /// The results of the other seeds at the best rate.
    pub fresh: Vec<TrialResult>,
}

impl Finding {
    /// The best rate.
    pub fn lr(&self) -> f64 {
        rates::best(&self.tried).value()
    }

    /// The shares of right answers, by seed.
    pub fn scores(&self) -> Vec<f64> {
        self.fresh.iter().map(TrialResult::score).collect()
    }
}

impl Sweep {
    /// Runs what has no result yet.
    ///
    /// # Errors
    ///
    /// Those of the trials.
    pub fn run(&self, children: &Children) -> Result<Vec<Finding>, Error> {
        let mut findings: Vec<Finding> = Vec::new();
        for &task in &self.tasks {
            for &row in &self.rows {
                findings.push(Finding {
                    task,
                    row,
                    tried: Vec::new(),
                    fresh: Vec::new(),
                });
            }
        }
        let mut trials = Vec::new();
        for finding in &findings {
            let rates = rates::first(finding.task, finding.row).into_iter();
            trials.extend(rates.flat_map(|rate| self.tuning(finding, rate)));
        }
        while !trials.is_empty() {
            for result in children.run(&trials, "rates")? {
                let is_of = |finding: &&mut Finding| finding.has(&result.trial);
                let finding = findings.iter_mut().find(is_of).expect("a trial of ours");
                finding.tried.push(result);
            }
            trials.clear();
            for finding in &findings {
                let rate = rates::next(&finding.tried);
                trials.extend(rate.into_iter().flat_map(|rate| self.tuning(finding, rate)));
            }
        }
        for finding in &mut findings {
            let tried = &mut finding.tried;
            tried.sort_by(|a, b| a.trial.lr.total_cmp(&b.trial.lr));
        }
        let fresh = |finding: &Finding| {
            let lr = finding.lr();
            let seeds = self.seeds.iter();
            seeds
                .map(|&seed| self.trial(finding, lr, seed))
                .collect::<Vec<_>>()
        };
        let trials: Vec<Trial> = findings.iter().flat_map(fresh).collect();
        for result in children.run(&trials, "seeds")? {
            let is_of = |finding: &&mut Finding| finding.has(&result.trial);
            let finding = findings.iter_mut().find(is_of).expect("a trial of ours");
            finding.fresh.push(result);
        }
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
        let grade = Exam::new(task, seed, items)?.grade(&model)?;
        Ok(grade.correct as f64 / items as f64)
    }

    /// The trials of a rate that decide whether it is the best.
    fn tuning(&self, finding: &Finding, rate: Rate) -> Vec<Trial> {
        let seeds = self.tuning_seeds.iter();
        seeds
            .map(|&seed| self.trial(finding, rate.value(), seed))
            .collect()
    }

    fn trial(&self, finding: &Finding, lr: f64, seed: u64) -> Trial {
        let Finding { task, row, .. } = *finding;
        let (steps, items) = task.length(self.quick);
        Trial {
            task,
            row,
            lr,
            seed,
            steps,
            items,
            rank: self.rank,
            shards: self.shards,
        }
    }
}

impl Finding {
    fn has(&self, trial: &Trial) -> bool {
        (self.task, self.row) == (trial.task, trial.row)
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
        task,
        row,
        tried,
        fresh,
    } = finding;
    format!("{task} {row}: {} | {}", shown(tried), shown(fresh))
}
