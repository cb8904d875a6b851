//! `cargo run --example llama_math -- --help` says what it can do.

use std::process::ExitCode;

use clap::Parser;
use llama_math::cli::Cli;

#[cfg(feature = "mimalloc")]
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Lets the allocator keep the memory that operations give back. A step takes and returns the same
/// buffers again and again; by default they go back to the system in between, which then clears every page
/// once more. The variable `MIMALLOC_PURGE_DELAY`, in milliseconds, has the last word.
#[cfg(feature = "mimalloc")]
fn keep_memory() {
    /// Place of `mi_option_purge_delay` among the options.
    const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;
    const NEVER: std::ffi::c_long = -1;
    // SAFETY: sets a number. No other thread runs yet.
    unsafe { libmimalloc_sys::mi_option_set_default(PURGE_DELAY, NEVER) }
}

fn main() -> ExitCode {
    #[cfg(feature = "mimalloc")]
    keep_memory();
    match Cli::parse().run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => ExitCode::from(error.report()),
    }
}
