//! Statistics of the rows of a matrix: the number of elements that are not finite, and the size of
//! the others.

use cubecl::prelude::*;
use cubecl::server::Handle;

use crate::grid::cube_count;
use crate::reduce::cube_sum;
use crate::tile::Four;
use crate::{FloatType, KernelError, Matrix};

const UNITS: usize = 256;
/// Columns of a chunk, the share of a cube. Chunks have more columns only if a row would have too
/// many chunks. Only the length of the rows determines the chunks and the order of the sums.
const LEAST_CHUNK: usize = 4096;
/// Most chunks of a row. A single cube adds their sums.
const MOST_CHUNKS: usize = 1024;

/// Four statistics of every row of an `f32` matrix `[rows, columns]`, which may have any strides.
///
/// The returned buffer holds the `f32` matrix `[rows, 4]`, row by row:
///
/// 1. the number of NaN and infinite elements, exact up to 2^24,
/// 2. the sum of the squares of the finite elements of columns `0..split`,
/// 3. the same of columns `split..columns`,
/// 4. the sum of the squares of all finite elements, each multiplied by 2^-80 first.
///
/// The second and third are infinite if they exceed the range of `f32`. The fourth never does: it
/// gives the size of a row whose squares overflow. The kernel recognizes NaN and infinity by the
/// bits of their exponent, which no compiler setting can remove, and leaves them out of the sums.
///
/// Equal rows give equal bits. No float is added atomically. Rows without columns give zeros. For a
/// matrix without rows, the content of the buffer means nothing.
///
/// # Errors
///
/// [`KernelError`] if `values` holds another type than `f32` or reaches behind its buffer, if
/// `split` is more than `columns`, or if the device cannot launch a cube for every row. Then
/// nothing runs.
pub fn row_statistics(
    client: &Client,
    values: Matrix,
    split: usize,
) -> Result<Handle, KernelError> {
    let [rows, columns] = values.shape;
    values.check_type("values", FloatType::F32)?;
    values.check_read("values")?;
    if split > columns {
        return Err(KernelError::Split { split, columns });
    }
    let chunk = columns.div_ceil(MOST_CHUNKS).max(LEAST_CHUNK);
    let chunks = columns.div_ceil(chunk).max(1);
    let count = cube_count(client, [chunks, rows, 1])?;
    let buffer = |len: usize| client.empty(len.max(1) * size_of::<[f32; 4]>());
    let statistics = buffer(rows);
    if rows == 0 {
        return Ok(statistics);
    }
    let parts = match chunks {
        1 => statistics.clone(),
        chunks => buffer(rows * chunks),
    };
    let strides = values.strides;
    // SAFETY: `check_read` found the elements; the other buffers have the size of the results.
    unsafe {
        kernel::chunks::launch_unchecked(
            client,
            count,
            CubeDim::new_1d(UNITS as u32),
            values.arg(client, 1),
            BufferArg::from_raw_parts(parts.clone(), rows * chunks),
            columns,
            split,
            chunk,
            strides[0],
            strides[1],
            UNITS,
        );
        if chunks > 1 {
            kernel::totals::launch_unchecked(
                client,
                CubeCount::Static(rows as u32, 1, 1),
                CubeDim::new_1d(UNITS as u32),
                BufferArg::from_raw_parts(parts, rows * chunks),
                BufferArg::from_raw_parts(statistics.clone(), rows),
                chunks,
                UNITS,
            );
        }
    }
    Ok(statistics)
}

/// The exponent bits of infinity.
const INFINITE: u32 = 0x7f80_0000;
/// The difference in a value's bits when it is multiplied by 2^-80.
const SCALE: u32 = 80 << 23;
/// The bits of the smallest value that then stays normal. Squares of smaller values are below the
/// range of `f32`.
const LEAST_SCALED: u32 = 81 << 23;

/// The statistics of a row of one element, given by its bits.
#[cube]
fn statistics(bits: u32, is_left: bool) -> Four {
    let magnitude = bits & 0x7fff_ffffu32;
    let is_finite = magnitude < INFINITE;
    let kept = select(is_finite, magnitude, 0u32);
    let value = f32::reinterpret(kept);
    let square = value * value;
    // Scales through the exponent: a compiler that reorders products could square the factor first.
    let scaled = f32::reinterpret(select(kept >= LEAST_SCALED, kept - SCALE, 0u32));
    let mut statistics = Four::new(0.0);
    statistics.insert(0usize, select(is_finite, 0.0f32, 1.0f32));
    statistics.insert(1usize, select(is_left, square, 0.0f32));
    statistics.insert(2usize, select(is_left, 0.0f32, square));
    statistics.insert(3usize, scaled * scaled);
    statistics
}

/// Kernels of this module.
pub mod kernel {
    use super::*;

    /// The statistics of one chunk of one row per cube.
    #[cube(launch_unchecked, create_dummy_kernel)]
    pub fn chunks(
        values: &[u32],
        parts: &mut [Four],
        columns: usize,
        split: usize,
        chunk: usize,
        row_stride: usize,
        column_stride: usize,
        #[comptime] units: usize,
    ) {
        let row = CUBE_POS_Y as usize;
        let start = CUBE_POS_X as usize * chunk;
        let mut end = start + chunk;
        if end > columns {
            end = columns;
        }
        let mut sums = Four::new(0.0);
        let mut column = start + UNIT_POS as usize;
        while column < end {
            let bits = values[row * row_stride + column * column_stride];
            sums += statistics(bits, column < split);
            column += units;
        }
        let total = cube_sum(sums, units);
        if UNIT_POS == 0 {
            parts[row * CUBE_COUNT_X as usize + CUBE_POS_X as usize] = total;
        }
    }

    /// The sums of all chunks of one row per cube.
    #[cube(launch_unchecked, create_dummy_kernel)]
    pub fn totals(parts: &[Four], totals: &mut [Four], chunks: usize, #[comptime] units: usize) {
        let row = CUBE_POS_X as usize;
        let mut sums = Four::new(0.0);
        let mut chunk = UNIT_POS as usize;
        while chunk < chunks {
            sums += parts[row * chunks + chunk];
            chunk += units;
        }
        let total = cube_sum(sums, units);
        if UNIT_POS == 0 {
            totals[row] = total;
        }
    }
}
