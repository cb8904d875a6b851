//! The learning rates that a sweep has found, which are part of this example.

use serde::{Deserialize, Serialize};

use super::row::Row;
use super::task::Task;

/// Their file in the repository.
pub const PATH: &str = "book/src/results/learning_rates.json";

/// The best rates from the output of a sweep.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LearningRates {
    /// Seeds by which they were chosen.
    pub tuning_seeds: Vec<u64>,
    /// Rank of a shard.
    pub rank: usize,
    /// Number of shards.
    pub shards: usize,
    /// The best of each row on each task.
    pub best: Vec<Best>,
}

/// A best rate.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// The task.
    pub task: Task,
    /// The row.
    pub row: Row,
    /// The rate.
    pub lr: f64,
}

impl LearningRates {
    /// The rates in the repository.
    ///
    /// # Panics
    ///
    /// Never with the committed file.
    pub fn recorded() -> Self {
        let json = include_str!("../../../../book/src/results/learning_rates.json");
        serde_json::from_str(json).expect("the file is a sweep's output")
    }

    /// The best rate of a row on a task, if the sweep had it.
    pub fn of(&self, task: Task, row: Row) -> Option<f64> {
        let is_it = |best: &&Best| (best.task, best.row) == (task, row);
        self.best.iter().find(is_it).map(|best| best.lr)
    }
}
