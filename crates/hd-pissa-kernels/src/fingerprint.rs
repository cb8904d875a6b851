//! 64 bits that tell whether two matrices hold the same bits.

use cubecl::features::AtomicUsage;
use cubecl::ir::{ElemType, Type, UIntKind};
use cubecl::prelude::*;
use cubecl::server::Handle;
use hd_pissa_bits::SEEDS;

use crate::reduce::cube_sum;
use crate::{FloatType, KernelError, Matrix};

const UNITS: usize = 256;
/// Cubes for every size: each walks the matrix in steps of the whole grid.
const MAX_CUBES: usize = 1024;

/// A fingerprint of a matrix `[rows, columns]`, which may have any strides: a buffer of two `u32`.
///
/// With `i` for the number of an element, counted row by row, and `b` for its bits, word `j` is
/// `Σ mix(b ^ mix(i ^ SEEDS[j]))`, in `u32` that wrap; `mix` is the finalizer of MurmurHash3.
/// [`hd_pissa_bits::fingerprint`] gives the same. Every order of the terms gives the same sum, so
/// layout and device do not matter.
///
/// Half-precision elements count with the bits of their value in `f32`. Elements of 32 bits of any
/// type count with their own bits: for a matrix of `i32`, use [`FloatType::F32`].
///
/// # Errors
///
/// [`KernelError`] if `values` reaches behind its buffer, or if the device lacks the element type or
/// 32-bit integer atomics. Then nothing runs.
pub fn fingerprint(client: &Client, values: Matrix) -> Result<Handle, KernelError> {
    let dtype = values.dtype;
    values.check_supported(client)?;
    values.check_read("values")?;
    check_atomics(client)?;
    let words = client.create_from_slice(&[0; size_of::<[u32; 2]>()]);
    let len = values.shape[0] * values.shape[1];
    if len == 0 {
        return Ok(words);
    }
    // Neighbouring units read neighbouring memory.
    let minor = values.minor_axis();
    let steps = [values.shape[1], 1];
    let strides = values.strides;
    // SAFETY: `check_read` found the elements; the other buffer has two words.
    unsafe {
        kernel::launch_unchecked(
            client,
            CubeCount::Static(len.div_ceil(UNITS).min(MAX_CUBES) as u32, 1, 1),
            CubeDim::new_1d(UNITS as u32),
            values.clone().arg(client, 1),
            BufferArg::from_raw_parts(words.clone(), 2),
            len,
            values.shape[minor],
            strides[1 - minor],
            strides[minor],
            steps[1 - minor],
            steps[minor],
            UNITS,
            storage_type(dtype),
        );
    }
    Ok(words)
}

/// Whether the device adds to 32-bit integers atomically.
fn check_atomics(client: &Client) -> Result<(), KernelError> {
    let word = Type::atomic(ElemType::UInt(UIntKind::U32));
    let usage = client.properties().atomic_type_usage(word);
    if usage.contains(AtomicUsage::Add) {
        Ok(())
    } else {
        Err(KernelError::NoAtomics)
    }
}

/// How the kernel reads elements: those of 32 bits as plain words.
pub fn storage_type(dtype: FloatType) -> ElemType {
    match dtype {
        FloatType::F32 => ElemType::UInt(UIntKind::U32),
        half => half.elem_type(),
    }
}

type Words = Vector<u32, Const<2>>;

/// The finalizer of MurmurHash3, a bijection.
#[cube]
fn mix(words: Words) -> Words {
    let mut x = words;
    x ^= x >> Words::new(16u32);
    x *= Words::new(0x85eb_ca6bu32);
    x ^= x >> Words::new(13u32);
    x *= Words::new(0xc2b2_ae35u32);
    x ^ (x >> Words::new(16u32))
}

/// Adds the terms of all elements along the minor axis. From one element to the next, `strides` are
/// distances in memory and `steps` distances in the numbers of the elements.
#[allow(clippy::too_many_arguments)]
#[cube(launch_unchecked, create_dummy_kernel)]
pub fn kernel<E: Numeric>(
    values: &[E],
    words: &mut [Atomic<u32>],
    len: usize,
    minor_extent: usize,
    major_stride: usize,
    minor_stride: usize,
    major_step: usize,
    minor_step: usize,
    #[comptime] units: usize,
    #[define(E)] dtype: ElemType,
) {
    let mut seeds = Words::new(comptime!(SEEDS[0]));
    seeds.insert(1usize, comptime!(SEEDS[1]));
    let mut sums = Words::new(0u32);
    let mut place = ABSOLUTE_POS;
    while place < len {
        let (major, minor) = (place / minor_extent, place % minor_extent);
        let value = values[major * major_stride + minor * minor_stride];
        let bits = if comptime!(matches!(dtype, ElemType::UInt(_))) {
            u32::cast_from(value)
        } else {
            u32::reinterpret(f32::cast_from(value))
        };
        let index = (major * major_step + minor * minor_step) as u32;
        sums += mix(mix(seeds ^ Words::new(index)) ^ Words::new(bits));
        place += CUBE_COUNT_X as usize * units;
    }
    let sums = cube_sum(sums, units);
    if UNIT_POS == 0 {
        words[0].fetch_add(sums.extract(0usize));
        words[1].fetch_add(sums.extract(1usize));
    }
}
