//! The precision in which deltas travel between workers.

use std::fmt::{self, Display, Formatter};

use burn::tensor::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};

use super::OptimizerError;

/// The precision in which deltas travel between workers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum CommunicationDtype {
    /// Unrounded, as the inner optimizer computes them.
    #[default]
    F32,
    /// Rounded to the nearest `bf16` before the merge: half the bytes, and relative errors of up to
    /// 2⁻⁸ in every delta.
    Bf16,
}

impl CommunicationDtype {
    fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::Bf16 => DType::BF16,
        }
    }

    pub(super) fn check(self, device: &Device) -> Result<(), OptimizerError> {
        match device.supports_dtype(self.dtype()) {
            true => Ok(()),
            false => Err(OptimizerError::UnsupportedCommunicationDtype {
                dtype: self.dtype(),
                device: format!("{device:?}"),
            }),
        }
    }

    /// A delta after its travel, in `f32`.
    pub(super) fn round<const D: usize>(self, delta: Tensor<D>) -> Tensor<D> {
        delta.cast(self.dtype()).cast(DType::F32)
    }

    /// Number of values that encode a count.
    pub(super) fn count_len(self) -> usize {
        match self {
            Self::F32 => 1,
            Self::Bf16 => 3,
        }
    }

    /// Rounded deltas `[n]` and counts `[m]` as one buffer `[n + m · count_len]`.
    ///
    /// `bf16` holds integers up to 256 exactly. A count therefore travels as three digits of base
    /// 256, the highest first. If a count is too large, its highest digit is rounded, never to
    /// zero.
    pub(super) fn encode(self, deltas: Tensor<1>, counts: Tensor<1>) -> Tensor<1> {
        match self {
            Self::F32 => Tensor::cat(vec![deltas, counts], 0),
            Self::Bf16 => {
                let high = (counts.clone() / 65536.0).floor();
                let rest = counts - high.clone() * 65536.0;
                let middle = (rest.clone() / 256.0).floor();
                let low = rest - middle.clone() * 256.0;
                Tensor::cat(vec![deltas, high, middle, low], 0).cast(DType::BF16)
            }
        }
    }

    /// Deltas `[workers, n]` and counts `[workers, m]` of the encoded buffers of several workers,
    /// `[workers, n + m · count_len]`.
    pub(super) fn decode(self, buffers: Tensor<2>, counts: usize) -> (Tensor<2>, Tensor<2>) {
        let buffers = buffers.cast(DType::F32);
        let deltas = buffers.dims()[1] - counts * self.count_len();
        let digits = (0..self.count_len())
            .map(|digit| buffers.clone().narrow(1, deltas + digit * counts, counts));
        let decoded = digits.reduce(|high, low| high * 256.0 + low);
        let decoded = decoded.expect("a count has a digit");
        (buffers.narrow(1, 0, deltas), decoded)
    }
}

impl Display for CommunicationDtype {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_survive_the_way() {
        let device = Device::flex();
        let counts = [
            0.0f32,
            1.0,
            255.0,
            257.0,
            65_535.0,
            65_537.0,
            8_388_609.0,
            16_777_215.0,
        ];
        for dtype in [CommunicationDtype::F32, CommunicationDtype::Bf16] {
            let deltas = dtype.round(Tensor::<1>::from_floats([0.1, -3e-7, 1e38], &device));
            let sent = dtype.encode(deltas.clone(), Tensor::from_floats(counts, &device));
            assert_eq!(sent.dims(), [3 + counts.len() * dtype.count_len()]);
            assert_eq!(sent.dtype(), dtype.dtype());
            // The buffers of two workers.
            let sent = Tensor::stack::<2>(vec![sent.clone(), sent], 0);
            let (received, decoded) = dtype.decode(sent, counts.len());
            for worker in 0..2 {
                let received = received.clone().narrow(0, worker, 1).flatten::<1>(0, 1);
                received
                    .into_data()
                    .assert_eq(&deltas.clone().into_data(), true);
                let decoded = decoded.clone().narrow(0, worker, 1).into_data();
                assert_eq!(decoded.as_slice::<f32>().unwrap(), counts);
            }
        }
        // A count that is too large does not become zero.
        let sent = CommunicationDtype::Bf16.encode(
            Tensor::zeros([1], &device),
            Tensor::<1>::from_floats([3e10], &device),
        );
        let (_, decoded) = CommunicationDtype::Bf16.decode(sent.unsqueeze(), 1);
        assert!(decoded.into_scalar::<f32>() > 1e10);
    }
}
