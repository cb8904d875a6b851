use cubecl::ir::{ElemType, FloatKind};
use cubecl::prelude::*;

use crate::merge::cube_count;
use crate::tile::{
    self, Access, Four, Operand, OperandLaunch, Tile, Window, accumulate_stage, accumulators,
};
use crate::{Buffer, FloatType, KernelError, Matrix};

/// The arguments of [`low_rank_product`].
///
/// Every matrix may have any strides, so the products of the backward pass are the same call with
/// [`Matrix::transposed`] operands: `G·Wᵀ` and `G·bᵀ`.
#[derive(Clone, Debug)]
pub struct LowRankProduct {
    /// `x`, `[tokens, d_input]`.
    pub input: Matrix,
    /// `W`, `[d_input, d_output]`, the element type of `input`.
    pub weight: Matrix,
    /// `a`, `[d_input, rank]`, `f32`.
    pub factor: Matrix,
    /// Added to every row of `output`: `[d_output]`, the element type of `input`.
    pub bias: Option<Buffer>,
    /// Receives `x·W`, `[tokens, d_output]`, the element type of `input`.
    pub output: Matrix,
    /// Receives `x·a`, `[tokens, rank]`, `f32`.
    pub projection: Matrix,
}

/// `output = input · weight (+ bias)` and `projection = input · factor` in one launch.
///
/// The right operand is `[weight | factor]`: the cubes of one band of tokens run side by side, the
/// last of them on the factor, so the band is read from memory once and by the others from the
/// cache. Both products are accumulated in `f32` in the order of the inner dimension and rounded
/// once.
///
/// An empty inner dimension gives zeros (or the bias), an empty output nothing.
///
/// Fusing saves one of two reads of the input and one launch. A product of the backend's own that has
/// matrix units, or is tuned to its shape, gains more than that: for 4096 tokens, a 4096×4096 weight,
/// rank 16 and 16-bit operands, by the data sheets of an A100 and an H100, `x·W` takes 440 and 139 µs on
/// matrix units and 7.0 and 2.1 ms on the ordinary ones, which this kernel uses; a second read of `x`
/// takes 16 and 10 µs. So the adapter of `hd-pissa` multiplies twice, the second time by
/// [`factor_product`](crate::factor_product()) where that spares it a copy of `x` in `f32`.
///
/// # Errors
///
/// [`KernelError`] if shapes, element types or buffers do not fit each other, or if the device
/// lacks the element type. Then nothing runs.
pub fn low_rank_product(client: &Client, product: LowRankProduct) -> Result<(), KernelError> {
    check(client, &product)?;
    let LowRankProduct {
        input,
        weight,
        factor,
        bias,
        output,
        projection,
    } = product;
    let [tokens, d_input] = input.shape;
    let [_, d_output] = weight.shape;
    let [_, rank] = factor.shape;
    let dtype = input.dtype;

    let tile = Tile::choose(client, tokens, d_output + rank, 1);
    let tiles = d_output.div_ceil(tile.minor());
    let cubes = [
        tiles + rank.div_ceil(tile.minor()),
        tokens.div_ceil(tile.major()),
    ];
    if cubes[0] * cubes[1] == 0 {
        return Ok(());
    }
    let count = cube_count(client, [cubes[0], cubes[1], 1])?;

    // Tiles lie along the tokens of the input and along the columns of the right operands.
    let (input_access, input_operand) = operand(&input, 0);
    let (weight_access, weight_operand) = operand(&weight, 1);
    let (factor_access, factor_operand) = operand(&factor, 1);
    let output_vectors = output.has_vectors(1);
    let [input_size, weight_size, factor_size, output_size] = [
        input_access.vectors,
        weight_access.vectors,
        factor_access.vectors,
        output_vectors,
    ]
    .map(|vectors| if vectors { 4 } else { 1 });
    let (output_strides, projection_strides) = (output.strides, projection.strides);
    let bias = bias.map(|bias| {
        // SAFETY: `check` found `len` elements in the buffer.
        unsafe { BufferArg::from_raw_parts(bias.handle, bias.len) }
    });
    // SAFETY: the checks above.
    unsafe {
        kernel::launch_unchecked(
            client,
            count,
            CubeDim::new_1d(tile.units() as u32),
            input_size,
            weight_size,
            factor_size,
            output_size,
            input.arg(client, input_size),
            weight.arg(client, weight_size),
            factor.arg(client, factor_size),
            bias.into(),
            output.arg(client, output_size),
            projection.arg(client, 1),
            input_operand,
            weight_operand,
            factor_operand,
            tokens,
            d_input,
            d_output,
            rank,
            tiles,
            output_strides[0],
            output_strides[1],
            projection_strides[0],
            projection_strides[1],
            input_access,
            weight_access,
            factor_access,
            tile,
            dtype.elem_type(),
        );
    }
    Ok(())
}

/// Whether the operands fit each other and the device.
pub(crate) fn check(client: &Client, product: &LowRankProduct) -> Result<(), KernelError> {
    let LowRankProduct {
        input,
        weight,
        factor,
        bias,
        output,
        projection,
    } = product;
    let [tokens, d_input] = input.shape;
    let [_, d_output] = weight.shape;
    let [_, rank] = factor.shape;
    let dtype = input.dtype;
    dtype.check(client)?;
    weight.check_shape("weight", [d_input, d_output])?;
    factor.check_shape("factor", [d_input, rank])?;
    output.check_shape("output", [tokens, d_output])?;
    projection.check_shape("projection", [tokens, rank])?;
    weight.check_type("weight", dtype)?;
    output.check_type("output", dtype)?;
    factor.check_type("factor", FloatType::F32)?;
    projection.check_type("projection", FloatType::F32)?;
    input.check_read("input")?;
    weight.check_read("weight")?;
    factor.check_read("factor")?;
    output.check_write("output")?;
    projection.check_write("projection")?;
    if let Some(bias) = bias {
        let found = [1, bias.len];
        if bias.len != d_output {
            let expected = [1, d_output];
            return Err(KernelError::Shape {
                operand: "bias",
                expected,
                found,
            });
        }
        if bias.dtype != dtype {
            let (expected, found) = (dtype, bias.dtype);
            return Err(KernelError::ElementType {
                operand: "bias",
                expected,
                found,
            });
        }
        bias.check("bias")?;
    }
    Ok(())
}

/// Whether the device has matrix units for operands of `dtype`; those of `f32` they take as `tf32`.
pub fn has_matrix_units(client: &Client, dtype: FloatType) -> bool {
    let operand = matrix_unit_type(dtype);
    let matmul = &client.features().matmul;
    matmul
        .cmma
        .iter()
        .chain(&matmul.mma)
        .any(|config| config.a_type == operand)
}

/// The type in which matrix units take operands of `dtype`.
pub(crate) fn matrix_unit_type(dtype: FloatType) -> ElemType {
    match dtype {
        FloatType::F32 => ElemType::Float(FloatKind::TF32),
        half => half.elem_type(),
    }
}

/// How to read a matrix whose axis `tile_axis` lies along the tiles.
pub(crate) fn operand(matrix: &Matrix, tile_axis: usize) -> (Access, OperandLaunch) {
    let depth_axis = 1 - tile_axis;
    let along_depth = matrix.minor_axis() == depth_axis;
    let vectors = matrix.has_vectors(matrix.minor_axis());
    let access = Access {
        vectors,
        along_depth,
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

/// One tile of the output or of the projection per cube.
#[allow(clippy::too_many_arguments)]
#[cube(launch_unchecked, create_dummy_kernel)]
pub fn kernel<F: Float, NX: Size, NW: Size, NA: Size, NY: Size>(
    input: &[Vector<F, NX>],
    weight: &[Vector<F, NW>],
    factor: &[Vector<f32, NA>],
    bias: ComptimeOption<&[F]>,
    output: &mut [Vector<F, NY>],
    projection: &mut [f32],
    input_operand: Operand,
    weight_operand: Operand,
    factor_operand: Operand,
    tokens: usize,
    d_input: usize,
    d_output: usize,
    rank: usize,
    output_tiles: usize,
    output_row_stride: usize,
    output_column_stride: usize,
    projection_row_stride: usize,
    projection_column_stride: usize,
    #[comptime] input_access: Access,
    #[comptime] weight_access: Access,
    #[comptime] factor_access: Access,
    #[comptime] tile: Tile,
    #[define(F)] _dtype: ElemType,
) {
    let (width_major, width_minor) = comptime!((tile.major(), tile.minor()));
    let depth = comptime!(tile.depth);
    let (left_shape, right_shape) = comptime!((tile.stage(width_major), tile.stage(width_minor)));
    let mut left = Shared::<[Four]>::new_slice(comptime!(left_shape.vectors()));
    let mut right = Shared::<[Four]>::new_slice(comptime!(right_shape.vectors()));

    let tile_x = CUBE_POS_X as usize;
    let is_output = tile_x < output_tiles;
    let first_row = CUBE_POS_Y as usize * width_major;
    let mut first_column = tile_x * width_minor;
    let mut columns = d_output;
    if !is_output {
        first_column = (tile_x - output_tiles) * width_minor;
        columns = rank;
    }
    let mut left_window = Window {
        first: first_row,
        extent: tokens,
        depth: 0usize,
        depth_extent: d_input,
    };
    let mut right_window = Window {
        first: first_column,
        extent: columns,
        depth: 0usize,
        depth_extent: d_input,
    };

    let mut sums = accumulators(tile);
    let mut start = 0usize;
    while start < d_input {
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
            tile::fill::<F, NW>(
                weight,
                &weight_operand,
                &mut right,
                ComptimeOption::new_None(),
                &right_window,
                right_shape,
                weight_access,
            );
        } else {
            tile::fill::<f32, NA>(
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
        start += depth;
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
                let mut sum = sums[(m * 4 + i) * tile.minor_vectors + v];
                if row < tokens && column < columns {
                    if is_output {
                        #[comptime]
                        match bias {
                            ComptimeOption::Some(bias) =>
                            {
                                #[unroll]
                                for j in 0..4usize {
                                    if column + j < columns {
                                        let shifted =
                                            sum.extract(j) + f32::cast_from(bias[column + j]);
                                        sum.insert(j, shifted);
                                    }
                                }
                            }
                            ComptimeOption::None => {}
                        }
                        let start = row * output_row_stride + column * output_column_stride;
                        if NY::value().comptime() == 4 {
                            output[start / 4] = Vector::cast_from(sum);
                        } else {
                            #[unroll]
                            for j in 0..4usize {
                                if column + j < columns {
                                    output[start + j * output_column_stride] =
                                        Vector::cast_from(F::cast_from(sum.extract(j)));
                                }
                            }
                        }
                    } else {
                        let start = row * projection_row_stride + column * projection_column_stride;
                        #[unroll]
                        for j in 0..4usize {
                            if column + j < columns {
                                projection[start + j * projection_column_stride] = sum.extract(j);
                            }
                        }
                    }
                }
            }
        }
    }
}
