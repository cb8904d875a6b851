//! Recorded runs, against the recording and against Flex.

use std::path::Path;

use crate::measure::sample::Host;
use burn::tensor::{DType, Device};
use hd_pissa::{SvdMethod, SvdPrecision};

use crate::CheckError;
use crate::bounds::Arithmetic;
use crate::case::Case;
use crate::comparison::{Compared, Expected};
use crate::recorded::RecordedRun;
use crate::report::Report;

/// Number of runs with disturbed inputs, which measure the effect of rounding on a run.
const DISTURBED: u64 = 8;
/// The run itself may differ by this factor more than any of those.
const MARGIN: f64 = 4.0;

/// The recorded runs of a folder.
///
/// # Errors
///
/// If the folder or one of its files cannot be read.
pub fn read(folder: &Path) -> Result<Vec<RecordedRun>, CheckError> {
    let data = |source| CheckError::Data {
        folder: folder.into(),
        source,
    };
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(data)? {
        let path = entry.map_err(data)?.path();
        if path
            .extension()
            .is_some_and(|extension| extension == "safetensors")
        {
            files.push(path);
        }
    }
    if files.is_empty() {
        return Err(data(std::io::Error::other("no .safetensors files")));
    }
    files.sort();
    let read = |file: std::path::PathBuf| RecordedRun::read(&file);
    Ok(files.into_iter().map(read).collect::<Result<_, _>>()?)
}

/// Replays every run on the device and on Flex and compares every step's weight.
///
/// Adam's first step is close to a sign function of the gradient, so small differences grow. Runs
/// on Flex measure how much: their inputs and targets are changed at random by the typical error of
/// a product on this device, `√n·u`. The bound is `MARGIN` times the largest difference of
/// `DISTURBED` such runs at the same step. The recording may differ by the same amount again,
/// because another program made it in `f32`.
pub fn check(device: &Device, runs: &[RecordedRun], arithmetic: Arithmetic, report: &mut Report) {
    for run in runs {
        let case = Case::new("recorded run", DType::F32, run.name());
        report.case(case, || compare(device, run, arithmetic));
    }
}

fn compare(device: &Device, run: &RecordedRun, arithmetic: Arithmetic) -> Vec<Compared> {
    let weights = |run: &RecordedRun, device: &Device| {
        let weights = run.weights(device, SvdMethod::Exact(SvdPrecision::F64));
        weights.unwrap_or_else(|error| panic!("{error}"))
    };
    let flex = weights(run, &Device::flex());
    let found = match device == &Device::flex() {
        true => flex.clone(),
        false => weights(run, device),
    };
    let [d_input, d_output] = run.size();
    let disturb = |share: f64| -> Vec<f64> {
        let mut worst = vec![0.0; run.steps()];
        for seed in 0..DISTURBED {
            let disturbed = weights(&run.disturbed(share, seed), &Device::flex());
            for (step, worst) in worst.iter_mut().enumerate() {
                *worst = f64::max(*worst, largest(&disturbed[step], &flex[step]));
            }
        }
        worst
    };
    let inner = d_input.max(d_output);
    let own = disturb(arithmetic.typical(inner));
    let recorded = disturb(Arithmetic::of("flex").typical(inner));
    let per_step =
        |name: &str, found: &[Vec<f32>], bounds: Vec<f64>, to: &dyn Fn(usize) -> Vec<f32>| {
            // One row for each step: the largest difference of its weight.
            let differences = (0..run.steps()).map(|step| largest(&found[step], &to(step)) as f32);
            let found = Host {
                values: differences.collect(),
                columns: 1,
            };
            let expected = bounds.iter().enumerate().map(|(step, bound)| Expected {
                place: [step, 0],
                value: 0.0,
                // A step at rate zero moves nothing.
                bound: *bound,
            });
            Compared::new(name, found, expected.collect())
        };
    let both = own
        .iter()
        .zip(&recorded)
        .map(|(own, recorded)| MARGIN * (own + recorded));
    let own = own.iter().map(|own| MARGIN * own);
    vec![
        per_step("against the recording", &found, both.collect(), &|step| {
            run.recorded(step + 1).to_vec()
        }),
        per_step("against Flex", &found, own.collect(), &|step| {
            flex[step].clone()
        }),
    ]
}

/// The largest difference of two weights; infinite if one is NaN.
fn largest(x: &[f32], y: &[f32]) -> f64 {
    let differences = x
        .iter()
        .zip(y)
        .map(|(x, y)| (f64::from(*x) - f64::from(*y)).abs());
    differences.fold(0.0, |most, difference| match difference.is_nan() {
        true => f64::INFINITY,
        false => most.max(difference),
    })
}
