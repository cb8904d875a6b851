//! A search: the best learning rate of every entry by the tuning seeds, then other seeds at that
//! rate.

use serde::{Deserialize, Serialize};

use super::children::Children;
use super::judge::Judge;
use super::rates;
use super::row::Row;
use super::task::Task;
use super::trial::{Trial, TrialResult};
use crate::Error;

/// Everything of a trial but its rate and its seed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// What is trained on.
    pub task: Task,
    /// What is trained.
    pub row: Row,
    /// Steps.
    pub steps: usize,
    /// Test problems, facts, or the rank of a planted change.
    pub items: usize,
    /// Rank of a shard.
    pub rank: usize,
    /// Number of shards.
    pub shards: usize,
}

impl Entry {
    /// The trial that helps to choose the rate: where methods are compared by their loss, without
    /// answers.
    pub fn tuning(&self, lr: f64, seed: u64) -> Trial {
        Trial {
            loss_only: self.task.judge() == Judge::Loss,
            ..self.trial(lr, seed)
        }
    }

    /// The trial at a rate, with a seed.
    pub fn trial(&self, lr: f64, seed: u64) -> Trial {
        let Self {
            task,
            row,
            steps,
            items,
            rank,
            shards,
        } = *self;
        Trial {
            task,
            row,
            lr,
            seed,
            steps,
            items,
            rank,
            shards,
            loss_only: false,
        }
    }

    /// The name in tables.
    pub fn title(&self) -> String {
        self.row.title(self.rank, self.shards)
    }
}

impl From<Trial> for Entry {
    fn from(trial: Trial) -> Self {
        Self {
            task: trial.task,
            row: trial.row,
            steps: trial.steps,
            items: trial.items,
            rank: trial.rank,
            shards: trial.shards,
        }
    }
}

/// Settings of a search.
#[derive(Clone, Debug)]
pub struct Search {
    /// The entries, each once, with a rate where that is known already.
    pub entries: Vec<(Entry, Option<f64>)>,
    /// Seeds by which rates are chosen.
    pub tuning_seeds: Vec<u64>,
    /// Seeds of the results.
    pub seeds: Vec<u64>,
}

/// What a search found about an entry.
#[derive(Clone, Debug)]
pub struct Finding {
    /// The entry.
    pub entry: Entry,
    /// The rate that was known before.
    pub known: Option<f64>,
    /// The results of the tuning seeds, by rate.
    pub tried: Vec<TrialResult>,
    /// The results of the other seeds at the best rate, all of them or none.
    pub fresh: Vec<TrialResult>,
}

impl Finding {
    /// The rate of the results.
    ///
    /// # Panics
    ///
    /// If no rate was tried and none was known.
    pub fn lr(&self) -> f64 {
        let best = || rates::best(&self.tried).value();
        self.known.unwrap_or_else(best)
    }

    /// Whether it has results.
    pub fn is_complete(&self) -> bool {
        !self.fresh.is_empty()
    }

    /// What methods are compared by, by seed; more is better.
    pub fn gains(&self) -> Vec<f64> {
        self.fresh.iter().map(TrialResult::gain).collect()
    }

    /// The shares of right answers, by seed.
    pub fn scores(&self) -> Vec<f64> {
        self.fresh.iter().map(TrialResult::score).collect()
    }
}

impl Search {
    /// Runs what has no result yet. Once the time of `children` is over, the findings about some
    /// entries have no results.
    ///
    /// # Errors
    ///
    /// Those of the trials.
    pub fn run(&self, children: &Children) -> Result<Vec<Finding>, Error> {
        let finding = |&(entry, known)| Finding {
            entry,
            known,
            tried: Vec::new(),
            fresh: Vec::new(),
        };
        let mut findings: Vec<Finding> = self.entries.iter().map(finding).collect();
        // Entries whose rate is found.
        let mut ready = vec![false; findings.len()];
        loop {
            let mut trials = Vec::new();
            for (finding, ready) in findings.iter().zip(&mut ready) {
                let rates = match &finding.tried[..] {
                    _ if finding.known.is_some() => Vec::new(),
                    [] => rates::first(finding.entry.task, finding.entry.row),
                    tried => rates::next(tried).into_iter().collect(),
                };
                *ready = rates.is_empty();
                for rate in rates {
                    let seeds = self.tuning_seeds.iter();
                    trials.extend(seeds.map(|&seed| finding.entry.tuning(rate.value(), seed)));
                }
            }
            if trials.is_empty() {
                break;
            }
            let results = children.run(&trials, "rates")?;
            let in_time = results.len() == trials.len();
            for result in results {
                finding_of(&mut findings, &result).tried.push(result);
            }
            if !in_time {
                break;
            }
        }
        let by_rate = |a: &TrialResult, b: &TrialResult| a.trial.lr.total_cmp(&b.trial.lr);
        for finding in &mut findings {
            finding.tried.sort_by(by_rate);
        }
        let found = findings.iter().zip(&ready).filter(|(_, ready)| **ready);
        let trials: Vec<Trial> = found
            .flat_map(|(finding, _)| {
                let (entry, lr) = (finding.entry, finding.lr());
                self.seeds.iter().map(move |&seed| entry.trial(lr, seed))
            })
            .collect();
        for result in children.run(&trials, "seeds")? {
            finding_of(&mut findings, &result).fresh.push(result);
        }
        for finding in &mut findings {
            if finding.fresh.len() < self.seeds.len() {
                finding.fresh.clear();
            }
        }
        Ok(findings)
    }
}

fn finding_of<'a>(findings: &'a mut [Finding], result: &TrialResult) -> &'a mut Finding {
    let is_of = |finding: &&mut Finding| finding.entry == result.trial.into();
    findings.iter_mut().find(is_of).expect("a trial of ours")
}
