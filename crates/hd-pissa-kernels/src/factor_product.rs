use cubecl::ir::ElemType;
use cubecl::prelude::*;

use crate::merge::cube_count;
use crate::product::operand;
use crate::tile::{self, Access, Operand, Tile, Window, accumulate_stage, accumulators};
use crate::{FloatType, KernelError, Matrix, reduce};

/// The arguments of [`factor_product`].
///
/// Every matrix may have any strides: with [`Matrix::transposed`] ones the same call gives the
/// gradients of the factors, `xᵀ·q` and, from `Gᵀ·p`, `pᵀ·G`.
#[derive(Clone, Debug)]
pub struct FactorProduct {
    /// `x`, `[rows, depth]`.
    pub input: Matrix,
    /// `f`, `[depth, rank]`, `f32`.
    pub factor: Matrix,
    /// Receives `x·f`, `[rows, rank]`, `f32`.
    pub output: Matrix,
}

/// Inner steps that are worth a cube of their own. This and the next are estimates for large GPUs,
/// tuned on none.
const LEAST_CHUNK: usize = 128;
/// Cubes per multiprocessor, so that some compute while others wait for memory.
const CUBES_PER_MULTIPROCESSOR: usize = 8;

/// `output = input · factor`, for a factor of few columns and a large input of any element type.
///
/// The input is read once (per 64 columns) in its own type and multiplied in `f32` on the ordinary
/// units: no copy of it in `f32` is made. Where the output has too few tiles to fill the device, the
/// inner dimension is cut into chunks; their sums take `4 · chunks · rows · rank` bytes, and are added
/// in order.
///
/// An empty inner dimension gives zeros, an empty output nothing.
///
/// # Errors
///
/// [`KernelError`] if shapes, element types or buffers do not fit each other, or if the device
/// lacks the element type. Then nothing runs.
pub fn factor_product(client: &Client, product: FactorProduct) -> Result<(), KernelError> {
    let FactorProduct {
        input,
        factor,
        output,
    } = product;
    let [rows, depth] = input.shape;
    let [_, rank] = factor.shape;
    let dtype = input.dtype;
    dtype.check(client)?;
    factor.check_shape("factor", [depth, rank])?;
    output.check_shape("output", [rows, rank])?;
    factor.check_type("factor", FloatType::F32)?;
    output.check_type("output", FloatType::F32)?;
    input.check_read("input")?;
    factor.check_read("factor")?;
    output.check_write("output")?;
    if rows * rank == 0 {
        return Ok(());
    }

    let tile = Tile::choose_narrow(rank);
    let cubes = [rank.div_ceil(tile.minor()), rows.div_ceil(tile.major())];
    let plan = Chunks::new(client, cubes[0] * cubes[1], rows * rank, depth, tile.depth);
    let count = cube_count(client, [cubes[0], cubes[1], plan.count])?;
    let (input_access, input_operand) = operand(&input, 0);
    let (factor_access, factor_operand) = operand(&factor, 1);
    let [input_size, factor_size] =
        [input_access, factor_access].map(|access| if access.vectors { 4 } else { 1 });
    let sums = match plan.count {
        1 => output.clone(),
        chunks => {
            let handle = client.empty(chunks * rows * rank * size_of::<f32>());
            Matrix::row_major(handle, [chunks * rows, rank], FloatType::F32)
        }
    };
    let strides = sums.strides;
    // SAFETY: the checks above.
    unsafe {
        kernel::launch_unchecked(
            client,
            count,
            CubeDim::new_1d(tile.units() as u32),
            input_size,
            factor_size,
            input.arg(client, input_size),
            factor.arg(client, factor_size),
            sums.clone().arg(client, 1),
            input_operand,
            factor_operand,
            rows,
            rank,
            depth,
            plan.len,
            rows * strides[0],
            strides[0],
            strides[1],
            input_access,
            factor_access,
            tile,
            dtype.elem_type(),
        );
    }
    if plan.count > 1 {
        reduce::sum_chunks(client, sums, plan.count, output);
    }
    Ok(())
}

/// How the inner dimension is cut.
struct Chunks {
    count: usize,
    /// Inner steps of all but the last, a multiple of a stage's.
    len: usize,
}

impl Chunks {
    /// For an output of `tiles` tiles with `elements` elements in all.
    fn new(client: &Client, tiles: usize, elements: usize, depth: usize, stage: usize) -> Self {
        let hardware = &client.properties().hardware;
        let wanted = (CUBES_PER_MULTIPROCESSOR * tile::multiprocessors(client)).div_ceil(tiles);
        // Places in the sums of all chunks are `i32` on some devices.
        let most = (depth / LEAST_CHUNK)
            .min(hardware.max_cube_count.2 as usize)
            .min(i32::MAX as usize / elements);
        let len = depth
            .div_ceil(wanted.min(most).max(1))
            .max(1)
            .next_multiple_of(stage);
        Self {
            count: depth.div_ceil(len).max(1),
            len,
        }
    }
}

/// One tile of one chunk's share of the output per cube.
#[allow(clippy::too_many_arguments)]
#[cube(launch_unchecked, create_dummy_kernel)]
pub fn kernel<F: Float, NX: Size, NF: Size>(
    input: &[Vector<F, NX>],
    factor: &[Vector<f32, NF>],
    sums: &mut [f32],
    input_operand: Operand,
    factor_operand: Operand,
    rows: usize,
    rank: usize,
    depth: usize,
    chunk: usize,
    chunk_stride: usize,
    row_stride: usize,
    column_stride: usize,
    #[comptime] input_access: Access,
    #[comptime] factor_access: Access,
    #[comptime] tile: Tile,
    #[define(F)] _dtype: ElemType,
) {
    let (left_shape, right_shape) = comptime!((tile.stage(tile.major()), tile.stage(tile.minor())));
    let mut left = Shared::<[tile::Four]>::new_slice(comptime!(left_shape.vectors()));
    let mut right = Shared::<[tile::Four]>::new_slice(comptime!(right_shape.vectors()));

    let first_row = CUBE_POS_Y as usize * comptime!(tile.major());
    let first_column = CUBE_POS_X as usize * comptime!(tile.minor());
    let mut start = CUBE_POS_Z as usize * chunk;
    let mut end = start + chunk;
    if end > depth {
        end = depth;
    }
    let mut left_window = Window {
        first: first_row,
        extent: rows,
        depth: start,
        depth_extent: depth,
    };
    let mut right_window = Window {
        first: first_column,
        extent: rank,
        depth: start,
        depth_extent: depth,
    };
    let mut totals = accumulators(tile);
    while start < end {
        left_window.depth = start;
        right_window.depth = start;
        tile::fill::<F, NX>(
            input,
            &input_operand,
            &mut left,
            ComptimeOption::new_None(),
            &left_window,
            left_shape,
            input_access,
        );
        tile::fill::<f32, NF>(
            factor,
            &factor_operand,
            &mut right,
            ComptimeOption::new_None(),
            &right_window,
            right_shape,
            factor_access,
        );
        accumulate_stage(&mut totals, &left, &right, tile);
        start += comptime!(tile.depth);
    }

    let unit = UNIT_POS as usize;
    let (unit_major, unit_minor) = (unit / tile.minor_units, unit % tile.minor_units);
    let first = CUBE_POS_Z as usize * chunk_stride;
    #[unroll]
    for m in 0..tile.major_vectors {
        #[unroll]
        for i in 0..4usize {
            let row = first_row + (unit_major + m * tile.major_units) * 4 + i;
            #[unroll]
            for v in 0..tile.minor_vectors {
                let column = first_column + (unit_minor + v * tile.minor_units) * 4;
                let total = totals[(m * 4 + i) * tile.minor_vectors + v];
                if row < rows {
                    #[unroll]
                    for j in 0..4usize {
                        if column + j < rank {
                            sums[first + row * row_stride + (column + j) * column_stride] =
                                total.extract(j);
                        }
                    }
                }
            }
        }
    }
}
