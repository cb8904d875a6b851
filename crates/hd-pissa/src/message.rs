//! Integers between workers.

use burn::tensor::Device;
use hd_pissa_comm::{CommError, Communicator, gather_integers};

/// A worker's messages to the others: [`gather_integers`], for callers that have yet to move to it.
pub(crate) struct Messages<'a> {
    communicator: &'a dyn Communicator,
}

impl<'a> Messages<'a> {
    pub(crate) fn new(communicator: &'a dyn Communicator, _device: Device) -> Self {
        Self { communicator }
    }

    /// The integers of every worker, as many of each, by its index.
    pub(crate) fn gather(&self, own: &[u64]) -> Result<Vec<Vec<u64>>, CommError> {
        gather_integers(self.communicator, own)
    }
}
