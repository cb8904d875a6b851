use cubecl::prelude::*;
use cubecl::server::Handle;

use crate::matrix::{in_buffer, is_aligned};
use crate::rounding::{self, Rounding, StochasticKey};
use crate::tile::{
    self, Access, Four, Operand, OperandLaunch, Tile, Window, accumulate, accumulators, row_vectors,
};
use crate::{Buffer, FloatType, KernelError, Matrix, reduce};

/// What a merge into a half-precision weight keeps of the digits that the weight cannot hold. An
/// `f32` weight is merged the same way whatever the choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MergePrecision {
    /// Nothing: the sum is rounded to the nearest value. A step smaller than half a unit in the
    /// last place is lost, which is most of them at ordinary learning rates.
    Plain,
    /// A companion buffer holds 16 more bits of every element ([`companion_shape`]).
    ///
    /// With a `bf16` weight the two halves make any `f32` value exactly, so the pair follows the
    /// trajectory of an `f32` weight bit for bit. The high half is the nearest `bf16`, ties away
    /// from zero: ties to even would give even values 65537 `f32` values each, one more than 16
    /// bits tell apart. With an `f16` weight they make any `f32` from `2^-16` up to the largest
    /// `f16` exactly; smaller values are held to within `2^-39`.
    ///
    /// An all-zero companion stands for the weight alone.
    Split,
    /// The sum is rounded up or down at random with the sum as its mean.
    Stochastic(StochasticKey),
}

impl MergePrecision {
    fn rounding(self, dtype: FloatType) -> Rounding {
        match (self, dtype) {
            (_, FloatType::F32) | (Self::Plain, _) => Rounding::Nearest,
            (Self::Split, _) => Rounding::Split(dtype),
            (Self::Stochastic(_), _) => Rounding::Stochastic(dtype),
        }
    }
}

/// The factors of one weight for every shard, in one flat `f32` buffer.
///
/// Shard `k` has its left factor, `[d_input, rank]` row by row, at element
/// `k · shard_stride + left`, and its right factor, `[rank, d_output]` row by row, at
/// `k · shard_stride + right`.
#[derive(Clone, Debug)]
pub struct ShardedFactors {
    /// The buffer.
    pub buffer: Buffer,
    /// Position of shard 0's left factor.
    pub left: usize,
    /// Position of shard 0's right factor.
    pub right: usize,
    /// Distance between shards.
    pub shard_stride: usize,
}

impl ShardedFactors {
    fn check(&self, operand: &'static str, sizes: &Sizes) -> Result<(), KernelError> {
        let expected = FloatType::F32;
        let found = self.buffer.dtype;
        if found != expected {
            return Err(KernelError::ElementType {
                operand,
                expected,
                found,
            });
        }
        self.buffer.check(operand)?;
        if sizes.inner() == 0 {
            return Ok(());
        }
        let last_shard = (sizes.shards as u64 - 1) * self.shard_stride as u64;
        let left = self.left as u64 + (sizes.d_input * sizes.rank) as u64;
        let right = self.right as u64 + (sizes.rank * sizes.d_output) as u64;
        let needed = last_shard + left.max(right);
        let available = self.buffer.len as u64;
        if needed > available {
            return Err(KernelError::OutOfBounds {
                operand,
                needed,
                available,
            });
        }
        Ok(())
    }

    /// Whether every row of every factor starts on a vector of four.
    fn has_vectors(&self, sizes: &Sizes) -> bool {
        [
            self.left,
            self.right,
            self.shard_stride,
            self.buffer.len,
            sizes.rank,
            sizes.d_output,
        ]
        .iter()
        .all(|place| place.is_multiple_of(4))
            && is_aligned(&self.buffer.handle, 4)
    }

    fn arg(&self, vector_size: usize) -> BufferArg {
        // SAFETY: `check` found `len` elements in the buffer; `has_vectors` that they are whole
        // vectors.
        unsafe {
            BufferArg::from_raw_parts(self.buffer.handle.clone(), self.buffer.len / vector_size)
        }
    }

    fn left_operand(&self, sizes: &Sizes) -> OperandLaunch {
        OperandLaunch::new(
            self.left,
            sizes.rank,
            1,
            sizes.rank.max(1),
            self.shard_stride,
        )
    }

    fn right_operand(&self, sizes: &Sizes) -> OperandLaunch {
        OperandLaunch::new(
            self.right,
            1,
            sizes.d_output,
            sizes.rank.max(1),
            self.shard_stride,
        )
    }
}

struct Sizes {
    d_input: usize,
    d_output: usize,
    rank: usize,
    shards: usize,
}

impl Sizes {
    fn inner(&self) -> usize {
        self.rank * self.shards
    }
}

/// The arguments of [`merge`].
#[derive(Clone, Debug)]
pub struct Merge {
    /// `W`, `[d_input, d_output]`, row- or column-major or any other strides without overlap.
    pub weight: Matrix,
    /// The fixed factors `a_k` and `b_k`.
    pub frames: ShardedFactors,
    /// The gathered deltas `Δa_k` and `Δb_k`.
    pub deltas: ShardedFactors,
    /// Rank of a shard's factors.
    pub rank: usize,
    /// Number of shards.
    pub shards: usize,
    /// What a half-precision weight keeps of the sum.
    pub precision: MergePrecision,
    /// The low halves of a half-precision weight with [`MergePrecision::Split`], `u32` of
    /// [`companion_shape`]. Ignored otherwise.
    pub companion: Option<Handle>,
    /// One `u32`: the merge leaves the weight alone unless it is zero when the merge runs. See
    /// [`count_non_finite`](crate::count_non_finite).
    pub non_finite: Handle,
    /// An `f32` buffer whose element `square_slot` receives the sum of the squares of the update
    /// before rounding, zero where `non_finite` closed the gate.
    pub squares: Handle,
    /// The element of `squares` to write.
    pub square_slot: usize,
}

/// Shape of the companion of a split weight, as `u32` words: `[n, ceil(m / 2)]` for `n` runs of `m`
/// elements along the axis with the smaller stride. The low half of word `[i, j]` belongs to
/// element `2j` of run `i`, the high half to element `2j + 1`.
pub fn companion_shape(weight: &Matrix) -> [usize; 2] {
    let minor = weight.minor_axis();
    [weight.shape[1 - minor], weight.shape[minor].div_ceil(2)]
}

/// Number of `u32` words in the companion of a split weight.
pub fn companion_len(weight: &Matrix) -> usize {
    companion_shape(weight).iter().product()
}

/// Adds the update of one step to a weight in place:
/// `W += Σ_k (a_k + Δa_k)·Δb_k + Δa_k·b_k`.
///
/// The sum is accumulated in `f32` in the order of the shards and, within one, of the components,
/// whatever the tile; it is added to `W` once and rounded once. No memory of the weight's size is
/// taken.
///
/// An empty weight, or no component at all, leaves the weight alone and writes a zero to `squares`.
///
/// # Errors
///
/// [`KernelError`] if an operand does not fit its buffer, if the device lacks the weight's type or
/// if a split weight has no companion. Then nothing runs.
pub fn merge(client: &Client, merge: Merge) -> Result<(), KernelError> {
    let Merge {
        weight,
        frames,
        deltas,
        rank,
        shards,
        ..
    } = &merge;
    let [d_input, d_output] = weight.shape;
    let sizes = Sizes {
        d_input,
        d_output,
        rank: *rank,
        shards: *shards,
    };
    let dtype = weight.dtype;
    let rounding = merge.precision.rounding(dtype);
    dtype.check(client)?;
    weight.check_write("weight")?;
    frames.check("frames", &sizes)?;
    deltas.check("deltas", &sizes)?;
    in_buffer("non_finite", &merge.non_finite, 4, 1)?;
    in_buffer("squares", &merge.squares, 4, merge.square_slot as u64 + 1)?;
    let companion = match (rounding, &merge.companion) {
        (Rounding::Split(_), None) => return Err(KernelError::MissingCompanion(dtype)),
        (Rounding::Split(_), Some(handle)) => {
            let words = companion_len(weight);
            in_buffer("companion", handle, 4, words as u64)?;
            // SAFETY: `in_buffer` found the words in the buffer.
            Some(unsafe { BufferArg::from_raw_parts(handle.clone(), words) })
        }
        _ => None,
    };

    let minor = weight.minor_axis();
    let extents = [weight.shape[1 - minor], weight.shape[minor]];
    let tile = Tile::choose(client, extents[0], extents[1], 2);
    let cubes = [
        extents[1].div_ceil(tile.minor()),
        extents[0].div_ceil(tile.major()),
    ];
    let partials = cubes[0] * cubes[1];
    if partials == 0 || sizes.inner() == 0 {
        return reduce::sum(client, None, merge.squares.clone(), merge.square_slot);
    }
    let count = cube_count(client, cubes)?;

    let vectors = frames.has_vectors(&sizes) && deltas.has_vectors(&sizes);
    let vector_size = if vectors { 4 } else { 1 };
    let weight_vector_size = if weight.has_vectors(minor) { 4 } else { 1 };
    let strides = [weight.strides[1 - minor], weight.strides[minor]];
    let key = match merge.precision {
        MergePrecision::Stochastic(key) => key.words(),
        _ => [0, 0],
    };
    let partial_sums = client.empty(partials * 4);
    // SAFETY: the checks above; the buffer of partial sums has one element per cube, and the gate
    // one element.
    unsafe {
        kernel::launch_unchecked(
            client,
            count,
            CubeDim::new_1d(tile.units() as u32),
            vector_size,
            weight_vector_size,
            weight.clone().arg(client, weight_vector_size),
            companion.into(),
            frames.arg(vector_size),
            deltas.arg(vector_size),
            BufferArg::from_raw_parts(merge.non_finite.clone(), 1),
            BufferArg::from_raw_parts(partial_sums.clone(), partials),
            frames.left_operand(&sizes),
            frames.right_operand(&sizes),
            deltas.left_operand(&sizes),
            deltas.right_operand(&sizes),
            sizes.inner(),
            extents[0],
            extents[1],
            strides[0],
            strides[1],
            key[0],
            key[1],
            vectors,
            minor == 0,
            rounding,
            tile,
            dtype.elem_type(),
        );
    }
    reduce::sum(
        client,
        Some((partial_sums, partials)),
        merge.squares.clone(),
        merge.square_slot,
    )
}

/// The grid of `[x, y]` tiles.
pub(crate) fn cube_count(client: &Client, cubes: [usize; 2]) -> Result<CubeCount, KernelError> {
    let (x, y, _) = client.properties().hardware.max_cube_count;
    let cubes = cubes.map(|count| count as u64);
    if cubes[0] > u64::from(x) || cubes[1] > u64::from(y) {
        return Err(KernelError::TooManyTiles {
            cubes,
            limit: [x, y],
        });
    }
    Ok(CubeCount::Static(cubes[0] as u32, cubes[1] as u32, 1))
}

/// One tile of the weight per cube. `W` is walked with its minor axis along `x`; `column_major`
/// says that this is the axis of `d_input`.
#[allow(clippy::too_many_arguments)]
#[cube(launch_unchecked, create_dummy_kernel)]
pub fn kernel<F: Float, N: Size, M: Size>(
    weight: &mut [Vector<F, M>],
    companion: &mut ComptimeOption<Box<[u32]>>,
    frames: &[Vector<f32, N>],
    deltas: &[Vector<f32, N>],
    non_finite: &[u32],
    partials: &mut [f32],
    frame_left: Operand,
    frame_right: Operand,
    delta_left: Operand,
    delta_right: Operand,
    inner: usize,
    major_extent: usize,
    minor_extent: usize,
    major_stride: usize,
    minor_stride: usize,
    key0: u32,
    key1: u32,
    #[comptime] vectors: bool,
    #[comptime] column_major: bool,
    #[comptime] rounding: Rounding,
    #[comptime] tile: Tile,
    #[define(F)] _dtype: cubecl::ir::ElemType,
) {
    let left_access = comptime!(Access {
        vectors,
        along_depth: true
    });
    let right_access = comptime!(Access {
        vectors,
        along_depth: false
    });
    let (width_major, width_minor) = comptime!((tile.major(), tile.minor()));
    let (width_left, width_right) = comptime!(if column_major {
        (width_minor, width_major)
    } else {
        (width_major, width_minor)
    });
    let units = comptime!(tile.units());
    let depth = comptime!(tile.depth);

    // (a + Δa) and Δa against Δb and b.
    let mut left_sum = Shared::<[Four]>::new_slice(comptime!(depth * row_vectors(width_left)));
    let mut left_delta = Shared::<[Four]>::new_slice(comptime!(depth * row_vectors(width_left)));
    let mut right_delta = Shared::<[Four]>::new_slice(comptime!(depth * row_vectors(width_right)));
    let mut right_frame = Shared::<[Four]>::new_slice(comptime!(depth * row_vectors(width_right)));

    let first_major = CUBE_POS_Y as usize * width_major;
    let first_minor = CUBE_POS_X as usize * width_minor;
    let mut left_window = Window {
        first: first_major,
        extent: major_extent,
        depth: 0usize,
        depth_extent: inner,
    };
    let mut right_window = Window {
        first: first_minor,
        extent: minor_extent,
        depth: 0usize,
        depth_extent: inner,
    };
    if comptime!(column_major) {
        left_window.first = first_minor;
        left_window.extent = minor_extent;
        right_window.first = first_major;
        right_window.extent = major_extent;
    }

    let mut sums = accumulators(tile);
    let mut start = 0usize;
    while start < inner {
        left_window.depth = start;
        right_window.depth = start;
        tile::fill_sum::<f32, N>(
            frames,
            &frame_left,
            deltas,
            &delta_left,
            &mut left_sum,
            &mut left_delta,
            &left_window,
            width_left,
            depth,
            units,
            left_access,
        );
        tile::fill::<f32, N>(
            deltas,
            &mut right_delta,
            &delta_right,
            &right_window,
            width_right,
            depth,
            units,
            right_access,
        );
        tile::fill::<f32, N>(
            frames,
            &mut right_frame,
            &frame_right,
            &right_window,
            width_right,
            depth,
            units,
            right_access,
        );
        sync_cube();
        #[unroll]
        for q in 0..depth {
            if comptime!(column_major) {
                accumulate(&mut sums, &right_delta, &left_sum, q, tile);
                accumulate(&mut sums, &right_frame, &left_delta, q, tile);
            } else {
                accumulate(&mut sums, &left_sum, &right_delta, q, tile);
                accumulate(&mut sums, &left_delta, &right_frame, q, tile);
            }
        }
        sync_cube();
        start += depth;
    }

    let unit = UNIT_POS as usize;
    let (unit_major, unit_minor) = (unit / tile.minor_units, unit % tile.minor_units);
    let open = non_finite[0] == 0;
    let mut squares = 0.0f32;
    if open {
        #[unroll]
        for m in 0..tile.major_vectors {
            #[unroll]
            for i in 0..4usize {
                let major = first_major + (unit_major + m * tile.major_units) * 4 + i;
                if major < major_extent {
                    #[unroll]
                    for v in 0..tile.minor_vectors {
                        let minor = first_minor + (unit_minor + v * tile.minor_units) * 4;
                        let update = sums[(m * 4 + i) * tile.minor_vectors + v];
                        // Elements outside of the weight have zero operands and add nothing.
                        let square = update * update;
                        squares += square.extract(0usize)
                            + square.extract(1usize)
                            + square.extract(2usize)
                            + square.extract(3usize);
                        if minor < minor_extent {
                            write::<F, M>(
                                weight,
                                companion,
                                update,
                                major,
                                minor,
                                minor_extent,
                                major_stride,
                                minor_stride,
                                key0,
                                key1,
                                column_major,
                                rounding,
                            );
                        }
                    }
                }
            }
        }
    }
    let total = reduce::cube_sum(squares, units);
    if UNIT_POS == 0 {
        partials[CUBE_POS] = total;
    }
}

/// Adds four neighbours along the minor axis to the weight.
#[allow(clippy::too_many_arguments)]
#[cube]
fn write<F: Float, M: Size>(
    weight: &mut [Vector<F, M>],
    companion: &mut ComptimeOption<Box<[u32]>>,
    update: Four,
    major: usize,
    minor: usize,
    minor_extent: usize,
    major_stride: usize,
    minor_stride: usize,
    key0: u32,
    key1: u32,
    #[comptime] column_major: bool,
    #[comptime] rounding: Rounding,
) {
    let vectorized = M::value().comptime() == 4;
    let start = major * major_stride + minor * minor_stride;
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
    match rounding {
        Rounding::Nearest => {
            new = old + update;
        }
        Rounding::Stochastic(dtype) =>
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
                    rounding::stochastic(value, row, column, key0, key1, dtype),
                );
            }
        }
        Rounding::Split(dtype) =>
        {
            #[unroll]
            for pair in 0..2usize {
                if minor + pair * 2 < minor_extent {
                    let place = major * words_per_run + minor / 2 + pair;
                    #[comptime]
                    match companion {
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
