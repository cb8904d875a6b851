//! The low-rank product: `p = x·f` for a factor of few columns, and `y = x·W` in the same launch.

use cubecl::ir::ElemType;
use cubecl::prelude::*;

use crate::grid::{cube_count, multiprocessors};
use crate::tile::{
    self, Access, Four, Operand, OperandLaunch, Tile, Window, accumulate_stage, accumulators,
};
use crate::{FloatType, KernelError, Matrix, reduce};

/// The arguments of [`low_rank_product`].
///
/// Every matrix may have any strides. With [`Matrix::transposed`] operands, the same call computes
/// the products of the backward pass, `G·Wᵀ` and `G·bᵀ`, and the gradients of the factors, `xᵀ·q`
/// and, from `Gᵀ·p`, `pᵀ·G`.
#[derive(Clone, Debug)]
pub struct LowRankProduct {
    /// `x`, `[rows, depth]`.
    pub input: Matrix,
    /// `f`, `[depth, rank]`, `f32`.
    pub factor: Matrix,
    /// Receives `x·f`, `[rows, rank]`, `f32`.
    pub projection: Matrix,
    /// The product with a weight, in the same launch.
    pub dense: Option<DenseProduct>,
}

/// The product of the same input with a weight.
#[derive(Clone, Debug)]
pub struct DenseProduct {
    /// `W`, `[depth, columns]`, the element type of the input.
    pub weight: Matrix,
    /// Receives `x·W`, `[rows, columns]`, the element type of the input.
    pub output: Matrix,
}

/// The least number of inner steps for a separate cube. This and the next constant are estimates
/// for large GPUs, not measured on any.
const LEAST_CHUNK: usize = 128;
/// Cubes per multiprocessor, so that some compute while others wait for memory.
const CUBES_PER_MULTIPROCESSOR: usize = 8;

/// `projection = input · factor`, and optionally `output = input · weight` in the same launch.
///
/// The kernel reads the input in its own type and multiplies in `f32` on the ordinary units,
/// without a copy of the input in `f32`. It rounds each sum once, to the type of its result.
///
/// With a weight the right operand is `[weight | factor]`. The cubes of one band of rows run side
/// by side, the last of them on the factor. One cube reads the band from memory, the others from
/// the cache. The sums follow the inner dimension.
///
/// Without a weight, the output may have too few tiles to fill the device. The kernel then cuts the
/// inner dimension into chunks. Their sums take `4 · chunks · rows · rank` bytes, and a second
/// kernel adds them in order.
///
/// An empty inner dimension gives zeros. For an empty result nothing runs.
///
/// # Errors
///
/// [`KernelError`] if shapes, element types or buffers do not fit each other, or if the device
/// lacks the element type. Then nothing runs.
pub fn low_rank_product(client: &Client, product: LowRankProduct) -> Result<(), KernelError> {
    product.check(client)?;
    let LowRankProduct {
        input,
        factor,
        projection,
        dense,
    } = product;
    let dense = dense.filter(|dense| dense.weight.shape[1] > 0);
    let columns = dense.as_ref().map_or(0, |dense| dense.weight.shape[1]);
    let [rows, depth] = input.shape;
    let [_, rank] = factor.shape;
    let dtype = input.dtype;
    if rows * (columns + rank) == 0 {
        return Ok(());
    }

    let tile = match dense {
        None => Tile::choose_narrow(rank),
        Some(_) => Tile::choose(client, rows, columns + rank, 1),
    };
    let output_tiles = columns.div_ceil(tile.minor());
    let cubes = [
        output_tiles + rank.div_ceil(tile.minor()),
        rows.div_ceil(tile.major()),
    ];
    let chunks = match dense {
        None => Chunks::new(client, cubes[0] * cubes[1], rows * rank, depth, tile.depth),
        Some(_) => Chunks {
            count: 1,
            len: depth,
        },
    };
    let count = cube_count(client, [cubes[0], cubes[1], chunks.count])?;
    let sums = match chunks.count {
        1 => projection.clone(),
        chunks => {
            let handle = client.empty(chunks * rows * rank * size_of::<f32>());
            Matrix::row_major(handle, [chunks * rows, rank], FloatType::F32)
        }
    };

    // Tiles follow the rows of the input and the columns of the right operands.
    let (input_access, input_operand) = operand(&input, 0);
    let (factor_access, factor_operand) = operand(&factor, 1);
    let (weight_access, weight_operand) = match &dense {
        Some(dense) => operand(&dense.weight, 1),
        None => operand(&factor, 1),
    };
    let output_vectors = dense.as_ref().is_some_and(|d| d.output.has_vectors(1));
    let [input_size, factor_size, weight_size, output_size] = [
        input_access.vectors,
        factor_access.vectors,
        weight_access.vectors,
        output_vectors,
    ]
    .map(|vectors| if vectors { 4 } else { 1 });
    let output_strides = dense.as_ref().map_or([0, 0], |dense| dense.output.strides);
    let places = PlacesLaunch::new(
        rows * sums.strides[0],
        sums.strides[0],
        sums.strides[1],
        output_strides[0],
        output_strides[1],
    );
    let (weight, output) = dense
        .map(|dense| {
            let weight = dense.weight.arg(client, weight_size);
            (weight, dense.output.arg(client, output_size))
        })
        .unzip();
    // SAFETY: the checks above.
    unsafe {
        kernel::launch_unchecked(
            client,
            count,
            CubeDim::new_1d(tile.units() as u32),
            input_size,
            factor_size,
            weight_size,
            output_size,
            input.arg(client, input_size),
            factor.arg(client, factor_size),
            sums.clone().arg(client, 1),
            weight.into(),
            output.into(),
            input_operand,
            factor_operand,
            weight_operand,
            ExtentsLaunch::new(rows, depth, rank, columns, output_tiles, chunks.len),
            places,
            input_access,
            factor_access,
            weight_access,
            tile,
            dtype.elem_type(),
        );
    }
    if chunks.count > 1 {
        reduce::sum_chunks(client, sums, chunks.count, projection);
    }
    Ok(())
}

impl LowRankProduct {
    /// Whether the operands fit each other and the device.
    fn check(&self, client: &Client) -> Result<(), KernelError> {
        let Self {
            input,
            factor,
            projection,
            dense,
        } = self;
        let [rows, depth] = input.shape;
        let rank = factor.shape[1];
        input.check_supported(client)?;
        factor.check_shape("factor", [depth, rank])?;
        projection.check_shape("projection", [rows, rank])?;
        factor.check_type("factor", FloatType::F32)?;
        projection.check_type("projection", FloatType::F32)?;
        input.check_read("input")?;
        factor.check_read("factor")?;
        projection.check_write("projection")?;
        if let Some(DenseProduct { weight, output }) = dense {
            let columns = weight.shape[1];
            weight.check_shape("weight", [depth, columns])?;
            output.check_shape("output", [rows, columns])?;
            weight.check_type("weight", input.dtype)?;
            output.check_type("output", input.dtype)?;
            weight.check_read("weight")?;
            output.check_write("output")?;
        }
        Ok(())
    }
}

/// How the inner dimension is cut.
struct Chunks {
    count: usize,
    /// Inner steps of all but the last.
    len: usize,
}

impl Chunks {
    /// For a result of `tiles` tiles with `elements` elements in all; whole stages.
    fn new(client: &Client, tiles: usize, elements: usize, depth: usize, stage: usize) -> Self {
        let hardware = &client.properties().hardware;
        let wanted = (CUBES_PER_MULTIPROCESSOR * multiprocessors(client)).div_ceil(tiles);
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

/// How to read a matrix whose axis `tile_axis` follows the tiles.
fn operand(matrix: &Matrix, tile_axis: usize) -> (Access, OperandLaunch) {
    let depth_axis = 1 - tile_axis;
    let access = Access {
        vectors: matrix.has_vectors(matrix.minor_axis()),
        along_depth: matrix.minor_axis() == depth_axis,
    };
    let operand = OperandLaunch::new(
        0,
        matrix.strides[tile_axis],
        matrix.strides[depth_axis],
        // One shard: the whole inner dimension.
        matrix.shape[depth_axis].max(1),
        0,
    );
    (access, operand)
}

/// The sizes of a product and of its chunks.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
pub struct Extents {
    /// Rows of the input.
    pub rows: usize,
    /// Inner steps.
    pub depth: usize,
    /// Columns of the factor.
    pub rank: usize,
    /// Columns of the weight.
    pub columns: usize,
    /// Tiles of a band on the weight; the others are on the factor.
    pub output_tiles: usize,
    /// Inner steps of a chunk.
    pub chunk: usize,
}

/// The places of the results.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
pub struct Places {
    /// Distance between the projections of two chunks.
    pub chunk: usize,
    /// Distance between the rows of a projection.
    pub row: usize,
    /// Distance between its columns.
    pub column: usize,
    /// Distance between the rows of the output.
    pub output_row: usize,
    /// Distance between its columns.
    pub output_column: usize,
}

/// One tile of the output, or of one chunk's share of the projection, per cube.
#[allow(clippy::too_many_arguments)]
#[cube(launch_unchecked, create_dummy_kernel)]
pub fn kernel<F: Float, NX: Size, NF: Size, NW: Size, NY: Size>(
    input: &[Vector<F, NX>],
    factor: &[Vector<f32, NF>],
    projection: &mut [f32],
    weight: ComptimeOption<&[Vector<F, NW>]>,
    output: &mut ComptimeOption<Box<[Vector<F, NY>]>>,
    input_operand: Operand,
    factor_operand: Operand,
    weight_operand: Operand,
    extents: Extents,
    places: Places,
    #[comptime] input_access: Access,
    #[comptime] factor_access: Access,
    #[comptime] weight_access: Access,
    #[comptime] tile: Tile,
    #[define(F)] _dtype: ElemType,
) {
    let (left_shape, right_shape) = comptime!((tile.stage(tile.major()), tile.stage(tile.minor())));
    let mut left = Shared::<[Four]>::new_slice(comptime!(left_shape.vectors()));
    let mut right = Shared::<[Four]>::new_slice(comptime!(right_shape.vectors()));

    let tile_x = CUBE_POS_X as usize;
    let is_output = tile_x < extents.output_tiles;
    let first_row = CUBE_POS_Y as usize * comptime!(tile.major());
    let mut first_column = tile_x * comptime!(tile.minor());
    let mut columns = extents.columns;
    if !is_output {
        first_column = (tile_x - extents.output_tiles) * comptime!(tile.minor());
        columns = extents.rank;
    }
    let mut start = CUBE_POS_Z as usize * extents.chunk;
    let mut end = start + extents.chunk;
    if end > extents.depth {
        end = extents.depth;
    }
    let mut left_window = Window {
        first: first_row,
        extent: extents.rows,
        depth: start,
        depth_extent: extents.depth,
    };
    let mut right_window = Window {
        first: first_column,
        extent: columns,
        depth: start,
        depth_extent: extents.depth,
    };

    let mut sums = accumulators(tile);
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
        if is_output {
            #[comptime]
            match weight {
                ComptimeOption::Some(weight) => tile::fill::<F, NW>(
                    weight,
                    &weight_operand,
                    &mut right,
                    ComptimeOption::new_None(),
                    &right_window,
                    right_shape,
                    weight_access,
                ),
                ComptimeOption::None => {}
            }
        } else {
            tile::fill::<f32, NF>(
                factor,
                &factor_operand,
                &mut right,
                ComptimeOption::new_None(),
                &right_window,
                right_shape,
                factor_access,
            );
        }
        accumulate_stage(&mut sums, &left, &right, tile);
        start += comptime!(tile.depth);
    }

    let unit = UNIT_POS as usize;
    let (unit_major, unit_minor) = (unit / tile.minor_units, unit % tile.minor_units);
    #[unroll]
    for m in 0..tile.major_vectors {
        #[unroll]
        for i in 0..4usize {
            let row = first_row + (unit_major + m * tile.major_units) * 4 + i;
            #[unroll]
            for v in 0..tile.minor_vectors {
                let column = first_column + (unit_minor + v * tile.minor_units) * 4;
                let sum = sums[(m * 4 + i) * tile.minor_vectors + v];
                if row < extents.rows && column < columns {
                    if is_output {
                        #[comptime]
                        match output {
                            ComptimeOption::Some(output) => {
                                let start = row * places.output_row + column * places.output_column;
                                if NY::value().comptime() == 4 {
                                    output[start / 4] = Vector::cast_from(sum);
                                } else {
                                    #[unroll]
                                    for j in 0..4usize {
                                        if column + j < columns {
                                            output[start + j * places.output_column] =
                                                Vector::cast_from(F::cast_from(sum.extract(j)));
                                        }
                                    }
                                }
                            }
                            ComptimeOption::None => {}
                        }
                    } else {
                        let start = CUBE_POS_Z as usize * places.chunk
                            + row * places.row
                            + column * places.column;
                        #[unroll]
                        for j in 0..4usize {
                            if column + j < columns {
                                projection[start + j * places.column] = sum.extract(j);
                            }
                        }
                    }
                }
            }
        }
    }
}
