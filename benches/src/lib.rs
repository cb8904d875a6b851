//! What the benchmarks share: devices, paired timing, and where results go.

use std::path::{Path, PathBuf};
use std::time::Instant;

use burn::tensor::Device;
use serde::Serialize;

/// Pairs to take the median of.
pub const PAIRS: usize = 41;

/// The device to measure on: `HD_PISSA_DEVICE`, or Flex. Names are those of the features.
///
/// # Panics
///
/// If the name is unknown or the build lacks its feature.
pub fn device() -> (&'static str, Device) {
    let name = std::env::var("HD_PISSA_DEVICE").unwrap_or_else(|_| "flex".into());
    match name.as_str() {
        #[cfg(feature = "flex")]
        "flex" => ("flex", Device::flex()),
        #[cfg(feature = "wgpu")]
        "wgpu" => ("wgpu", Device::wgpu(Default::default())),
        #[cfg(feature = "cuda")]
        "cuda" => ("cuda", Device::cuda(0)),
        other => panic!("HD_PISSA_DEVICE={other}: unknown, or its feature is off in this build"),
    }
}

/// Milliseconds of each of `works`, called in turn `PAIRS` times after three rounds of warm-up.
///
/// `works` wait for the device themselves. The order turns round from one round to the next, so
/// that none of them always follows the same one.
pub fn alternate(works: &mut [&mut dyn FnMut()]) -> Vec<Vec<f64>> {
    let mut times = vec![Vec::with_capacity(PAIRS); works.len()];
    for round in 0..PAIRS + 3 {
        for turn in 0..works.len() {
            let which = match round % 2 {
                0 => turn,
                _ => works.len() - 1 - turn,
            };
            let start = Instant::now();
            works[which]();
            let elapsed = start.elapsed().as_secs_f64() * 1e3;
            if round >= 3 {
                times[which].push(elapsed);
            }
        }
    }
    times
}

pub fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Median of the ratios of simultaneous measurements.
pub fn median_ratio(of: &[f64], to: &[f64]) -> f64 {
    median(of.iter().zip(to).map(|(of, to)| of / to))
}

/// Writes `{"rows": rows}` to `bench/{name}.json` in the target directory.
///
/// # Panics
///
/// If the file cannot be written.
pub fn write_rows(name: &str, rows: &[impl Serialize]) {
    let file = target_directory()
        .join("bench")
        .join(format!("{name}.json"));
    let folder = file.parent().expect("joined above");
    std::fs::create_dir_all(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let json = serde_json::to_string_pretty(&serde_json::json!({ "rows": rows }))
        .expect("rows are plain data");
    std::fs::write(&file, json).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
    println!("\nwritten to {}", file.display());
}

fn target_directory() -> PathBuf {
    // `target/tmp`, which cargo names when it builds a benchmark.
    match option_env!("CARGO_TARGET_TMPDIR")
        .map(Path::new)
        .and_then(Path::parent)
    {
        Some(target) => target.into(),
        None => std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| "target".into(), PathBuf::from),
    }
}
