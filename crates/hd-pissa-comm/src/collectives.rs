//! Workers that exchange by Burn's own collectives.

use std::time::Duration;

use burn::tensor::distributed::{ReduceOperation, all_reduce};
use burn::tensor::{Device, Tensor};

use crate::communicator::check_root;
use crate::{CommError, Communicator, ThreadCommunicator, Traffic, thread_group};

/// One communicator for each of `devices`, which exchange by Burn's collectives: NCCL on CUDA, the
/// only backend that has them in Burn 0.22.
///
/// Each is for a thread of this process, and for buffers on its own device. Burn reduces but does
/// not gather, so that a gather is the sum of buffers that hold zeros in the places of all other
/// workers: twice the bytes of a gather. Values are kept, but a zero loses its sign, and the bits
/// of a NaN may change. Before each sum the workers agree on the call through the process's
/// memory, within `timeout`; the sum itself, which NCCL runs once all have launched it, is not
/// limited.
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
            traffic: Default::default(),
        })
        .collect()
}

/// A worker's end of a [`collective_group`].
#[derive(Debug)]
pub struct CollectiveCommunicator {
    threads: ThreadCommunicator,
    devices: Vec<Device>,
    traffic: std::cell::Cell<Traffic>,
}

impl CollectiveCommunicator {
    /// The sum of all workers' buffers, of which all but one are zero in each place.
    fn sum(&self, buffer: Tensor<1>) -> Tensor<1> {
        let workers = self.num_workers();
        let bytes = buffer.dims()[0] * buffer.dtype().size();
        if bytes == 0 || workers == 1 {
            return buffer;
        }
        // What a ring sends and receives: each worker twice the buffer, but for its own part.
        let mut traffic = self.traffic.get();
        traffic.count(2 * bytes / workers, 2 * bytes / workers, workers - 1);
        self.traffic.set(traffic);
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
        self.threads.agree_on_gather(&buffer)?;
        let (worker, workers) = (self.worker_index(), self.num_workers());
        let options = (&buffer.device(), buffer.dtype());
        let padded = Tensor::zeros([workers * len], options);
        let start = worker * len;
        Ok(self.sum(padded.slice_assign([start..start + len], buffer)))
    }

    fn broadcast(&self, buffer: Tensor<1>, root: usize) -> Result<Tensor<1>, CommError> {
        check_root(root, self.num_workers());
        let len = self.threads.agree_on_broadcast(&buffer, root)?;
        Ok(self.sum(if self.worker_index() == root {
            buffer
        } else {
            Tensor::zeros([len], (&buffer.device(), buffer.dtype()))
        }))
    }

    fn barrier(&self) -> Result<(), CommError> {
        self.threads.barrier()
    }

    fn traffic(&self) -> Traffic {
        self.traffic.get()
    }
}
