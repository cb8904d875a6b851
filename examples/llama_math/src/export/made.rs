//! The folder of an earlier run or export: its record, and the model in it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{Device, Tensor};
use hd_pissa::export::{ExportError, WeightChange, read_delta, read_peft};
use hd_pissa::{FrameScale, HdPissaConfig, Windows};
use regex::Regex;
use serde::Deserialize;

use super::format::Format;
use crate::method::{DEFAULT_TARGETS, Method, SvdOption};
use crate::output::RECORD;
use crate::pretrained::TensorName;
use crate::{Error, Llama, Pretrained, files};

/// Name of the file of a delta.
pub(super) const DELTA: &str = "delta.safetensors";
/// Setting with the form of an output.
pub(crate) const FORMAT: &str = "--format";
const BASE: &str = "--model (SHA-256)";

/// A folder that this program has written, with its record.
pub(super) struct Made {
    pub(super) folder: PathBuf,
    pub(super) written_by: String,
    pub(super) settings: BTreeMap<String, String>,
    pub(super) format: Format,
}

#[derive(Deserialize)]
struct Record {
    written_by: String,
    settings: BTreeMap<String, String>,
}

impl Made {
    /// Reads the record of a folder.
    ///
    /// # Errors
    ///
    /// [`Error::Field`] for a folder that no run or export has written.
    pub(super) fn open(folder: &Path) -> Result<Self, Error> {
        let path = folder.join(RECORD);
        if folder.is_dir() && !path.exists() {
            let reason =
                "is missing, so that no run or export of this program has made this folder";
            return Err(Error::field(folder, RECORD, reason));
        }
        let broken = |error: serde_json::Error| Error::field(&path, "content", error.to_string());
        let record = serde_json::from_str(&files::text(&path)?).map_err(broken)?;
        let Record {
            written_by,
            settings,
        } = record;
        let format = match settings.get(FORMAT) {
            None => Format::Merged,
            Some(name) => Format::parse(name)
                .ok_or_else(|| Error::field(&path, FORMAT, format!("is `{name}`")))?,
        };
        Ok(Self {
            folder: folder.into(),
            written_by,
            settings,
            format,
        })
    }

    /// A setting of the training.
    pub(super) fn setting(&self, name: &str) -> Result<&str, Error> {
        let value = self.settings.get(name).map(String::as_str);
        value.ok_or_else(|| self.refuse(name, "is missing"))
    }

    fn refuse(&self, setting: &str, reason: impl Into<String>) -> Error {
        Error::field(self.folder.join(RECORD), setting, reason)
    }

    fn number<T: std::str::FromStr>(&self, name: &str) -> Result<T, Error> {
        let value = self.setting(name)?;
        let number = value.parse().ok();
        number.ok_or_else(|| self.refuse(name, format!("is `{value}`, no number")))
    }

    /// The pretrained model that was trained, which must be the one in `folder`.
    ///
    /// # Errors
    ///
    /// Those of [`Pretrained::open`], and [`Error::Field`] with both digests for another model.
    pub(super) fn base(&self, folder: &Path) -> Result<Pretrained, Error> {
        let expected = self.setting(BASE)?;
        let base = Pretrained::open(folder)?;
        let found = base.digest()?;
        if found == expected {
            return Ok(base);
        }
        let reason = format!(
            "is {found}, but {} was trained from a model with {expected}; --model must name that one",
            self.folder.display()
        );
        Err(Error::field(
            folder,
            "SHA-256 of config.json and weights",
            reason,
        ))
    }

    /// The configuration of the adapters, and the names of the weights that had one.
    ///
    /// # Errors
    ///
    /// [`Error::Field`] for another method than HD-PiSSA.
    pub(super) fn adapters(&self) -> Result<(HdPissaConfig, Regex), Error> {
        let method = self.setting("--method")?;
        if method != Method::HdPissa.to_string() {
            let reason = format!(
                "is {method}; only of hd-pissa is it known which low-rank form a change has, and the \
                 other methods can be exported as merged"
            );
            return Err(self.refuse("--method", reason));
        }
        let seed = self.number("--seed")?;
        let windows = match self.setting("--windows")? {
            "leading" => Windows::Leading,
            "spread" => Windows::Spread,
            "trailing" => Windows::Trailing,
            "random" => Windows::Random { seed },
            other => return Err(self.refuse("--windows", format!("is `{other}`"))),
        };
        let frame_scale = match self.setting("--frame-scale")? {
            "balanced" => FrameScale::Balanced,
            "unit" => FrameScale::Unit,
            other => return Err(self.refuse("--frame-scale", format!("is `{other}`"))),
        };
        let svd = match self.settings.get("--svd").map(String::as_str) {
            Some("krylov") => SvdOption::Krylov,
            _ => SvdOption::Exact,
        };
        let config = HdPissaConfig::new()
            .with_svd(svd.into())
            .with_rank(self.number("--rank")?)
            .with_shards(self.number("--shards")?)
            .with_windows(windows)
            .with_frame_scale(frame_scale);
        let targets = match self.setting("--targets")? {
            "the default ones" => DEFAULT_TARGETS,
            pattern => pattern,
        };
        let targets = Regex::new(targets).map_err(|_| {
            self.refuse("--targets", format!("`{targets}` is no regular expression"))
        })?;
        Ok((config, targets))
    }

    /// The changes that a LoRA adapter or a delta holds; of a merged model none.
    pub(super) fn changes(&self) -> Result<Vec<WeightChange>, Error> {
        Ok(match self.format {
            Format::Merged => Vec::new(),
            Format::Lora => read_peft(&self.folder)?,
            Format::Delta => read_delta(&self.folder.join(DELTA))?,
        })
    }
}

/// The pretrained model with changes added to it.
///
/// # Errors
///
/// Those of [`Pretrained::load`], and [`Error::Export`] for changes of another model.
pub(super) fn changed(
    base: &Pretrained,
    changes: Vec<WeightChange>,
    device: &Device,
) -> Result<Llama, Error> {
    let changes = changes.into_iter();
    let mut add = Add {
        names: TensorName::default(),
        changes: changes
            .map(|change| (change.path().into(), change))
            .collect(),
        error: None,
    };
    let model = base.load(device)?.map(&mut add);
    if let Some(error) = add.error {
        return Err(error.into());
    }
    match add.changes.keys().next() {
        None => Ok(model),
        Some(path) => {
            let reason = "the model has no such weight, but the export has a change of it";
            Err(Error::field(&base.folder, path, reason))
        }
    }
}

/// Adds each weight's change and removes it from those that are left.
struct Add {
    names: TensorName,
    changes: BTreeMap<String, WeightChange>,
    error: Option<ExportError>,
}

impl ModuleMapper for Add {
    fn enter_module(&mut self, name: &str, container_type: &str) {
        self.names.enter(name, container_type);
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.names.exit();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if D != 2 || self.error.is_some() {
            return param;
        }
        let Some(change) = self.changes.remove(&self.names.name()) else {
            return param;
        };
        param.map(|value| {
            let weight = Tensor::<2>::from_dispatch(value.clone().into_dispatch());
            match change.added_to(&weight) {
                Ok(sum) => Tensor::from_dispatch(sum.into_dispatch()),
                Err(error) => {
                    self.error = Some(error);
                    value
                }
            }
        })
    }
}
