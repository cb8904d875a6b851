//! A weight on the host.

use burn::tensor::{DType, Tensor};
use faer::{Mat, MatRef};

use crate::HdPissaError;

/// A weight on the host, in `f32`, row by row.
pub(crate) struct HostMatrix {
    rows: usize,
    cols: usize,
    values: Vec<f32>,
}

impl HostMatrix {
    /// Refuses NaN and infinite values, and a weight of zeros.
    pub(crate) fn read(path: &str, weight: &Tensor<2>) -> Result<Self, HdPissaError> {
        let [rows, cols] = weight.dims();
        let values = weight
            .clone()
            .inner()
            .into_data()
            .convert_dtype(DType::F32)
            .try_into_vec::<f32>()
            .expect("data converted to f32 reads as f32");
        let mut bad = values.iter().enumerate().filter(|(_, v)| !v.is_finite());
        if let Some((first, _)) = bad.next() {
            return Err(HdPissaError::NonFiniteWeight {
                path: path.into(),
                count: 1 + bad.count(),
                row: first / cols,
                col: first % cols,
            });
        }
        if values.iter().all(|&value| value == 0.0) {
            return Err(HdPissaError::ZeroWeight { path: path.into() });
        }
        Ok(Self { rows, cols, values })
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    pub(crate) fn cols(&self) -> usize {
        self.cols
    }

    /// Row by row.
    pub(crate) fn values(&self) -> &[f32] {
        &self.values
    }

    /// `‖W‖_F²`
    pub(crate) fn squared_norm(&self) -> f64 {
        let square = |value: &f32| f64::from(*value) * f64::from(*value);
        self.values.iter().map(square).sum()
    }

    pub(crate) fn f32(&self) -> MatRef<'_, f32> {
        MatRef::from_row_major_slice(&self.values, self.rows, self.cols)
    }

    pub(crate) fn f64(&self) -> Mat<f64> {
        let f32 = self.f32();
        Mat::from_fn(self.rows, self.cols, |i, j| f64::from(f32[(i, j)]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;

    #[test]
    fn non_finite_weights_are_named() {
        let device = Device::flex();
        let weight = Tensor::<2>::from_floats([[1.0, f32::NAN], [f32::INFINITY, 0.0]], &device);
        let error = HostMatrix::read("fc.weight", &weight).err().unwrap();
        assert_eq!(
            error.to_string(),
            "`fc.weight` holds 2 NaN or infinite values, the first at row 0, column 1; load an \
             undamaged checkpoint"
        );
    }
}
