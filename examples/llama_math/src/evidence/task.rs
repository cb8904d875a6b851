//! What the tiny model is trained on, and how its answers count.

use std::fmt::{self, Display, Formatter};

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::batch::Sequence;
use crate::data::Record;
use crate::evaluate::{Solver, mean_loss};
use crate::facts::{facts, recalled};
use crate::problems::problems;
use crate::tokenize::Tokens;
use crate::{Error, Llama, tiny};

/// Longest sequence and longest answer, in tokens.
const MAX_LENGTH: usize = 128;
const MAX_NEW_TOKENS: usize = 48;
const TRAIN_PROBLEMS: usize = 6000;
/// Test problems whose loss is measured during the training.
const WATCHED: usize = 50;
/// Sequences of a step, with every method.
pub const SEQUENCES_PER_STEP: usize = 32;

/// A task for the tiny model.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, ValueEnum, Serialize, Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub enum Task {
    /// One skill, a small change of the weights: problems of two steps, tested on others.
    Problems,
    /// As many random associations as fit, a change of high rank: tested on the same.
    Facts,
}

impl Task {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Problems, Self::Facts];

    /// Steps, and test problems or facts, of a run, or of a quick one.
    pub fn length(self, quick: bool) -> (usize, usize) {
        match (self, quick) {
            (Self::Problems, false) => (250, 200),
            (Self::Facts, false) => (400, 256),
            (Self::Problems, true) => (8, 10),
            // A step takes no fact twice.
            (Self::Facts, true) => (20, SEQUENCES_PER_STEP),
        }
    }

    /// What a share of right answers is called.
    pub fn measure(self) -> &'static str {
        match self {
            Self::Problems => "exact match",
            Self::Facts => "recall",
        }
    }

    /// In how many micro-batches those methods take a step's sequences that need none of their own
    /// for each of `shards` shards. Facts are all of one length, so that one is as good as many.
    pub fn micro_batches(self, shards: usize) -> usize {
        match self {
            Self::Problems => shards,
            Self::Facts => 1,
        }
    }
}

/// As on the command line and in names of files.
impl Display for Task {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let name = self.to_possible_value().expect("no task is hidden");
        f.write_str(name.get_name())
    }
}

/// The data of a task.
pub struct Exam {
    task: Task,
    tokens: Tokens,
    /// What is trained on.
    pub train: Vec<Sequence>,
    /// What the loss is measured on.
    test: Vec<Sequence>,
    /// The test problems.
    records: Vec<Record>,
}

/// How a model did.
#[derive(Clone, Debug)]
pub struct Grade {
    /// Mean loss per target token.
    pub loss: f64,
    /// Number of right answers.
    pub correct: usize,
    /// The answers to problems, with whether they are right.
    pub answers: Vec<(String, bool)>,
}

impl Exam {
    /// The data of this seed, with so many test problems or facts.
    ///
    /// # Errors
    ///
    /// None for the embedded model.
    pub fn new(task: Task, seed: u64, items: usize) -> Result<Self, Error> {
        let pretrained = tiny::pretrained()?;
        let tokens = Tokens::of(&pretrained)?;
        let (train, test, records) = match task {
            Task::Problems => {
                let (train, test) = problems(seed, TRAIN_PROBLEMS, items);
                let template = tiny::template();
                let sequences =
                    |records: &[Record]| tokens.sequences(records, &template, MAX_LENGTH);
                (sequences(&train)?.usable, sequences(&test)?.usable, test)
            }
            Task::Facts => {
                // Every token but those for the unknown and for the end.
                let vocabulary = 2..pretrained.config.vocab_size as u32;
                let facts = facts(seed, items, vocabulary);
                (facts.clone(), facts, Vec::new())
            }
        };
        Ok(Self {
            task,
            tokens,
            train,
            test,
            records,
        })
    }

    /// The test problems.
    pub fn records(&self) -> &[Record] {
        &self.records
    }

    /// Mean loss per target token of a model in validation mode, on the first test problems or on all
    /// facts.
    pub fn loss(&self, model: &Llama) -> f64 {
        let first = match self.task {
            Task::Problems => self.test.len().min(WATCHED),
            Task::Facts => self.test.len(),
        };
        mean_loss(model, &self.test[..first], || ())
    }

    /// Measures a model, which must be in validation mode.
    ///
    /// # Errors
    ///
    /// Those of the tokenizer.
    pub fn grade(&self, model: &Llama) -> Result<Grade, Error> {
        let loss = mean_loss(model, &self.test, || ());
        let (correct, answers) = match self.task {
            Task::Facts => (recalled(model, &self.test), Vec::new()),
            Task::Problems => {
                let solver = Solver {
                    model,
                    tokens: &self.tokens,
                    template: &tiny::template(),
                    max_new_tokens: MAX_NEW_TOKENS,
                };
                let answers = solver.answers(&self.records)?;
                let marked = answers
                    .into_iter()
                    .map(|answer| (answer.text, answer.correct == Some(true)));
                let marked: Vec<_> = marked.collect();
                let correct = marked.iter().filter(|(_, correct)| *correct).count();
                (correct, marked)
            }
        };
        Ok(Grade {
            loss,
            correct,
            answers,
        })
    }
}
