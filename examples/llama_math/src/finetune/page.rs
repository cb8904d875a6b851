//! The report of a run.

use std::path::Path;

use burn::tensor::Device;

use super::inputs::Inputs;
use super::options::FineTuning;
use super::report::{file_name, mebibytes};
use crate::export::{command, name_of};
use crate::history::{Measures, Record};
use crate::report::{
    Answered, Figure, Line, Question, Report, Section, change, configuration, curves, last_changes,
    machine, warnings,
};
use crate::run::Trained;

/// Share of an update below which the rounding of the output is worth a word.
const SURVIVED: f64 = 0.9;

/// What is known of the output, besides the record.
#[derive(Clone, Debug, Default)]
pub(super) struct Written {
    /// Share of the update that the written weights hold.
    pub(super) survived: Option<f64>,
    /// Right answers, in words.
    pub(super) exact_match: Option<String>,
}

impl FineTuning {
    /// The report, as far as it is known.
    pub(super) fn report(
        &self,
        inputs: &Inputs,
        trained: &Trained,
        written: &Written,
        device: &Device,
    ) -> Report {
        let record = &trained.history.record;
        let mut notes = warnings(record);
        if let Some(share) = written.survived.filter(|&share| share < SURVIVED) {
            notes.push(format!(
                "{:.1} % of the update survives the rounding of the written weights; --output-dtype f32 \
                 keeps all of it, --rounding stochastic its mean.",
                100.0 * share
            ));
        }
        let name = self.output.file_name().unwrap_or_default();
        Report {
            title: name.to_string_lossy().into_owned(),
            subtitle: format!(
                "{} fine-tuned on {} with {}",
                short(&name_of(&self.model)),
                self.data_name(file_name),
                self.run.adaptation.method
            ),
            figures: figures(trained, written),
            warnings: notes,
            sections: [
                Some(self.curves(record)),
                change(record),
                answers(record),
                Some(configuration(
                    self.of_output(&inputs.settings).into_iter().collect(),
                    command(std::env::args()),
                )),
                Some(machine(device)),
            ]
            .into_iter()
            .flatten()
            .collect(),
        }
    }

    fn curves(&self, record: &Record) -> Section {
        let line = Line {
            name: self.run.adaptation.method.to_string(),
            color: 0,
            dashed: false,
            record,
        };
        Section {
            id: "curves".into(),
            heading: "Curves".into(),
            about: "Losses and norms have logarithmic axes. The time of measurements between steps does not \
                    count in the speed."
                .into(),
            pictures: curves(&[line]).iter().map(|panel| panel.inline()).collect(),
            ..Section::default()
        }
    }
}

/// The name of a model on the Hub, or of its folder.
fn short(name: &str) -> String {
    match Path::new(name).is_absolute() || name.starts_with('.') {
        true => file_name(Path::new(name)),
        false => name.into(),
    }
}

/// The numbers at the top.
fn figures(trained: &Trained, written: &Written) -> Vec<Figure> {
    let figure = |name: &str, value: String, note: String| Figure {
        name: name.into(),
        value,
        note,
    };
    let record = &trained.history.record;
    let mut figures = Vec::new();
    let loss = |of_output: bool| {
        let measurements = record.measurements.iter();
        measurements.filter_map(move |measurement| match measurement.measures {
            Measures::HeldOut {
                loss,
                of_output: of,
                ..
            } if of == of_output => Some((measurement.step, loss)),
            _ => None,
        })
    };
    let before = loss(false).find(|(step, _)| *step == 0);
    let last = loss(false).next_back().filter(|(step, _)| *step > 0);
    let before = before.map(|(_, loss)| format!("{loss:.4} before"));
    if let Some((_, after)) = loss(true).next_back() {
        let note = before.map_or_else(String::new, |before| {
            before + ", of the weights as they are written"
        });
        figures.push(figure("held-out loss", format!("{after:.4}"), note));
    } else if let Some((step, loss)) = last {
        let before = before.map_or_else(String::new, |before| format!(", {before}"));
        let note = format!("after step {step}{before}");
        figures.push(figure("held-out loss", format!("{loss:.4}"), note));
    }
    if let Some(text) = &written.exact_match {
        let text = text.strip_prefix("exact match: ").unwrap_or(text);
        let (value, note) = text.split_once("; ").unwrap_or((text, ""));
        figures.push(figure("exact match", value.into(), note.into()));
    }
    if let (Some(first), Some(last)) = (record.metrics.first(), record.metrics.last()) {
        let note = format!("{:.4} in the first step", first.loss);
        figures.push(figure("training loss", format!("{:.4}", last.loss), note));
    }
    if let Some((_, weights)) = last_changes(record) {
        let mean = weights
            .iter()
            .map(|change| change.effective_rank)
            .sum::<f64>()
            / weights.len().max(1) as f64;
        let note = format!("mean over {} changed weights", weights.len());
        figures.push(figure("effective rank", format!("{mean:.1}"), note));
    }
    figures.push(figure(
        "steps",
        record.metrics.len().to_string(),
        format!("in {}", duration(trained.seconds)),
    ));
    figures.push(figure(
        "speed",
        format!("{:.0}", trained.tokens_per_second),
        "tokens per second".into(),
    ));
    figures.push(figure(
        "trainable",
        thousands(trained.trainable),
        "parameters".into(),
    ));
    figures.push(figure(
        "peak memory",
        mebibytes(trained.peak_memory),
        String::new(),
    ));
    figures
}

/// The logged answers, question by question.
fn answers(record: &Record) -> Option<Section> {
    let mut questions: Vec<Question> = Vec::new();
    for measurement in &record.measurements {
        let Measures::Answers { answers, of_output } = &measurement.measures else {
            continue;
        };
        for (index, answer) in answers.iter().enumerate() {
            if questions.len() <= index {
                questions.push(Question {
                    prompt: answer.prompt.clone(),
                    reference: answer.reference.clone(),
                    answers: Vec::new(),
                });
            }
            questions[index].answers.push(Answered {
                by: match (measurement.step, of_output) {
                    (_, true) => "after, as written".into(),
                    (0, _) => "before".into(),
                    (step, _) => format!("step {step}"),
                },
                text: answer.text.trim().into(),
                correct: answer.correct,
            });
        }
    }
    (!questions.is_empty()).then(|| Section {
        id: "answers".into(),
        heading: "Answers".into(),
        about: "What the model generates, greedily, for held-out prompts.".into(),
        questions,
        ..Section::default()
    })
}

/// A number with spaces between groups of three digits.
fn thousands(number: usize) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push('\u{202f}');
        }
        text.push(digit);
    }
    text
}

/// A time for people.
fn duration(seconds: f64) -> String {
    match seconds {
        ..60.0 => format!("{seconds:.1} s"),
        60.0..3600.0 => format!(
            "{:.0} min {:02.0} s",
            (seconds / 60.0).floor(),
            seconds % 60.0
        ),
        _ => format!("{:.1} h", seconds / 3600.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_for_people() {
        assert_eq!(thousands(1234567), "1\u{202f}234\u{202f}567");
        assert_eq!(thousands(999), "999");
        assert_eq!(duration(12.34), "12.3 s");
        assert_eq!(duration(125.0), "2 min 05 s");
        assert_eq!(duration(5400.0), "1.5 h");
    }
}
