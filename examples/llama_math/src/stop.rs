//! Signals that end a run after its step.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::Error;
use crate::console::complain;

/// Signals that come so soon after the first are the same request: `timeout` sends two.
const ONE_REQUEST: Duration = Duration::from_millis(500);

/// Whether the run is asked to stop.
#[derive(Clone, Debug, Default)]
pub struct Stop {
    requested: Arc<AtomicBool>,
    /// Whether steps are being taken. A signal then lets the current one finish.
    in_steps: Arc<AtomicBool>,
}

impl Stop {
    /// Listens to SIGTERM, SIGINT and SIGHUP. While steps are taken the first one asks the run to stop
    /// and to save, and says so; the second ends the process. At any other time the first one does,
    /// because nothing is lost then.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] if the system does not let it.
    pub fn on_signals() -> Result<Self, Error> {
        let stop = Self::default();
        let mut signals =
            Signals::new([SIGTERM, SIGINT, SIGHUP]).map_err(Error::io("signal handlers"))?;
        let own = stop.clone();
        let listen = move || {
            let mut first = None;
            for signal in signals.forever() {
                let first = *first.get_or_insert_with(Instant::now);
                if !own.in_steps.load(Ordering::SeqCst) {
                    std::process::exit(128 + signal);
                }
                if !own.requested.swap(true, Ordering::SeqCst) {
                    complain!("stopping: the step is finished and saved first; again ends at once");
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
        self.in_steps.store(true, Ordering::SeqCst);
    }

    /// No further steps are taken.
    pub fn end_steps(&self) {
        self.in_steps.store(false, Ordering::SeqCst);
    }
}
