//! Views of Burn's tensors for the kernels.

use burn::backend::TensorMetadata;
use burn::tensor::DType;
use burn_cubecl::tensor::CubeTensor;
use hd_pissa_kernels::{FloatType, Matrix};

/// The kernels' view of a tensor of two dimensions.
pub(super) fn matrix(tensor: &CubeTensor) -> Matrix {
    let dtype = known(tensor.dtype)
        .unwrap_or_else(|| panic!("{:?} is refused when adapters are attached", tensor.dtype));
    matrix_of(tensor, dtype)
}

/// As [`matrix`], with elements that count as `dtype`.
pub(super) fn matrix_of(tensor: &CubeTensor, dtype: FloatType) -> Matrix {
    let (shape, strides) = (tensor.shape(), tensor.meta.strides());
    Matrix {
        handle: tensor.handle.clone(),
        shape: [shape[0], shape[1]],
        strides: [strides[0], strides[1]],
        dtype,
    }
}

pub(super) fn known(dtype: DType) -> Option<FloatType> {
    match dtype {
        DType::F32 => Some(FloatType::F32),
        DType::F16 => Some(FloatType::F16),
        DType::BF16 => Some(FloatType::BF16),
        _ => None,
    }
}

/// `tensor`, or a copy of it if someone else holds its memory.
pub(super) fn writable(tensor: CubeTensor) -> CubeTensor {
    if tensor.can_mut() {
        tensor
    } else {
        tensor.copy()
    }
}
