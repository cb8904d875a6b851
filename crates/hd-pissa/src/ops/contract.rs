use burn::backend::{Backend, TensorMetadata, backend_extension, tensor::FloatTensor};
use burn::tensor::{BoolDType, DType, FloatDType, Shape, Slice};

/// What the adapter and the optimizer need from a backend beyond Burn's own operations.
///
/// Every method has a body made of Burn's operations, correct on every backend; a backend
/// overrides one where it can save memory or time. The factors `a: [d_input, rank]` and
/// `b: [rank, d_output]` are `f32`, whatever the dtype of the weight `w: [d_input, d_output]`.
#[backend_extension(
    Autodiff,
    Flex: cfg(feature = "flex"),
    Cube: cfg(feature = "cubecl-backend"),
    Fusion: cfg(feature = "fusion"),
)]
pub trait HdPissaOps: Backend {
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

    /// `w + Σ_k ((a_k + Δa_k)·Δb_k + Δa_k·b_k)`, rounded once to the dtype of `w`.
    ///
    /// `frames` and `deltas` are `f32` of shape `[shards, rank · (d_input + d_output)]`: row `k`
    /// holds `a_k`, row by row, followed by `b_k`, row by row, or their deltas. The result reuses
    /// the memory of `w` where the backend can and no other handle to it exists.
    #[fusion(dtype = w, shape = w)]
    fn hd_pissa_merge(
        w: FloatTensor<Self>,
        frames: FloatTensor<Self>,
        deltas: FloatTensor<Self>,
        rank: usize,
    ) -> FloatTensor<Self> {
        let (dtype, shape) = (w.dtype(), w.shape());
        let (d_input, d_output) = (shape[0], shape[1]);
        let factor = |rows: &FloatTensor<Self>, shard: usize, left: bool| {
            let (start, shape) = match left {
                true => (0, [d_input, rank]),
                false => (d_input * rank, [rank, d_output]),
            };
            let row = Slice::from(shard..shard + 1);
            let columns = Slice::from(start..start + shape[0] * shape[1]);
            let part = Self::float_slice(rows.clone(), &[row, columns]);
            Self::float_reshape(part, Shape::new(shape))
        };
        let (mut left, mut right) = (Vec::new(), Vec::new());
        for shard in 0..frames.shape()[0] {
            let moved = Self::float_add(factor(&frames, shard, true), factor(&deltas, shard, true));
            left.extend([moved, factor(&deltas, shard, true)]);
            right.extend([factor(&deltas, shard, false), factor(&frames, shard, false)]);
        }
        let update = Self::float_matmul(Self::float_cat(left, 1), Self::float_cat(right, 0));
        let sum = Self::float_add(cast::<Self>(w, DType::F32), update);
        cast::<Self>(sum, dtype)
    }

    /// How many elements of `x` are NaN or infinite: an `f32` tensor of shape `[1]`.
    #[fusion(default)]
    fn hd_pissa_count_non_finite(x: FloatTensor<Self>, bool_dtype: BoolDType) -> FloatTensor<Self> {
        let nan = Self::float_is_nan(x.clone(), bool_dtype);
        let infinite = Self::float_is_inf(x, bool_dtype);
        let bad = Self::bool_or(nan, infinite);
        Self::float_sum(Self::bool_into_float(bad, FloatDType::F32))
    }
}

/// `x · w` for `x: [.., d_input]`; zero rows give a tensor with zero rows.
pub(super) fn dense_linear<B: Backend>(x: FloatTensor<B>, w: FloatTensor<B>) -> FloatTensor<B> {
    let mut shape = x.shape();
    if shape.num_elements() == 0 {
        let last = shape.num_dims() - 1;
        shape[last] = w.shape()[1];
        return B::float_zeros(shape, &x.device(), x.dtype().into());
    }
    B::linear(x, w, None)
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

pub(super) fn cast<B: Backend>(x: FloatTensor<B>, dtype: DType) -> FloatTensor<B> {
    if x.dtype() == dtype {
        x
    } else {
        B::float_cast(x, dtype.into())
    }
}
