//! The element types of buffers.

use cubecl::features::TypeUsage;
use cubecl::ir::{ElemType, FloatKind};
use cubecl::prelude::*;

/// The element type of a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FloatType {
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// The upper half of a binary32. WGSL does not have it.
    BF16,
}

impl FloatType {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
        }
    }

    /// The same type as CubeCL names it.
    pub fn elem_type(self) -> ElemType {
        ElemType::Float(match self {
            Self::F32 => FloatKind::F32,
            Self::F16 => FloatKind::F16,
            Self::BF16 => FloatKind::BF16,
        })
    }

    /// Whether buffers of this type can be read, written and converted on the client's device.
    pub fn is_supported(self, client: &Client) -> bool {
        let usage = client.properties().type_usage(self.elem_type());
        usage.contains(TypeUsage::Buffer) && usage.contains(TypeUsage::Conversion)
    }
}
