//! Held-out records: their loss, and answers to them.

use std::path::Path;
use std::time::Instant;

use crate::batch::Sequence;
use crate::console::say;
use crate::data::Record;
use crate::evaluate::{BATCH, Solver, mean_loss};
use crate::progress::Progress;
use crate::tokenize::{Template, Tokens};
use crate::{Error, Llama};

/// Held-out records with their sequences.
pub(super) struct HeldOut {
    records: Vec<Record>,
    pub(super) sequences: Vec<Sequence>,
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

    /// Mean loss per target.
    pub(super) fn loss(&self, model: &Llama) -> f64 {
        let progress = Progress::new("held out", self.sequences.len());
        let loss = mean_loss(model, &self.sequences, || progress.tick());
        progress.finish();
        loss
    }

    /// Answers every record with at most `max_new_tokens` tokens, and says how many answers are
    /// right; that is what it returns, in words.
    pub(super) fn answer(
        &self,
        model: &Llama,
        tokens: &Tokens,
        template: &dyn Template,
        max_new_tokens: usize,
    ) -> Result<String, Error> {
        let solver = Solver {
            model,
            tokens,
            template,
            max_new_tokens,
        };
        let progress = Progress::new("answering", self.records.len());
        let (mut correct, mut scored, mut length) = (0, 0, 0);
        let mut shown = Vec::new();
        let start = Instant::now();
        for records in self.records.chunks(BATCH) {
            for (record, answer) in records.iter().zip(solver.answers(records)?) {
                correct += usize::from(answer.correct == Some(true));
                scored += usize::from(answer.correct.is_some());
                length += answer.tokens;
                if shown.len() < 2 {
                    shown.push((record, answer));
                }
                progress.tick();
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
        say!("{figure}");
        for (record, answer) in shown {
            say!("\n{}\n-> {}", record.instruction, answer.text.trim());
        }
        say!("");
        Ok(figure)
    }
}
