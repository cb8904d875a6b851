//! The reproduction of every result: its settings, and the trainings that they ask for.

use std::path::Path;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::children::Children;
use super::judge::Judge;
use super::learning_rates::LearningRates;
use super::row::Row;
use super::search::{Entry, Finding, Search};
use super::task::{Kind, Task};
use super::trial::TrialResult;
use crate::Error;
use crate::console::say;

/// The settings file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Seeds by which learning rates are chosen.
    pub tuning_seeds: Vec<u64>,
    /// Seeds of the results.
    pub seeds: Vec<u64>,
    /// Rank of a shard.
    pub rank: usize,
    /// The experiments, in the order in which they are run and told.
    pub experiments: Vec<Experiment>,
}

/// A question, and the trainings that answer it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Experiment {
    /// Name, for headings and files.
    pub name: String,
    /// What is asked, a heading.
    pub title: String,
    /// What is compared.
    pub rows: Vec<Row>,
    /// On what.
    pub parts: Vec<Part>,
    /// The tables.
    pub tables: Vec<Measure>,
    /// The picture, if there is one.
    #[serde(default)]
    pub picture: Option<Measure>,
    /// Name of the axis that the numbers of the parts stand on.
    #[serde(default)]
    pub axis: String,
    /// Whether the rates of the recorded sweep are taken where it had them.
    #[serde(default)]
    pub recorded_rates: bool,
    /// Seeds of the results, if not those of the others.
    #[serde(default)]
    pub seeds: Option<Vec<u64>>,
}

impl Experiment {
    /// By what its methods are compared.
    ///
    /// # Panics
    ///
    /// Without a part.
    pub fn judge(&self) -> Judge {
        self.parts
            .first()
            .expect("an experiment has parts")
            .task
            .judge()
    }
}

/// A column of an experiment's tables.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Part {
    /// The heading of the column.
    pub label: String,
    /// The panel of the picture that it belongs to.
    #[serde(default)]
    pub panel: String,
    /// Its place on the axis of the panel.
    #[serde(default)]
    pub at: f64,
    /// What is trained on.
    pub task: Task,
    /// Test questions, facts, or the rank of a planted change.
    pub items: usize,
    /// Steps.
    pub steps: usize,
    /// Number of shards.
    pub shards: usize,
}

/// What a table or a picture shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Measure {
    /// Share of right answers.
    Score,
    /// Mean loss per target token on the test problems.
    Loss,
    /// The share of a planted change that is missing, beside its closed form; the axis of a picture is
    /// the rank of the change.
    Missed,
    /// Right answers for each thousand trainable values.
    PerParameter,
    /// The learning rate that was best.
    Rate,
    /// Loss on texts of the pre-training.
    TextLoss,
    /// Effective rank of the update after the last step.
    EffectiveRank,
    /// Effective rank of a layer's update, step by step.
    RankBySteps,
}

/// What was found about a part.
#[derive(Clone, Debug)]
pub struct Answered {
    /// The part.
    pub part: Part,
    /// The untrained model; none for a layer, or if there was no time.
    pub base: Option<TrialResult>,
    /// A finding for each row.
    pub findings: Vec<Finding>,
}

impl Settings {
    /// Reads a settings file.
    ///
    /// # Errors
    ///
    /// [`Error::Io`], and [`Error::Field`] for what cannot be run.
    pub fn read(path: &Path) -> Result<Self, Error> {
        let invalid = |field: &str, reason: String| Err(Error::field(path, field, reason));
        let text = crate::files::text(path)?;
        let settings: Self = match serde_json::from_str(&text) {
            Ok(settings) => settings,
            Err(error) => return invalid("content", error.to_string()),
        };
        if settings.tuning_seeds.is_empty() {
            return invalid("tuning_seeds", "is empty; name one seed at least".into());
        }
        for experiment in &settings.experiments {
            let seeds = settings.seeds_of(experiment);
            if seeds.is_empty() {
                return invalid("seeds", "is empty; name one seed at least".into());
            }
            if let Some(seed) = seeds.iter().find(|s| settings.tuning_seeds.contains(s)) {
                let reason = format!("{seed} is one of the tuning seeds; name others");
                return invalid("seeds", reason);
            }
            for part in &experiment.parts {
                let Part { label, shards, .. } = part;
                if part.task.judge() != experiment.judge() {
                    let reason = "is compared by something else than the first part; a table of differences has one unit"
                        .into();
                    return invalid(&format!("{} / {label} / task", experiment.name), reason);
                }
                let sequences = part.task.sequences_per_step();
                if *shards == 0 || !sequences.is_multiple_of(*shards) {
                    let reason =
                        format!("{shards} does not divide the {sequences} sequences of a step");
                    return invalid(&format!("{} / {label} / shards", experiment.name), reason);
                }
            }
        }
        Ok(settings)
    }

    /// The seeds of an experiment's results.
    pub fn seeds_of<'a>(&'a self, experiment: &'a Experiment) -> &'a [u64] {
        experiment.seeds.as_deref().unwrap_or(&self.seeds)
    }

    /// Runs what has no result yet, experiment by experiment. Without files nothing is trained for tasks
    /// that take them.
    ///
    /// # Errors
    ///
    /// Those of the trials.
    pub fn run(&self, children: &Children) -> Result<Vec<Vec<Answered>>, Error> {
        let mut answers = Vec::new();
        for experiment in &self.experiments {
            let mut parts = Vec::new();
            for part in &experiment.parts {
                say!("{}: {}", experiment.name, part.label);
                parts.push(self.part(experiment, part, children)?);
            }
            answers.push(parts);
        }
        Ok(answers)
    }

    fn part(
        &self,
        experiment: &Experiment,
        part: &Part,
        children: &Children,
    ) -> Result<Answered, Error> {
        let seeds = self.seeds_of(experiment);
        let entry = |row, steps| Entry {
            task: part.task,
            row,
            steps,
            items: part.items,
            rank: self.rank,
            shards: part.shards,
        };
        // Without its files nothing is trained; the results that there are count.
        let lacks_files = part.task.takes_files() && children.files.is_none();
        let until = match lacks_files {
            true => Some(Instant::now()),
            false => children.until,
        };
        let children = &Children {
            until,
            ..children.clone()
        };
        let base = match part.task.kind() {
            Kind::Layer(_) => None,
            _ => {
                let untrained = entry(Row::Full, 0).trial(1e-3, seeds[0]);
                children.run(&[untrained], "base")?.pop()
            }
        };
        let recorded = LearningRates::recorded();
        let is_recorded = experiment.recorded_rates
            && (recorded.rank, recorded.shards) == (self.rank, part.shards)
            && part.task.length(false) == (part.steps, part.items);
        let known = |row| recorded.of(part.task, row).filter(|_| is_recorded);
        let rows = experiment.rows.iter();
        let search = Search {
            entries: rows
                .map(|&row| (entry(row, part.steps), known(row)))
                .collect(),
            tuning_seeds: self.tuning_seeds.clone(),
            seeds: seeds.to_vec(),
        };
        Ok(Answered {
            part: part.clone(),
            base,
            findings: search.run(children)?,
        })
    }
}
