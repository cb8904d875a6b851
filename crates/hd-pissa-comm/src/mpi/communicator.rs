//! A worker that is an MPI process.

use std::cell::{Cell, RefCell};
use std::fmt::{self, Debug, Formatter};
use std::time::Duration;

use burn::tensor::{DType, Device, Tensor, TensorData};

use super::group::Group;
use crate::communicator::{Call, check_root};
use crate::{CommError, Communicator, PendingGather, Traffic};

/// One worker per process, under any launcher of MPI programs (`mpirun`, `srun`, …).
///
/// Buffers go from each process to each of the others, through the host's memory, by calls that
/// do not block and are polled until a time limit: a worker that is killed or stalls ends them
/// with [`CommError::TimedOut`], which names it, and one that panics or leaves early at once with
/// [`CommError::WorkerGone`]. Whoever notices first tells the others, so that all report the same.
///
/// The messages of a gather that was started move while its worker is in any call; most MPI
/// libraries move large ones only then.
///
/// Dropping it waits until all workers drop theirs, up to the time limit, and shuts MPI down.
/// After a failure, or if not all come, the process ends without that, which launchers report:
/// MPI's own shutdown has no time limit. MPI cannot be initialized again in the same process.
///
/// ```no_run
/// use std::time::Duration;
/// use hd_pissa_comm::{Communicator, MpiCommunicator};
///
/// # fn main() -> Result<(), hd_pissa_comm::CommError> {
/// let communicator = MpiCommunicator::new(Duration::from_secs(60))?;
/// println!("worker {} of {}", communicator.worker_index(), communicator.num_workers());
/// communicator.barrier()?;
/// # Ok(())
/// # }
/// ```
pub struct MpiCommunicator {
    /// `None` only while it is dropped.
    group: RefCell<Option<Group>>,
    index: usize,
    size: usize,
    local_index: usize,
    traffic: Cell<Traffic>,
}

impl MpiCommunicator {
    /// Initializes MPI and meets the other processes.
    ///
    /// `timeout` limits every call, this one included, from the moment a worker makes it, and a
    /// started gather from the moment a worker waits for it (one that
    /// fails takes up to 0.2 s more to tell the others): choose
    /// it longer than anything that keeps one worker from its next call while others wait, such as
    /// an evaluation or a checkpoint. [`DEFAULT_TIMEOUT`](Self::DEFAULT_TIMEOUT) is 60 s.
    ///
    /// # Errors
    ///
    /// [`CommError::Unavailable`] if MPI is already initialized in this process or does not
    /// support threads; else see [`CommError`]. A launcher that cannot start every process, or an
    /// MPI library that fails to initialize, ends the process itself.
    pub fn new(timeout: Duration) -> Result<Self, CommError> {
        let mut group = Group::start(timeout)?;
        let (index, size) = (group.index(), group.size());
        let machines = group.call(Call::Barrier, group.machine(), 1)?;
        let local_index = machines[..index]
            .iter()
            .filter(|&machine| *machine == machines[index])
            .count();
        Ok(Self {
            group: RefCell::new(Some(group)),
            index,
            size,
            local_index,
            traffic: Cell::default(),
        })
    }

    /// The time limit to use without a reason for another: 60 s.
    pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(60);

    /// Index of this worker among those on the same machine: the device to use where every
    /// process sees all devices of its machine.
    pub fn local_index(&self) -> usize {
        self.local_index
    }

    fn with_group<T>(&self, work: impl FnOnce(&mut Group) -> T) -> T {
        work(
            self.group
                .borrow_mut()
                .as_mut()
                .expect("present until dropped"),
        )
    }

    fn count(&self, own: usize, theirs: usize, others: usize) {
        let mut traffic = self.traffic.get();
        traffic.count(own, theirs, others);
        self.traffic.set(traffic);
    }
}

impl Communicator for MpiCommunicator {
    fn worker_index(&self) -> usize {
        self.index
    }

    fn num_workers(&self) -> usize {
        self.size
    }

    fn all_gather(&self, buffer: Tensor<1>) -> Result<Tensor<1>, CommError> {
        self.start_all_gather(buffer)?.wait()
    }

    fn start_all_gather(
        &self,
        buffer: Tensor<1>,
    ) -> Result<Box<dyn PendingGather + '_>, CommError> {
        let (device, dtype) = (buffer.device(), buffer.dtype());
        let own = buffer.into_data().as_bytes().to_vec();
        let bytes = own.len();
        let call = self.with_group(|group| group.begin(Call::AllGather(dtype), own, dtype.size()));
        Ok(Box::new(Pending {
            communicator: self,
            call: Some(call?),
            device,
            dtype,
            bytes,
        }))
    }

    fn broadcast(&self, buffer: Tensor<1>, root: usize) -> Result<Tensor<1>, CommError> {
        check_root(root, self.size);
        let (device, dtype) = (buffer.device(), buffer.dtype());
        let own = if root == self.index {
            buffer.into_data().as_bytes().to_vec()
        } else {
            Vec::new()
        };
        let call = Call::Broadcast(dtype, root);
        let received = self
            .with_group(|group| group.call(call, own, 1))?
            .swap_remove(root);
        if root == self.index {
            self.count(received.len(), 0, self.size - 1);
        } else {
            self.count(0, received.len(), 1);
        }
        Ok(tensor(received, dtype, &device))
    }

    fn barrier(&self) -> Result<(), CommError> {
        self.with_group(|group| group.call(Call::Barrier, Vec::new(), 1))
            .map(|_| ())
    }

    fn traffic(&self) -> Traffic {
        self.traffic.get()
    }
}

/// A gather whose messages are under way.
struct Pending<'a> {
    communicator: &'a MpiCommunicator,
    /// `None` once waited for.
    call: Option<u64>,
    device: Device,
    dtype: DType,
    bytes: usize,
}

impl PendingGather for Pending<'_> {
    fn wait(mut self: Box<Self>) -> Result<Tensor<1>, CommError> {
        let call = self.call.take().expect("waited for once");
        let all = self.communicator.with_group(|group| group.complete(call))?;
        let others = self.communicator.size - 1;
        self.communicator.count(self.bytes, self.bytes, others);
        Ok(tensor(all.concat(), self.dtype, &self.device))
    }
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        if let Some(call) = self.call {
            self.communicator.with_group(|group| group.abandon(call));
        }
    }
}

fn tensor(bytes: Vec<u8>, dtype: DType, device: &Device) -> Tensor<1> {
    let len = bytes.len() / dtype.size();
    Tensor::from_data(
        TensorData::from_bytes_vec(bytes, [len], dtype),
        (device, dtype),
    )
}

impl Debug for MpiCommunicator {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.debug_struct("MpiCommunicator")
            .field("worker_index", &self.index)
            .field("num_workers", &self.size)
            .finish_non_exhaustive()
    }
}

impl Drop for MpiCommunicator {
    fn drop(&mut self) {
        if let Some(group) = self.group.get_mut().take() {
            group.leave();
        }
    }
}
