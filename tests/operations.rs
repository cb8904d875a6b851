//! The adapter's operations against the dense formula and finite differences.

use burn::tensor::{DType, Device, Tensor};
use hd_pissa::ops::{adapter_linear, adapter_weight};
use hd_pissa_tests::{assert_close, bits, normal, values};
use proptest::prelude::*;

const SCALE: f64 = 1.75;

/// Input, weight and factors of one product.
struct Case {
    x: Tensor<2>,
    w: Tensor<2>,
    a: Tensor<2>,
    b: Tensor<2>,
}

impl Case {
    fn new([tokens, d_input, d_output, rank]: [usize; 4], device: &Device) -> Self {
        Self {
            x: normal([tokens, d_input], device),
            w: normal([d_input, d_output], device),
            a: normal([d_input, rank], device),
            b: normal([rank, d_output], device),
        }
    }

    /// `x · (w + scale · (a·b − stop_gradient(a·b)))`, as written.
    fn dense(&self) -> Tensor<2> {
        let product = self.a.clone().matmul(self.b.clone());
        let shift = (product.clone() - product.detach()) * SCALE;
        self.x.clone().matmul(self.w.clone() + shift)
    }

    fn lean(&self) -> Tensor<2> {
        adapter_linear(
            self.x.clone(),
            self.w.clone(),
            self.a.clone(),
            self.b.clone(),
            SCALE,
        )
    }
}

/// A loss whose gradient differs from entry to entry.
fn loss(y: Tensor<2>) -> Tensor<1> {
    (y.clone().tanh() + y.square() * 0.1).sum()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// Value and gradients for any shape and any subset of tracked inputs.
    #[test]
    fn gradients_are_those_of_the_dense_formula(
        shape in (0usize..20, 1usize..40, 1usize..40, 1usize..9),
        tracked in prop::array::uniform3(any::<bool>()),
        checkpointing: bool,
        seed: u64,
    ) {
        let plain = Device::flex();
        plain.seed(seed);
        let device = match checkpointing {
            true => plain.autodiff().gradient_checkpointing(),
            false => plain.autodiff(),
        };
        let mut case = Case::new([shape.0, shape.1, shape.2, shape.3], &device);
        let [x, a, b] = tracked;
        case.x = case.x.set_require_grad(x);
        case.a = case.a.set_require_grad(a);
        case.b = case.b.set_require_grad(b);

        let (lean, dense) = (case.lean(), case.dense());
        prop_assert_eq!(lean.dims(), [shape.0, shape.2]);
        prop_assert_eq!(lean.is_tracked(), x || a || b);
        if shape.0 > 0 {
            assert_close(lean.clone(), case.x.clone().matmul(case.w.clone()), 0.0);
        }
        if shape.0 == 0 || !(x || a || b) {
            return Ok(());
        }
        let (lean, dense) = (loss(lean).backward(), loss(dense).backward());
        for (leaf, tracked) in [(&case.x, x), (&case.a, a), (&case.b, b)] {
            match (leaf.grad(&lean), leaf.grad(&dense)) {
                (Some(lean), Some(dense)) => assert_close(lean, dense, 1e-5),
                (lean, _) => prop_assert!(!tracked && lean.is_none()),
            }
        }
    }
}

/// Independent of autodiff: central differences of the loss in `f64`.
#[test]
fn gradients_agree_with_finite_differences() {
    fn host_loss(x: &[f64], w: &[f64], ab: &[f64], [n, i, o]: [usize; 3]) -> f64 {
        let mut total = 0.0;
        for row in 0..n {
            for col in 0..o {
                let y: f64 = (0..i)
                    .map(|k| x[row * i + k] * (w[k * o + col] + ab[k * o + col]))
                    .sum();
                total += y.tanh() + y * y * 0.1;
            }
        }
        total
    }

    fn product(a: &[f64], b: &[f64], [i, r, o]: [usize; 3]) -> Vec<f64> {
        (0..i * o)
            .map(|p| (0..r).map(|k| a[p / o * r + k] * b[k * o + p % o]).sum())
            .collect()
    }

    let [tokens, d_input, d_output, rank] = [5, 7, 6, 3];
    let check = |device: &Device, dtype: DType, track_x: bool, tolerance: f32| {
        let device = device.clone().autodiff();
        let mut case = Case::new([tokens, d_input, d_output, rank], &device);
        case.x = case.x.cast(dtype).detach().set_require_grad(track_x);
        case.w = case.w.cast(dtype);
        case.a = case.a.require_grad();
        case.b = case.b.require_grad();
        let grads = loss(case.lean().cast(DType::F32)).backward();

        let host =
            |t: &Tensor<2>| -> Vec<f64> { values(t.clone()).iter().map(|&v| v.into()).collect() };
        let (x, w, a, b) = (host(&case.x), host(&case.w), host(&case.a), host(&case.b));
        let frozen = product(&a, &b, [d_input, rank, d_output]);
        let evaluate = |x: &[f64], a: &[f64], b: &[f64]| {
            let ab = product(a, b, [d_input, rank, d_output]);
            let shift: Vec<f64> = ab
                .iter()
                .zip(&frozen)
                .map(|(p, q)| SCALE * (p - q))
                .collect();
            host_loss(x, &w, &shift, [tokens, d_input, d_output])
        };
        let differences = |leaf: &[f64], at: &dyn Fn(&[f64]) -> f64| -> Vec<f32> {
            (0..leaf.len())
                .map(|k| {
                    let mut moved = leaf.to_vec();
                    moved[k] = leaf[k] + 1e-5;
                    let above = at(&moved);
                    moved[k] = leaf[k] - 1e-5;
                    ((above - at(&moved)) / 2e-5) as f32
                })
                .collect()
        };
        assert_eq!(case.x.grad(&grads).is_some(), track_x);
        for (leaf, expected) in [
            (&case.x, differences(&x, &|x| evaluate(x, &a, &b))),
            (&case.a, differences(&a, &|a| evaluate(&x, a, &b))),
            (&case.b, differences(&b, &|b| evaluate(&x, &a, b))),
        ] {
            if let Some(found) = leaf.grad(&grads) {
                let expected = Tensor::<1>::from_floats(&expected[..], &Device::flex());
                let found = bits(&found.cast(DType::F32));
                let found = Tensor::<2>::from_data(found, &Device::flex());
                assert_close(found.flatten(0, 1), expected, tolerance);
            }
        }
    };
    for track_x in [false, true] {
        check(&Device::flex(), DType::F32, track_x, 1e-5);
        #[cfg(any(feature = "wgpu", feature = "cuda"))]
        if let Some(gpu) = hd_pissa_tests::gpu() {
            let f32_products = hd_pissa_tests::gpu_product_tolerance();
            // A rounding step of f16 is 1e-3 of a value, and of bf16 8e-3.
            for (dtype, tolerance) in [
                (DType::F32, f32_products),
                (DType::F16, 5e-3),
                (DType::BF16, 4e-2),
            ] {
                if gpu.supports_dtype(dtype) {
                    check(&gpu, dtype, track_x, tolerance);
                }
            }
        }
    }
}

/// Leading dimensions are tokens, whatever their number and memory layout.
#[test]
fn any_number_of_leading_dimensions() {
    let device = Device::flex().autodiff();
    let case = Case::new([24, 10, 9, 2], &device);
    let (a, b) = (case.a.clone().require_grad(), case.b.clone().require_grad());
    let flat = adapter_linear(case.x.clone(), case.w.clone(), a.clone(), b.clone(), SCALE);
    let flat_grads = loss(flat.clone()).backward();

    // A transposed view: contiguous data of the same values would hide a wrong flattening.
    let x = case.x.clone().reshape([4, 6, 10]);
    let x = x.swap_dims(0, 1).clone() + 0.0;
    let x = x.swap_dims(0, 1);
    let (a2, b2) = (case.a.clone().require_grad(), case.b.clone().require_grad());
    let deep = adapter_linear(x, case.w.clone(), a2.clone(), b2.clone(), SCALE);
    assert_eq!(deep.dims(), [4, 6, 9]);
    let deep = deep.reshape([24, 9]);
    assert_close(deep.clone(), flat, 1e-6);
    let deep_grads = loss(deep).backward();
    assert_close(
        a2.grad(&deep_grads).unwrap(),
        a.grad(&flat_grads).unwrap(),
        1e-6,
    );
    assert_close(
        b2.grad(&deep_grads).unwrap(),
        b.grad(&flat_grads).unwrap(),
        1e-6,
    );

    let one = case.x.clone().narrow(0, 0, 1).reshape([10]);
    let y = adapter_linear(one, case.w.clone(), case.a.clone(), case.b.clone(), SCALE);
    assert_close(y, case.x.narrow(0, 0, 1).matmul(case.w).reshape([9]), 1e-6);
}

/// No tokens: outputs and gradients of the right shape, all zero.
#[test]
fn empty_batches() {
    let device = Device::flex().autodiff();
    let mut case = Case::new([0, 5, 3, 2], &device);
    case.a = case.a.require_grad();
    case.b = case.b.require_grad();
    let y = case.lean();
    assert_eq!(y.dims(), [0, 3]);
    let grads = (y.sum() + case.a.clone().sum() * 0.0).backward();
    assert_eq!(values(case.a.grad(&grads).unwrap()), [0.0; 10]);
    assert_eq!(values(case.b.grad(&grads).unwrap()), [0.0; 6]);
}

/// Half-precision weights and activations: `f32` factor gradients close to those of an `f32` run.
#[test]
fn factor_gradients_are_f32_for_half_weights() {
    let device = Device::flex().autodiff();
    for (dtype, tolerance) in [(DType::F16, 4e-3), (DType::BF16, 3e-2)] {
        let case = Case::new([12, 19, 14, 3], &device);
        let (x, w) = (case.x.clone().cast(dtype), case.w.clone().cast(dtype));
        let (a, b) = (case.a.clone().require_grad(), case.b.clone().require_grad());
        let x_half = x.clone().detach().require_grad();
        let y = adapter_linear(x_half.clone(), w.clone(), a.clone(), b.clone(), SCALE);
        assert_eq!(y.dtype(), dtype);
        let grads = loss(y.cast(DType::F32)).backward();

        let full = Case {
            x: x.cast(DType::F32).detach().require_grad(),
            w: w.cast(DType::F32),
            a: case.a.clone().require_grad(),
            b: case.b.clone().require_grad(),
        };
        let expected = loss(full.dense()).backward();
        let (ga, gb) = (a.grad(&grads).unwrap(), b.grad(&grads).unwrap());
        assert_eq!((ga.dtype(), gb.dtype()), (DType::F32, DType::F32));
        assert_close(ga, full.a.grad(&expected).unwrap(), tolerance);
        assert_close(gb, full.b.grad(&expected).unwrap(), tolerance);
        let gx = x_half.grad(&grads).unwrap();
        assert_eq!(gx.dtype(), dtype);
        assert_close(
            gx.cast(DType::F32),
            full.x.grad(&expected).unwrap(),
            tolerance,
        );
    }
}

/// The way of a reparameterization: the dense gradient, projected.
#[test]
fn the_projected_weight_has_the_gradients_of_the_product() {
    let device = Device::flex().autodiff();
    let mut case = Case::new([9, 8, 15, 4], &device);
    case.a = case.a.require_grad();
    case.b = case.b.require_grad();
    let weight = adapter_weight(case.w.clone(), case.a.clone(), case.b.clone(), SCALE);
    assert_close(weight.clone(), case.w.clone(), 0.0);
    let projected = loss(case.x.clone().matmul(weight)).backward();
    let lean = loss(case.lean()).backward();
    for leaf in [&case.a, &case.b] {
        assert_close(
            leaf.grad(&projected).unwrap(),
            leaf.grad(&lean).unwrap(),
            1e-5,
        );
    }
}

#[test]
#[should_panic(expected = "b must be [4, 15]")]
fn shapes_that_do_not_fit_panic() {
    let device = Device::flex();
    let case = Case::new([9, 8, 15, 4], &device);
    adapter_linear(case.x, case.w, case.a, case.b.transpose(), SCALE);
}
