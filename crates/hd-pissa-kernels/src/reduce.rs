//! Sums in a fixed order: over the units of a cube, of a short buffer, of the chunks of a product.

use cubecl::prelude::*;
use cubecl::server::Handle;

use crate::Matrix;

const UNITS: usize = 256;
/// Cubes of a sum of chunks, for every length: each walks the buffer in steps of the whole grid.
const MAX_CUBES: usize = 512;

/// The sum of the `len` elements of `partials`: a buffer of one `f32`.
pub(crate) fn sum(client: &Client, partials: Handle, len: usize) -> Handle {
    let total = client.empty(size_of::<f32>());
    // SAFETY: the caller made a buffer of `len` partial sums.
    unsafe {
        kernel::sum::launch_unchecked(
            client,
            CubeCount::Static(1, 1, 1),
            CubeDim::new_1d(UNITS as u32),
            BufferArg::from_raw_parts(partials, len),
            BufferArg::from_raw_parts(total.clone(), 1),
            len,
            UNITS,
        );
    }
    total
}

/// Writes the sum of the `chunks` parts of `sums`, one below the other, to `output`, whose shape is
/// that of a part. The output is not empty.
pub(crate) fn sum_chunks(client: &Client, sums: Matrix, chunks: usize, output: Matrix) {
    let [rows, columns] = output.shape;
    let cubes = (rows * columns).div_ceil(UNITS).min(MAX_CUBES);
    let strides = output.strides;
    // SAFETY: the caller made `sums` and checked `output`.
    unsafe {
        kernel::sum_chunks::launch_unchecked(
            client,
            CubeCount::Static(cubes as u32, 1, 1),
            CubeDim::new_1d(UNITS as u32),
            sums.arg(client, 1),
            output.arg(client, 1),
            chunks,
            rows,
            columns,
            strides[0],
            strides[1],
            UNITS,
        );
    }
}

/// The sum of `value` over the cube's `units`, in a fixed order; every unit gets it.
#[cube]
pub(crate) fn cube_sum<T: Numeric, N: Size>(
    value: Vector<T, N>,
    #[comptime] units: usize,
) -> Vector<T, N> {
    let mut sums = Shared::<[Vector<T, N>]>::new_slice(units);
    let unit = UNIT_POS as usize;
    sums[unit] = value;
    sync_cube();
    let mut half = comptime!(units / 2).runtime();
    while half > 0 {
        if unit < half {
            let other = sums[unit + half];
            sums[unit] += other;
        }
        sync_cube();
        half /= 2;
    }
    sums[0]
}

/// Kernels of this module.
pub mod kernel {
    use super::*;

    /// Sums a short buffer in a fixed order.
    #[cube(launch_unchecked, create_dummy_kernel)]
    pub fn sum(values: &[f32], output: &mut [f32], len: usize, #[comptime] units: usize) {
        let mut total = Vector::<f32, Const<1>>::new(0.0);
        let mut place = UNIT_POS as usize;
        while place < len {
            total += Vector::new(values[place]);
            place += units;
        }
        let total = cube_sum(total, units);
        if UNIT_POS == 0 {
            output[0] = total.extract(0usize);
        }
    }

    /// Adds contiguous parts of one shape, in order.
    #[cube(launch_unchecked, create_dummy_kernel)]
    pub fn sum_chunks(
        sums: &[f32],
        output: &mut [f32],
        chunks: usize,
        rows: usize,
        columns: usize,
        row_stride: usize,
        column_stride: usize,
        #[comptime] units: usize,
    ) {
        let len = rows * columns;
        let step = CUBE_COUNT_X as usize * units;
        let mut place = ABSOLUTE_POS;
        while place < len {
            let mut total = 0.0f32;
            let mut from = place;
            for _ in 0..chunks {
                total += sums[from];
                from += len;
            }
            output[place / columns * row_stride + place % columns * column_stride] = total;
            place += step;
        }
    }
}
