use cubecl::prelude::*;
use cubecl::server::Handle;

use crate::matrix::{in_buffer, is_aligned};
use crate::merge_kernel::{Engine, OperandsLaunch, TargetLaunch, kernel};
use crate::planes::{self, PlaneTile};
use crate::rounding::{Rounding, StochasticKey};
use crate::tile::{OperandLaunch, Tile};
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

/// How a merge multiplies.
///
/// A merge does `4·K·r` flops per element of `W` and moves 8 bytes for it. From about `K·r = 25` on
/// an A100 (19.5 Tflop/s, 1.6 TB/s) and 40 on an H100 (67 Tflop/s, 3.4 TB/s), by their data sheets,
/// [`Exact`](Arithmetic::Exact) is bound by its arithmetic: at `K·r = 128` and 4096×4096 by 440 and 130 µs
/// where the memory takes 85 and 40. Three `tf32` products at 156 and 495 Tflop/s would take 165 and
/// 52 µs.
///
/// Both ways give equal bits for equal inputs on devices of one kind, so all workers of a run must
/// make the same choice. The dtype of the weight and [`MergePrecision`] are another matter: they say
/// what is kept of the sum.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Arithmetic {
    /// `f32` multiply-adds, one after the other in a fixed order.
    #[default]
    Exact,
    /// On the device's matrix units: every factor as the sum of two `tf32`, and three of their four
    /// products accumulated in `f32`. An element of a factor is held to within `2^-23` of itself and
    /// the product left out is below that, but the order and the rounding of the sums are the
    /// hardware's: the accuracy is meant to be that of `f32`, the bits are not those of
    /// [`Exact`](Self::Exact).
    ///
    /// As [`Exact`](Self::Exact) where [`is_supported`](Self::is_supported) says no, and where the
    /// factors or the weight cannot be read as aligned vectors of four. Its CUDA C++ is compiled
    /// in the tests; it has never run, for want of a GPU, so neither its results nor its speed are
    /// known.
    SplitTf32,
}

impl Arithmetic {
    /// Whether the device has the instructions, rather than merging as [`Exact`](Self::Exact).
    pub fn is_supported(self, client: &Client) -> bool {
        self == Self::Exact || planes::is_supported(client)
    }

    fn engine(self, client: &Client, [major, minor]: [usize; 2], vectors: bool) -> Engine {
        let planes = match self {
            Self::SplitTf32 if vectors => PlaneTile::choose(client, major, minor),
            _ => None,
        };
        match planes {
            Some(tile) => Engine::Planes(tile),
            None => Engine::Units(Tile::choose(client, major, minor, 2)),
        }
    }
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
    merge_with(client, merge, Arithmetic::Exact)
}

/// [`merge()`] with a choice of arithmetic.
///
/// # Errors
///
/// As [`merge()`].
pub fn merge_with(
    client: &Client,
    merge: Merge,
    arithmetic: Arithmetic,
) -> Result<(), KernelError> {
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
    let vectors = frames.has_vectors(&sizes) && deltas.has_vectors(&sizes);
    let vector_size = if vectors { 4 } else { 1 };
    let weight_vector_size = if weight.has_vectors(minor) { 4 } else { 1 };
    let engine = arithmetic.engine(client, extents, vectors && weight_vector_size == 4);
    let cubes = [
        extents[1].div_ceil(engine.minor()),
        extents[0].div_ceil(engine.major()),
    ];
    let partials = cubes[0] * cubes[1];
    if partials == 0 || sizes.inner() == 0 {
        return reduce::sum(client, None, merge.squares.clone(), merge.square_slot);
    }
    let count = cube_count(client, [cubes[0], cubes[1], 1])?;
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
            CubeDim::new_1d(engine.units() as u32),
            vector_size,
            weight_vector_size,
            weight.clone().arg(client, weight_vector_size),
            companion.into(),
            frames.arg(vector_size),
            deltas.arg(vector_size),
            BufferArg::from_raw_parts(merge.non_finite.clone(), 1),
            BufferArg::from_raw_parts(partial_sums.clone(), partials),
            OperandsLaunch::new(
                frames.left_operand(&sizes),
                frames.right_operand(&sizes),
                deltas.left_operand(&sizes),
                deltas.right_operand(&sizes),
            ),
            sizes.inner(),
            TargetLaunch::new(
                extents[0], extents[1], strides[0], strides[1], key[0], key[1],
            ),
            vectors,
            minor == 0,
            rounding,
            engine,
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

/// The grid of `[x, y, z]` cubes.
pub(crate) fn cube_count(client: &Client, cubes: [usize; 3]) -> Result<CubeCount, KernelError> {
    let (x, y, z) = client.properties().hardware.max_cube_count;
    let limit = [x, y, z];
    let cubes = cubes.map(|count| count as u64);
    if (0..3).any(|axis| cubes[axis] > u64::from(limit[axis])) {
        return Err(KernelError::TooManyTiles { cubes, limit });
    }
    let [x, y, z] = cubes.map(|count| count as u32);
    Ok(CubeCount::Static(x, y, z))
}
