//! Changes as a LoRA adapter that Python's PEFT opens.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Value, json};

use super::tensors::{self, Names};
use super::{ExportError, WeightChange};

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
const ALPHA: [&str; 2] = ["lora_alpha", "alpha_pattern"];
const RANK: [&str; 2] = ["r", "rank_pattern"];

/// Entries of a PEFT adapter's configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Peft {
    /// Name or folder of the base model, as PEFT's `AutoPeftModel` looks for it.
    pub base_model: String,
    /// PEFT's `task_type`, such as `CAUSAL_LM`.
    pub task_type: Option<String>,
}

/// Writes changes into an existing folder as `adapter_model.safetensors` and `adapter_config.json`.
///
/// Paths must be those of PyTorch's model, with `weight` at the end. PEFT's `lora_A` of shape
/// `[rank, d_input]` and `lora_B` of shape `[d_output, rank]` are the transposes of the factors, in `f32`.
/// Alpha is the rank, so that the adapter's scale is 1. If ranks differ, `rank_pattern` and `alpha_pattern`
/// name those that are not the largest; llama.cpp's converter reads neither.
///
/// # Errors
///
/// [`ExportError::Empty`], [`ExportError::NoLayer`], [`ExportError::Io`], and [`ExportError::Content`]
/// for a path that is given twice.
pub fn write_peft(
    folder: &Path,
    changes: &[WeightChange],
    about: &Peft,
) -> Result<(), ExportError> {
    let no_layer = |change: &WeightChange| ExportError::NoLayer {
        path: change.path().into(),
    };
    tensors::write(&folder.join(WEIGHTS), changes, |change| {
        names(change.path()).ok_or_else(|| no_layer(change))
    })?;
    let rank = changes.iter().map(WeightChange::rank).max().unwrap_or(0);
    let modules = changes.iter().filter_map(|change| layer(change.path()));
    let modules: Vec<&str> = modules.collect();
    let others: BTreeMap<&str, usize> = changes
        .iter()
        .filter(|change| change.rank() != rank)
        .filter_map(|change| Some((layer(change.path())?, change.rank())))
        .collect();
    let mut config = json!({
        "peft_type": "LORA",
        "task_type": about.task_type,
        "base_model_name_or_path": about.base_model,
        "inference_mode": true,
        "bias": "none",
        "fan_in_fan_out": false,
        "lora_dropout": 0.0,
        "use_dora": false,
        "use_rslora": false,
        "modules_to_save": null,
        "target_modules": modules,
    });
    // Where alpha is the rank, the scale is 1.
    for [of_all, of_some] in [RANK, ALPHA] {
        config[of_all] = rank.into();
        config[of_some] = json!(others);
    }
    let path = folder.join(CONFIG);
    std::fs::write(&path, format!("{config:#}\n")).map_err(ExportError::io(&path))
}

/// Reads what [`write_peft`] wrote into a folder, in the order of paths.
///
/// # Errors
///
/// [`ExportError::Io`] and [`ExportError::Content`], also if the scale of the adapter is not 1 any more.
pub fn read_peft(folder: &Path) -> Result<Vec<WeightChange>, ExportError> {
    let path = folder.join(CONFIG);
    let text = std::fs::read(&path).map_err(ExportError::io(&path))?;
    let config: Value = serde_json::from_slice(&text)
        .map_err(|error| ExportError::content(&path, "content", error.to_string()))?;
    for (rank, alpha) in RANK.into_iter().zip(ALPHA) {
        if config[rank].as_f64() != config[alpha].as_f64()
            || config[rank].as_object() != config[alpha].as_object()
        {
            let reason = format!("is not the same as {rank}, so that the scale is not 1");
            return Err(ExportError::content(&path, alpha, reason));
        }
    }
    tensors::read(&folder.join(WEIGHTS), names)
}

/// The layer of a weight.
fn layer(path: &str) -> Option<&str> {
    path.strip_suffix(".weight")
}

fn names(path: &str) -> Option<Names> {
    let layer = layer(path)?;
    let name = |factor| format!("base_model.model.{layer}.lora_{factor}.weight");
    Some(Names {
        left: name("A"),
        right: name("B"),
        transposed: true,
    })
}
