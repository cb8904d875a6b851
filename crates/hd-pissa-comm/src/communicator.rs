//! What every transport does, and how it fails.

use std::fmt::{self, Display, Formatter};
use std::time::Duration;

use burn::tensor::{DType, Tensor};

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
        /// What the transport says about it.
        reason: String,
    },
    /// The transport cannot be set up.
    #[error("the transport cannot be set up: {reason}")]
    Unavailable {
        /// What is missing.
        reason: String,
    },
}

/// Bytes of payload that a worker sent and received since its communicator was made.
///
/// Buffers only: headers, acknowledgements and what the network adds are not counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Bytes this worker sent, once for each worker that it sent them to.
    pub sent: u64,
    /// Bytes this worker received.
    pub received: u64,
}

impl Traffic {
    /// Counts one call in which this worker sends `own` bytes to each of `others` workers, which
    /// send it `theirs` bytes each.
    pub(crate) fn count(&mut self, own: usize, theirs: usize, others: usize) {
        self.sent += (own * others) as u64;
        self.received += (theirs * others) as u64;
    }
}

/// The exchange of flat buffers between workers.
///
/// Every worker calls the same methods in the same order. A call returns when all workers have
/// made it, or fails on every worker that is still there, within the transport's time limit. Buffers
/// are of any float dtype that the device holds, and arrive with the bits they were sent with.
/// Transports say where they fall short of this.
///
/// A worker that learns of a failure after its own call has succeeded fails at its next one.
///
/// A gather can be [started](Self::start_all_gather) and waited for later, with any other calls in
/// between; what counts as the order of calls is the order in which they start.
pub trait Communicator: Send {
    /// Index of this worker, below [`num_workers`](Self::num_workers).
    fn worker_index(&self) -> usize;

    /// Number of workers.
    fn num_workers(&self) -> usize;

    /// The buffers of all workers, one after the other in the order of their indices.
    ///
    /// - buffer: `[n]`, the same `n` and dtype on every worker
    /// - output: `[num_workers · n]`, on the device of `buffer`
    ///
    /// # Errors
    ///
    /// See [`CommError`].
    fn all_gather(&self, buffer: Tensor<1>) -> Result<Tensor<1>, CommError>;

    /// Starts [`all_gather`](Self::all_gather), so that the buffers travel while this worker does
    /// something else, as far as the transport allows; by default all of it happens here.
    ///
    /// The time limit runs while this worker waits. Dropped without
    /// [`wait`](PendingGather::wait), the gather still counts as a call that this worker made.
    ///
    /// # Errors
    ///
    /// See [`CommError`].
    fn start_all_gather(
        &self,
        buffer: Tensor<1>,
    ) -> Result<Box<dyn PendingGather + '_>, CommError> {
        Ok(Box::new(Gathered(self.all_gather(buffer)?)))
    }

    /// The buffer of worker `root`, on the device of this worker's `buffer`.
    ///
    /// - buffer: any length, the same dtype on every worker
    /// - output: as long as that of `root`
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

    /// What this worker has sent and received so far; differences give the cost of a step.
    fn traffic(&self) -> Traffic;
}

/// A gather under way; see [`Communicator::start_all_gather`].
pub trait PendingGather {
    /// What [`Communicator::all_gather`] returns, once it is there.
    ///
    /// # Errors
    ///
    /// See [`CommError`].
    fn wait(self: Box<Self>) -> Result<Tensor<1>, CommError>;
}

/// A gather that is over already.
struct Gathered(Tensor<1>);

impl PendingGather for Gathered {
    fn wait(self: Box<Self>) -> Result<Tensor<1>, CommError> {
        Ok(self.0)
    }
}

/// What a worker calls, for the comparison with the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Call {
    AllGather(DType),
    Broadcast(DType, usize),
    Barrier,
}

impl Display for Call {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::AllGather(dtype) => write!(f, "all_gather of {dtype:?} values"),
            Self::Broadcast(dtype, root) => {
                write!(f, "broadcast of {dtype:?} values from worker {root}")
            }
            Self::Barrier => write!(f, "barrier"),
        }
    }
}

/// Compares the workers' calls, and the lengths of what they gather, with those of worker 0.
pub(crate) fn agree(calls: &[(Call, usize)]) -> Result<(), CommError> {
    let (expected, expected_len) = calls[0];
    for (worker, &(call, len)) in calls.iter().enumerate() {
        if call != expected {
            return Err(CommError::CallMismatch {
                worker,
                call: call.to_string(),
                expected: expected.to_string(),
            });
        }
        if matches!(call, Call::AllGather(_)) && len != expected_len {
            return Err(CommError::LengthMismatch {
                worker,
                len,
                expected: expected_len,
            });
        }
    }
    Ok(())
}

/// Stops a broadcast from a worker that does not exist.
pub(crate) fn check_root(root: usize, workers: usize) {
    assert!(root < workers, "broadcast from worker {root} of {workers}");
}
