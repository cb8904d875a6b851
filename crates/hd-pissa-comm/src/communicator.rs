//! What every transport offers.

use burn::tensor::Tensor;

use crate::CommError;

/// Bytes of payload that a worker sent and received since its communicator was made.
///
/// Buffers and byte strings only: headers, acknowledgements and what the network adds are not
/// counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Bytes this worker sent, once for each worker that it sent them to.
    pub sent: u64,
    /// Bytes this worker received.
    pub received: u64,
}

impl Traffic {
    /// Counts one call of worker `worker`, in which each worker sends to each of the others as many
    /// bytes as `sent` says.
    pub(crate) fn count(&mut self, worker: usize, sent: &[usize]) {
        let total: usize = sent.iter().sum();
        self.sent += (sent[worker] * (sent.len() - 1)) as u64;
        self.received += (total - sent[worker]) as u64;
    }
}

/// The exchange of flat buffers between workers, and of byte strings.
///
/// Buffers are on devices and hold floats; byte strings are for everything else that workers tell
/// each other, and no device takes part in their exchange. What is usually told has functions of
/// its own: [`all_or_none`](crate::all_or_none), [`agree`](crate::agree) and
/// [`gather_integers`](crate::gather_integers).
///
/// Every worker calls the same methods in the same order. A call returns when all workers have
/// made it, or fails on every worker that is still there, within the time limit of the transport;
/// the [crate's table](crate) says what that limit covers. Buffers are of any float dtype that the
/// device holds, and arrive with the bits they were sent with.
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

    /// The sum over all workers of what each has for this one.
    ///
    /// - buffer: `[num_workers · n]` in f32, the same `n` on every worker; values `j·n` to
    ///   `(j + 1)·n` are for worker `j`
    /// - output: `[n]`, on the device of `buffer`
    ///
    /// Workers are summed in pairs, 0 and 1, 2 and 3, and so on, then those sums in pairs, until
    /// one is left; the last of an odd number goes on as it is. So the bits depend on nothing but
    /// the values and the device's addition, and 2ᵏ buffers summed this way have the same sum on
    /// any number of workers that is a power of two, if each first sums its own share this way.
    /// `CollectiveCommunicator` alone leaves the order to its library.
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

    /// The byte string of worker `root`; what the others hand over is not looked at.
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
