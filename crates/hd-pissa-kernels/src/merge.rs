//! The merge of all shards' deltas into a weight.

use cubecl::prelude::*;
use cubecl::server::Handle;
use hd_pissa_bits::Rounding;

use crate::grid::cube_count;
use crate::matrix::{in_buffer, is_aligned};
use crate::merge_kernel::{OperandsLaunch, TargetLaunch, kernel};
use crate::rounding::Store;
use crate::tile::{OperandLaunch, Tile};
use crate::{FloatType, KernelError, Matrix, reduce};

/// The arguments of [`merge`].
///
/// Frames and deltas are contiguous `f32` matrices `[shards, rank · (d_input + d_output)]`. Row `k`
/// holds the left factor of shard `k`, `[d_input, rank]` row by row, and then the right one,
/// `[rank, d_output]` row by row.
#[derive(Clone, Debug)]
pub struct Merge {
    /// `W`, `[d_input, d_output]`, row- or column-major or any other strides without overlap.
    pub weight: Matrix,
    /// The fixed factors `a_k` and `b_k`.
    pub frames: Handle,
    /// The gathered deltas `Δa_k` and `Δb_k`.
    pub deltas: Handle,
    /// Rank of a shard's factors.
    pub rank: usize,
    /// Number of shards.
    pub shards: usize,
    /// How the sum is rounded to a half-precision weight. Ignored if `residual` keeps the rest of
    /// the sum.
    pub rounding: Rounding,
    /// The 16 bits that each element of a half-precision weight lacks, `u32` of [`residual_shape`];
    /// see [`hd_pissa_bits::Half`]. Zeros stand for the bare weight. Ignored for an `f32` weight.
    pub residual: Option<Handle>,
    /// One `u32`: the merge changes the weight only if this is zero when it runs.
    pub gate: Handle,
}

/// The extents of the factors.
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

    /// Elements of a row of frames or deltas.
    fn row(&self) -> usize {
        self.rank * (self.d_input + self.d_output)
    }

    /// Whether every row of every factor starts on a vector of four.
    fn has_vectors(&self, factors: &Handle) -> bool {
        self.rank.is_multiple_of(4) && self.d_output.is_multiple_of(4) && is_aligned(factors, 4)
    }

    fn operands(&self) -> OperandsLaunch {
        let (rank, row) = (self.rank.max(1), self.row());
        OperandsLaunch::new(
            OperandLaunch::new(0, rank, 1, rank, row),
            OperandLaunch::new(self.rank * self.d_input, 1, self.d_output, rank, row),
        )
    }
}

/// Shape of the residual bits of a half-precision weight, as `u32` words: `[n, ceil(m / 2)]` for `n` runs
/// of `m` elements along the axis with the smaller stride. The low half of word `[i, j]` belongs to
/// element `2j` of run `i`, the high half to element `2j + 1`.
pub fn residual_shape(weight: &Matrix) -> [usize; 2] {
    let minor = weight.minor_axis();
    [weight.shape[1 - minor], weight.shape[minor].div_ceil(2)]
}

/// Adds the update of one step to a weight in place:
/// `W += Σ_k (a_k + Δa_k)·Δb_k + Δa_k·b_k`.
///
/// Returns a buffer of one `f32`: the sum of the squares of the update before rounding, or zero if
/// the gate is closed.
///
/// The kernel sums in `f32`, in the order of the shards and within a shard of the components, for
/// every tile. It adds the sum to `W` once and rounds once. It takes no memory of the weight's
/// size. An empty weight, or an empty set of components, leaves the weight unchanged.
///
/// # Errors
///
/// [`KernelError`] if an operand does not fit its buffer, or if the device lacks the weight's type.
/// Then nothing runs.
pub fn merge(client: &Client, merge: Merge) -> Result<Handle, KernelError> {
    let Merge {
        weight,
        frames,
        deltas,
        rank,
        shards,
        rounding,
        residual,
        gate,
    } = merge;
    let [d_input, d_output] = weight.shape;
    let sizes = Sizes {
        d_input,
        d_output,
        rank,
        shards,
    };
    let dtype = weight.dtype;
    weight.check_supported(client)?;
    weight.check_write("weight")?;
    let factors = shards * sizes.row();
    in_buffer("frames", &frames, 4, factors as u64)?;
    in_buffer("deltas", &deltas, 4, factors as u64)?;
    in_buffer("gate", &gate, 4, 1)?;
    let residual = residual.filter(|_| dtype != FloatType::F32);
    let words = residual_shape(&weight).iter().product();
    if let Some(residual) = &residual {
        in_buffer("residual", residual, 4, words as u64)?;
    }
    let (store, key) = match (dtype, rounding) {
        (FloatType::F32, _) => (Store::Nearest, [0; 2]),
        _ if residual.is_some() => (Store::Compensated(dtype), [0; 2]),
        (_, Rounding::Nearest) => (Store::Nearest, [0; 2]),
        (_, Rounding::Stochastic(key)) => (Store::Stochastic(dtype), key.words()),
    };

    let minor = weight.minor_axis();
    let extents = [weight.shape[1 - minor], weight.shape[minor]];
    let strides = [weight.strides[1 - minor], weight.strides[minor]];
    let vectors = sizes.has_vectors(&frames) && sizes.has_vectors(&deltas);
    let [vector_size, weight_vector_size] =
        [vectors, weight.has_vectors(minor)].map(|vectors| if vectors { 4 } else { 1 });
    let tile = Tile::choose(client, extents[0], extents[1], 2);
    let cubes = [
        extents[1].div_ceil(tile.minor()),
        extents[0].div_ceil(tile.major()),
    ];
    let partials = cubes[0] * cubes[1];
    if partials == 0 || sizes.inner() == 0 {
        return Ok(client.create_from_slice(&0f32.to_ne_bytes()));
    }
    let count = cube_count(client, [cubes[0], cubes[1], 1])?;
    let partial_sums = client.empty(partials * size_of::<f32>());
    // SAFETY: the checks above; the buffer of partial sums has one element per cube.
    unsafe {
        let factors = |handle| BufferArg::from_raw_parts(handle, factors / vector_size);
        kernel::launch_unchecked(
            client,
            count,
            CubeDim::new_1d(tile.units() as u32),
            vector_size,
            weight_vector_size,
            weight.arg(client, weight_vector_size),
            residual
                .map(|residual| BufferArg::from_raw_parts(residual, words))
                .into(),
            factors(frames),
            factors(deltas),
            BufferArg::from_raw_parts(gate, 1),
            BufferArg::from_raw_parts(partial_sums.clone(), partials),
            sizes.operands(),
            sizes.inner(),
            TargetLaunch::new(
                extents[0], extents[1], strides[0], strides[1], key[0], key[1],
            ),
            vectors,
            minor == 0,
            store,
            tile,
            dtype.elem_type(),
        );
    }
    Ok(reduce::sum(client, partial_sums, partials))
}
