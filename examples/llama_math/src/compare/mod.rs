//! The run without arguments: every method on both tasks, at the learning rates that a sweep has found.

mod page;

use std::path::Path;
use std::time::Instant;

use burn::tensor::Device;

use crate::chart::{self, Curve, Panel, Scale, Stroke};
use crate::console::{conclude, say};
use crate::evidence::children::{self, Children};
use crate::evidence::learning_rates::{self, LearningRates};
use crate::evidence::row::Row;
use crate::evidence::statistics::{Estimate, percent};
use crate::evidence::task::{Exam, Grade, SEQUENCES_PER_STEP, Task};
use crate::evidence::trial::{Measured, Outcome, Trial, TrialResult};
use crate::evidence::verdict::{Rival, against};
use crate::history::Measures;
use crate::output::Staged;
use crate::picture::{smooth, window};
use crate::{Error, tiny};

/// HD-PiSSA with shared gradients, in the form that `llama_math` takes by default.
const BEST: Row = Row::SharedRandom;
/// What is compared.
const ROWS: [Row; 6] = [
    Row::Lora,
    Row::Pissa,
    Row::Published,
    BEST,
    Row::LoraWide,
    Row::Full,
];
/// Test problems shown with their answers.
const SHOWN: usize = 3;

/// Settings of the comparison.
#[derive(Clone, Debug)]
pub struct Comparison {
    /// Seed of data, order and random adapters.
    pub seed: u64,
    /// Steps of each method; those of the task where `None`.
    pub steps: Option<usize>,
    /// Rank of adapters; with HD-PiSSA of each shard's.
    pub rank: usize,
    /// Shards of HD-PiSSA.
    pub shards: usize,
    /// Largest learning rate of every method; the recorded ones where `None`.
    pub lr: Option<f64>,
    /// A short run.
    pub quick: bool,
    /// Methods at a time.
    pub processes: usize,
    /// Name of the device, for the child processes.
    pub device: Option<String>,
}

/// A task with what the methods reached.
struct Part {
    task: Task,
    base: Grade,
    exam: Exam,
    results: Vec<TrialResult>,
}

impl Comparison {
    /// The default run.
    pub fn new(processes: usize) -> Self {
        Self {
            seed: 1,
            steps: None,
            rank: 4,
            shards: 8,
            lr: None,
            quick: false,
            processes,
            device: None,
        }
    }

    /// Every training of the run.
    ///
    /// # Errors
    ///
    /// [`Error::Option`] for a number of shards that does not divide the sequences of a step.
    pub fn trials(&self) -> Result<Vec<Trial>, Error> {
        if !SEQUENCES_PER_STEP.is_multiple_of(self.shards) {
            let reason = format!(
                "{} does not divide the {SEQUENCES_PER_STEP} sequences of a step",
                self.shards
            );
            return Err(Error::Option {
                option: "shards",
                reason,
            });
        }
        let recorded = LearningRates::recorded();
        let trial = |task: Task, row| {
            let (steps, items) = task.length(self.quick);
            let lr = self.lr.or_else(|| recorded.of(task, row));
            Trial {
                task,
                row,
                lr: lr.expect("the sweep had every row"),
                seed: self.seed,
                steps: self.steps.unwrap_or(steps),
                items,
                rank: self.rank,
                shards: self.shards,
                loss_only: false,
            }
        };
        let of_task = |task| ROWS.map(|row| trial(task, row));
        Ok(Task::COMPARED.into_iter().flat_map(of_task).collect())
    }

    /// Runs every method in a child process of this program and writes table and picture.
    ///
    /// # Errors
    ///
    /// [`Error::Child`] if a method fails, and those of [`trials`](Self::trials) and of the output.
    pub fn run(&self, device: &Device, output: &Path, overwrite: bool) -> Result<(), Error> {
        let start = Instant::now();
        let trials = self.trials()?;
        let staged = Staged::new(output, overwrite)?;
        say!("{}", self.introduction());
        let children = Children {
            folder: staged.path().join("trials"),
            processes: self.processes,
            device: self.device.clone(),
            files: None,
            record: true,
            until: None,
            program: children::this_program,
        };
        let results = children.run(&trials, "trainings")?;

        let model = tiny::pretrained()?.load(device)?;
        let mut parts = Vec::new();
        for task in Task::COMPARED {
            let of_task = |result: &&TrialResult| result.trial.task == task;
            let results: Vec<_> = results.iter().filter(of_task).cloned().collect();
            let exam = Exam::new(task, self.seed, results[0].trial.items, None)?;
            parts.push(Part {
                task,
                base: exam.grade(&model)?,
                exam,
                results,
            });
        }
        let tables: Vec<String> = parts.iter().map(Part::table).collect();
        let text = tables.join("\n") + COLUMNS;
        conclude!("\n{text}");
        parts.iter().for_each(Part::show_answers);
        let write = |name: &str, content: &str| {
            let path = staged.path().join(name);
            std::fs::write(&path, content).map_err(Error::io(path))
        };
        write("table.txt", &text)?;
        let panels: Vec<Panel> = parts.iter().map(Part::panel).collect();
        write("loss.svg", &chart::svg("Tiny Llama", &panels))?;
        page::report(self, &parts, start.elapsed(), device).write(staged.path())?;
        staged.commit()?;
        conclude!(
            "{:.0} s in all; report (report.html), table, losses and picture (loss.svg) are in {}",
            start.elapsed().as_secs_f64(),
            output.display()
        );
        Ok(())
    }

    fn introduction(&self) -> String {
        let recorded = LearningRates::recorded();
        let rates = match self.lr {
            Some(lr) => format!("learning rate {lr:e} for all, though the best differ by method"),
            None => format!("learning rates from {}", learning_rates::PATH),
        };
        let swept = (recorded.rank, recorded.shards);
        let doubt = match self.lr {
            None if swept != (self.rank, self.shards) => format!(
                ", found for {} shards of rank {} and not for these",
                recorded.shards, recorded.rank
            ),
            _ => String::new(),
        };
        let short = match self.quick {
            true => "a run too short to compare methods: ",
            false => "",
        };
        format!(
            "{short}tiny Llama, {SEQUENCES_PER_STEP} sequences in each step, {} shards of rank {}, seed \
             {}; {rates}{doubt}",
            self.shards, self.rank, self.seed
        )
    }
}

/// What the columns of the tables are.
const COLUMNS: &str = "rank and eff. rank: numeric and effective rank of the update of a projection, \
                       mean over all;\ntrain loss: mean of the last tenth of the steps; peak MiB: of \
                       the method's process up to its last step;\ntest loss and score: on held-out \
                       problems, and on the facts that were trained on;\ndifferences: with the 95 % \
                       interval that the number of answers gives, of this seed alone\n";

impl Part {
    fn columns(&self) -> [&'static str; 11] {
        [
            "method",
            "lr",
            "train loss",
            "test loss",
            self.task.measure(),
            "rank",
            "eff. rank",
            "trainable",
            "seconds",
            "tokens/s",
            "peak MiB",
        ]
    }

    fn table(&self) -> String {
        let heading = self.heading();
        let [method, rest @ ..] = self.columns();
        let mut table = format!("{heading}\n{method:26}");
        for (name, width) in rest.iter().zip([8, 10, 10, 12, 8, 9, 10, 8, 9, 9]) {
            table += &format!(" {name:>width$}");
        }
        table.push('\n');
        table += &format!(
            "{:26} {:>8} {:>10} {:>10.4} {:>12}\n",
            "base",
            "",
            "",
            self.base.loss,
            percent(self.base_share())
        );
        for result in &self.results {
            let title = title(result);
            let lr = format!("{:.0e}", result.trial.lr);
            table += &match &result.outcome {
                Outcome::Trained(measured) => {
                    let score = percent(result.score());
                    format!("{title:26} {lr:>8} {}\n", numbers(measured, &score))
                }
                Outcome::Diverged(reason) => format!("{title:26} {lr:>8} diverged: {reason}\n"),
            };
        }
        table + &self.verdict() + "\n"
    }

    fn heading(&self) -> &'static str {
        match self.task {
            Task::Problems => "problems: one skill, a small change of the weights",
            _ => "facts: random associations, a change of high rank",
        }
    }

    fn base_share(&self) -> f64 {
        self.base.correct as f64 / self.results[0].trial.items as f64
    }

    /// What the table shows, in words.
    fn verdict(&self) -> String {
        let of = |row: Row| {
            let found = self.results.iter().find(|result| result.trial.row == row);
            found.expect("every row was run")
        };
        let task = self.task;
        let judge = task.judge();
        if let Some(reason) = judge.why_unfit(Some(self.base_share()), of(Row::Full).score()) {
            return format!("{task}: nothing can be said about the methods, because {reason}\n");
        }
        let subject = of(BEST);
        let others = self.results.iter().filter(|other| other.trial.row != BEST);
        let rivals: Vec<Rival> = others
            .map(|other| Rival {
                name: title(other),
                difference: Estimate::of_shares(
                    subject.score(),
                    other.score(),
                    subject.trial.items,
                ),
            })
            .collect();
        format!("{task}: {}\n", against(judge, &title(subject), &rivals))
    }

    fn show_answers(&self) {
        for (index, record) in self.exam.records().iter().take(SHOWN).enumerate() {
            say!("{}", record.instruction);
            let rows = self.results.iter().filter_map(|result| {
                let Outcome::Trained(measured) = &result.outcome else {
                    return None;
                };
                Some((title(result), measured.answers.get(index)?))
            });
            let base = ("base".to_string(), &self.base.answers[index]);
            for (label, (text, correct)) in [base].into_iter().chain(rows) {
                let mark = if *correct { "right" } else { "wrong" };
                let text = text.trim().replace('\n', " ");
                say!("  {label:26} {mark}  {text}");
            }
            say!("");
        }
    }

    fn panel(&self) -> Panel {
        let mut curves = Vec::new();
        for result in &self.results {
            let Outcome::Trained(measured) = &result.outcome else {
                continue;
            };
            let Trial {
                row, rank, shards, ..
            } = result.trial;
            let curve = |name, stroke, points| Curve {
                name,
                color: row.color(),
                stroke,
                points,
                band: Vec::new(),
            };
            let record = measured.record.iter();
            let measurements = record.flat_map(|record| &record.measurements);
            let held_out = measurements.filter_map(|measurement| match measurement.measures {
                Measures::HeldOut { loss, .. } => Some((measurement.step as f64, loss)),
                _ => None,
            });
            let training = smooth(&measured.losses, window(measured.losses.len()));
            let stroke = match row {
                Row::LoraWide => Stroke::Dashed,
                _ => Stroke::Line,
            };
            curves.push(curve(row.short(rank, shards), stroke, training));
            if self.task == Task::Problems {
                curves.push(curve(String::new(), Stroke::Dots, held_out.collect()));
            }
        }
        let title = match self.task {
            Task::Problems => "Problems; dots: held-out loss",
            _ => "Facts",
        };
        Panel {
            title: title.into(),
            labels: ["step".into(), "training loss".into()],
            scales: [Scale::Count, Scale::Logarithmic],
            curves,
        }
    }
}

fn title(result: &TrialResult) -> String {
    let Trial {
        row, rank, shards, ..
    } = result.trial;
    row.title(rank, shards)
}

/// Mean training loss of the last tenth of the steps.
fn train_loss(measured: &Measured) -> f64 {
    let losses = &measured.losses;
    let tail = &losses[losses.len() - losses.len().div_ceil(10)..];
    tail.iter().sum::<f64>() / tail.len() as f64
}

fn peak_memory(measured: &Measured) -> String {
    match measured.peak_memory {
        Some(bytes) => format!("{:.0}", bytes as f64 / f64::from(1 << 20)),
        None => "-".into(),
    }
}

fn numbers(measured: &Measured, score: &str) -> String {
    format!(
        "{:>10.4} {:>10.4} {score:>12} {:>8.1} {:>9.1} {:>10} {:>8.1} {:>9.0} {:>9}",
        train_loss(measured),
        measured.loss,
        measured.numeric_rank,
        measured.effective_rank,
        measured.trainable,
        measured.seconds,
        measured.tokens_per_second,
        peak_memory(measured)
    )
}
