//! Integers and texts between workers, as floats: transports carry nothing else.

use burn::tensor::{DType, Device, Tensor, TensorData};
use hd_pissa_comm::{CommError, Communicator};

/// A worker's messages to the others.
pub(crate) struct Messages<'a> {
    communicator: &'a dyn Communicator,
    device: Device,
}

impl<'a> Messages<'a> {
    /// `device` is the one that the transport takes buffers from.
    pub(crate) fn new(communicator: &'a dyn Communicator, device: Device) -> Self {
        let device = device.inner();
        Self {
            communicator,
            device,
        }
    }

    /// The integers of every worker, as many of each, by its index.
    pub(crate) fn gather(&self, own: &[u64]) -> Result<Vec<Vec<u64>>, CommError> {
        let own = own.iter().flat_map(|&integer| to_floats(integer)).collect();
        let gathered = read(self.communicator.all_gather(self.tensor(own))?);
        let len = gathered.len() / self.communicator.num_workers();
        let integers = |floats: &[f32]| floats.chunks(4).map(from_floats).collect();
        Ok(gathered.chunks(len).map(integers).collect())
    }

    /// The text of worker `root`.
    pub(crate) fn broadcast(&self, text: &str, root: usize) -> Result<String, CommError> {
        let own = text.bytes().map(f32::from).collect();
        let received = read(self.communicator.broadcast(self.tensor(own), root)?);
        let bytes: Vec<u8> = received.into_iter().map(|byte| byte as u8).collect();
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Values in a buffer for the transport.
    pub(crate) fn tensor(&self, values: Vec<f32>) -> Tensor<1> {
        let len = values.len();
        Tensor::from_data(TensorData::new(values, [len]), (&self.device, DType::F32))
    }
}

/// An integer as `f32` values that hold it exactly, 16 bits each.
fn to_floats(value: u64) -> [f32; 4] {
    [0, 16, 32, 48].map(|shift| f32::from((value >> shift) as u16))
}

fn from_floats(floats: &[f32]) -> u64 {
    floats
        .iter()
        .rev()
        .fold(0, |value, &part| value << 16 | part as u64)
}

pub(crate) fn read(tensor: Tensor<1>) -> Vec<f32> {
    tensor.into_data().iter::<f32>().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn integers_survive_as_floats(value: u64) {
            prop_assert_eq!(from_floats(&to_floats(value)), value);
        }
    }
}
