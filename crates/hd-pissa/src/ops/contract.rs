//! The operations that the adapter and the optimizer need from a backend, with defaults made of
//! Burn's operations.

#[cfg(feature = "fusion")]
use burn::backend::fusion::custom::TensorSpec;
use burn::backend::{
    Backend, Dispatch, TensorMetadata, backend_extension,
    tensor::{Device, FloatTensor, IntTensor},
};
use burn::tensor::{DType, Shape, Slice};

use super::Rounding;

/// The operations that the adapter and the optimizer need from a backend beyond Burn's own.
///
/// A method with a body uses Burn's operations and is correct on every backend. A backend overrides
/// it to save memory or time. The factors `a: [d_input, rank]` and `b: [rank, d_output]` are `f32`
/// for every dtype of the weight `w: [d_input, d_output]`.
#[backend_extension(
    Autodiff,
    Flex: cfg(feature = "flex"),
    Cube: cfg(feature = "cubecl-backend"),
    Fusion: cfg(feature = "fusion"),
)]
pub trait HdPissaOps: Backend + ProductKernels {
    /// `x · w` for `x: [.., d_input]`, of rank 2 or more; shape `[.., d_output]`, dtype of `x`.
    ///
    /// The value does not depend on the factors. Its gradient is that of `x · (w + scale · a · b)`
    /// with respect to `x` (at `a · b = 0`), `a` and `b`; `w` receives none.
    #[fusion(default)]
    fn hd_pissa_linear(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        scale: f64,
    ) -> FloatTensor<Self> {
        let _ = (a, b, scale);
        dense_linear::<Self>(x, w)
    }

    /// `x · f` in `f32`, for `x: [m, n]` of any float dtype and an `f32` matrix `f: [n, rank]` of few
    /// columns: the projections `x·a` and `G·bᵀ` and, of transposed operands, the gradients of the
    /// factors.
    ///
    /// Called if [`ProductKernels::has_factor_product`] is true.
    #[fusion(meta = |x, f| TensorSpec::new(Shape::new([x.shape[0], f.shape[1]]), f.dtype))]
    fn hd_pissa_factor_product(x: FloatTensor<Self>, f: FloatTensor<Self>) -> FloatTensor<Self> {
        product::<Self>(cast::<Self>(x, DType::F32), f)
    }

    /// `x · w` in the dtype of `x`, and `x · f` in `f32`, for `x: [m, n]` of any float dtype,
    /// `w: [n, columns]` of the same, and an `f32` matrix `f: [n, rank]` of few columns. The
    /// forward pass of the adapter needs both products of `x`; the backward pass needs them of `G`,
    /// with transposed operands.
    ///
    /// Called if [`ProductKernels::has_low_rank_product`] is true.
    #[fusion(meta = |x, w, f| (
        TensorSpec::new(Shape::new([x.shape[0], w.shape[1]]), x.dtype),
        TensorSpec::new(Shape::new([x.shape[0], f.shape[1]]), f.dtype),
    ))]
    fn hd_pissa_low_rank_product(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        f: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let y = product::<Self>(x.clone(), w);
        (y, factor_product::<Self>(readable::<Self>(x), f))
    }

    /// `w` itself, with the gradient of `w + scale · a · b` with respect to `a` and `b`.
    #[fusion(default)]
    fn hd_pissa_weight(
        w: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        scale: f64,
    ) -> FloatTensor<Self> {
        let _ = (a, b, scale);
        w
    }

    /// `whole` itself, whose values from `start` on along dimension `dim` are those of `part`: their
    /// gradient goes to `part` too.
    #[fusion(default)]
    fn hd_pissa_part(
        whole: FloatTensor<Self>,
        part: FloatTensor<Self>,
        dim: usize,
        start: usize,
    ) -> FloatTensor<Self> {
        let _ = (part, dim, start);
        whole
    }

    /// `w + Σ_k ((a_k + Δa_k)·Δb_k + Δa_k·b_k)`, rounded once to the dtype of `w`, and the sum of
    /// the squares of the update.
    ///
    /// `frames` and `deltas` are `f32` of shape `[shards, rank · (d_input + d_output)]`: row `k`
    /// holds `a_k`, row by row, followed by `b_k`, row by row, or their deltas. `gate` is an `f32`
    /// of shape `[1]`: unless it is zero, `w` comes back unchanged. The second output has shape
    /// `[1]`; a backend may leave it at zero if `measure` is false. The first output reuses the
    /// memory of `w` if no other handle to it exists.
    #[fusion(meta = |w, frames, _deltas, _gate, _rank, _rounding, _measure| (
        w.clone(),
        scalar(frames),
    ))]
    fn hd_pissa_merge(
        w: FloatTensor<Self>,
        frames: FloatTensor<Self>,
        deltas: FloatTensor<Self>,
        gate: FloatTensor<Self>,
        rank: usize,
        rounding: Rounding,
        measure: bool,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// [`hd_pissa_merge`](Self::hd_pissa_merge) for a half-precision `w` with residual bits, an
    /// `i32` tensor of shape `[d_input, ceil(d_output / 2)]`, whose words hold 16 more bits of two
    /// neighbouring elements of a row, the first in the low half.
    #[fusion(meta = |w, residual, frames, _deltas, _gate, _rank, _measure| (
        w.clone(),
        residual.clone(),
        scalar(frames),
    ))]
    fn hd_pissa_merge_compensated(
        w: FloatTensor<Self>,
        residual: IntTensor<Self>,
        frames: FloatTensor<Self>,
        deltas: FloatTensor<Self>,
        gate: FloatTensor<Self>,
        rank: usize,
        measure: bool,
    ) -> (FloatTensor<Self>, IntTensor<Self>, FloatTensor<Self>);

    /// The statistics that a step needs of each row of `x`, an `f32` matrix `[rows, n]`, before it
    /// merges: an `f32` matrix `[rows, 4]` whose columns are
    ///
    /// 0. the number of NaN and infinite elements,
    /// 1. the sum of squares of the columns `0..split`,
    /// 2. the sum of squares of the columns `split..n`,
    /// 3. the sum of squares of all columns, each element times `2^-80` before it is squared.
    ///
    /// The sums leave out NaN and infinite elements. Column 3 is finite even if columns 1 and 2
    /// exceed the range of `f32`.
    #[fusion(meta = |x, _split| TensorSpec::new(Shape::new([x.shape[0], 4]), x.dtype))]
    fn hd_pissa_row_statistics(x: FloatTensor<Self>, split: usize) -> FloatTensor<Self>;

    /// `target: [n]` with the elements of the first `count` of eight matrices from its element `start` on:
    /// row by row, one matrix after the other. All are `f32`.
    ///
    /// Eight, because a backend extension cannot take a list of tensors.
    #[allow(clippy::too_many_arguments)]
    #[fusion(meta = |target, _start, _count, _p0, _p1, _p2, _p3, _p4, _p5, _p6, _p7| target.clone())]
    fn hd_pissa_join(
        target: FloatTensor<Self>,
        start: usize,
        count: usize,
        p0: FloatTensor<Self>,
        p1: FloatTensor<Self>,
        p2: FloatTensor<Self>,
        p3: FloatTensor<Self>,
        p4: FloatTensor<Self>,
        p5: FloatTensor<Self>,
        p6: FloatTensor<Self>,
        p7: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        let parts = [p0, p1, p2, p3, p4, p5, p6, p7];
        let mut start = start;
        parts.into_iter().take(count).fold(target, |target, part| {
            let len = part.shape().num_elements();
            let part = Self::float_reshape(part, Shape::new([len]));
            let range = Slice::from(start..start + len);
            start += len;
            Self::float_slice_assign(target, &[range], part)
        })
    }

    /// The largest magnitude in `w`, a half-precision matrix: an `f32` tensor of shape `[1]`.
    #[fusion(default)]
    fn hd_pissa_max_abs(w: FloatTensor<Self>) -> FloatTensor<Self> {
        let largest = cast::<Self>(Self::float_max_abs(w), DType::F32);
        Self::float_reshape(largest, Shape::new([1]))
    }

    /// A hash of the bits of `x`, a float matrix: an `i32` tensor of shape `[2]`.
    ///
    /// With the element at row-major index `i`, as `u32`, and its value's `f32` bits `b`, word `j` is
    /// the wrapping sum over all elements of `mix(b ^ mix(i ^ SEEDS[j]))`. `mix` is the finalizer of
    /// MurmurHash3 for 32 bits, and the seeds are `0x9e3779b9` and `0x85ebca77`.
    #[fusion(meta = |_x| TensorSpec::new(Shape::new([2]), DType::I32))]
    fn hd_pissa_fingerprint(x: FloatTensor<Self>) -> IntTensor<Self>;

    /// [`hd_pissa_fingerprint`](Self::hd_pissa_fingerprint) of an `i32` matrix.
    #[fusion(meta = |_x| TensorSpec::new(Shape::new([2]), DType::I32))]
    fn hd_pissa_fingerprint_int(x: IntTensor<Self>) -> IntTensor<Self>;
}

/// The description of an `f32` tensor of shape `[1]` for Fusion.
#[cfg(feature = "fusion")]
fn scalar(like: &TensorSpec) -> TensorSpec {
    TensorSpec::new(Shape::new([1]), like.dtype)
}

/// The products that a backend has itself. This is separate from [`HdPissaOps`], because the answer
/// is needed before anything is queued.
pub trait ProductKernels: Backend {
    /// Whether [`HdPissaOps::hd_pissa_factor_product`] of an `x` of `dtype` is better than Burn's
    /// product: because Burn would need a copy of `x` in `f32`, or because it is faster.
    fn has_factor_product(device: &Device<Self>, dtype: DType) -> bool {
        let _ = (device, dtype);
        false
    }

    /// Whether [`HdPissaOps::hd_pissa_low_rank_product`] of an `x` of `dtype` may be faster than two
    /// products.
    fn has_low_rank_product(device: &Device<Self>, dtype: DType) -> bool {
        let _ = (device, dtype);
        false
    }
}

/// `Dispatch` forwards to backends and has no products of its own.
impl ProductKernels for Dispatch {}

#[cfg(feature = "fusion")]
impl<B: burn::backend::fusion::FusionBackend + ProductKernels> ProductKernels
    for burn::backend::fusion::Fusion<B>
{
    fn has_factor_product(device: &Device<Self>, dtype: DType) -> bool {
        B::has_factor_product(device, dtype)
    }

    fn has_low_rank_product(device: &Device<Self>, dtype: DType) -> bool {
        B::has_low_rank_product(device, dtype)
    }
}

/// `x · w` for `x: [.., d_input]`, as one product of two matrices.
///
/// If `x` has a batch of one, Burn's own `linear` gives the weight as many dimensions as `x`. That
/// copies a transposed weight, and the batched product of Flex runs on one thread.
pub(super) fn dense_linear<B: Backend>(x: FloatTensor<B>, w: FloatTensor<B>) -> FloatTensor<B> {
    let shape = with_last(x.shape(), w.shape()[1]);
    B::float_reshape(product::<B>(flatten::<B>(x), w), shape)
}

/// `x · w` for `x: [.., d]`, and `x · f` of shape `[tokens, rank]` in `f32`, each if requested.
pub(super) fn products<B: HdPissaOps>(
    x: FloatTensor<B>,
    w: Option<FloatTensor<B>>,
    f: Option<FloatTensor<B>>,
) -> (Option<FloatTensor<B>>, Option<FloatTensor<B>>) {
    match (w, f) {
        (Some(w), Some(f)) if B::has_low_rank_product(&x.device(), x.dtype()) => {
            let shape = with_last(x.shape(), w.shape()[1]);
            let (y, p) = B::hd_pissa_low_rank_product(flatten::<B>(x), w, f);
            (Some(B::float_reshape(y, shape)), Some(p))
        }
        // The dense product comes first, because the next layer waits for it.
        (w, f) => (
            w.map(|w| dense_linear::<B>(x.clone(), w)),
            f.map(|f| factor_product::<B>(readable::<B>(flatten::<B>(x)), f)),
        ),
    }
}

fn with_last(mut shape: Shape, size: usize) -> Shape {
    let last = shape.num_dims() - 1;
    shape[last] = size;
    shape
}

/// `x` with its leading dimensions flattened: `[tokens, d]`.
pub(super) fn flatten<B: Backend>(x: FloatTensor<B>) -> FloatTensor<B> {
    let shape = x.shape();
    let d = shape[shape.num_dims() - 1];
    let tokens: usize = shape.iter().take(shape.num_dims() - 1).product();
    B::float_reshape(x, Shape::new([tokens, d]))
}

/// `lhs · rhs` of two matrices; an empty inner dimension gives zeros on every backend.
pub(super) fn product<B: Backend>(lhs: FloatTensor<B>, rhs: FloatTensor<B>) -> FloatTensor<B> {
    let (rows, inner, cols) = (lhs.shape()[0], lhs.shape()[1], rhs.shape()[1]);
    if rows * inner * cols == 0 {
        return B::float_zeros(Shape::new([rows, cols]), &lhs.device(), lhs.dtype().into());
    }
    B::float_matmul(lhs, rhs)
}

/// `x` in a dtype that [`factor_product`] takes: unchanged if the backend reads its dtype, else in
/// `f32`.
pub(super) fn readable<B: HdPissaOps>(x: FloatTensor<B>) -> FloatTensor<B> {
    match B::has_factor_product(&x.device(), x.dtype()) {
        true => x,
        false => cast::<B>(x, DType::F32),
    }
}

/// `x · f` in `f32` for a [`readable`] matrix `x` and an `f32` matrix `f`.
pub(super) fn factor_product<B: HdPissaOps>(
    x: FloatTensor<B>,
    f: FloatTensor<B>,
) -> FloatTensor<B> {
    match B::has_factor_product(&x.device(), x.dtype()) {
        true => B::hd_pissa_factor_product(x, f),
        false => product::<B>(x, f),
    }
}

/// `fᵀ · x` in `f32` for a [`readable`] matrix `x` and an `f32` matrix `f`.
pub(super) fn transposed_factor_product<B: HdPissaOps>(
    f: FloatTensor<B>,
    x: FloatTensor<B>,
) -> FloatTensor<B> {
    match B::has_factor_product(&x.device(), x.dtype()) {
        true => B::float_transpose(B::hd_pissa_factor_product(B::float_transpose(x), f)),
        false => product::<B>(B::float_transpose(f), x),
    }
}

pub(super) fn cast<B: Backend>(x: FloatTensor<B>, dtype: DType) -> FloatTensor<B> {
    if x.dtype() == dtype {
        x
    } else {
        B::float_cast(x, dtype.into())
    }
}
