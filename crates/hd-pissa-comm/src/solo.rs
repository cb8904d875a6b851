//! A single worker.

use burn::tensor::Tensor;

use crate::call::check_root;
use crate::sum::chunk_len;
use crate::{CommError, Communicator, Traffic};

/// The transport of a single worker, which hosts every shard.
#[derive(Clone, Copy, Debug, Default)]
pub struct Solo;

impl Communicator for Solo {
    fn worker_index(&self) -> usize {
        0
    }

    fn num_workers(&self) -> usize {
        1
    }

    fn all_gather(&self, buffer: Tensor<1>) -> Result<Tensor<1>, CommError> {
        Ok(buffer)
    }

    fn broadcast(&self, buffer: Tensor<1>, root: usize) -> Result<Tensor<1>, CommError> {
        check_root(root, 1);
        Ok(buffer)
    }

    fn reduce_scatter(&self, buffer: Tensor<1>) -> Result<Tensor<1>, CommError> {
        chunk_len(&buffer, 1);
        Ok(buffer)
    }

    fn all_gather_bytes(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, CommError> {
        Ok(vec![bytes.to_vec()])
    }

    fn broadcast_bytes(&self, bytes: &[u8], root: usize) -> Result<Vec<u8>, CommError> {
        check_root(root, 1);
        Ok(bytes.to_vec())
    }

    fn barrier(&self) -> Result<(), CommError> {
        Ok(())
    }

    fn traffic(&self) -> Traffic {
        Traffic::default()
    }
}
