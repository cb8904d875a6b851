//! The kernel of the merge.

use cubecl::prelude::*;

use crate::reduce;
use crate::rounding::{self, Store};
use crate::tile::{
    self, Access, Four, Operand, StageShape, Tile, Window, accumulate, accumulators,
};

/// The factors in shared memory: `a + Δa` and `Δa` against `Δb` and `b`.
#[derive(CubeType)]
struct Stages {
    left_sum: Shared<[Four]>,
    left_delta: Shared<[Four]>,
    right_delta: Shared<[Four]>,
    right_frame: Shared<[Four]>,
}

#[cube]
impl Stages {
    fn new(#[comptime] left: StageShape, #[comptime] right: StageShape) -> Self {
        let (left, right) = comptime!((left.vectors(), right.vectors()));
        Stages {
            left_sum: Shared::<[Four]>::new_slice(left),
            left_delta: Shared::<[Four]>::new_slice(left),
            right_delta: Shared::<[Four]>::new_slice(right),
            right_frame: Shared::<[Four]>::new_slice(right),
        }
    }
}

/// The places of the factors of all shards in the buffers of frames and deltas.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
pub struct Operands {
    /// `a` or `Δa`.
    pub left: Operand,
    /// `b` or `Δb`.
    pub right: Operand,
}

/// The next inner steps of all factors.
#[cube]
fn fill<N: Size>(
    stages: &mut Stages,
    frames: &[Vector<f32, N>],
    deltas: &[Vector<f32, N>],
    operands: &Operands,
    left: &Window,
    right: &Window,
    #[comptime] left_shape: StageShape,
    #[comptime] right_shape: StageShape,
    #[comptime] vectors: bool,
) {
    let left_access = comptime!(Access {
        vectors,
        along_depth: true
    });
    let right_access = comptime!(Access {
        vectors,
        along_depth: false
    });
    tile::fill::<f32, N>(
        deltas,
        &operands.left,
        &mut stages.left_delta,
        ComptimeOption::new_None(),
        left,
        left_shape,
        left_access,
    );
    tile::fill::<f32, N>(
        frames,
        &operands.left,
        &mut stages.left_sum,
        ComptimeOption::new_Some(stages.left_delta.clone()),
        left,
        left_shape,
        left_access,
    );
    tile::fill::<f32, N>(
        deltas,
        &operands.right,
        &mut stages.right_delta,
        ComptimeOption::new_None(),
        right,
        right_shape,
        right_access,
    );
    tile::fill::<f32, N>(
        frames,
        &operands.right,
        &mut stages.right_frame,
        ComptimeOption::new_None(),
        right,
        right_shape,
        right_access,
    );
}

/// The place of an update.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
pub struct Target {
    /// Elements along the major axis.
    pub major_extent: usize,
    /// Elements along the minor axis.
    pub minor_extent: usize,
    /// Distance along the major axis.
    pub major_stride: usize,
    /// Distance along the minor axis.
    pub minor_stride: usize,
    /// Keys of stochastic rounding.
    pub key0: u32,
    /// See `key0`.
    pub key1: u32,
}

/// One tile of the weight per cube. The minor axis of `W` runs along `x`; with `column_major` this
/// is the axis of `d_input`.
#[allow(clippy::too_many_arguments)]
#[cube(launch_unchecked, create_dummy_kernel)]
pub fn kernel<F: Float, N: Size, M: Size>(
    weight: &mut [Vector<F, M>],
    residual: &mut ComptimeOption<Box<[u32]>>,
    frames: &[Vector<f32, N>],
    deltas: &[Vector<f32, N>],
    gate: &[u32],
    partials: &mut [f32],
    operands: Operands,
    inner: usize,
    target: Target,
    #[comptime] vectors: bool,
    #[comptime] column_major: bool,
    #[comptime] store: Store,
    #[comptime] tile: Tile,
    #[define(F)] _dtype: cubecl::ir::ElemType,
) {
    let (width_major, width_minor) = comptime!((tile.major(), tile.minor()));
    let (left_shape, right_shape) = comptime!(if column_major {
        (tile.stage(width_minor), tile.stage(width_major))
    } else {
        (tile.stage(width_major), tile.stage(width_minor))
    });
    let depth = comptime!(left_shape.depth);
    let mut stages = Stages::new(left_shape, right_shape);

    let first_major = CUBE_POS_Y as usize * width_major;
    let first_minor = CUBE_POS_X as usize * width_minor;
    let mut left_window = Window {
        first: first_major,
        extent: target.major_extent,
        depth: 0usize,
        depth_extent: inner,
    };
    let mut right_window = Window {
        first: first_minor,
        extent: target.minor_extent,
        depth: 0usize,
        depth_extent: inner,
    };
    if comptime!(column_major) {
        left_window.first = first_minor;
        left_window.extent = target.minor_extent;
        right_window.first = first_major;
        right_window.extent = target.major_extent;
    }

    let open = gate[0] == 0;
    let mut squares = 0.0f32;
    let mut start = 0usize;
    let mut sums = accumulators(tile);
    while start < inner {
        left_window.depth = start;
        right_window.depth = start;
        fill::<N>(
            &mut stages,
            frames,
            deltas,
            &operands,
            &left_window,
            &right_window,
            left_shape,
            right_shape,
            vectors,
        );
        sync_cube();
        #[unroll]
        for q in 0..depth {
            if comptime!(column_major) {
                accumulate(&mut sums, &stages.right_delta, &stages.left_sum, q, tile);
                accumulate(&mut sums, &stages.right_frame, &stages.left_delta, q, tile);
            } else {
                accumulate(&mut sums, &stages.left_sum, &stages.right_delta, q, tile);
                accumulate(&mut sums, &stages.left_delta, &stages.right_frame, q, tile);
            }
        }
        sync_cube();
        start += depth;
    }
    if open {
        let unit = UNIT_POS as usize;
        let (unit_major, unit_minor) = (unit / tile.minor_units, unit % tile.minor_units);
        #[unroll]
        for m in 0..tile.major_vectors {
            #[unroll]
            for i in 0..4usize {
                let major = first_major + (unit_major + m * tile.major_units) * 4 + i;
                #[unroll]
                for v in 0..tile.minor_vectors {
                    let minor = first_minor + (unit_minor + v * tile.minor_units) * 4;
                    let update = sums[(m * 4 + i) * tile.minor_vectors + v];
                    if major < target.major_extent && minor < target.minor_extent {
                        squares += sum_of_squares(update);
                        write::<F, M>(
                            weight,
                            residual,
                            update,
                            major,
                            minor,
                            &target,
                            column_major,
                            store,
                        );
                    }
                }
            }
        }
    }
    let squares = Vector::<f32, Const<1>>::new(squares);
    let total = reduce::cube_sum(squares, comptime!(tile.units()));
    if UNIT_POS == 0 {
        partials[CUBE_POS] = total.extract(0usize);
    }
}

/// Elements outside of the weight have zero operands and add zero.
#[cube]
fn sum_of_squares(update: Four) -> f32 {
    let square = update * update;
    square.extract(0usize)
        + square.extract(1usize)
        + square.extract(2usize)
        + square.extract(3usize)
}

/// Adds four neighbours along the minor axis to the weight.
#[allow(clippy::too_many_arguments)]
#[cube]
fn write<F: Float, M: Size>(
    weight: &mut [Vector<F, M>],
    residual: &mut ComptimeOption<Box<[u32]>>,
    update: Four,
    major: usize,
    minor: usize,
    target: &Target,
    #[comptime] column_major: bool,
    #[comptime] store: Store,
) {
    let (minor_extent, minor_stride) = (target.minor_extent, target.minor_stride);
    let vectorized = M::value().comptime() == 4;
    let start = major * target.major_stride + minor * minor_stride;
    let words_per_run = minor_extent.div_ceil(2);

    let mut old = Four::new(0.0);
    if vectorized {
        old = Four::cast_from(weight[start / 4]);
    } else {
        #[unroll]
        for j in 0..4usize {
            if minor + j < minor_extent {
                let element = weight[start + j * minor_stride];
                old.insert(j, f32::cast_from(element.extract(0usize)));
            }
        }
    }

    let mut new = Four::new(0.0);
    match store {
        Store::Nearest => {
            new = old + update;
        }
        Store::Stochastic(dtype) =>
        {
            #[unroll]
            for j in 0..4usize {
                let value = old.extract(j) + update.extract(j);
                let (row, column) = if comptime!(column_major) {
                    ((minor + j) as u32, major as u32)
                } else {
                    (major as u32, (minor + j) as u32)
                };
                new.insert(
                    j,
                    rounding::stochastic(value, row, column, target.key0, target.key1, dtype),
                );
            }
        }
        Store::Compensated(dtype) =>
        {
            #[unroll]
            for pair in 0..2usize {
                if minor + pair * 2 < minor_extent {
                    let place = major * words_per_run + minor / 2 + pair;
                    #[comptime]
                    match residual {
                        ComptimeOption::Some(words) => {
                            let word = words[place];
                            let even = rounding::join(old.extract(pair * 2), word, dtype);
                            let odd =
                                rounding::join(old.extract(pair * 2 + 1), word >> 16u32, dtype);
                            let (even, even_low) =
                                rounding::split::<F>(even + update.extract(pair * 2), dtype);
                            let (odd, odd_low) =
                                rounding::split::<F>(odd + update.extract(pair * 2 + 1), dtype);
                            new.insert(pair * 2, even);
                            new.insert(pair * 2 + 1, odd);
                            words[place] = even_low | (odd_low << 16u32);
                        }
                        ComptimeOption::None => {}
                    }
                }
            }
        }
    }

    if vectorized {
        weight[start / 4] = Vector::cast_from(new);
    } else {
        #[unroll]
        for j in 0..4usize {
            if minor + j < minor_extent {
                weight[start + j * minor_stride] = Vector::cast_from(F::cast_from(new.extract(j)));
            }
        }
    }
}
