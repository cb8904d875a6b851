//! What earlier runs have left: the output, and the checkpoint to go on from.

use std::path::{Path, PathBuf};

use hd_pissa::checkpoint::{Checkpoint, Checkpoints};
use serde_json::Value;

use super::options::{FineTuning, Resume, TemplateChoice};
use crate::Error;
use crate::console::{complain, say};
use crate::lock::Lock;
use crate::output::{RECORD, Staged, normalized};

/// What the first worker finds before anyone reads.
#[derive(Default)]
pub(super) struct Places {
    /// Held until the run ends.
    pub(super) lock: Option<Lock>,
    /// The checkpoint to go on from.
    pub(super) saved: Option<Checkpoint>,
    /// The settings of the output that is there already, for a run that resumes.
    pub(super) finished: Option<Value>,
}

impl FineTuning {
    /// The folder of this run's checkpoints.
    pub(super) fn checkpoint_folder(&self) -> PathBuf {
        self.saving.folder.clone().unwrap_or_else(|| {
            let mut name = normalized(&self.output).into_os_string();
            name.push(".checkpoints");
            name.into()
        })
    }

    /// What the first worker checks before anyone reads: the output, and the checkpoints. Returns
    /// the one to go on from.
    pub(super) fn check_places(&self, checkpoints: &Checkpoints) -> Result<Places, Error> {
        let folder = checkpoints.folder();
        let mut kept = vec![&*self.model, folder, Path::new(".")];
        kept.extend(self.data.iter().map(|path| &**path));
        if let TemplateChoice::File(path) = &self.template {
            kept.push(path);
        }
        let eval = self.eval.iter().flat_map(|(paths, _)| paths);
        kept.extend(eval.map(|path| &**path));
        if normalized(&self.output).starts_with(normalized(folder)) {
            let reason = format!(
                "is inside {}, the folder of the checkpoints",
                folder.display()
            );
            return Err(Error::Option {
                option: "output",
                reason,
            });
        }
        // Two runs that write the same output have the same checkpoints, unless told otherwise.
        let lock = Lock::take(folder)?;
        let has_checkpoints = !checkpoints.steps()?.is_empty();
        Staged::tidy(&self.output)?;
        // A run that replaces an output may have got half-way.
        let finished = match self.saving.resume {
            Some(_) if !(has_checkpoints && self.overwrite) => record_of(&self.output),
            _ => None,
        };
        if finished.is_none() || self.overwrite {
            Staged::check(&self.output, self.overwrite, &kept)?;
        }
        if self.saving.resume.is_none() && !self.overwrite {
            refuse_earlier_run(checkpoints)?;
        }
        let saved = match finished {
            Some(_) => None,
            None => self.find(checkpoints, true)?,
        };
        Ok(Places {
            lock: Some(lock),
            saved,
            finished,
        })
    }

    /// The checkpoint to go on from. The first worker reports damaged ones and sets them aside; the
    /// others look after it has.
    pub(super) fn find(
        &self,
        own: &Checkpoints,
        is_first: bool,
    ) -> Result<Option<Checkpoint>, Error> {
        let (found, checkpoints, required) = match &self.saving.resume {
            None => return Ok(None),
            Some(Resume::Latest) => (own.latest()?, own.clone(), false),
            Some(Resume::At(path)) if path.join("manifest.json").exists() => {
                return Ok(Some(Checkpoint::open(path)?));
            }
            Some(Resume::At(path)) => {
                let checkpoints = Checkpoints::new(path);
                (checkpoints.latest()?, checkpoints, true)
            }
        };
        for damaged in found.damaged.iter().filter(|_| is_first) {
            complain!("skipped a damaged checkpoint: {damaged}");
        }
        let folder = checkpoints.folder().display();
        let invalid = |reason: String| Error::Option {
            option: "resume",
            reason,
        };
        match found.checkpoint {
            // Not in the folder of another run, which may be at work there.
            Some(_) if is_first && !required => checkpoints.set_aside(&found)?,
            Some(_) => {}
            None if !found.damaged.is_empty() => {
                return Err(invalid(format!("every checkpoint in {folder} is damaged")));
            }
            None if required => return Err(invalid(format!("{folder} holds no checkpoint"))),
            None if is_first => {
                say!("no checkpoint in {folder} yet: starting from the beginning");
            }
            None => {}
        }
        Ok(found.checkpoint)
    }
}

/// The settings of a finished output.
fn record_of(output: &Path) -> Option<Value> {
    let bytes = std::fs::read(output.join(RECORD)).ok()?;
    let record: Value = serde_json::from_slice(&bytes).ok()?;
    record.get("settings").cloned()
}

/// A run from the start would mix its checkpoints with those of another.
fn refuse_earlier_run(checkpoints: &Checkpoints) -> Result<(), Error> {
    let Some(step) = checkpoints.steps()?.pop() else {
        return Ok(());
    };
    let reason = format!(
        "{} holds checkpoints of an earlier run, up to step {step}; --resume goes on from there, \
         --overwrite discards them",
        checkpoints.folder().display()
    );
    Err(Error::Option {
        option: "checkpoints",
        reason,
    })
}

/// The output is on disk and replaces them.
pub(super) fn remove_checkpoints(checkpoints: &Checkpoints) {
    let folder = checkpoints.folder().display();
    match checkpoints.steps() {
        Ok(steps) if steps.is_empty() => {}
        _ => match checkpoints.discard_all() {
            Ok(()) => say!("removed: the checkpoints in {folder}, which the output replaces"),
            Err(error) => complain!("the checkpoints in {folder} are not removed: {error}"),
        },
    }
}

/// The error of a run that ended early, with what it leaves.
pub(super) fn ended(source: Error, checkpoints: &Checkpoints) -> Error {
    Error::Ended {
        source: Box::new(source),
        left: what_is_left(checkpoints),
    }
}

/// What a run that ended early leaves.
fn what_is_left(checkpoints: &Checkpoints) -> String {
    let folder = checkpoints.folder().display();
    match checkpoints.steps().map(|mut steps| steps.pop()) {
        Ok(Some(step)) => format!(
            "the checkpoint of step {step} is in {folder}, and --resume goes on from there (with \
             --change lr at another --lr)"
        ),
        Ok(None) => "no checkpoint was saved".into(),
        Err(error) => format!("the checkpoints cannot be listed: {error}"),
    }
}
