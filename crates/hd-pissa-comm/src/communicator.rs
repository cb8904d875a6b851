//! The trait of all transports.

use burn::tensor::Tensor;

use crate::CommError;

/// Bytes of payload that a worker sent and received since its communicator was made.
///
/// Only buffers and byte strings count, not headers, acknowledgements and additions of the network.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Bytes this worker sent, counted once for each receiver.
    pub sent: u64,
    /// Bytes this worker received.
    pub received: u64,
}

impl Traffic {
    /// Counts one call of worker `worker`, in which worker `i` sends `sent[i]` bytes to each of the
    /// others.
    pub(crate) fn count(&mut self, worker: usize, sent: &[usize]) {
        let total: usize = sent.iter().sum();
        self.sent += (sent[worker] * (sent.len() - 1)) as u64;
        self.received += (total - sent[worker]) as u64;
    }
}

/// The exchange of flat buffers between workers, and of byte strings.
///
/// Buffers are on devices and hold floats. Byte strings carry everything else that workers tell
/// each other, and their exchange uses no device. The common messages have their own functions:
/// [`all_or_none`](crate::all_or_none), [`agree`](crate::agree) and
/// [`gather_integers`](crate::gather_integers).
///
/// Every worker calls the same methods in the same order. A call returns when all workers have made
/// it, or fails on every remaining worker within the time limit of the transport. The
/// [crate's table](crate) says what that limit covers. Buffers have any float dtype that the device
/// supports, and arrive with the same bits.
///
/// A worker that learns of a failure after its own call has succeeded fails at its next one.
///
/// A gather can be [started](Self::start_all_gather) and waited for later, with any other calls in
/// between. The order of calls is the order in which they start.
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

    /// Starts [`all_gather`](Self::all_gather). The buffers travel while this worker does something
    /// else, as far as the transport allows. By default this call does all of it.
    ///
    /// The time limit runs while this worker waits. A gather that is dropped without
    /// [`wait`](PendingGather::wait) still counts as a call of this worker.
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

    /// The sum over all workers of the values that each has for this one.
    ///
    /// - buffer: `[num_workers · n]` in f32, the same `n` on every worker; values `j·n` to
    ///   `(j + 1)·n` are for worker `j`
    /// - output: `[n]`, on the device of `buffer`
    ///
    /// The sum adds workers in pairs, 0 and 1, 2 and 3, and so on, then those sums in pairs, until
    /// one is left. The last of an odd number moves up unchanged. The bits therefore depend only on
    /// the values and the device's addition. If each worker first sums its own share this way, 2ᵏ
    /// buffers have the same sum on any number of workers that is a power of two. Only
    /// `CollectiveCommunicator` leaves the order to its library.
    ///
    /// # Errors
    ///
    /// See [`CommError`].
    ///
    /// # Panics
    ///
    /// If the length of `buffer` is not a multiple of the number of workers, or its dtype is not
    /// f32.
    fn reduce_scatter(&self, buffer: Tensor<1>) -> Result<Tensor<1>, CommError>;

    /// The byte strings of all workers, by index. They may differ in length.
    ///
    /// # Errors
    ///
    /// See [`CommError`].
    fn all_gather_bytes(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, CommError>;

    /// The byte string of worker `root`; those of the others are ignored.
    ///
    /// # Errors
    ///
    /// See [`CommError`].
    ///
    /// # Panics
    ///
    /// If there is no worker `root`.
    fn broadcast_bytes(&self, bytes: &[u8], root: usize) -> Result<Vec<u8>, CommError>;

    /// Returns when every worker has called it.
    ///
    /// # Errors
    ///
    /// See [`CommError`].
    fn barrier(&self) -> Result<(), CommError>;

    /// The traffic of this worker so far; differences give that of a step.
    fn traffic(&self) -> Traffic;
}

/// A started gather; see [`Communicator::start_all_gather`].
pub trait PendingGather {
    /// Waits for the result of [`Communicator::all_gather`].
    ///
    /// # Errors
    ///
    /// See [`CommError`].
    fn wait(self: Box<Self>) -> Result<Tensor<1>, CommError>;
}

/// A gather that is already complete.
struct Gathered(Tensor<1>);

impl PendingGather for Gathered {
    fn wait(self: Box<Self>) -> Result<Tensor<1>, CommError> {
        Ok(self.0)
    }
}
