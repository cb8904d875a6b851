//! Runs a test of the current test program in several processes, under `mpirun`.

use std::process::Command;
use std::time::{Duration, Instant};

/// Environment variable with the name of the job that the processes do.
pub const JOB: &str = "HD_PISSA_TEST_JOB";

/// Makes Open MPI 4 leave the other processes alone when one fails.
pub const RECOVERY: &[&str] = &[
    "--enable-recovery",
    "--mca",
    "orte_abort_on_non_zero_status",
    "0",
];

pub struct Run {
    pub success: bool,
    /// Standard output and error of all processes.
    pub output: String,
    pub elapsed: Duration,
}

/// Starts `workers` processes of the test `mpi::process`; `None`, with a message, if there is no
/// `mpirun` and none is required.
pub fn run(workers: usize, job: &str, flags: &[&str]) -> Option<Run> {
    let (variable, none) = super::NO_DEFAULT_DEVICE;
    let start = Instant::now();
    let result = Command::new("mpirun")
        .args([
            "--allow-run-as-root",
            "--oversubscribe",
            "--bind-to",
            "none",
        ])
        .args(["-np", &workers.to_string(), "-x", JOB, "-x", variable])
        .args(flags)
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "mpi::process", "--ignored", "--nocapture"])
        .env(JOB, job)
        .env(variable, none)
        .output();
    let output = match result {
        Ok(output) => output,
        Err(error) => {
            assert!(
                std::env::var_os("HD_PISSA_REQUIRE_MPI").is_none(),
                "HD_PISSA_REQUIRE_MPI is set, but mpirun does not start: {error}"
            );
            eprintln!("skipped: {workers} MPI processes; mpirun does not start: {error}");
            return None;
        }
    };
    let text = [output.stdout, output.stderr].concat();
    Some(Run {
        success: output.status.success(),
        output: String::from_utf8_lossy(&text).into_owned(),
        elapsed: start.elapsed(),
    })
}
