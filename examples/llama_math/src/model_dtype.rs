//! The dtype in which a model is held and computed.

use std::fmt::{self, Display, Formatter};

use burn::tensor::{DType, Device};
use clap::ValueEnum;

use crate::Error;

/// The dtype of weights and activations while a model trains and answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum ModelDtype {
    /// 32 bits.
    #[default]
    F32,
    /// 16 bits with 8 of precision and the range of `f32`.
    Bf16,
}

impl Display for ModelDtype {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        })
    }
}

impl ModelDtype {
    /// Burn's name for it.
    pub fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::Bf16 => DType::BF16,
        }
    }

    /// Refuses a device that does not compute in this dtype.
    ///
    /// # Errors
    ///
    /// [`Error::Option`].
    pub fn check(self, device: &Device) -> Result<(), Error> {
        match device.supports_dtype(self.dtype()) {
            true => Ok(()),
            false => Err(Error::Option {
                option: "dtype",
                reason: format!(
                    "this device has no {self}; leave the option out, or choose another --device"
                ),
            }),
        }
    }
}

#[cfg(all(test, feature = "wgpu"))]
mod tests {
    use super::*;

    #[test]
    fn wgsl_has_no_bf16() {
        let device = Device::wgpu(Default::default());
        assert!(ModelDtype::F32.check(&device).is_ok());
        let error = ModelDtype::Bf16.check(&device).unwrap_err().to_string();
        assert!(
            error.contains("--dtype") && error.contains("bf16"),
            "{error}"
        );
    }
}
