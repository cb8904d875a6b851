use std::time::Duration;

use burn::tensor::Tensor;

/// Why an exchange between workers failed. The communicator cannot be used afterwards.
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
    /// Workers sent buffers of different lengths to a gather.
    #[error("worker {worker} sent {len} values where worker 0 sent {expected}")]
    LengthMismatch {
        /// Index of the worker.
        worker: usize,
        /// Number of values it sent.
        len: usize,
        /// Number of values worker 0 sent.
        expected: usize,
    },
}

/// The exchange of flat buffers between workers.
///
/// Every worker calls the same methods in the same order. A call returns when all workers have
/// made it, or fails on every worker that is still there; no call waits for ever.
pub trait Communicator: Send {
    /// Index of this worker, below [`num_workers`](Self::num_workers).
    fn worker_index(&self) -> usize;

    /// Number of workers.
    fn num_workers(&self) -> usize;

    /// The buffers of all workers, one after the other in the order of their indices.
    ///
    /// - buffer: `[n]`, the same `n` on every worker
    /// - output: `[num_workers · n]`, on the device of `buffer`
    ///
    /// # Errors
    ///
    /// See [`CommError`].
    fn all_gather(&self, buffer: Tensor<1>) -> Result<Tensor<1>, CommError>;

    /// The buffer of worker `root`, on the device of this worker's `buffer`.
    ///
    /// # Errors
    ///
    /// See [`CommError`].
    ///
    /// # Panics
    ///
    /// If there is no worker `root`.
    fn broadcast(&self, buffer: Tensor<1>, root: usize) -> Result<Tensor<1>, CommError>;

    /// Returns when every worker has called it.
    ///
    /// # Errors
    ///
    /// See [`CommError`].
    fn barrier(&self) -> Result<(), CommError>;
}
