//! The operations as functions of tensors.

use burn::backend::{Dispatch, DispatchDevice, DispatchTensorKind};
use burn::tensor::{DType, Device, Int, Tensor};
use burn_autodiff::NodeId;

use super::{HdPissaOps, Rounding};

/// `input · weight` with the gradients of the adapted product.
///
/// # Shapes
///
/// - input: `[.., d_input]`
/// - weight: `[d_input, d_output]`, the dtype of `input`
/// - a: `[d_input, rank]`, `f32`
/// - b: `[rank, d_output]`, `f32`
/// - output: `[.., d_output]`
///
/// The value is that of `input · weight`, without the factors. If the backend computes `input · a`
/// in the same launch, the order of the sums may differ from that of Burn's own product. The
/// gradients are those of `input · (weight + scale · (a·b − stop_gradient(a·b)))`, with `G` the
/// gradient of the output and leading dimensions flattened to tokens:
///
/// - input: `G · weightᵀ`
/// - a: `scale · inputᵀ · (G · bᵀ)`
/// - b: `scale · (input · a)ᵀ · G`
///
/// No gradient reaches `weight`, and no tensor of its size is made, forward or backward. If
/// autodiff tracks neither factor, this is a product with a constant weight.
///
/// # Panics
///
/// If the shapes do not fit, or on a backend that [`HdPissaOps`] is not implemented for.
pub fn adapter_linear<const D: usize>(
    input: Tensor<D>,
    weight: Tensor<2>,
    a: Tensor<2>,
    b: Tensor<2>,
    scale: f64,
) -> Tensor<D> {
    let [d_input, d_output] = weight.dims();
    let rank = a.dims()[1];
    assert_eq!(
        (input.dims()[D - 1], a.dims()[0], b.dims()),
        (d_input, d_input, [rank, d_output]),
        "adapter_linear: the last dimension of input and the first of a must be {d_input}, \
         b must be [{rank}, {d_output}]"
    );
    if D == 1 {
        return adapter_linear(input.unsqueeze::<2>(), weight, a, b, scale).squeeze_dim(0);
    }
    Tensor::from_dispatch(Dispatch::hd_pissa_linear(
        input.into_dispatch(),
        weight.into_dispatch(),
        a.into_dispatch(),
        b.into_dispatch(),
        scale,
    ))
}

/// `weight` itself, with the gradients of `weight + scale · (a·b − stop_gradient(a·b))`.
///
/// Shapes as in [`adapter_linear`]. The backward pass receives the dense gradient
/// `[d_input, d_output]` of the weight and projects it: `scale · G · bᵀ` and `scale · aᵀ · G`.
///
/// # Panics
///
/// On a backend that [`HdPissaOps`] is not implemented for.
pub fn adapter_weight(weight: Tensor<2>, a: Tensor<2>, b: Tensor<2>, scale: f64) -> Tensor<2> {
    Tensor::from_dispatch(Dispatch::hd_pissa_weight(
        weight.into_dispatch(),
        a.into_dispatch(),
        b.into_dispatch(),
        scale,
    ))
}

/// `whole` itself, whose values from `start` on along dimension `dim` are those of `part`: their gradient
/// goes to `part` too.
pub(crate) fn part_of(whole: Tensor<2>, part: Tensor<2>, dim: usize, start: usize) -> Tensor<2> {
    Tensor::from_dispatch(Dispatch::hd_pissa_part(
        whole.into_dispatch(),
        part.into_dispatch(),
        dim,
        start,
    ))
}

/// `weight + Σ_k ((a_k + Δa_k)·Δb_k + Δa_k·b_k)`: the weight after one step.
///
/// # Shapes
///
/// - weight: `[d_input, d_output]`, f32, f16 or bf16
/// - frames, deltas: `[shards, rank · (d_input + d_output)]`, `f32`; row `k` holds `a_k` row by row,
///   then `b_k` row by row, or their deltas
/// - output: as weight, in its memory if nothing else holds it
///
/// The sum is accumulated in `f32` and rounded once to the weight's dtype.
///
/// # Panics
///
/// If the shapes do not fit, or on a backend that [`HdPissaOps`] is not implemented for.
pub fn merge(weight: Tensor<2>, frames: Tensor<2>, deltas: Tensor<2>, rank: usize) -> Tensor<2> {
    let gate = Tensor::zeros([1], (&frames.device(), DType::F32));
    let inputs = MergeInputs {
        frames,
        deltas,
        gate,
        rank,
        measure: false,
    };
    merge_rounded(weight, inputs, Rounding::Nearest).0
}

/// The inputs of a merge, besides the weight, `[d_input, d_output]`.
pub(crate) struct MergeInputs {
    /// The frames of all shards, `[shards, rank · (d_input + d_output)]`, `f32`. Row `k` holds `a_k`,
    /// `[d_input, rank]` row by row, then `b_k`, `[rank, d_output]` row by row.
    pub(crate) frames: Tensor<2>,
    /// The deltas of all shards, as `frames`.
    pub(crate) deltas: Tensor<2>,
    /// `[1]`, `f32`: the weight changes only if this is zero.
    pub(crate) gate: Tensor<1>,
    /// Rank of a shard's factors.
    pub(crate) rank: usize,
    /// Whether to compute the sum of the squares of the update.
    pub(crate) measure: bool,
}

impl MergeInputs {
    fn check(&self, weight: &Tensor<2>) {
        let [d_input, d_output] = weight.dims();
        let expected = [self.frames.dims()[0], self.rank * (d_input + d_output)];
        assert!(
            self.rank > 0 && self.frames.dims() == expected && self.deltas.dims() == expected,
            "merge: frames {:?} and deltas {:?} must both be {expected:?}, for rank {} above 0",
            self.frames.dims(),
            self.deltas.dims(),
            self.rank
        );
    }
}

/// The merged weight, `[d_input, d_output]` in its own dtype, and `[1]`, `f32`, with the sum of the
/// squares of the update.
pub(crate) fn merge_rounded(
    weight: Tensor<2>,
    inputs: MergeInputs,
    rounding: Rounding,
) -> (Tensor<2>, Tensor<1>) {
    inputs.check(&weight);
    let (weight, squares) = Dispatch::hd_pissa_merge(
        weight.into_dispatch(),
        inputs.frames.into_dispatch(),
        inputs.deltas.into_dispatch(),
        inputs.gate.into_dispatch(),
        inputs.rank,
        rounding,
        inputs.measure,
    );
    (
        Tensor::from_dispatch(weight),
        Tensor::from_dispatch(squares),
    )
}

/// The merged weight, `[d_input, d_output]`, `f16` or `bf16`; its residual bits,
/// `[d_input, ceil(d_output / 2)]`, `i32`; and `[1]`, `f32`, with the sum of the squares of the update.
pub(crate) fn merge_compensated(
    weight: Tensor<2>,
    residual: Tensor<2, Int>,
    inputs: MergeInputs,
) -> (Tensor<2>, Tensor<2, Int>, Tensor<1>) {
    inputs.check(&weight);
    let (weight, residual, squares) = Dispatch::hd_pissa_merge_compensated(
        weight.into_dispatch(),
        residual.into_dispatch(),
        inputs.frames.into_dispatch(),
        inputs.deltas.into_dispatch(),
        inputs.gate.into_dispatch(),
        inputs.rank,
        inputs.measure,
    );
    (
        Tensor::from_dispatch(weight),
        Tensor::from_dispatch(residual),
        Tensor::from_dispatch(squares),
    )
}

/// The statistics that a step needs of each row of `x: [rows, n]`, `f32`: `[rows, 4]`, see
/// [`HdPissaOps::hd_pissa_row_statistics`].
pub(crate) fn row_statistics(x: Tensor<2>, split: usize) -> Tensor<2> {
    Tensor::from_dispatch(Dispatch::hd_pissa_row_statistics(x.into_dispatch(), split))
}

/// The elements of `f32` matrices, row by row, one matrix after the other: `[n]`.
///
/// # Panics
///
/// Without a matrix.
pub(crate) fn join(parts: Vec<Tensor<2>>) -> Tensor<1> {
    let device = parts[0].device();
    let len = |part: &Tensor<2>| part.shape().num_elements();
    if is_cpu(&device) {
        let flat = |part: Tensor<2>| part.flatten(0, 1);
        return Tensor::cat(parts.into_iter().map(flat).collect(), 0);
    }
    let total: usize = parts.iter().map(len).sum();
    let mut joined = Tensor::<1>::empty([total], (&device, DType::F32)).into_dispatch();
    let mut start = 0;
    for parts in parts.chunks(8) {
        let part = |index: usize| {
            let part = parts.get(index).unwrap_or(&parts[0]);
            part.clone().into_dispatch()
        };
        let [p0, p1, p2, p3, p4, p5, p6, p7] = std::array::from_fn(part);
        let count = parts.len();
        joined = Dispatch::hd_pissa_join(joined, start, count, p0, p1, p2, p3, p4, p5, p6, p7);
        start += parts.iter().map(len).sum::<usize>();
    }
    Tensor::from_dispatch(joined)
}

/// The largest magnitude in a half-precision weight, `[1]`, `f32`.
pub(crate) fn max_abs(weight: Tensor<2>) -> Tensor<1> {
    Tensor::from_dispatch(Dispatch::hd_pissa_max_abs(weight.into_dispatch()))
}

/// A hash of the bits of a float matrix, `[2]`, `i32`, on its device.
pub(crate) fn fingerprint(x: Tensor<2>) -> Tensor<1, Int> {
    Tensor::from_dispatch(Dispatch::hd_pissa_fingerprint(x.into_dispatch()))
}

/// A hash of the bits of an `i32` matrix, `[2]`, `i32`, on its device.
pub(crate) fn fingerprint_int(x: Tensor<2, Int>) -> Tensor<1, Int> {
    Tensor::from_dispatch(Dispatch::hd_pissa_fingerprint_int(x.into_dispatch()))
}

/// The identity of a tensor and its clones: the id of its node in the autodiff graph. `None`
/// without autodiff.
pub(crate) fn identity(tensor: &Tensor<2>) -> Option<NodeId> {
    let DispatchTensorKind::Autodiff(kind) = tensor.clone().into_dispatch().kind else {
        return None;
    };
    match *kind {
        #[cfg(feature = "flex")]
        DispatchTensorKind::Flex(tensor) => Some(tensor.as_autodiff().id()),
        #[cfg(feature = "cubecl-backend")]
        DispatchTensorKind::Cube(tensor) => Some(tensor.as_autodiff().id()),
        #[allow(unreachable_patterns)]
        _ => None,
    }
}

/// The origin of a tensor's values.
pub(crate) enum Origin {
    /// Memory that the tensor shares with its clones, including those with their own node in the
    /// autodiff graph. While it is held, nobody writes to it, and no other tensor gets it.
    #[cfg(feature = "flex")]
    Memory(burn_flex::FlexTensor),
    /// A node, see [`identity`].
    Node(Option<NodeId>),
}

impl Origin {
    pub(crate) fn of(tensor: &Tensor<2>) -> Self {
        let inner = match tensor.is_autodiff() {
            true => tensor.clone().inner(),
            false => tensor.clone(),
        };
        match inner.into_dispatch().kind {
            #[cfg(feature = "flex")]
            DispatchTensorKind::Flex(tensor) => Self::Memory(tensor.float()),
            _ => Self::Node(identity(tensor)),
        }
    }

    /// Whether the values are certainly the same.
    pub(crate) fn is(&self, other: &Self) -> bool {
        match (self, other) {
            #[cfg(feature = "flex")]
            (Self::Memory(x), Self::Memory(y)) => {
                std::sync::Arc::ptr_eq(&x.data_arc(), &y.data_arc()) && x.layout() == y.layout()
            }
            (Self::Node(Some(x)), Self::Node(y)) => Some(*x) == *y,
            _ => false,
        }
    }
}

/// Whether the device computes on the threads that call it.
pub(crate) fn is_cpu(device: &Device) -> bool {
    fn is_cpu(device: &DispatchDevice) -> bool {
        match device {
            DispatchDevice::Autodiff(device) => is_cpu(&device.clone().inner()),
            #[cfg(feature = "flex")]
            DispatchDevice::Flex(_) => true,
            #[allow(unreachable_patterns)]
            _ => false,
        }
    }
    is_cpu(device.as_dispatch())
}

/// Whether [`HdPissaOps`] is implemented for the device's backend in this build.
pub(crate) fn is_supported(device: &Device) -> bool {
    fn supported(device: &DispatchDevice) -> bool {
        match device {
            DispatchDevice::Autodiff(device) => supported(&device.clone().inner()),
            #[cfg(feature = "flex")]
            DispatchDevice::Flex(_) => true,
            #[cfg(feature = "cubecl-backend")]
            DispatchDevice::Cube(_) => true,
            #[allow(unreachable_patterns)]
            _ => false,
        }
    }
    supported(device.as_dispatch())
}
