//! Signals that end a run after its step.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

use crate::Error;

/// Whether the run is asked to stop.
#[derive(Clone, Debug, Default)]
pub struct Stop {
    requested: Arc<AtomicBool>,
    /// Whether the next signal ends the process without further ado.
    at_once: Arc<AtomicBool>,
}

impl Stop {
    /// Listens to SIGTERM and SIGINT. Outside of [`steps`](Self::steps) they end the process, and
    /// so does the second one.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] if the system does not let it.
    pub fn on_signals() -> Result<Self, Error> {
        let stop = Self::default();
        stop.at_once.store(true, Ordering::SeqCst);
        for signal in [SIGTERM, SIGINT] {
            // In this order: the first signal sees `at_once` as it was.
            flag::register_conditional_shutdown(signal, 128 + signal, stop.at_once.clone())
                .and_then(|_| flag::register(signal, stop.requested.clone()))
                .and_then(|_| flag::register(signal, stop.at_once.clone()))
                .map_err(Error::io("signal handlers"))?;
        }
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

    /// Runs steps, between which somebody asks [`requested`](Self::requested).
    pub fn steps<T>(&self, run: impl FnOnce() -> T) -> T {
        self.at_once.store(false, Ordering::SeqCst);
        let result = run();
        self.at_once.store(true, Ordering::SeqCst);
        result
    }
}
