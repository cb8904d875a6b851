//! The run itself: the workers' tasks in order.

use burn::module::Module;
use burn::tensor::Device;
use hd_pissa::checkpoint::Checkpoints;
use hd_pissa::comm::{Communicator, Solo};

use super::inputs::Inputs;
use super::options::FineTuning;
use super::report::summary;
use super::resume::{Places, ended, remove_checkpoints};
use super::settings::compare_with_first;
use crate::console::{conclude, say};
use crate::history::{Measurement, Measures};
use crate::lock::Lock;
use crate::run::{Outcome, Saving, Training};
use crate::stop::Stop;
use crate::team::Team;
use crate::{Error, Llama, device};

impl FineTuning {
    /// Loads, trains, evaluates and writes, with one thread for each of `devices`.
    ///
    /// # Errors
    ///
    /// Errors of the files or the settings; only the requested checkpoints are written then. After
    /// the training [`Error::NotMoved`], which says where the model is, and errors of the
    /// evaluation, when the model is already written.
    pub fn run(&self, devices: &[Device]) -> Result<(), Error> {
        self.run_with(&devices[0], Solo, |training, model, solo| {
            match devices.len() {
                1 => training.work(model, solo),
                _ => training.work_in_threads(model, devices, self.timeout),
            }
        })
    }

    /// As [`run`](Self::run), on one of the workers that `communicator` connects. Worker 0 prints,
    /// evaluates and writes; all read.
    ///
    /// # Errors
    ///
    /// Those of [`run`](Self::run). An error on any worker before the first step ends all workers:
    /// the others get [`Error::OtherWorker`].
    pub fn run_as_worker(
        &self,
        device: &Device,
        communicator: impl Communicator + 'static,
    ) -> Result<(), Error> {
        self.run_with(device, communicator, |training, model, communicator| {
            training.work(model, communicator)
        })
    }

    fn run_with<C: Communicator>(
        &self,
        device: &Device,
        communicator: C,
        train: impl FnOnce(&Training<'_>, Llama, C) -> Result<Outcome, Error>,
    ) -> Result<(), Error> {
        let team = Team::new(&communicator);
        let is_first = team.is_first();
        let workers = communicator.num_workers();
        team.agree(self.dtype.check(device))?;
        team.agree(self.run.check_workers("mpi", workers))?;
        let checkpoints = Checkpoints::new(self.checkpoint_folder());
        let checkpoints = checkpoints.with_keep_last(self.saving.keep_last);
        // The lock is held until this run ends.
        let Some((inputs, _lock)) = self.prepare(&team, &checkpoints)? else {
            return Ok(());
        };
        if is_first {
            self.announce(&inputs, workers);
        }
        let method = self.run.adaptation.method.to_string();
        let mut training = self.training(&inputs, &checkpoints, &method)?;
        device.seed(self.seed);
        let (inputs, model, before) = self.load(&team, inputs, &checkpoints, device)?;
        training.before = before;
        let stop = training.stop.clone();
        // The communicator ends with the steps, so nobody waits for the first worker's later work.
        let outcome = train(&training, model, communicator);
        if outcome.is_ok() && is_first {
            stop.begin_writing();
        } else {
            stop.end();
        }
        if !is_first {
            return outcome.map(drop);
        }
        match outcome.map_err(|error| ended(error, &checkpoints))? {
            Outcome::Finished(trained) => {
                let lines = summary(&trained);
                conclude!("{method}: {}", lines.join("\n"));
                self.finish(inputs, *trained, &checkpoints, &stop)
            }
            Outcome::Stopped {
                step,
                total,
                checkpoint,
            } => {
                conclude!(
                    "stopped after step {step} of {total}; saved: {}\nthe same command with \
                     --resume goes on from there",
                    checkpoint.display()
                );
                Ok(())
            }
        }
    }

    /// The inputs that all workers have read and agree on, and the first worker's lock; `None` if
    /// the output already exists.
    fn prepare(
        &self,
        team: &Team<'_>,
        checkpoints: &Checkpoints,
    ) -> Result<Option<(Inputs, Option<Lock>)>, Error> {
        let is_first = team.is_first();
        // Only the first worker looks for output and checkpoints, because they may change
        // meanwhile.
        let (this, own) = (self.clone(), checkpoints.clone());
        let places = team.together(move || match is_first {
            true => this.check_places(&own),
            false => Ok(Places::default()),
        })?;
        let Places {
            lock,
            saved,
            finished,
        } = places;
        let (this, own) = (self.clone(), checkpoints.clone());
        let inputs = team.together(move || match is_first {
            true => this.read(saved),
            false => this.read(this.find(&own, false)?),
        })?;
        team.agree(compare_with_first(
            team,
            &inputs.settings,
            inputs.saved.as_ref(),
        ))?;
        let finished = team.agree(match finished {
            Some(settings) => self.is_finished(&settings, &self.of_output(&inputs.settings)),
            None => Ok(false),
        })?;
        if finished && is_first {
            conclude!("finished already: {}", self.output.display());
            remove_checkpoints(checkpoints);
        }
        // The others do not need the output.
        if !team
            .text_of_first(if finished { "yes" } else { "" })?
            .is_empty()
        {
            return Ok(None);
        }
        Ok(Some((inputs, lock)))
    }

    /// The training, labelled with the name of its method.
    fn training<'a>(
        &'a self,
        inputs: &Inputs,
        checkpoints: &Checkpoints,
        method: &'a str,
    ) -> Result<Training<'a>, Error> {
        let mut training = Training::new(&self.run, inputs.sequences.clone(), method)?;
        training.resume = inputs.saved.clone();
        training.saving = Some(Saving {
            checkpoints: checkpoints.clone(),
            every: self.saving.every,
            interval: self.saving.interval,
            settings: inputs.settings.clone(),
        });
        training.stop = Stop::on_signals()?;
        training.watch = Some(inputs.watching.clone());
        Ok(training)
    }

    /// Loads the model on every worker. The first removes the checkpoints that this run replaces, and
    /// measures loss and answers before a run from the start.
    fn load(
        &self,
        team: &Team<'_>,
        inputs: Inputs,
        checkpoints: &Checkpoints,
        device: &Device,
    ) -> Result<(Inputs, Llama, Vec<Measurement>), Error> {
        let is_first = team.is_first();
        let discards = is_first && self.overwrite && inputs.saved.is_none();
        let (own, autodiff) = (checkpoints.clone(), device::training(device));
        let dtype = self.dtype;
        // While the first evaluates, the others wait here, not in a step.
        team.together(move || {
            if discards {
                own.discard_all()?;
            }
            let model = inputs.pretrained.load_as(dtype, &autodiff)?;
            let mut before = Vec::new();
            if let Some(held_out) = inputs.held_out.as_ref().filter(|_| inputs.saved.is_none())
                && is_first
            {
                let valid = model.valid();
                let measured = held_out.measured(0, held_out.loss(&valid), false);
                if let Measures::HeldOut { loss, records, .. } = measured.measures {
                    say!("held-out loss before: {loss:.4} ({records} records)");
                }
                before.push(measured);
                before.extend(inputs.watching.answers(0, &valid)?);
            }
            Ok((inputs, model, before))
        })
    }
}
