//! Threads of one process as workers, each with a device, which exchange through Burn's
//! collectives.

use std::cell::Cell;
use std::time::Duration;

use burn::tensor::distributed::{ReduceOperation, all_reduce};
use burn::tensor::{Device, Tensor, s};

use crate::call::{Call, check_root};
use crate::sum::{chunk, chunk_len};
use crate::{CommError, Communicator, ThreadCommunicator, Traffic, thread_group};

/// One communicator for each of `devices`. They exchange through Burn's collectives: NCCL on CUDA,
/// the only backend that has them in Burn 0.22.
///
/// Each is for a thread of this process, and for buffers on its own device. Burn reduces but does
/// not gather. A gather is therefore the sum of buffers that hold zeros in the places of all other
/// workers, and sends twice the bytes. It keeps values, but a zero loses its sign, and the bits of
/// a NaN may change. A reduce_scatter sums whole buffers and keeps a part: twice the bytes as well.
/// NCCL chooses the order of additions, so the last bits may depend on the number of workers.
///
/// Byte strings go through the process's memory, from thread to thread.
///
/// `timeout` limits the exchange of byte strings, a barrier, and the agreement on the call before
/// each sum. It does not limit the sum: NCCL runs it once every worker has launched its part, and
/// has no time limit. If a worker fails after the agreement and before its launch, or a device
/// stops during the sum, the others wait without end when they read the result.
///
/// # Panics
///
/// If `devices` is empty. Calls panic on devices whose backend has no collectives.
pub fn collective_group(devices: &[Device], timeout: Duration) -> Vec<CollectiveCommunicator> {
    thread_group(devices.len(), timeout)
        .into_iter()
        .map(|threads| CollectiveCommunicator {
            threads,
            devices: devices.to_vec(),
            sums: Default::default(),
        })
        .collect()
}

/// A worker's end of a [`collective_group`].
#[derive(Debug)]
pub struct CollectiveCommunicator {
    threads: ThreadCommunicator,
    devices: Vec<Device>,
    /// Traffic of the sums.
    sums: Cell<Traffic>,
}

impl CollectiveCommunicator {
    /// The sum of all workers' buffers.
    fn sum(&self, buffer: Tensor<1>) -> Tensor<1> {
        let workers = self.num_workers();
        let bytes = buffer.dims()[0] * buffer.dtype().size();
        if bytes == 0 || workers == 1 {
            return buffer;
        }
        // In a ring each worker sends and receives twice the buffer, except its own part.
        let mut sums = self.sums.get();
        sums.count(self.worker_index(), &vec![2 * bytes / workers; workers]);
        self.sums.set(sums);
        all_reduce(buffer, ReduceOperation::Sum, self.devices.clone()).resolve()
    }
}

impl Communicator for CollectiveCommunicator {
    fn worker_index(&self) -> usize {
        self.threads.worker_index()
    }

    fn num_workers(&self) -> usize {
        self.threads.num_workers()
    }

    fn all_gather(&self, buffer: Tensor<1>) -> Result<Tensor<1>, CommError> {
        let len = buffer.dims()[0];
        self.threads
            .agree_on(Call::AllGather(buffer.dtype()), len)?;
        let (worker, workers) = (self.worker_index(), self.num_workers());
        let options = (&buffer.device(), buffer.dtype());
        let padded = Tensor::zeros([workers * len], options);
        let start = worker * len;
        Ok(self.sum(padded.slice_assign(s![start..start + len], buffer)))
    }

    fn broadcast(&self, buffer: Tensor<1>, root: usize) -> Result<Tensor<1>, CommError> {
        check_root(root, self.num_workers());
        let call = Call::Broadcast(buffer.dtype(), root);
        let len = self.threads.agree_on(call, buffer.dims()[0])?[root];
        Ok(self.sum(if self.worker_index() == root {
            buffer
        } else {
            Tensor::zeros([len], (&buffer.device(), buffer.dtype()))
        }))
    }

    fn reduce_scatter(&self, buffer: Tensor<1>) -> Result<Tensor<1>, CommError> {
        let (worker, workers) = (self.worker_index(), self.num_workers());
        let len = chunk_len(&buffer, workers);
        self.threads.agree_on(Call::ReduceScatter, len)?;
        Ok(chunk(self.sum(buffer), worker, len))
    }

    fn all_gather_bytes(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, CommError> {
        self.threads.all_gather_bytes(bytes)
    }

    fn broadcast_bytes(&self, bytes: &[u8], root: usize) -> Result<Vec<u8>, CommError> {
        self.threads.broadcast_bytes(bytes, root)
    }

    fn barrier(&self) -> Result<(), CommError> {
        self.threads.barrier()
    }

    fn traffic(&self) -> Traffic {
        let (sums, bytes) = (self.sums.get(), self.threads.traffic());
        Traffic {
            sent: sums.sent + bytes.sent,
            received: sums.received + bytes.received,
        }
    }
}
