//! What a run measures between its steps.

use std::sync::Arc;

use super::held_out::HeldOut;
use super::options::{FineTuning, WatchOptions};
use crate::changes::Changes;
use crate::console::complain;
use crate::evaluate::Solver;
use crate::history::{LoggedAnswer, Measurement, Measures};
use crate::model_dtype::ModelDtype;
use crate::run::Watch;
use crate::tokenize::{Template, Tokens};
use crate::{Error, Llama, Pretrained};

/// Measures held-out loss, answers, and the change of the weights.
pub(super) struct Watching {
    options: WatchOptions,
    pretrained: Arc<Pretrained>,
    dtype: ModelDtype,
    changes: Changes,
    held_out: Option<Arc<HeldOut>>,
    tokens: Arc<Tokens>,
    template: Arc<dyn Template>,
    max_new_tokens: usize,
}

impl Watching {
    /// With the options of a run, on what it has read.
    ///
    /// # Errors
    ///
    /// Those of [`Changes::new`].
    pub(super) fn new(
        run: &FineTuning,
        pretrained: &Arc<Pretrained>,
        held_out: Option<&Arc<HeldOut>>,
        tokens: &Arc<Tokens>,
        template: &Arc<dyn Template>,
    ) -> Result<Self, Error> {
        let layer = run.watch.layer.as_deref();
        Ok(Self {
            options: run.watch.clone(),
            pretrained: pretrained.clone(),
            dtype: run.dtype,
            changes: Changes::new(pretrained.clone(), &run.run.adaptation, layer)?,
            held_out: held_out.cloned(),
            tokens: tokens.clone(),
            template: template.clone(),
            max_new_tokens: run.max_new_tokens,
        })
    }

    /// Loss on the held-out records, and answers to the first of them.
    fn held_out(&self, step: usize, model: &Llama) -> Result<Vec<Measurement>, Error> {
        let Some(held_out) = &self.held_out else {
            return Ok(Vec::new());
        };
        let mut found = vec![held_out.measured(step, held_out.quiet_loss(model), false)];
        found.extend(self.answers(step, model)?);
        Ok(found)
    }

    /// The change of the weights since the start.
    fn changes(&self, step: usize, model: &Llama) -> Result<Measurement, Error> {
        let measures = match self.dtype {
            ModelDtype::F32 => self.changes.measure(step, model)?,
            ModelDtype::Bf16 => {
                let model = self.pretrained.trained(model, self.dtype)?;
                self.changes.measure(step, &model)?
            }
        };
        Ok(Measurement { step, measures })
    }

    /// Answers of a model in validation mode to the first held-out records, if some are logged.
    ///
    /// # Errors
    ///
    /// Those of the tokenizer.
    pub(super) fn answers(&self, step: usize, model: &Llama) -> Result<Option<Measurement>, Error> {
        let Some(held_out) = &self.held_out else {
            return Ok(None);
        };
        let count = held_out.records().len().min(self.options.samples);
        if count == 0 || self.max_new_tokens == 0 {
            return Ok(None);
        }
        let records = &held_out.records()[..count];
        let solver = Solver {
            model,
            tokens: &self.tokens,
            template: &*self.template,
            max_new_tokens: self.max_new_tokens,
        };
        let answers = solver.answers(records, || ())?;
        let answers = records.iter().zip(answers);
        let answers = answers.map(|(record, answer)| LoggedAnswer::new(record, answer));
        Ok(Some(Measurement {
            step,
            measures: Measures::Answers {
                answers: answers.collect(),
                of_output: false,
            },
        }))
    }
}

/// Whether something that is measured every so many steps is due. The last step is always one of them.
fn is_due(every: Option<usize>, step: usize, total: usize) -> bool {
    every.is_some_and(|every| step.is_multiple_of(every) || step == total)
}

impl Watch for Watching {
    fn is_due(&self, step: usize, total: usize) -> bool {
        let WatchOptions {
            eval_every,
            rank_every,
            ..
        } = self.options;
        is_due(eval_every, step, total) || is_due(rank_every, step, total)
    }

    fn measure(&self, step: usize, total: usize, model: &Llama) -> Vec<Measurement> {
        let mut found = Vec::new();
        if is_due(self.options.eval_every, step, total) {
            match self.held_out(step, model) {
                Ok(measurements) => found.extend(measurements),
                Err(error) => complain!("step {step}: no held-out loss and answers: {error}"),
            }
        }
        if is_due(self.options.rank_every, step, total) {
            match self.changes(step, model) {
                Ok(measurement) => found.push(measurement),
                Err(error) => {
                    complain!("step {step}: the change of the weights is not known: {error}")
                }
            }
        }
        found
    }
}
