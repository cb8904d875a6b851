//! The report of the comparison.

use std::time::Duration;

use burn::tensor::Device;

use super::{BEST, COLUMNS, Comparison, Part, SHOWN, peak_memory, title, train_loss};
use crate::evidence::row::Row;
use crate::evidence::statistics::percent;
use crate::evidence::trial::{Measured, Outcome, Trial, TrialResult};
use crate::export::command;
use crate::report::{
    Answered, Figure, Line, Question, Report, Section, Table, change, configuration, curves,
    machine, ranks,
};

/// The report of all parts.
pub(super) fn report(
    comparison: &Comparison,
    parts: &[Part],
    time: Duration,
    device: &Device,
) -> Report {
    let mut sections = Vec::new();
    for part in parts {
        sections.push(part.results());
        sections.extend(part.change());
        sections.extend(part.answers());
    }
    sections.push(configuration(
        comparison.settings(),
        command(std::env::args()),
    ));
    sections.push(machine(device));
    let mut figures: Vec<Figure> = parts.iter().flat_map(Part::figures).collect();
    figures.push(Figure {
        name: "time".into(),
        value: format!("{:.0} s", time.as_secs_f64()),
        note: format!("{} trainings at a time", comparison.processes),
    });
    Report {
        title: "Methods on a tiny Llama".into(),
        subtitle: comparison.introduction(),
        figures,
        warnings: Vec::new(),
        sections,
    }
}

impl Comparison {
    fn settings(&self) -> Vec<(String, String)> {
        let or = |value: Option<String>, default: &str| value.unwrap_or_else(|| default.into());
        [
            ("--seed", self.seed.to_string()),
            (
                "--steps",
                or(
                    self.steps.map(|steps| steps.to_string()),
                    "those of each task",
                ),
            ),
            ("--rank", self.rank.to_string()),
            ("--shards", self.shards.to_string()),
            (
                "--lr",
                or(
                    self.lr.map(|lr| format!("{lr:e}")),
                    "each method's best of a sweep",
                ),
            ),
            ("--quick", if self.quick { "yes" } else { "no" }.into()),
            ("--threads", self.processes.to_string()),
        ]
        .map(|(name, value)| (name.into(), value))
        .into()
    }
}

impl Part {
    /// Methods that ended, with what was measured.
    fn measured(&self) -> impl Iterator<Item = (&TrialResult, &Measured)> {
        self.results
            .iter()
            .filter_map(|result| match &result.outcome {
                Outcome::Trained(measured) => Some((result, &**measured)),
                Outcome::Diverged(_) => None,
            })
    }

    fn figures(&self) -> Vec<Figure> {
        let best = self
            .results
            .iter()
            .max_by(|a, b| a.score().total_cmp(&b.score()));
        let ours = self.results.iter().find(|result| result.trial.row == BEST);
        let figure = |name: &str, result: &TrialResult| Figure {
            name: format!("{}, {name}", self.task),
            value: percent(result.score()),
            note: format!("{} by {}", self.task.measure(), title(result)),
        };
        let best = best.map(|result| figure("best method", result));
        let ours = ours.map(|result| figure("default method", result));
        best.into_iter().chain(ours).collect()
    }

    /// The table, and the curves of all methods.
    fn results(&self) -> Section {
        let lines = self.measured().filter_map(|(result, measured)| {
            let Trial {
                row, rank, shards, ..
            } = result.trial;
            Some(Line {
                name: row.short(rank, shards),
                color: row.color(),
                dashed: row == Row::LoraWide,
                record: measured.record.as_ref()?,
            })
        });
        let lines: Vec<Line<'_>> = lines.collect();
        let panels = curves(&lines);
        let ranks = ranks(&lines);
        Section {
            id: self.task.to_string(),
            heading: capitalized(self.heading()),
            about: capitalized(self.verdict().trim()) + ".",
            pictures: panels
                .iter()
                .chain(&ranks)
                .map(|panel| panel.inline())
                .collect(),
            tables: vec![self.rows()],
            ..Section::default()
        }
    }

    fn rows(&self) -> Table {
        let columns = self.columns();
        let mut base = vec![String::new(); columns.len()];
        base[0] = "base".into();
        base[3] = format!("{:.4}", self.base.loss);
        base[4] = percent(self.base_share());
        let row = |result: &TrialResult| {
            let lr = format!("{:.0e}", result.trial.lr);
            match &result.outcome {
                Outcome::Trained(measured) => vec![
                    title(result),
                    lr,
                    format!("{:.4}", train_loss(measured)),
                    format!("{:.4}", measured.loss),
                    percent(result.score()),
                    format!("{:.1}", measured.numeric_rank),
                    format!("{:.1}", measured.effective_rank),
                    measured.trainable.to_string(),
                    format!("{:.1}", measured.seconds),
                    format!("{:.0}", measured.tokens_per_second),
                    peak_memory(measured),
                ],
                Outcome::Diverged(reason) => vec![title(result), lr, format!("diverged: {reason}")],
            }
        };
        Table {
            caption: COLUMNS.replace('\n', " "),
            columns: columns.map(String::from).into(),
            rows: std::iter::once(base)
                .chain(self.results.iter().map(row))
                .collect(),
            is_folded: false,
        }
    }

    /// What the default method did to the weights.
    fn change(&self) -> Option<Section> {
        let (result, measured) = self
            .measured()
            .find(|(result, _)| result.trial.row == BEST)?;
        let mut section = change(measured.record.as_ref()?)?;
        section.id = format!("change-{}", self.task);
        section.heading = format!(
            "{}: change of the weights by {}",
            capitalized(&self.task.to_string()),
            title(result)
        );
        Some(section)
    }

    /// The answers to the first problems.
    fn answers(&self) -> Option<Section> {
        let questions = self.exam.records().iter().take(SHOWN).enumerate();
        let questions = questions.map(|(index, record)| {
            let base = ("base".to_string(), self.base.answers.get(index));
            let others = self
                .measured()
                .map(|(result, measured)| (title(result), measured.answers.get(index)));
            let answers = [base].into_iter().chain(others);
            let answers = answers.filter_map(|(by, answer)| {
                let (text, correct) = answer?;
                Some(Answered {
                    by,
                    text: text.trim().into(),
                    correct: Some(*correct),
                })
            });
            Question {
                prompt: record.instruction.clone(),
                reference: record.answer.clone(),
                answers: answers.collect(),
            }
        });
        let questions: Vec<Question> = questions.collect();
        (!questions.is_empty()).then(|| Section {
            id: format!("answers-{}", self.task),
            heading: format!("{}: answers", capitalized(&self.task.to_string())),
            about: "What the model generates, greedily, for held-out prompts: before, and after each method."
                .into(),
            questions,
            ..Section::default()
        })
    }
}

/// The text with a capital letter at its start.
fn capitalized(text: &str) -> String {
    let mut letters = text.chars();
    let first = letters
        .next()
        .map(|letter| letter.to_uppercase().to_string());
    first.unwrap_or_default() + letters.as_str()
}
