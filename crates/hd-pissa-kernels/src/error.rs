//! Errors of a refused launch.

use crate::FloatType;

/// Why a launch was refused. Nothing was queued on the device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KernelError {
    /// An operand does not have the shape that the others need.
    #[error("{operand} must have the shape {expected:?}, not {found:?}")]
    Shape {
        /// The operand's name in the documentation of the function.
        operand: &'static str,
        /// The shape that fits.
        expected: [usize; 2],
        /// The shape it has.
        found: [usize; 2],
    },
    /// An operand has an element type that the function does not take there.
    #[error("{operand} must hold {expected:?}, not {found:?}")]
    ElementType {
        /// The operand's name in the documentation of the function.
        operand: &'static str,
        /// The type that fits.
        expected: FloatType,
        /// The type it has.
        found: FloatType,
    },
    /// The device cannot load, store and compute with the element type.
    #[error("the device does not support {0:?} buffers")]
    Unsupported(FloatType),
    /// An operand reads or writes behind the end of its buffer.
    #[error("{operand} needs {needed} elements, its buffer has {available}")]
    OutOfBounds {
        /// The operand's name in the documentation of the function.
        operand: &'static str,
        /// Elements up to the last one touched.
        needed: u64,
        /// Elements in the buffer.
        available: u64,
    },
    /// Two elements of a matrix that is written share an address.
    #[error("{operand} is written, but its strides {strides:?} give elements the same address")]
    Overlap {
        /// The operand's name in the documentation of the function.
        operand: &'static str,
        /// The strides at fault.
        strides: [usize; 2],
    },
    /// An operand has more elements than a 32-bit index can address.
    #[error("{operand} spans {elements} elements, more than a 32-bit index can address")]
    TooLarge {
        /// The operand's name in the documentation of the function.
        operand: &'static str,
        /// Elements up to the last one touched.
        elements: u64,
    },
    /// The column at which rows are split is outside of them.
    #[error("rows of {columns} columns cannot be split at column {split}")]
    Split {
        /// First column of the second part.
        split: usize,
        /// Columns of a row.
        columns: usize,
    },
    /// The grid of tiles exceeds what the device launches at once.
    #[error("{cubes:?} tiles exceed the device's limit of {limit:?}")]
    TooManyTiles {
        /// Tiles per dimension.
        cubes: [u64; 3],
        /// The device's limit per dimension.
        limit: [u32; 3],
    },
    /// The device cannot add to a 32-bit integer atomically.
    #[error("the device has no atomic addition of 32-bit integers")]
    NoAtomics,
}
