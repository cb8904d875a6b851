//! `check`: tests whether this device computes correct results. See the package's `lib.rs`.

use std::process::ExitCode;

use clap::Parser;
use hd_pissa_check::{Options, run};

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(report) if report.passed() => ExitCode::SUCCESS,
        Ok(_) => ExitCode::from(1),
        Err(error) => {
            eprintln!("check could not run: {error}");
            ExitCode::from(2)
        }
    }
}
