//! The operations as functions of tensors, made of Burn's own operations if those are better.

use burn::backend::{Dispatch, DispatchDevice};
use burn::nn;
use burn::tensor::activation::{log_softmax, silu, softmax};
use burn::tensor::{Bool, DType, Device, Int, Tensor, TensorData};

use super::{Causal, LlamaOps};
use crate::rope::Rotation;

/// Whether the tensor's backend has the operations for its dtype.
fn has_own<const D: usize>(x: &Tensor<D>) -> bool {
    x.dtype() == DType::F32 && is_flex(&x.device())
}

/// Whether a device is Flex, Burn's CPU backend.
pub fn is_flex(device: &Device) -> bool {
    fn is_flex(device: &DispatchDevice) -> bool {
        match device {
            DispatchDevice::Autodiff(device) => is_flex(&device.clone().inner()),
            #[cfg(feature = "flex")]
            DispatchDevice::Flex(_) => true,
            #[allow(unreachable_patterns)]
            _ => false,
        }
    }
    is_flex(device.as_dispatch())
}

/// Whether a dtype has 16 bits. Norms, softmax and losses are then computed in `f32`, as in transformers, and
/// rotations too.
fn is_half(dtype: DType) -> bool {
    matches!(dtype, DType::F16 | DType::BF16)
}

/// `softmax(scale · queries · keysᵀ) · values`, over the keys that a query may see.
///
/// # Shapes
///
/// - queries: `[batch, heads, rows, head_dim]`; row `i` is the query at position `i % causal.positions`
/// - keys, values: `[batch, heads, keys, head_dim]`
/// - output: that of the queries
pub fn attention(
    queries: Tensor<4>,
    keys: Tensor<4>,
    values: Tensor<4>,
    scale: f64,
    causal: Causal,
) -> Tensor<4> {
    if has_own(&queries) {
        let [queries, keys, values] = [queries, keys, values].map(Tensor::into_dispatch);
        return Tensor::from_dispatch(Dispatch::llama_attention(
            queries, keys, values, scale, causal,
        ));
    }
    let dtype = queries.dtype();
    let scores = queries.matmul(keys.transpose()) * scale;
    let scores = match is_half(dtype) {
        true => scores.cast(DType::F32),
        false => scores,
    };
    let weights = softmax(
        match mask(causal, scores.dims()) {
            Some(hidden) => {
                let hidden = Tensor::<4, Bool>::from_data(hidden, &scores.device());
                let hidden = hidden.expand(scores.dims());
                scores.mask_fill(hidden, f32::NEG_INFINITY)
            }
            None => scores,
        },
        3,
    );
    weights.cast(dtype).matmul(values)
}

/// `true` for keys that a query may not see, `[1, 1, rows, keys]`; `None` if every query sees all
/// keys.
fn mask(causal: Causal, [_, _, rows, keys]: [usize; 4]) -> Option<TensorData> {
    if (0..causal.positions).all(|row| causal.keys_of(row, keys) == (0..keys)) {
        return None;
    }
    let hidden: Vec<bool> = (0..rows)
        .flat_map(|row| {
            let visible = causal.keys_of(row, keys);
            (0..keys).map(move |key| !visible.contains(&key))
        })
        .collect();
    Some(TensorData::new(hidden, [1, 1, rows, keys]))
}

/// `silu(gate) · up`, all of one shape.
pub fn swiglu(gate: Tensor<3>, up: Tensor<3>) -> Tensor<3> {
    match has_own(&gate) {
        true => Tensor::from_dispatch(Dispatch::llama_swiglu(
            gate.into_dispatch(),
            up.into_dispatch(),
        )),
        false => silu(gate) * up,
    }
}

/// The norm of `x: [.., d]`. A norm of a half-precision model has an `f32` weight.
pub fn rms_norm(norm: &nn::RmsNorm, x: Tensor<3>) -> Tensor<3> {
    let dtype = x.dtype();
    if is_half(dtype) {
        return rms_norm(norm, x.cast(DType::F32)).cast(dtype);
    }
    let gamma = norm.gamma.val();
    match has_own(&x) && has_own(&gamma) {
        true => Tensor::from_dispatch(Dispatch::llama_rms_norm(
            x.into_dispatch(),
            gamma.into_dispatch(),
            norm.epsilon,
        )),
        false => norm.forward(x),
    }
}

/// The heads of a projection, rotated: `[batch, positions, heads · head_dim]` to
/// `[batch, heads, positions, head_dim]`.
pub fn rotate_heads(x: Tensor<3>, rotation: &Rotation) -> Tensor<4> {
    let dtype = x.dtype();
    if is_half(dtype) {
        return rotate_heads(x.cast(DType::F32), rotation).cast(dtype);
    }
    let [batch, positions, width] = x.dims();
    if has_own(&x) {
        return Tensor::from_dispatch(Dispatch::llama_rotate_heads(
            x.into_dispatch(),
            rotation.cos.clone().into_dispatch(),
            rotation.sin.clone().into_dispatch(),
        ));
    }
    let head_dim = 2 * rotation.cos.dims()[1];
    let heads = x.reshape([batch, positions, width / head_dim, head_dim]);
    rotation.apply(heads.swap_dims(1, 2))
}

/// Sum over rows of the negative log-likelihood of their labels, `[1]`, where the logits are `hidden · weight`;
/// in `f32` for half precision.
///
/// # Shapes
///
/// - hidden: `[rows, d]`
/// - weight: `[d, vocabulary]`
/// - labels: one for each row
pub fn head_loss(hidden: Tensor<2>, weight: Tensor<2>, labels: Vec<u32>) -> Tensor<1> {
    if has_own(&hidden) && has_own(&weight) && !weight.is_tracked() {
        let (hidden, weight) = (hidden.into_dispatch(), weight.into_dispatch());
        return Tensor::from_dispatch(Dispatch::llama_head_loss(hidden, weight, labels));
    }
    target_loss(hidden.matmul(weight), labels)
}

/// Sum over rows of the negative log-likelihood of their labels, `[1]`; in `f32` for half precision.
///
/// # Shapes
///
/// - logits: `[rows, vocabulary]`
/// - labels: one for each row
pub fn target_loss(logits: Tensor<2>, labels: Vec<u32>) -> Tensor<1> {
    if is_half(logits.dtype()) {
        return target_loss(logits.cast(DType::F32), labels);
    }
    if has_own(&logits) {
        let loss = Dispatch::llama_target_loss(logits.into_dispatch(), labels);
        return Tensor::from_dispatch(loss);
    }
    let count = labels.len();
    let labels: Vec<i64> = labels.into_iter().map(i64::from).collect();
    let labels = TensorData::new(labels, [count, 1]);
    let labels = Tensor::<2, Int>::from_data(labels, &logits.device());
    log_softmax(logits, 1).gather(1, labels).sum().neg()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rope::Rope;
    use burn::nn::RmsNormConfig;
    use burn::tensor::{Device, Distribution};

    /// Largest difference of the entries, relative to the largest of them.
    fn error<const D: usize>(ours: Tensor<D>, theirs: Tensor<D>) -> f64 {
        let largest: f64 = theirs.clone().abs().max().into_scalar();
        let difference: f64 = (ours - theirs).abs().max().into_scalar();
        difference / largest
    }

    /// Compares value and gradient with respect to the input of an operation in `f32`, which has its own
    /// kernels, and in `f64`, which is Burn's. The gradient is that of the sum of `f(x)·w`.
    fn agrees<const I: usize, const O: usize>(
        shape: [usize; I],
        f: impl Fn(Tensor<I>) -> Tensor<O>,
    ) {
        let device = Device::flex().autodiff();
        let x = Tensor::<I>::random(shape, Distribution::Normal(0.0, 2.0), &device);
        let run = |dtype: DType| {
            let x = x.clone().cast(dtype).detach().require_grad();
            let y = f(x.clone());
            let count = y.shape().num_elements() as i64;
            let weight = Tensor::<1, Int>::arange(0..count, &device).float();
            let weight = (weight * 0.7 + 0.5).sin().cast(dtype).reshape(y.shape());
            let gradients = (y.clone() * weight).sum().backward();
            let gradient = x.grad(&gradients).expect("x has a gradient");
            [
                y.inner().cast(DType::F64).flatten::<1>(0, O - 1),
                gradient.cast(DType::F64).flatten(0, I - 1),
            ]
        };
        assert!(has_own(&x) && !has_own(&x.clone().cast(DType::F64)));
        let [ours, theirs] = [DType::F32, DType::F64].map(run);
        for (ours, theirs) in ours.into_iter().zip(theirs) {
            let error = error(ours, theirs);
            assert!(error < 2e-6, "{error:e}");
        }
    }

    #[test]
    fn attentions() {
        let device = Device::flex().autodiff();
        let random =
            |rows| Tensor::<4>::random([2, 3, rows, 5], Distribution::Normal(0.0, 2.0), &device);
        for (start, window) in [(0, None), (4, None), (4, Some(3)), (0, Some(20))] {
            let causal = Causal {
                start,
                positions: 7,
                window,
            };
            let (queries, keys, values) = (random(21), random(start + 7), random(start + 7));
            let constant = |x: &Tensor<4>, like: &Tensor<4>| x.clone().cast(like.dtype());
            agrees([2, 3, 21, 5], |x| {
                let (keys, values) = (constant(&keys, &x), constant(&values, &x));
                attention(x, keys, values, 0.3, causal)
            });
            agrees([2, 3, start + 7, 5], |x| {
                let (queries, values) = (constant(&queries, &x), constant(&values, &x));
                attention(queries, x, values, 0.3, causal)
            });
            agrees([2, 3, start + 7, 5], |x| {
                let (queries, keys) = (constant(&queries, &x), constant(&keys, &x));
                attention(queries, keys, x.clone(), 0.3, causal)
                    + attention(queries_of(&x, 21), x.clone(), x, 0.3, causal)
            });
        }
    }

    /// `rows` rows made of those of `x`.
    fn queries_of(x: &Tensor<4>, rows: usize) -> Tensor<4> {
        let times = rows.div_ceil(x.dims()[2]);
        x.clone().repeat_dim(2, times).narrow(2, 0, rows)
    }

    #[test]
    fn gates() {
        let device = Device::flex().autodiff();
        let other = Tensor::<3>::random([2, 5, 37], Distribution::Normal(0.0, 2.0), &device);
        agrees([2, 5, 37], |x| {
            let other = other.clone().cast(x.dtype());
            swiglu(x.clone(), other.clone()) + swiglu(other, x)
        });
    }

    #[test]
    fn norms() {
        let device = Device::flex().autodiff();
        let mut norm = RmsNormConfig::new(37).with_epsilon(0.1).init(&device);
        let gamma = Tensor::<1>::random([37], Distribution::Default, &device);
        norm.gamma = norm.gamma.map(|_| gamma.clone());
        let with = |gamma: Tensor<1>| {
            let mut norm = norm.clone();
            norm.gamma = norm.gamma.map(|_| gamma);
            norm
        };
        agrees([2, 5, 37], |x| {
            rms_norm(&with(gamma.clone().cast(x.dtype())), x)
        });
        // As a function of gamma.
        let x = Tensor::<3>::random([2, 5, 37], Distribution::Normal(0.0, 2.0), &device);
        agrees([37], |gamma| {
            let x = x.clone().cast(gamma.dtype());
            let mut norm = norm.clone();
            let (id, _, mapper) = norm.gamma.consume();
            norm.gamma = burn::module::Param::from_mapped_value(id, gamma, mapper);
            rms_norm(&norm, x)
        });
    }

    #[test]
    fn rotated_heads() {
        let device = Device::flex().autodiff();
        let mut config = crate::tiny::pretrained().unwrap().config.clone();
        config.head_dim = 6;
        let rotation = Rotation::new(&Rope::new(&config), std::iter::once(2..9), &device);
        agrees([2, 7, 5 * 6], |x| {
            let rotation = Rotation {
                cos: rotation.cos.clone().cast(x.dtype()),
                sin: rotation.sin.clone().cast(x.dtype()),
            };
            rotate_heads(x, &rotation)
        });
    }

    #[test]
    fn losses() {
        let labels = vec![3, 0, 36, 3, 8];
        agrees([5, 37], |logits| target_loss(logits * 3.0, labels.clone()));
        // As a function of what the head gets.
        let device = Device::flex().autodiff();
        let weight = Tensor::<2>::random([6, 37], Distribution::Normal(0.0, 1.0), &device);
        agrees([5, 6], |hidden| {
            head_loss(
                hidden.clone(),
                weight.clone().cast(hidden.dtype()),
                labels.clone(),
            )
        });
        // NaN does not get lost.
        let device = Device::flex();
        for bad in [f32::NAN, f32::INFINITY] {
            let logits = Tensor::<2>::from_floats([[0.0, bad, 1.0]], &device);
            let loss: f64 = target_loss(logits, vec![0]).into_scalar();
            assert!(!loss.is_finite());
        }
    }

    /// An operation may reuse only memory that nothing else holds.
    #[test]
    fn operands_that_others_hold_stay_as_they_are() {
        let device = Device::flex();
        let logits = Tensor::<2>::random([4, 9], Distribution::Default, &device);
        let before = logits.to_data();
        target_loss(logits.clone(), vec![0, 1, 2, 3]);
        let scores = logits.clone().reshape([1, 1, 4, 9]);
        let causal = Causal {
            start: 5,
            positions: 4,
            window: None,
        };
        let keys = Tensor::<4>::ones([1, 1, 9, 9], &device);
        attention(
            scores.clone(),
            keys,
            scores.clone().repeat_dim(2, 3).narrow(2, 0, 9),
            1.0,
            causal,
        );
        assert_eq!(logits.to_data(), before);
    }
}
