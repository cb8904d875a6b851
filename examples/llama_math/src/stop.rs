//! Signals that end a run after its step.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::Error;
use crate::console::complain;

/// Signals this soon after the first are the same request: `timeout` sends two.
const ONE_REQUEST: Duration = Duration::from_millis(500);

/// The phase of a run, for signals.
const IDLE: u8 = 0;
const STEPS: u8 = 1;
const WRITING: u8 = 2;

/// Whether the run has been asked to stop.
#[derive(Clone, Debug, Default)]
pub struct Stop {
    requested: Arc<AtomicBool>,
    /// [`IDLE`], [`STEPS`] or [`WRITING`].
    phase: Arc<AtomicU8>,
}

impl Stop {
    /// Listens to SIGTERM, SIGINT and SIGHUP, except those that this process was started to ignore,
    /// as under `nohup`. While steps run and while the model is written, the first signal asks the
    /// run to stop afterwards, and prints that. The second signal ends the process. At any other
    /// time the first signal ends the process, because nothing is lost then.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] if the system does not allow it.
    pub fn on_signals() -> Result<Self, Error> {
        let stop = Self::default();
        let ignored = ignored();
        let heard = [SIGTERM, SIGINT, SIGHUP]
            .into_iter()
            .filter(|signal| ignored & (1 << (signal - 1)) == 0);
        let mut signals = Signals::new(heard).map_err(Error::io("signal handlers"))?;
        let own = stop.clone();
        let listen = move || {
            let mut first = None;
            for signal in signals.forever() {
                let first = *first.get_or_insert_with(Instant::now);
                let finished_first = match own.phase.load(Ordering::SeqCst) {
                    STEPS => "the step is finished and saved",
                    WRITING => "the model is written",
                    _ => std::process::exit(128 + signal),
                };
                if !own.requested.swap(true, Ordering::SeqCst) {
                    complain!("stopping: {finished_first} first; again ends at once");
                } else if first.elapsed() > ONE_REQUEST {
                    std::process::exit(128 + signal);
                }
            }
        };
        std::thread::Builder::new()
            .name("signals".into())
            .spawn(listen)
            .map_err(Error::io("signal handlers"))?;
        Ok(stop)
    }

    /// Whether a signal has come.
    pub fn requested(&self) -> bool {
        self.requested.load(Ordering::SeqCst)
    }

    /// Asks to stop from within the program.
    pub fn request(&self) {
        self.requested.store(true, Ordering::SeqCst);
    }

    /// From now on steps run, and [`requested`](Self::requested) is read after each.
    pub fn begin_steps(&self) {
        self.phase.store(STEPS, Ordering::SeqCst);
    }

    /// From now on the model is being written.
    pub fn begin_writing(&self) {
        self.phase.store(WRITING, Ordering::SeqCst);
    }

    /// From now on nothing is lost when the process ends.
    pub fn end(&self) {
        self.phase.store(IDLE, Ordering::SeqCst);
    }
}

/// The signals that this process ignores, one bit each, if the system reports them.
fn ignored() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let bits = status
        .lines()
        .find_map(|line| line.strip_prefix("SigIgn:"))
        .and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok());
    bits.unwrap_or(0)
}
