//! The folder of recorded runs, and comparisons.

#![allow(dead_code, reason = "every test binary uses its own part")]

use std::path::{Path, PathBuf};

use burn::tensor::{Device, Int, Tensor, TensorData};
use safetensors::{Dtype, SafeTensors};

/// A file of the recorded runs: under `HD_PISSA_SHARED`, else next to the workspace. `None`, with a
/// message, if it is absent.
pub fn recorded(name: &str) -> Option<PathBuf> {
    let folder = match std::env::var_os("HD_PISSA_SHARED") {
        Some(folder) => PathBuf::from(folder),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared"),
    };
    let path = folder.join("golden").join(name);
    if path.is_file() {
        return Some(path);
    }
    eprintln!("skipped: no recorded run {name} (set HD_PISSA_SHARED to the folder of `golden`)");
    None
}

/// The SmolLM2 checkpoint in `f32` under `HD_PISSA_SMOLLM2`; `None`, with a message, if the
/// variable is not set.
pub fn smollm2() -> Option<PathBuf> {
    match std::env::var_os("HD_PISSA_SMOLLM2") {
        Some(folder) => Some(PathBuf::from(folder).join("fp32")),
        None => {
            eprintln!("skipped: HD_PISSA_SMOLLM2 names no folder with a SmolLM2 checkpoint");
            None
        }
    }
}

pub fn floats(file: &SafeTensors, name: &str) -> (Vec<f32>, Vec<usize>) {
    let view = file.tensor(name).unwrap();
    assert_eq!(view.dtype(), Dtype::F32, "{name}");
    let values = view
        .data()
        .as_chunks()
        .0
        .iter()
        .map(|&bytes| f32::from_le_bytes(bytes));
    (values.collect(), view.shape().to_vec())
}

pub fn integers(file: &SafeTensors, name: &str) -> Vec<i64> {
    let view = file.tensor(name).unwrap();
    match view.dtype() {
        Dtype::I64 => view
            .data()
            .as_chunks()
            .0
            .iter()
            .map(|&bytes| i64::from_le_bytes(bytes))
            .collect(),
        Dtype::I32 => view
            .data()
            .as_chunks()
            .0
            .iter()
            .map(|&bytes| i64::from(i32::from_le_bytes(bytes)))
            .collect(),
        other => panic!("{name} has dtype {other:?}"),
    }
}

pub fn tokens(ids: &[i64], shape: [usize; 2], device: &Device) -> Tensor<2, Int> {
    Tensor::from_data(TensorData::new(ids.to_vec(), shape), device)
}

/// Largest absolute difference of two slices of one length.
pub fn largest_difference(x: &[f32], y: &[f32]) -> f64 {
    assert_eq!(x.len(), y.len());
    let differences = x.iter().zip(y).map(|(x, y)| f64::from((x - y).abs()));
    differences.fold(0.0, f64::max)
}

pub fn largest(x: &[f32]) -> f64 {
    x.iter().map(|x| f64::from(x.abs())).fold(0.0, f64::max)
}
