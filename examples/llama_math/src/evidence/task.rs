//! What is trained on, and how the tiny model's answers count.

use std::fmt::{self, Display, Formatter};
use std::path::PathBuf;
use std::sync::Arc;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::judge::Judge;
use super::planted::{Direction, Planted};
use crate::batch::Sequence;
use crate::data::{Record, read_records};
use crate::evaluate::{Solver, mean_loss};
use crate::facts::{facts, recalled};
use crate::families::{Family, questions};
use crate::prompt::PromptTemplate;
use crate::tokenize::Tokens;
use crate::{Error, Llama, Pretrained, tiny};

/// Longest sequence and longest answer, in tokens.
const MAX_LENGTH: usize = 128;
const MAX_NEW_TOKENS: usize = 48;
/// The same for the records of files; longer ones are not used.
pub const MAX_LENGTH_OF_RECORDS: usize = 160;
const MAX_NEW_TOKENS_OF_RECORDS: usize = 128;
const TRAIN_QUESTIONS: usize = 6000;
/// Test questions whose loss is measured during the training, and records that rates are chosen by.
const WATCHED: usize = 50;
/// Sequences of a step of the tiny model, with every method.
pub const SEQUENCES_PER_STEP: usize = 32;

/// A task for the tiny model, or for one layer.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, ValueEnum, Serialize, Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub enum Task {
    /// One skill, a small change of the weights: problems of two steps, tested on others.
    Problems,
    /// As many random associations as fit, a change of high rank: tested on the same.
    Facts,
    /// Sums of four numbers.
    Sums,
    /// The largest of five numbers.
    Largest,
    /// The smallest of five numbers.
    Smallest,
    /// How often a word stands in a list.
    Count,
    /// What one of four people has.
    Lookup,
    /// The next number of a series.
    Series,
    /// Problems, sums, largest, smallest, count, lookup and series at once.
    Mixture,
    /// A checkpoint on problems of GSM8K, tested on others; takes [`Files`].
    Gsm8k,
    /// One layer of side 128, and a change of it between random directions.
    PlantedRandom,
    /// One layer of side 128, and a change of it between its own leading directions.
    PlantedAligned,
    /// One layer of side 512, and a change of it between random directions.
    PlantedWide,
}

/// What a task consists of.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    /// Questions of these families.
    Questions(&'static [Family]),
    /// Facts.
    Facts,
    /// The records of files.
    Records,
    /// A change of one layer.
    Layer(Planted),
}

impl Kind {
    /// Whether the tiny model is trained.
    pub fn is_of_tiny_model(self) -> bool {
        matches!(self, Self::Questions(_) | Self::Facts)
    }
}

/// A checkpoint and the records that it is trained and tested on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Files {
    /// Folder of the checkpoint.
    pub model: PathBuf,
    /// Records to train on.
    pub train: PathBuf,
    /// Records to test on.
    pub test: PathBuf,
}

impl Task {
    /// Those of the run without arguments, and of a sweep.
    pub const COMPARED: [Self; 2] = [Self::Problems, Self::Facts];

    /// What it consists of.
    pub fn kind(self) -> Kind {
        let (random, aligned) = (Direction::Random, Direction::Aligned);
        let layer = |size, direction| Kind::Layer(Planted { size, direction });
        Kind::Questions(match self {
            Self::Facts => return Kind::Facts,
            Self::Gsm8k => return Kind::Records,
            Self::PlantedRandom => return layer(128, random),
            Self::PlantedAligned => return layer(128, aligned),
            Self::PlantedWide => return layer(512, random),
            Self::Problems => &[Family::Problems],
            Self::Sums => &[Family::Sums],
            Self::Largest => &[Family::Largest],
            Self::Smallest => &[Family::Smallest],
            Self::Count => &[Family::Count],
            Self::Lookup => &[Family::Lookup],
            Self::Series => &[Family::Series],
            Self::Mixture => &Family::ALL,
        })
    }

    /// Steps, and test problems, facts or the rank of a planted change, of a run, or of a quick one.
    pub fn length(self, quick: bool) -> (usize, usize) {
        match (self.kind(), quick) {
            (Kind::Questions(_), false) => (250, 200),
            (Kind::Facts, false) => (400, 256),
            (Kind::Records, false) => (20, 200),
            (Kind::Layer(_), false) => (300, 32),
            (Kind::Questions(_), true) => (8, 10),
            // A step takes no fact twice.
            (Kind::Facts, true) => (20, SEQUENCES_PER_STEP),
            (Kind::Records, true) => (2, 2),
            (Kind::Layer(_), true) => (10, 8),
        }
    }

    /// Whether it takes [`Files`].
    pub fn takes_files(self) -> bool {
        matches!(self.kind(), Kind::Records)
    }

    /// By what methods are compared on it. A small checkpoint has too few right answers of GSM8K to
    /// tell methods by.
    pub fn judge(self) -> Judge {
        match self.kind() {
            Kind::Records => Judge::Loss,
            Kind::Questions(_) | Kind::Facts | Kind::Layer(_) => Judge::Share,
        }
    }

    /// What a share of right answers, or of what was to be learned, is called.
    pub fn measure(self) -> &'static str {
        match self.kind() {
            Kind::Questions(_) | Kind::Records => "exact match",
            Kind::Facts => "recall",
            Kind::Layer(_) => "learned",
        }
    }

    /// What it is, for headings, with so many of what its length counts.
    pub fn heading(self, items: usize) -> String {
        match (self, self.kind()) {
            (Self::Problems, _) => format!("Problems of two steps, {items} tested"),
            (Self::Mixture, _) => format!("Seven families at once, {items} questions tested"),
            (_, Kind::Questions(_)) => format!("Family “{self}” alone, {items} questions tested"),
            (_, Kind::Records) => format!("A checkpoint on GSM8K, {items} held-out problems"),
            (_, Kind::Facts) => format!("Random facts, {items}"),
            (_, Kind::Layer(planted)) => planted.heading(items),
        }
    }

    /// Sequences of a step, with every method.
    pub fn sequences_per_step(self) -> usize {
        match self.kind() {
            Kind::Records => 8,
            _ => SEQUENCES_PER_STEP,
        }
    }

    /// In how many micro-batches those methods take a step's sequences that need none of their own
    /// for each of `shards` shards. Where all are of one length, one is as good as many.
    pub fn micro_batches(self, shards: usize) -> usize {
        match self.kind() {
            Kind::Questions(_) | Kind::Records => shards,
            Kind::Facts | Kind::Layer(_) => 1,
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

/// The model and the data of a task.
pub struct Exam {
    task: Task,
    /// The model that is trained.
    pub pretrained: Arc<Pretrained>,
    tokens: Tokens,
    template: PromptTemplate,
    /// What is trained on.
    pub train: Vec<Sequence>,
    /// What the loss is measured on.
    test: Vec<Sequence>,
    /// The test problems.
    records: Vec<Record>,
    /// Records that are no test problems, to choose rates by.
    others: Vec<Sequence>,
    /// How many of the records to train on are used, and how many there are, if a file has them.
    used: Option<(usize, usize)>,
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

impl Grade {
    /// That of a model which was asked nothing.
    pub(crate) fn of_loss(loss: f64) -> Self {
        let (correct, answers) = (0, Vec::new());
        Self {
            loss,
            correct,
            answers,
        }
    }
}

impl Exam {
    /// The data of this seed, with so many test problems or facts; `files` for a task that takes them.
    ///
    /// # Errors
    ///
    /// Those of the files, and [`Error::Option`] for too few records; none for the embedded model.
    ///
    /// # Panics
    ///
    /// For a task of one layer.
    pub fn new(task: Task, seed: u64, items: usize, files: Option<&Files>) -> Result<Self, Error> {
        let (pretrained, template) = match (task.kind(), files) {
            (Kind::Records, None) => {
                let reason = format!("{task} takes a checkpoint and records");
                return Err(Error::Option {
                    option: "model",
                    reason,
                });
            }
            (Kind::Records, Some(files)) => {
                let pretrained = Pretrained::open(&files.model)?;
                (pretrained, PromptTemplate::default())
            }
            _ => (tiny::pretrained()?, tiny::template()),
        };
        let tokens = Tokens::of(&pretrained)?;
        let sequences = |records: &[Record], length| -> Result<Vec<Sequence>, Error> {
            Ok(tokens.sequences(records, &template, length)?.usable)
        };
        let (mut others, mut used) = (Vec::new(), None);
        let (train, test, records) = match (task.kind(), files) {
            (Kind::Questions(families), _) => {
                let (train, test) = questions(families, seed, TRAIN_QUESTIONS, items);
                (
                    sequences(&train, MAX_LENGTH)?,
                    sequences(&test, MAX_LENGTH)?,
                    test,
                )
            }
            (Kind::Facts, _) => {
                // Every token but those for the unknown and for the end.
                let vocabulary = 2..pretrained.config.vocab_size as u32;
                let facts = facts(seed, items, vocabulary);
                (facts.clone(), facts, Vec::new())
            }
            (Kind::Records, Some(files)) => {
                let all = read_records(&files.train, None)?;
                let (train, _) = short(&tokens, &template, &all, usize::MAX)?;
                used = Some((train.len(), all.len()));
                let all = read_records(&files.test, None)?;
                let (mut test, mut records) = short(&tokens, &template, &all, items + WATCHED)?;
                others = test.split_off(items.min(test.len()));
                records.truncate(items);
                if others.is_empty() {
                    let reason = format!(
                        "has {} records of at most {MAX_LENGTH_OF_RECORDS} tokens; {items} are tested \
                         on, and learning rates are chosen by others",
                        records.len()
                    );
                    return Err(Error::Option {
                        option: "test",
                        reason,
                    });
                }
                (train, test, records)
            }
            (Kind::Records, None) | (Kind::Layer(_), _) => {
                panic!("{task} has no data for a language model")
            }
        };
        Ok(Self {
            task,
            pretrained: Arc::new(pretrained),
            tokens,
            template,
            train,
            test,
            records,
            others,
            used,
        })
    }

    /// The test problems.
    pub fn records(&self) -> &[Record] {
        &self.records
    }

    /// How many of the records to train on are used, and how many there are, if a file has them.
    pub fn used(&self) -> Option<(usize, usize)> {
        self.used
    }

    /// Mean loss per target token of a model in validation mode, on the first test problems or on all
    /// facts.
    pub fn loss(&self, model: &Llama) -> f64 {
        mean_loss(model, &self.test[..self.watched()], || ())
    }

    /// Number of test problems, or facts, whose loss is measured during a training.
    pub fn watched(&self) -> usize {
        match self.task.kind() {
            Kind::Questions(_) | Kind::Records => self.test.len().min(WATCHED),
            _ => self.test.len(),
        }
    }

    /// Mean loss per target token of a model in validation mode on records that are no test problems, to
    /// choose rates by; 0 for a task without files.
    pub fn loss_on_others(&self, model: &Llama) -> f64 {
        mean_loss(model, &self.others, || ())
    }

    /// Measures a model, which must be in validation mode.
    ///
    /// # Errors
    ///
    /// Those of the tokenizer.
    pub fn grade(&self, model: &Llama) -> Result<Grade, Error> {
        let loss = mean_loss(model, &self.test, || ());
        let (correct, answers) = match self.task.kind() {
            Kind::Facts | Kind::Layer(_) => (recalled(model, &self.test), Vec::new()),
            Kind::Questions(_) | Kind::Records => {
                let is_tiny = self.task.kind().is_of_tiny_model();
                let solver = Solver {
                    model,
                    tokens: &self.tokens,
                    template: &self.template,
                    max_new_tokens: match is_tiny {
                        true => MAX_NEW_TOKENS,
                        false => MAX_NEW_TOKENS_OF_RECORDS,
                    },
                };
                let answers = solver.answers(&self.records, || ())?;
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

/// The first records that fit whole into [`MAX_LENGTH_OF_RECORDS`] and have an answer, at most so many.
fn short(
    tokens: &Tokens,
    template: &PromptTemplate,
    records: &[Record],
    most: usize,
) -> Result<(Vec<Sequence>, Vec<Record>), Error> {
    let (mut sequences, mut kept) = (Vec::new(), Vec::new());
    for record in records {
        if kept.len() == most {
            break;
        }
        let of_record = std::slice::from_ref(record);
        let encoded = tokens.sequences(of_record, template, MAX_LENGTH_OF_RECORDS)?;
        if encoded.usable.len() == 1 && encoded.cut == 0 {
            sequences.extend(encoded.usable);
            kept.push(record.clone());
        }
    }
    Ok((sequences, kept))
}
