//! What the benchmarks share: devices, paired timing, and where results go.

use std::path::Path;
use std::time::Instant;

use burn::tensor::Device;
use serde::Serialize;

/// Pairs to take the median of.
pub const PAIRS: usize = 41;

/// The device to measure on: `HD_PISSA_DEVICE`, or the most capable one of the build, which is Flex
/// with the default features. Names are those of the features.
///
/// # Panics
///
/// If the name is unknown or the build lacks its feature.
pub fn device() -> (&'static str, Device) {
    let most_capable = match () {
        () if cfg!(feature = "cuda") => "cuda",
        () if cfg!(feature = "wgpu") => "wgpu",
        () => "flex",
    };
    let name = std::env::var("HD_PISSA_DEVICE").unwrap_or_else(|_| most_capable.into());
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

/// Rows and columns, written as `576x1536`, for a command line.
pub fn size(text: &str) -> Result<[usize; 2], String> {
    let parts = text
        .split_once('x')
        .map(|(rows, columns)| (rows.parse(), columns.parse()));
    match parts {
        Some((Ok(rows), Ok(columns))) => Ok([rows, columns]),
        _ => Err("a size is written as 576x1536".into()),
    }
}

/// Milliseconds of each of `works`, called in turn `PAIRS` times after three rounds of warm-up.
///
/// `works` wait for the device themselves. The order turns round from one round to the next, so
/// that none of them always follows the same one.
pub fn alternate(works: &mut [&mut dyn FnMut()]) -> Vec<Vec<f64>> {
    rounds(works, 3);
    rounds(works, PAIRS)
}

/// As [`alternate`], with as many rounds as fit in about `seconds`: at least 5, at most `PAIRS`.
pub fn alternate_within(seconds: f64, works: &mut [&mut dyn FnMut()]) -> Vec<Vec<f64>> {
    rounds(works, 1);
    let round: f64 = rounds(works, 1).iter().flatten().sum();
    rounds(works, ((seconds * 1e3 / round) as usize).clamp(5, PAIRS))
}

fn rounds(works: &mut [&mut dyn FnMut()], count: usize) -> Vec<Vec<f64>> {
    let mut times = vec![Vec::with_capacity(count); works.len()];
    for round in 0..count {
        for turn in 0..works.len() {
            let which = match round % 2 {
                0 => turn,
                _ => works.len() - 1 - turn,
            };
            let start = Instant::now();
            works[which]();
            times[which].push(start.elapsed().as_secs_f64() * 1e3);
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

/// Writes `{"rows": rows}` to `bench/{name}.json` in the target directory, which is the parent of
/// `target_tmpdir`: `env!("CARGO_TARGET_TMPDIR")`, which cargo sets for benchmarks alone.
///
/// # Panics
///
/// If the file cannot be written.
pub fn write_rows(name: &str, rows: &[impl Serialize], target_tmpdir: &str) {
    let target = Path::new(target_tmpdir)
        .parent()
        .expect("a folder in the target directory");
    let folder = target.join("bench");
    std::fs::create_dir_all(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let file = folder.join(format!("{name}.json"));
    let json = serde_json::to_string_pretty(&serde_json::json!({ "rows": rows }))
        .expect("rows are plain data");
    std::fs::write(&file, json).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
    println!("\nwritten to {}", file.display());
}
