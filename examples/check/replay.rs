//! Replays recorded single-layer runs of HD-PiSSA and compares the weights step by step.
//!
//! ```text
//! cargo run --release --example replay -- tests/data/*.safetensors
//! ```

use std::path::PathBuf;
use std::process::ExitCode;

use burn::tensor::Device;
use clap::{Parser, ValueEnum};
use hd_pissa::{SvdMethod, SvdPrecision};
use hd_pissa_check::measure::open;
use hd_pissa_check::recorded::{RecordedRun, ReplayError};

/// Replay recorded single-layer runs; exits with 1 if one differs or cannot be read.
#[derive(Parser)]
struct Arguments {
    /// Recorded runs, safetensors files.
    #[arg(required = true)]
    files: Vec<PathBuf>,
    /// Largest difference allowed, as a share of the run's largest change of a weight.
    #[arg(long, default_value_t = 1e-4)]
    tolerance: f64,
    /// Where to compute: a backend of this build.
    #[arg(long, default_value = "flex", value_parser = open)]
    device: Device,
    /// The singular value decomposition: exact in this precision, or block Krylov.
    #[arg(long, value_enum, default_value_t = Svd::F64)]
    svd: Svd,
}

#[derive(Clone, Copy, ValueEnum)]
enum Svd {
    F32,
    F64,
    Krylov,
}

impl From<Svd> for SvdMethod {
    fn from(svd: Svd) -> Self {
        match svd {
            Svd::F32 => SvdMethod::Exact(SvdPrecision::F32),
            Svd::F64 => SvdMethod::Exact(SvdPrecision::F64),
            Svd::Krylov => SvdMethod::Krylov,
        }
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let mut failures = 0;
    for file in &arguments.files {
        match replay(file, &arguments) {
            Ok(true) => {}
            Ok(false) => failures += 1,
            Err(error) => {
                eprintln!("error: {error}");
                failures += 1;
            }
        }
    }
    if failures == 0 {
        ExitCode::SUCCESS
    } else {
        eprintln!("{failures} of {} runs failed", arguments.files.len());
        ExitCode::FAILURE
    }
}

/// Whether the run is within the tolerance.
fn replay(file: &std::path::Path, arguments: &Arguments) -> Result<bool, ReplayError> {
    let run = RecordedRun::read(file)?;
    let errors = run.replay(&arguments.device, arguments.svd.into())?;
    println!("{}: {}", run.name(), run.describe());
    for (step, error) in errors.iter().enumerate() {
        println!("  step {:>3}  {error:.2e}", step + 1);
    }
    let worst = errors.iter().copied().fold(0.0, f64::max);
    let within = worst <= arguments.tolerance;
    println!(
        "  {}: largest difference {worst:.2e}, tolerance {:.0e}",
        if within { "ok" } else { "DIFFERS" },
        arguments.tolerance
    );
    Ok(within)
}
