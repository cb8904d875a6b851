use burn::backend::{Dispatch, DispatchDevice};
use burn::tensor::{Device, Tensor};

use super::HdPissaOps;

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
/// The value is that of `input · weight`, bit for bit: the factors never enter it. The gradients
/// are those of `input · (weight + scale · (a·b − stop_gradient(a·b)))`, with `G` the gradient of
/// the output and leading dimensions flattened to tokens:
///
/// - input: `G · weightᵀ`
/// - a: `scale · inputᵀ · (G · bᵀ)`
/// - b: `scale · (input · a)ᵀ · G`
///
/// No gradient reaches `weight`, and no tensor of its size is made, forward or backward. With
/// neither factor tracked by autodiff this is a product with a constant weight.
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

/// `weight + left · right`, in the memory of `weight` where no one else holds it.
pub(crate) fn merge(weight: Tensor<2>, left: Tensor<2>, right: Tensor<2>) -> Tensor<2> {
    Tensor::from_dispatch(Dispatch::hd_pissa_merge(
        weight.into_dispatch(),
        left.into_dispatch(),
        right.into_dispatch(),
    ))
}

/// The number of NaN and infinite elements, `[1]`.
pub(crate) fn count_non_finite<const D: usize>(tensor: Tensor<D>) -> Tensor<1> {
    let bool_dtype = tensor.device().settings().bool_dtype;
    Tensor::from_dispatch(Dispatch::hd_pissa_count_non_finite(
        tensor.into_dispatch(),
        bool_dtype,
    ))
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
