//! Errors of an exchange between workers.

use std::time::Duration;

/// Why an exchange between workers failed. The communicator is unusable afterwards.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CommError {
    /// A worker ended, or dropped its communicator, while others waited for it.
    #[error("worker {worker} is gone")]
    WorkerGone {
        /// Index of the worker.
        worker: usize,
    },
    /// Not every worker arrived in time.
    #[error("timed out after {after:?} waiting for workers {missing:?}")]
    TimedOut {
        /// Indices of the workers that had not arrived.
        missing: Vec<usize>,
        /// The time limit.
        after: Duration,
    },
    /// Workers sent buffers of different lengths to a gather or a reduce_scatter.
    #[error("worker {worker} sent {len} values where worker 0 sent {expected}")]
    LengthMismatch {
        /// Index of the worker.
        worker: usize,
        /// Number of values it sent to each of the others.
        len: usize,
        /// Number of values worker 0 sent.
        expected: usize,
    },
    /// Workers made different calls, or gathered values of different dtypes.
    #[error("worker {worker} called {call} where worker 0 called {expected}")]
    CallMismatch {
        /// Index of the worker.
        worker: usize,
        /// What it called.
        call: String,
        /// What worker 0 called.
        expected: String,
    },
    /// The transfer between two workers failed.
    #[error("the transfer between workers {} and {} failed: {reason}", workers[0], workers[1])]
    Transfer {
        /// Indices of the worker that noticed and of the other one.
        workers: [usize; 2],
        /// The transport's message.
        reason: String,
    },
    /// The transport cannot be set up.
    #[error("the transport cannot be set up: {reason}")]
    Unavailable {
        /// What is missing.
        reason: String,
    },
}
