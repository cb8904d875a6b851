//! Held-out records: their loss, and answers to them.

use std::path::Path;
use std::time::Instant;

use crate::batch::Sequence;
use crate::console::{conclude, say};
use crate::data::Record;
use crate::evaluate::{Solver, mean_loss};
use crate::history::{LoggedAnswer, Measurement, Measures};
use crate::progress::Progress;
use crate::tokenize::{Template, Tokens};
use crate::{Error, Llama};

/// Answers that are printed.
const SHOWN: usize = 2;

/// Held-out records with their sequences.
pub(super) struct HeldOut {
    records: Vec<Record>,
    sequences: Vec<Sequence>,
}

impl HeldOut {
    /// The records of the file at `path`, as sequences of at most `max_length` tokens.
    ///
    /// # Errors
    ///
    /// [`Error::Field`] if none of them has a target.
    pub(super) fn new(
        path: &Path,
        records: Vec<Record>,
        tokens: &Tokens,
        template: &dyn Template,
        max_length: usize,
    ) -> Result<Self, Error> {
        let sequences = tokens.sequences(&records, template, max_length)?;
        if sequences.usable.is_empty() {
            let reason = format!("no target to measure within {max_length} tokens");
            return Err(Error::field(
                path,
                "content",
                format!("{sequences}: {reason}"),
            ));
        }
        let sequences = sequences.usable;
        Ok(Self { records, sequences })
    }

    /// The records that answers are generated for.
    pub(super) fn records(&self) -> &[Record] {
        &self.records
    }

    /// A loss of these records, for the record of the run.
    pub(super) fn measured(&self, step: usize, loss: f64, of_output: bool) -> Measurement {
        let records = self.sequences.len();
        let measures = Measures::HeldOut {
            loss,
            records,
            of_output,
        };
        Measurement { step, measures }
    }

    /// Mean loss per target, without a word.
    pub(super) fn quiet_loss(&self, model: &Llama) -> f64 {
        mean_loss(model, &self.sequences, || ())
    }

    /// Mean loss per target.
    pub(super) fn loss(&self, model: &Llama) -> f64 {
        let progress = Progress::new("held out", self.sequences.len());
        let loss = mean_loss(model, &self.sequences, || progress.tick());
        progress.finish();
        loss
    }

    /// Answers every record with at most `max_new_tokens` tokens, and says how many answers are
    /// right. Returns that in words, and the first `logged` answers.
    pub(super) fn answer(
        &self,
        model: &Llama,
        tokens: &Tokens,
        template: &dyn Template,
        max_new_tokens: usize,
        logged: usize,
    ) -> Result<(String, Vec<LoggedAnswer>), Error> {
        let solver = Solver {
            model,
            tokens,
            template,
            max_new_tokens,
        };
        let progress = Progress::new("answering", self.records.len());
        let (mut correct, mut scored, mut length) = (0, 0, 0);
        let mut kept = Vec::new();
        let start = Instant::now();
        let answers = solver.answers(&self.records, || progress.tick())?;
        for (record, answer) in self.records.iter().zip(answers) {
            correct += usize::from(answer.correct == Some(true));
            scored += usize::from(answer.correct.is_some());
            length += answer.tokens;
            if kept.len() < logged.max(SHOWN) {
                kept.push(LoggedAnswer::new(record, answer));
            }
        }
        progress.finish();
        let seconds = start.elapsed().as_secs_f64();
        say!(
            "answers: {length} tokens in {seconds:.1} s, {:.0} tokens/s",
            length as f64 / seconds
        );
        let total = self.records.len();
        let figure = match total - scored {
            0 => format!("exact match: {correct} of {total}"),
            left => format!("exact match: {correct} of {scored}; {left} have no number to compare"),
        };
        conclude!("{figure}");
        for answer in kept.iter().take(SHOWN) {
            say!("\n{}\n-> {}", answer.prompt, answer.text.trim());
        }
        say!("");
        kept.truncate(logged);
        Ok((figure, kept))
    }
}
