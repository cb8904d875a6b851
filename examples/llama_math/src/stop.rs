//! Signals that end a run after its step.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::Error;
use crate::console::complain;

/// Signals that come so soon after the first are the same request: `timeout` sends two.
const ONE_REQUEST: Duration = Duration::from_millis(500);

/// What a run is doing, as far as signals are concerned.
const IDLE: u8 = 0;
const STEPS: u8 = 1;
const WRITING: u8 = 2;

/// Whether the run is asked to stop.
#[derive(Clone, Debug, Default)]
pub struct Stop {
    requested: Arc<AtomicBool>,
    /// [`IDLE`], [`STEPS`] or [`WRITING`].
    phase: Arc<AtomicU8>,
}

impl Stop {
    /// Listens to SIGTERM, SIGINT and SIGHUP, but for those that this process was started to ignore,
    /// as under `nohup`. While steps are taken and while the model is written the first signal asks
    /// the run to stop after that, and says so; the second ends the process. At any other time the
    /// first one does, because nothing is lost then.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] if the system does not let it.
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

    /// Asks for it from within the program.
    pub fn request(&self) {
        self.requested.store(true, Ordering::SeqCst);
    }

    /// From now on steps are taken, after each of which somebody asks
    /// [`requested`](Self::requested).
    pub fn begin_steps(&self) {
        self.phase.store(STEPS, Ordering::SeqCst);
    }

    /// From now on the model is written.
    pub fn begin_writing(&self) {
        self.phase.store(WRITING, Ordering::SeqCst);
    }

    /// Nothing is lost any more when the process ends.
    pub fn end(&self) {
        self.phase.store(IDLE, Ordering::SeqCst);
    }
}

/// The signals that this process ignores, one bit each, where the system tells.
fn ignored() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let bits = status
        .lines()
        .find_map(|line| line.strip_prefix("SigIgn:"))
        .and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok());
    bits.unwrap_or(0)
}
