//! What has to be the same: for a run that goes on, for an output that is there already, and for all
//! workers.

use std::collections::BTreeMap;

use clap::ValueEnum;
use clap::builder::PossibleValue;
use hd_pissa::Windows;
use hd_pissa::checkpoint::{Checkpoint, CheckpointError};
use serde_json::{Value, json};

use super::options::{Change, FineTuning};
use crate::export::{ExportConfig, FORMAT, Format};
use crate::method::{SvdOption, gradients_name};
use crate::model_dtype::ModelDtype;
use crate::run::RunConfig;
use crate::team::Team;
use crate::{Error, Pretrained};

const GRADIENTS: &str = "--gradients";
const WINDOWS: &str = "--windows";
const FRAME_SCALE: &str = "--frame-scale";
const LOSS_MEAN: &str = "--loss-mean";
const PACKING: &str = "--packing";

impl FineTuning {
    /// What a run that resumes must have in common with this one, by option. Text, so that it
    /// compares exactly.
    pub(super) fn settings(
        &self,
        pretrained: &Pretrained,
        max_length: usize,
        tokens: String,
        total: usize,
    ) -> Result<BTreeMap<String, String>, Error> {
        let RunConfig {
            adaptation,
            optimizer,
            batcher,
            lr,
            decay,
            warmup_ratio,
            ..
        } = &self.run;
        let optional = |value: Option<f64>| value.map_or("none".into(), |value| value.to_string());
        let targets = adaptation.targets.as_deref().unwrap_or("the default ones");
        let mut order: String = match batcher.shuffle {
            Some(_) => "shuffled".into(),
            None => "of the file".into(),
        };
        if batcher.by_length {
            order += ", by length";
        }
        let windows = match adaptation.windows {
            // Its seed is that of the run.
            Windows::Random { .. } => "random".into(),
            windows => format!("{windows:?}").to_lowercase(),
        };
        let frame_scale = format!("{:?}", adaptation.frame_scale).to_lowercase();
        let settings: [(&str, String); 23] = [
            ("--model (SHA-256)", pretrained.digest()?),
            ("--data, as tokens (SHA-256)", tokens),
            ("--max-length", max_length.to_string()),
            ("--method", adaptation.method.to_string()),
            ("--rank", adaptation.rank.to_string()),
            ("--shards", adaptation.shards.to_string()),
            (GRADIENTS, gradients_name(adaptation.gradients).into()),
            (WINDOWS, windows),
            (FRAME_SCALE, frame_scale),
            ("--alpha", optional(adaptation.alpha)),
            ("--targets", targets.into()),
            ("--clip", optional(optimizer.clip)),
            ("--weight-decay", optimizer.weight_decay.to_string()),
            ("--wire", optimizer.wire.to_string()),
            ("--accumulation", batcher.accumulation.to_string()),
            ("--batch-size", batcher.batch_size.to_string()),
            (PACKING, if batcher.packing { "yes" } else { "no" }.into()),
            ("order of the data", order),
            (LOSS_MEAN, optimizer.loss_mean.name().into()),
            ("--seed", self.seed.to_string()),
            ("--steps", total.to_string()),
            ("--lr", lr.to_string()),
            (
                "--schedule",
                format!("{decay} after {warmup_ratio} of the steps"),
            ),
        ];
        let named = |(name, value): (&str, String)| (name.to_string(), value);
        let mut settings: BTreeMap<_, _> = settings.into_iter().map(named).collect();
        // Outputs and checkpoints from before there was a choice say nothing of the exact one, and of f32.
        if adaptation.svd == SvdOption::Krylov {
            settings.insert("--svd".into(), "krylov".into());
        }
        if self.dtype == ModelDtype::Bf16 {
            settings.insert("--dtype".into(), self.dtype.to_string());
        }
        Ok(settings)
    }

    /// What an output notes about itself: the settings of the training, and how it is written.
    pub(super) fn of_output(
        &self,
        settings: &BTreeMap<String, String>,
    ) -> BTreeMap<String, String> {
        let name = |value: &dyn Fn() -> Option<PossibleValue>| {
            value().map_or_else(String::new, |value| value.get_name().to_string())
        };
        let ExportConfig {
            dtype, rounding, ..
        } = self.export;
        let mut all = settings.clone();
        all.insert("--output-dtype".into(), name(&|| dtype.to_possible_value()));
        all.insert("--rounding".into(), name(&|| rounding.to_possible_value()));
        // Of an export other forms are known.
        all.insert(FORMAT.into(), Format::Merged.to_string());
        all
    }

    /// Whether the output that is there is what this run would make. With `--overwrite` another one is
    /// replaced.
    pub(super) fn is_finished(
        &self,
        theirs: &Value,
        ours: &BTreeMap<String, String>,
    ) -> Result<bool, Error> {
        let differs = |(name, value): &(&String, &String)| theirs.get(name) != Some(&json!(value));
        match ours.iter().find(differs) {
            None => Ok(true),
            Some(_) if self.overwrite => Ok(false),
            Some((name, ours)) => Err(Error::Option {
                option: "output",
                reason: format!(
                    "{} exists, made with {name} {} where this run has {ours}; --overwrite replaces \
                     it",
                    self.output.display(),
                    theirs.get(name).and_then(Value::as_str).unwrap_or("none")
                ),
            }),
        }
    }

    /// Compares the settings with those of the checkpoint to go on from, but for what may change.
    pub(super) fn check_settings(
        &self,
        saved: &Checkpoint,
        settings: &BTreeMap<String, String>,
        total: usize,
    ) -> Result<(), Error> {
        let mut compared = settings.clone();
        for change in &self.saving.change {
            if let Some(value) = saved.settings().get(change.setting()) {
                compared.insert(change.setting().into(), value.clone());
            }
        }
        // Checkpoints from before there was a choice say nothing of the published one.
        for (setting, published) in [
            (GRADIENTS, "per-shard"),
            (WINDOWS, "leading"),
            (FRAME_SCALE, "balanced"),
            (LOSS_MEAN, "micro-batches"),
            (PACKING, "no"),
        ] {
            if !saved.settings().contains_key(setting) && compared[setting] == published {
                compared.remove(setting);
            }
        }
        let refused = |reason: String| Error::Option {
            option: "resume",
            reason,
        };
        saved.check_settings(&compared).map_err(|error| {
            let CheckpointError::SettingMismatch { setting, .. } = &error else {
                return error.into();
            };
            let named = |change: &Change| change.setting() == setting;
            match Change::ALL.into_iter().find(named) {
                Some(change) => {
                    let name = change.setting().trim_start_matches('-');
                    refused(format!("{error}, or allow the change with --change {name}"))
                }
                None => error.into(),
            }
        })?;
        if saved.step() > total as u64 {
            return Err(refused(format!(
                "{} has taken {} steps already, more than the {total} of --steps",
                saved.path().display(),
                saved.step()
            )));
        }
        Ok(())
    }
}

/// Whether this worker has read the same as worker 0.
pub(super) fn compare_with_first(
    team: &Team<'_>,
    settings: &BTreeMap<String, String>,
    saved: Option<&Checkpoint>,
) -> Result<(), Error> {
    let mut ours = settings.clone();
    let step = saved.map_or(0, Checkpoint::step);
    ours.insert("the step to go on from".into(), step.to_string());
    let text = serde_json::to_string(&ours).expect("a map of texts has a JSON form");
    let theirs = team.text_of_first(&text)?;
    let theirs: BTreeMap<String, String> =
        serde_json::from_str(&theirs).expect("worker 0 sends the same kind of map");
    match ours
        .into_iter()
        .find(|(setting, value)| theirs.get(setting) != Some(value))
    {
        Some((setting, ours)) => Err(Error::WorkerMismatch {
            theirs: theirs.get(&setting).cloned().unwrap_or_default(),
            setting,
            ours,
        }),
        None => Ok(()),
    }
}
