//! `cargo run --example llama_math -- --help` says what it can do.

use std::process::ExitCode;

use clap::Parser;
use llama_math::cli::Cli;

/// Without glibc, whose allocator needs no replacement.
#[cfg(all(
    feature = "mimalloc",
    not(all(target_os = "linux", target_env = "gnu"))
))]
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Lets the allocator keep the memory that operations give back. A step takes and returns the same
/// buffers again and again. By default they go back to the system in between, which then clears every
/// page once more.
///
/// One arena serves all threads: with one for each, none could use what another gave back. The variables
/// `MALLOC_ARENA_MAX` and the like of glibc have no effect.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn keep_memory() {
    let options = [
        (libc::M_ARENA_MAX, 1),
        // What is larger, logits above all, would leave holes that smaller buffers fill.
        (libc::M_MMAP_THRESHOLD, 4 << 20),
        (libc::M_TRIM_THRESHOLD, -1),
        (libc::M_TOP_PAD, 8 << 20),
    ];
    for (option, value) in options {
        // SAFETY: sets a number. No other thread runs yet. What glibc does not take, it ignores.
        unsafe { libc::mallopt(option, value) };
    }
}

fn main() -> ExitCode {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    keep_memory();
    match Cli::parse().run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => ExitCode::from(error.report()),
    }
}
