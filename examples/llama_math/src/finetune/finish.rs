//! What follows the last step: the model is written, and what is written is evaluated.

use std::path::Path;

use hd_pissa::HdPissaModule;
use hd_pissa::checkpoint::Checkpoints;

use super::inputs::Inputs;
use super::options::FineTuning;
use super::page::Written;
use super::report::{file_name, summary};
use super::resume::{ended, remove_checkpoints};
use crate::console::{complain, conclude};
use crate::export::{Card, Exported, Form, Probe, write_sums};
use crate::history::{MEASUREMENTS, Measurement, Measures};
use crate::output::Staged;
use crate::report::{REPORT, Report};
use crate::run::Trained;
use crate::stop::Stop;
use crate::{Error, Llama, Pretrained, files};

impl FineTuning {
    /// Writes, then evaluates: whatever fails or ends the program after the training, the model is
    /// there.
    pub(super) fn finish(
        &self,
        inputs: Inputs,
        mut trained: Trained,
        checkpoints: &Checkpoints,
        stop: &Stop,
    ) -> Result<(), Error> {
        // Adapters are merged, as in what is written.
        let model = inputs.pretrained.trained(&trained.model, self.dtype);
        let model = model.unwrap_or_else(|error| {
            complain!(
                "the output has the weights as --dtype {} rounds them, because the pretrained ones cannot be \
                 read again: {error}",
                self.dtype
            );
            trained.model.materialize_f32()
        });
        let device = model.device();
        let probe = Probe::new(&model, inputs.pretrained.config.max_positions);
        let card = self.card(&inputs, &trained);
        let exported = self.write(&inputs, &model, &trained, &probe, &card);
        let (exported, mut card) = exported.map_err(|error| match error {
            Error::NotMoved { .. } => error,
            error => ended(error, checkpoints),
        })?;
        stop.end();
        drop(model);
        self.print_written(&exported);
        self.draw_losses(&trained.history.record.metrics);
        remove_checkpoints(checkpoints);

        let Some(held_out) = &inputs.held_out else {
            return Ok(());
        };
        if stop.requested() {
            conclude!("stopped before the evaluation");
            return Ok(());
        }
        // What is measured is what lies on the disk.
        let model = Pretrained::open(&self.output)?.load_as(self.dtype, &device)?;
        let steps = trained.history.record.metrics.len();
        let mut written = Written {
            survived: exported.survived,
            ..Written::default()
        };
        let loss = held_out.loss(&model);
        let measured = held_out.measured(steps, loss, true);
        trained.history.record.measurements.push(measured);
        let figure = format!("held-out loss after: {loss:.4}, of the weights as they are written");
        conclude!("{figure}");
        card.figures.push(figure);
        self.rewrite(
            &card,
            &trained,
            &self.report(&inputs, &trained, &written, &device),
        );
        if self.max_new_tokens == 0 {
            return Ok(());
        }
        let (figure, answers) = held_out.answer(
            &model,
            &inputs.tokens,
            &*inputs.template,
            self.max_new_tokens,
            self.watch.samples,
        )?;
        card.figures.push(figure.clone());
        written.exact_match = Some(figure);
        if !answers.is_empty() {
            trained.history.record.measurements.push(Measurement {
                step: steps,
                measures: Measures::Answers {
                    answers,
                    of_output: true,
                },
            });
        }
        self.rewrite(
            &card,
            &trained,
            &self.report(&inputs, &trained, &written, &device),
        );
        Ok(())
    }

    /// The page of the output, as far as it is known before the weights are rounded.
    fn card(&self, inputs: &Inputs, trained: &Trained) -> Card {
        Card {
            folder: self.output.clone(),
            base: self.model.clone(),
            data: Some(self.data_name(file_name)),
            form: Form::Merged,
            settings: self.of_output(&inputs.settings),
            figures: summary(trained),
            layers: Vec::new(),
        }
    }

    /// Adds to page, record and report of an output that is in its place.
    fn rewrite(&self, card: &Card, trained: &Trained, report: &Report) {
        if let Err(error) = card.write(&self.output) {
            complain!("README.md lacks the last figures: {error}");
        }
        let files = trained.history.files();
        let record = files::replace(&self.output.join(MEASUREMENTS), &files[MEASUREMENTS]);
        if let Err(error) = record.and_then(|()| report.write(&self.output)) {
            complain!("{MEASUREMENTS} or {REPORT} lacks the last figures: {error}");
        }
    }

    /// Writes the model, the record of its training and a report as the output; elsewhere if that fails,
    /// which is an error that says where.
    fn write(
        &self,
        inputs: &Inputs,
        model: &Llama,
        trained: &Trained,
        probe: &Probe,
        card: &Card,
    ) -> Result<(Exported, Card), Error> {
        let settings = serde_json::to_value(self.of_output(&inputs.settings));
        let settings = settings.expect("a map of texts has a JSON form");
        let write = |folder: &Path| {
            let exported = inputs.pretrained.export(model, folder, &self.export)?;
            for (name, content) in trained.history.files() {
                let path = folder.join(name);
                std::fs::write(&path, content).map_err(Error::io(path))?;
            }
            let written = Written {
                survived: exported.survived,
                ..Written::default()
            };
            self.report(inputs, trained, &written, &model.device())
                .write(folder)?;
            probe.write(folder)?;
            let mut card = card.clone();
            card.figures.extend(exported.figure());
            card.write(folder)?;
            write_sums(folder)?;
            Ok((exported, card))
        };
        let staged = Staged::new(&self.output, self.overwrite).and_then(|staged| {
            let exported = write(staged.path())?;
            Ok((staged, exported))
        });
        match staged {
            Ok((staged, exported)) => {
                staged.with_settings(settings).commit()?;
                Ok(exported)
            }
            // Anywhere is better than nowhere.
            Err(Error::Io { source, .. }) => {
                let write = |folder: &Path| write(folder).map(drop);
                Err(Staged::rescue(&self.output, source, &settings, write))
            }
            Err(error) => Err(error),
        }
    }
}
