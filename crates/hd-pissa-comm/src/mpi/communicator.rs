//! A worker that is a process: buffers of a device on one side, messages of bytes on the other.

use std::cell::RefCell;
use std::fmt::{self, Debug, Formatter};
use std::time::Duration;

use burn::tensor::{DType, Device, Tensor, TensorData};

use super::group::Group;
use crate::call::{Call, check_root};
use crate::sum::{chunk_len, tree_sum};
use crate::{CommError, Communicator, PendingGather, Traffic};

/// One worker per process, under any launcher of MPI programs (`mpirun`, `srun`, …).
///
/// Buffers go from each process to each of the others, through the host's memory. The calls do not
/// block; the worker polls them until a time limit. If another worker is killed or stalls, they end
/// with [`CommError::TimedOut`], which names it. If it panics or leaves early, they end at once
/// with [`CommError::WorkerGone`]. The first worker to notice tells the others, so all report the
/// same.
///
/// The messages of a started gather move while its worker is in any call; most MPI libraries move
/// large messages only then.
///
/// Dropping it waits until all workers drop theirs, up to the time limit, and shuts MPI down. After
/// a failure, or if not all workers come, the process ends without the shutdown, because MPI's own
/// shutdown has no time limit. Launchers report this. MPI cannot be initialized again in the same
/// process.
///
/// It can be made, used and dropped on different threads. MPI must be shut down by the thread that
/// initialized it; a dedicated thread does both.
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
}

impl MpiCommunicator {
    /// Initializes MPI and meets the other processes.
    ///
    /// `timeout` limits every call, including this one, from the moment a worker makes it. It
    /// limits a started gather from the moment a worker waits for it. A failed call takes up to 0.2
    /// s more to tell the others. Choose a limit longer than anything that keeps one worker from
    /// its next call while others wait, such as an evaluation or a checkpoint. A limit beyond the
    /// range of the clock, such as [`Duration::MAX`], means no limit, for calls and for the drop.
    /// [`DEFAULT_TIMEOUT`](Self::DEFAULT_TIMEOUT) is 60 s.
    ///
    /// # Errors
    ///
    /// [`CommError::Unavailable`] if MPI is already initialized in this process or does not
    /// support threads; else see [`CommError`]. A launcher that cannot start every process, or an
    /// MPI library that fails to initialize, ends the process itself.
    pub fn new(timeout: Duration) -> Result<Self, CommError> {
        let mut group = Group::start(timeout)?;
        let (index, size) = (group.index(), group.size());
        let machines = group.machines()?;
        let local_index = machines[..index]
            .iter()
            .filter(|&machine| *machine == machines[index])
            .count();
        Ok(Self {
            group: RefCell::new(Some(group)),
            index,
            size,
            local_index,
        })
    }

    /// The time limit to use if you have no reason for another: 60 s.
    pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(60);

    /// Index of this worker among those on the same machine: the device to use if every process
    /// sees all devices of its machine.
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

    fn call(&self, call: Call, payload: Vec<u8>) -> Result<Vec<Vec<u8>>, CommError> {
        self.with_group(|group| group.call(call, payload))
    }

    /// The bytes that worker `root` sends in a call.
    fn take_from(
        &self,
        call: Call,
        root: usize,
        own: impl FnOnce() -> Vec<u8>,
    ) -> Result<Vec<u8>, CommError> {
        check_root(root, self.size);
        let payload = match root == self.index {
            true => own(),
            false => Vec::new(),
        };
        Ok(self.call(call, payload)?.swap_remove(root))
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
        let own = bytes(buffer);
        let call = self.with_group(|group| group.begin(Call::AllGather(dtype), own))?;
        Ok(Box::new(Pending {
            communicator: self,
            call: Some(call),
            device,
            dtype,
        }))
    }

    fn broadcast(&self, buffer: Tensor<1>, root: usize) -> Result<Tensor<1>, CommError> {
        let (device, dtype) = (buffer.device(), buffer.dtype());
        let call = Call::Broadcast(dtype, root);
        let received = self.take_from(call, root, || bytes(buffer))?;
        Ok(tensor(received, dtype, &device))
    }

    fn reduce_scatter(&self, buffer: Tensor<1>) -> Result<Tensor<1>, CommError> {
        let device = buffer.device();
        chunk_len(&buffer, self.size);
        let chunks = self.call(Call::ReduceScatter, bytes(buffer))?.into_iter();
        let chunks = chunks.map(|chunk| tensor(chunk, DType::F32, &device));
        Ok(tree_sum(chunks.collect()))
    }

    fn all_gather_bytes(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, CommError> {
        self.call(Call::AllGatherBytes, bytes.to_vec())
    }

    fn broadcast_bytes(&self, bytes: &[u8], root: usize) -> Result<Vec<u8>, CommError> {
        self.take_from(Call::BroadcastBytes(root), root, || bytes.to_vec())
    }

    fn barrier(&self) -> Result<(), CommError> {
        self.call(Call::Barrier, Vec::new()).map(|_| ())
    }

    fn traffic(&self) -> Traffic {
        self.with_group(|group| group.traffic())
    }
}

/// A gather whose messages are on their way.
struct Pending<'a> {
    communicator: &'a MpiCommunicator,
    /// `None` once waited for.
    call: Option<u64>,
    device: Device,
    dtype: DType,
}

impl PendingGather for Pending<'_> {
    fn wait(mut self: Box<Self>) -> Result<Tensor<1>, CommError> {
        let call = self.call.take().expect("waited for once");
        let all = self.communicator.with_group(|group| group.complete(call))?;
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

fn bytes(buffer: Tensor<1>) -> Vec<u8> {
    buffer.into_data().as_bytes().to_vec()
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
