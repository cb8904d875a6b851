//! The measured element types.

use burn::tensor::DType;
use half::{bf16, f16};
#[cfg(feature = "cubecl-kernels")]
use hd_pissa_kernels::FloatType;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Float {
    F32,
    F16,
    BF16,
}

impl Float {
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::BF16 => "bf16",
        }
    }

    pub fn bytes(self) -> f64 {
        match self {
            Self::F32 => 4.0,
            Self::F16 | Self::BF16 => 2.0,
        }
    }

    pub fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::F16 => DType::F16,
            Self::BF16 => DType::BF16,
        }
    }

    pub fn round(self, value: f32) -> f32 {
        match self {
            Self::F32 => value,
            Self::F16 => f16::from_f32(value).to_f32(),
            Self::BF16 => bf16::from_f32(value).to_f32(),
        }
    }

    /// The type as the kernels name it.
    #[cfg(feature = "cubecl-kernels")]
    pub fn kernel_type(self) -> FloatType {
        match self {
            Self::F32 => FloatType::F32,
            Self::F16 => FloatType::F16,
            Self::BF16 => FloatType::BF16,
        }
    }
}
