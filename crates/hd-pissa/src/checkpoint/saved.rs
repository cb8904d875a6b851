//! A complete checkpoint.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::module::Module;
use burn::store::ModuleRecord;
use burn::tensor::Bytes;
use hd_pissa_comm::Communicator;
use serde_json::Value;

use super::manifest::Manifest;
use super::parameters::Parameters;
use super::{CheckpointError, RestoreError, states};
use crate::{HdPissa, HdPissaConfig};

pub(super) const MODEL: &str = "model.bpk";
pub(super) const OPTIMIZER: &str = "optimizer.bpk";

pub(super) fn frames_file(shard: usize, shards: usize) -> String {
    format!("frames-{shard}-of-{shards}.bpk")
}

pub(super) fn moments_file(shard: usize, shards: usize) -> String {
    format!("moments-{shard}-of-{shards}.bpk")
}

/// A checkpoint whose files have been verified.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    pub(super) path: PathBuf,
    pub(super) manifest: Manifest,
}

impl Checkpoint {
    /// Opens the checkpoint in the folder `path` and compares each of its files with its digest.
    ///
    /// # Errors
    ///
    /// [`CheckpointError::Damaged`] with the file at fault, and
    /// [`CheckpointError::UnsupportedVersion`].
    pub fn open(path: impl Into<PathBuf>) -> Result<Self, CheckpointError> {
        let path = path.into();
        let manifest = Manifest::verify(&path)?;
        Ok(Self { path, manifest })
    }

    /// Its folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Number of steps taken.
    pub fn step(&self) -> u64 {
        self.manifest.step
    }

    /// Number of shards of the adapters; 0 for a model without HD-PiSSA adapters.
    pub fn shards(&self) -> usize {
        self.manifest.shards
    }

    /// The settings of the run that wrote it.
    pub fn settings(&self) -> &BTreeMap<String, String> {
        &self.manifest.settings
    }

    /// The run's own data; see [`Snapshot::progress`](super::Snapshot::progress).
    pub fn progress(&self) -> &Value {
        &self.manifest.progress
    }

    /// Compares the settings of a resuming run with the saved ones.
    ///
    /// # Errors
    ///
    /// [`CheckpointError::SettingMismatch`] with both values of the first that differs.
    pub fn check_settings(
        &self,
        settings: &BTreeMap<String, String>,
    ) -> Result<(), CheckpointError> {
        let saved = self.settings();
        for setting in saved.keys().chain(settings.keys()) {
            let [saved, given] =
                [saved, settings].map(|all| all.get(setting).map_or("none", String::as_str));
            if saved != given {
                return Err(CheckpointError::SettingMismatch {
                    path: self.path.clone(),
                    setting: setting.clone(),
                    saved: saved.into(),
                    given: given.into(),
                });
            }
        }
        Ok(())
    }

    /// The content of an attached file; see
    /// [`Snapshot::attachments`](super::Snapshot::attachments).
    ///
    /// # Errors
    ///
    /// [`CheckpointError::Damaged`] if the checkpoint has no such file or it cannot be read.
    pub fn attachment(&self, name: &str) -> Result<Vec<u8>, CheckpointError> {
        let path = self.path.join(name);
        if !self.manifest.has_file(name) {
            let reason = "the checkpoint has no such file";
            return Err(CheckpointError::damaged(path, reason));
        }
        std::fs::read(&path).map_err(|error| CheckpointError::damaged_by(&path, error))
    }

    /// Gives `model` the saved values and ids of all its parameters.
    ///
    /// The model has the adapters of the shards that this worker hosts. They may differ from those
    /// of the worker that saved them. Parameters keep their device, and whether they train.
    ///
    /// # Errors
    ///
    /// [`RestoreError`], which gives the model back, with [`CheckpointError::Parameter`] for a
    /// parameter that only the model or only the checkpoint has, or whose shape or dtype differs,
    /// [`CheckpointError::SettingMismatch`] or [`CheckpointError::Damaged`].
    pub fn restore<M: Module>(&self, model: M) -> Result<M, RestoreError<M>> {
        let records = match self.records(&model) {
            Ok(records) => records,
            Err(cause) => {
                let model = Some(model);
                return Err(RestoreError { model, cause });
            }
        };
        records
            .into_iter()
            .try_fold(model, |model, (path, record)| {
                let restored = model.try_load_record(record.allow_partial(true));
                restored.map_err(|error| RestoreError {
                    model: None,
                    cause: CheckpointError::damaged_by(path, error),
                })
            })
    }

    /// The records of the parameters of `model`, each checked against the model.
    fn records<M: Module>(
        &self,
        model: &M,
    ) -> Result<Vec<(PathBuf, ModuleRecord)>, CheckpointError> {
        let parameters = Parameters::of(model);
        let files = self.parts(&parameters, parameters.known(), MODEL, frames_file)?;
        let records = files.into_iter().map(|(shard, path)| {
            parameters.check(shard, &path)?;
            let record = ModuleRecord::load(&path);
            let record = record.map_err(|error| CheckpointError::damaged_by(&path, error))?;
            Ok((path, record))
        });
        records.collect()
    }

    /// Attaches adapters as [`apply_hd_pissa`](crate::HdPissaModule::apply_hd_pissa) does, and
    /// gives all parameters the saved values and ids as [`restore`](Self::restore) does. Nothing is
    /// decomposed: the frames are those of the checkpoint.
    ///
    /// `model` has no adapters yet, and `config` is that of the checkpointed run. The first hosted shard
    /// is selected.
    ///
    /// # Errors
    ///
    /// [`CheckpointError::Adapter`] for a configuration that does not fit the model, and those of
    /// `restore`.
    pub fn apply_hd_pissa<M: Module>(
        &self,
        model: M,
        config: &HdPissaConfig,
        hosted_shards: impl IntoIterator<Item = usize>,
    ) -> Result<M, CheckpointError> {
        let blank = HdPissa::blank(&model, config, hosted_shards)?;
        let restored = self.restore(model.apply_reparameterization(blank));
        restored.map_err(CheckpointError::from)
    }

    /// The optimizer's state for the shards that the worker of `communicator` hosts, for
    /// [`HdPissaOptimizerRecord::from_bytes`](crate::HdPissaOptimizerRecord::from_bytes) or
    /// [`ModuleOptimizer::from_bytes`](burn::optim::ModuleOptimizer::from_bytes), depending on
    /// which was saved. `model` is the one that [`restore`](Self::restore) returned.
    ///
    /// # Errors
    ///
    /// [`CheckpointError::Damaged`].
    pub fn optimizer<M: Module>(
        &self,
        model: &M,
        communicator: &dyn Communicator,
    ) -> Result<Bytes, CheckpointError> {
        let parameters = Parameters::of(model);
        let hosted = parameters.hosted(communicator);
        let files = self.parts(&parameters, hosted, OPTIMIZER, moments_file)?;
        let files = files.iter().map(|(_, path)| path.as_path());
        states::merge(&self.path, files, &parameters)
    }

    /// The file of parameters outside the shards, and those of `shards`.
    fn parts(
        &self,
        parameters: &Parameters,
        shards: Vec<usize>,
        dense: &str,
        of_shard: fn(usize, usize) -> String,
    ) -> Result<Vec<(Option<usize>, PathBuf)>, CheckpointError> {
        let (saved, given) = (self.manifest.frames, parameters.frames);
        let settings = [
            (
                "shards",
                self.shards().to_string(),
                parameters.shards.to_string(),
            ),
            (
                "windows",
                format!("{:?}", saved.windows),
                format!("{:?}", given.windows),
            ),
            (
                "frame_scale",
                format!("{:?}", saved.scale),
                format!("{:?}", given.scale),
            ),
            (
                "gradients",
                format!("{:?}", self.manifest.gradients),
                format!("{:?}", parameters.gradients),
            ),
        ];
        for (setting, saved, given) in settings {
            if saved != given {
                return Err(CheckpointError::SettingMismatch {
                    path: self.path.clone(),
                    setting: setting.into(),
                    saved,
                    given,
                });
            }
        }
        let shards = shards
            .into_iter()
            .map(|shard| (Some(shard), of_shard(shard, self.shards())));
        [(None, dense.to_string())]
            .into_iter()
            .chain(shards)
            .map(|(shard, name)| match self.manifest.has_file(&name) {
                true => Ok((shard, self.path.join(name))),
                false => {
                    let reason = "the checkpoint has no such file";
                    Err(CheckpointError::damaged(self.path.join(name), reason))
                }
            })
            .collect()
    }
}
