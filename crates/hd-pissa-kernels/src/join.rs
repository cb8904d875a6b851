//! Copies of matrices end to end in one buffer.

use cubecl::prelude::*;

use crate::grid::cube_count;
use crate::{FloatType, KernelError, Matrix};

const UNITS: usize = 256;
/// Elements that a unit copies at most.
const PER_UNIT: usize = 16;
/// Bindings besides the matrices: the target buffer, and the sizes.
const OTHER_BINDINGS: usize = 2;
/// Matrices of one launch, on devices without a limit. Each number of matrices has its own kernel.
const MOST_PARTS: usize = 16;

/// Copies the elements of `f32` matrices, which may have any strides, to the row `target`,
/// `[1, len]` without gaps, from its element `start` on: row by row, one matrix after the other.
///
/// One launch copies as many matrices as the device binds at once, at most 16.
///
/// # Errors
///
/// [`KernelError`] if a matrix or the target holds another type than `f32` or reaches behind its
/// buffer, if the matrices do not fit into the target, or if they are too large for one launch. Then
/// nothing runs.
pub fn join(
    client: &Client,
    parts: Vec<Matrix>,
    target: Matrix,
    start: usize,
) -> Result<(), KernelError> {
    for part in &parts {
        part.check_type("parts", FloatType::F32)?;
        part.check_read("parts")?;
    }
    let size = |part: &Matrix| part.shape[0] * part.shape[1];
    let end = start + parts.iter().map(size).sum::<usize>();
    let len = target.shape[1];
    target.check_type("target", FloatType::F32)?;
    target.check_shape("target", [1, len])?;
    target.check_write("target")?;
    if end > len {
        return Err(KernelError::OutOfBounds {
            operand: "target",
            needed: end as u64,
            available: len as u64,
        });
    }
    let bindings = client.properties().hardware.max_bindings as usize;
    let most = bindings.saturating_sub(OTHER_BINDINGS).clamp(1, MOST_PARTS);
    let launches: Vec<_> = parts
        .chunks(most)
        .map(|parts| {
            let largest = parts.iter().map(size).max().unwrap_or(0);
            let cubes = largest.div_ceil(UNITS * PER_UNIT);
            Ok((parts, cube_count(client, [cubes, parts.len(), 1])?))
        })
        .collect::<Result<_, KernelError>>()?;
    let mut start = start;
    for (parts, count) in launches {
        let mut arguments = Arguments::default();
        for part in parts {
            arguments.push(client, part, start);
            start += size(part);
        }
        let Arguments {
            matrices,
            starts,
            lens,
            columns,
            row_strides,
            column_strides,
        } = arguments;
        // SAFETY: the checks above found the elements.
        unsafe {
            kernel::launch_unchecked(
                client,
                count,
                CubeDim::new_1d(UNITS as u32),
                matrices,
                target.clone().arg(client, 1),
                starts,
                lens,
                columns,
                row_strides,
                column_strides,
                UNITS,
            );
        }
    }
    Ok(())
}

#[derive(Default)]
struct Arguments {
    matrices: SequenceArg<Box<[u32]>>,
    starts: SequenceArg<usize>,
    lens: SequenceArg<usize>,
    columns: SequenceArg<usize>,
    row_strides: SequenceArg<usize>,
    column_strides: SequenceArg<usize>,
}

impl Arguments {
    fn push(&mut self, client: &Client, part: &Matrix, start: usize) {
        let [rows, columns] = part.shape;
        self.matrices.push(part.clone().arg(client, 1));
        self.starts.push(start);
        self.lens.push(rows * columns);
        self.columns.push(columns.max(1));
        self.row_strides.push(part.strides[0]);
        self.column_strides.push(part.strides[1]);
    }
}

/// Copies one matrix in each row of cubes. Elements are copied by their bits.
#[allow(clippy::too_many_arguments)]
#[cube(launch_unchecked, create_dummy_kernel)]
pub fn kernel(
    matrices: &Sequence<Box<[u32]>>,
    joined: &mut [u32],
    starts: Sequence<usize>,
    lens: Sequence<usize>,
    columns: Sequence<usize>,
    row_strides: Sequence<usize>,
    column_strides: Sequence<usize>,
    #[comptime] units: usize,
) {
    #[unroll]
    for part in 0..matrices.len() {
        if CUBE_POS_Y as usize == part {
            let matrix = matrices.index(part);
            let width = *columns.index(part);
            let len = *lens.index(part);
            let mut i = ABSOLUTE_POS_X as usize;
            while i < len {
                let place = (i / width) * *row_strides.index(part)
                    + (i % width) * *column_strides.index(part);
                joined[*starts.index(part) + i] = matrix[place];
                i += CUBE_COUNT_X as usize * units;
            }
        }
    }
}
