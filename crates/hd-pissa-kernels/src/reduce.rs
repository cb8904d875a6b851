use cubecl::features::AtomicUsage;
use cubecl::ir::{ElemType, Type, UIntKind};
use cubecl::prelude::*;
use cubecl::server::Handle;

use crate::matrix::in_buffer;
use crate::{Buffer, KernelError, Matrix};

const UNITS: usize = 256;
/// Cubes of a count, whatever the length: each walks the buffer in steps of the whole grid.
const MAX_CUBES: usize = 512;

/// A counter for [`count_non_finite`]: one `u32` on the device, zero.
pub fn new_counter(client: &Client) -> Handle {
    client.create_from_slice(&0u32.to_ne_bytes())
}

/// Adds the number of NaN and infinite elements of `values` to the `u32` in `counter`.
///
/// Elements are judged by the bits of their exponent, which no compiler setting can fold away. The
/// counter stays on the device: [`merge`](crate::merge()) reads it there.
///
/// # Errors
///
/// [`KernelError`] if a buffer is too short, if the device lacks the element type or 32-bit
/// integer atomics.
pub fn count_non_finite(
    client: &Client,
    values: Buffer,
    counter: &Handle,
) -> Result<(), KernelError> {
    let dtype = values.dtype;
    dtype.check(client)?;
    values.check("values")?;
    in_buffer("counter", counter, 4, 1)?;
    check_atomics(client)?;
    if values.len == 0 {
        return Ok(());
    }
    let cubes = values.len.div_ceil(UNITS).min(MAX_CUBES);
    // SAFETY: `check` and `in_buffer` found the elements in their buffers.
    unsafe {
        kernel::count::launch_unchecked(
            client,
            CubeCount::Static(cubes as u32, 1, 1),
            CubeDim::new_1d(UNITS as u32),
            BufferArg::from_raw_parts(values.handle, values.len),
            BufferArg::from_raw_parts(counter.clone(), 1),
            values.len,
            UNITS,
            dtype.elem_type(),
        );
    }
    Ok(())
}

/// Whether the device adds to 32-bit integers atomically.
pub(crate) fn check_atomics(client: &Client) -> Result<(), KernelError> {
    let word = Type::atomic(ElemType::UInt(UIntKind::U32));
    let usage = client.properties().atomic_type_usage(word);
    if usage.contains(AtomicUsage::Add) {
        Ok(())
    } else {
        Err(KernelError::NoAtomics)
    }
}

/// Writes the sum of `partials` (buffer and length; zero for `None`) to element `slot` of `output`.
pub(crate) fn sum(
    client: &Client,
    partials: Option<(Handle, usize)>,
    output: Handle,
    slot: usize,
) -> Result<(), KernelError> {
    let (buffer, len) = partials.unwrap_or_else(|| (client.empty(4), 0));
    // SAFETY: the caller checked the slot and made the buffer of partial sums.
    unsafe {
        kernel::sum::launch_unchecked(
            client,
            CubeCount::Static(1, 1, 1),
            CubeDim::new_1d(UNITS as u32),
            BufferArg::from_raw_parts(buffer, len.max(1)),
            BufferArg::from_raw_parts(output, slot + 1),
            len,
            slot,
            UNITS,
        );
    }
    Ok(())
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

    /// Counts the elements whose exponent bits are all set.
    #[cube(launch_unchecked, create_dummy_kernel)]
    pub fn count<F: Float>(
        values: &[F],
        counter: &mut [Atomic<u32>],
        len: usize,
        #[comptime] units: usize,
        #[define(F)] _dtype: ElemType,
    ) {
        let mut found = 0u32;
        let step = CUBE_COUNT_X as usize * units;
        let mut place = ABSOLUTE_POS;
        while place < len {
            // Widening to f32 keeps NaN and infinity and makes nothing else of them.
            let bits = u32::reinterpret(f32::cast_from(values[place]));
            if (bits & 0x7f80_0000u32) == 0x7f80_0000u32 {
                found += 1;
            }
            place += step;
        }
        if found > 0 {
            counter[0].fetch_add(found);
        }
    }

    /// Sums a short buffer in a fixed order.
    #[cube(launch_unchecked, create_dummy_kernel)]
    pub fn sum(
        values: &[f32],
        output: &mut [f32],
        len: usize,
        slot: usize,
        #[comptime] units: usize,
    ) {
        let mut total = Vector::<f32, Const<1>>::new(0.0);
        let mut place = UNIT_POS as usize;
        while place < len {
            total += Vector::new(values[place]);
            place += units;
        }
        let total = cube_sum(total, units);
        if UNIT_POS == 0 {
            output[slot] = total.extract(0usize);
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
