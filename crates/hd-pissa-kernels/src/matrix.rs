//! Matrices in the memory of a device, and the checks of their bounds.

use cubecl::prelude::*;
use cubecl::server::Handle;

use crate::{FloatType, KernelError};

/// A matrix on the device: element `[i, j]` is number `i · strides[0] + j · strides[1]` of the
/// handle.
#[derive(Clone, Debug)]
pub struct Matrix {
    /// The memory; element `[0, 0]` is the handle's first.
    pub handle: Handle,
    /// Rows and columns.
    pub shape: [usize; 2],
    /// Distances in elements between neighbours in a column and in a row.
    pub strides: [usize; 2],
    /// Type of the elements.
    pub dtype: FloatType,
}

impl Matrix {
    /// A matrix whose rows follow each other without gaps.
    pub fn row_major(handle: Handle, shape: [usize; 2], dtype: FloatType) -> Self {
        let strides = [shape[1], 1];
        Self {
            handle,
            shape,
            strides,
            dtype,
        }
    }

    /// A matrix whose columns follow each other without gaps.
    pub fn column_major(handle: Handle, shape: [usize; 2], dtype: FloatType) -> Self {
        let strides = [1, shape[0]];
        Self {
            handle,
            shape,
            strides,
            dtype,
        }
    }

    /// The transposed matrix, in the same memory.
    pub fn transposed(mut self) -> Self {
        self.shape.reverse();
        self.strides.reverse();
        self
    }

    /// Elements from the first to the last, gaps included.
    pub(crate) fn span(&self) -> u64 {
        if self.shape.contains(&0) {
            return 0;
        }
        let last =
            |axis: usize| (self.shape[axis] as u64 - 1).saturating_mul(self.strides[axis] as u64);
        last(0).saturating_add(last(1)).saturating_add(1)
    }

    /// Elements of the matrix. With a stride of zero, they can exceed the elements in memory.
    fn elements(&self) -> u64 {
        (self.shape[0] as u64).saturating_mul(self.shape[1] as u64)
    }

    /// Whether the device computes with the element type.
    pub(crate) fn check_supported(&self, client: &Client) -> Result<(), KernelError> {
        match self.dtype.is_supported(client) {
            true => Ok(()),
            false => Err(KernelError::Unsupported(self.dtype)),
        }
    }

    pub(crate) fn check_read(&self, operand: &'static str) -> Result<(), KernelError> {
        in_buffer(operand, &self.handle, self.dtype.size(), self.span())?;
        index_fits(operand, self.elements())
    }

    pub(crate) fn check_write(&self, operand: &'static str) -> Result<(), KernelError> {
        let minor = self.minor_axis();
        let [near, far] = [minor, 1 - minor].map(|axis| (self.shape[axis], self.strides[axis]));
        let run = (near.0.max(1) - 1).saturating_mul(near.1);
        if self.elements() > 0 && ((near.0 > 1 && near.1 == 0) || (far.0 > 1 && far.1 <= run)) {
            let strides = self.strides;
            return Err(KernelError::Overlap { operand, strides });
        }
        self.check_read(operand)
    }

    pub(crate) fn check_shape(
        &self,
        operand: &'static str,
        expected: [usize; 2],
    ) -> Result<(), KernelError> {
        let found = self.shape;
        if found == expected {
            Ok(())
        } else {
            Err(KernelError::Shape {
                operand,
                expected,
                found,
            })
        }
    }

    pub(crate) fn check_type(
        &self,
        operand: &'static str,
        expected: FloatType,
    ) -> Result<(), KernelError> {
        let found = self.dtype;
        if found == expected {
            Ok(())
        } else {
            Err(KernelError::ElementType {
                operand,
                expected,
                found,
            })
        }
    }

    /// The axis along which neighbours are closer in memory.
    pub(crate) fn minor_axis(&self) -> usize {
        match self.strides {
            // The stride of a single row or column means nothing.
            [_, _] if self.shape[0] <= 1 => 1,
            [_, _] if self.shape[1] <= 1 => 0,
            [row, column] => usize::from(column <= row),
        }
    }

    /// Whether every run along `axis` can be read as aligned vectors of four elements.
    pub(crate) fn has_vectors(&self, axis: usize) -> bool {
        self.span() > 0
            && self.strides[axis] == 1
            && self.shape[axis].is_multiple_of(4)
            && self.strides[1 - axis].is_multiple_of(4)
            && is_aligned(&self.handle, self.dtype.size())
    }

    pub(crate) fn arg(self, client: &Client, vector_size: usize) -> BufferArg {
        if self.span() == 0 {
            // An empty tensor may have no memory to bind. The kernel does not touch this buffer.
            // SAFETY: the buffer has the one element, of any type and vector size.
            return unsafe { BufferArg::from_raw_parts(client.empty(16), 1) };
        }
        let len = self.span().div_ceil(vector_size as u64) as usize;
        // SAFETY: `check_read` or `check_write` found `span` elements in the buffer, and a vector
        // size above one is only taken where the span is a multiple of it.
        unsafe { BufferArg::from_raw_parts(self.handle, len) }
    }
}

/// Whether the handle starts on a vector of four elements of `size` bytes.
pub(crate) fn is_aligned(handle: &Handle, size: usize) -> bool {
    handle
        .offset_start
        .unwrap_or(0)
        .is_multiple_of(4 * size as u64)
}

pub(crate) fn in_buffer(
    operand: &'static str,
    handle: &Handle,
    size: usize,
    needed: u64,
) -> Result<(), KernelError> {
    let available = handle.size_in_used() / size as u64;
    if needed > available {
        return Err(KernelError::OutOfBounds {
            operand,
            needed,
            available,
        });
    }
    index_fits(operand, needed)
}

fn index_fits(operand: &'static str, elements: u64) -> Result<(), KernelError> {
    if elements > i32::MAX as u64 {
        return Err(KernelError::TooLarge { operand, elements });
    }
    Ok(())
}
