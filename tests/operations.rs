//! The adapter's operations against the dense formula and finite differences.

use burn::backend::Dispatch;
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use hd_pissa::ops::{HdPissaOps, Rounding, adapter_linear, adapter_weight};
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

    /// `x · (w + scale · (a·b − stop_gradient(a·b)))`, computed literally.
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
                if hd_pissa_tests::gpu_supports(&gpu, dtype) {
                    check(&gpu, dtype, track_x, tolerance);
                }
            }
        }
    }
}

/// Leading dimensions are tokens, for any number of them and any memory layout.
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

/// The path of a reparameterization: the dense gradient, projected.
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

/// Flex, and the GPU if this build has one.
fn devices() -> Vec<Device> {
    #[allow(unused_mut)]
    let mut devices = vec![Device::flex()];
    #[cfg(any(feature = "wgpu", feature = "cuda"))]
    devices.extend(hd_pissa_tests::gpu());
    devices
}

/// Counts and sums of squares against a loop in `f64`, with values that no `f32` sum can hold.
#[test]
fn row_statistics_are_those_of_a_plain_loop() {
    for device in devices() {
        for ([rows, columns], split) in
            [([1, 1], 0), ([3, 35], 20), ([2, 4099], 4099), ([5, 33], 0)]
        {
            let x = normal([rows, columns], &Device::flex());
            let mut host = values(x);
            host[0] = f32::NAN;
            host[columns - 1] = f32::NEG_INFINITY;
            if rows > 1 {
                host[columns + 1] = 3e38;
                host[2 * columns - 1] = -2e30;
            }
            let data = TensorData::new(host.clone(), [rows, columns]);
            let x = Tensor::<2>::from_data(data, &device);
            let found = Dispatch::hd_pissa_row_statistics(x.into_dispatch(), split);
            let found = values(Tensor::<2>::from_dispatch(found));
            for (row, found) in host.chunks(columns).zip(found.chunks(4)) {
                let sum = |values: &[f32]| -> f64 {
                    let finite = values.iter().filter(|x| x.is_finite());
                    finite.map(|&x| f64::from(x).powi(2)).sum()
                };
                let bad = row.iter().filter(|x| !x.is_finite()).count();
                let (left, right) = (sum(&row[..split]), sum(&row[split..]));
                let scaled = (left + right) * 2f64.powi(-160);
                assert_eq!(found[0], bad as f32);
                for (found, expected) in found[1..].iter().zip([left, right, scaled]) {
                    let expected = expected as f32;
                    let close = (found - expected).abs() <= 1e-5 * expected.abs();
                    // The scaled sum is below the normal range where the others say all.
                    let tiny = expected < 1e-30 && *found < 1e-30;
                    assert!(*found == expected || close || tiny, "{found} {expected}");
                }
            }
        }
    }
}

/// The hash against its definition, for any strides, and values that it must distinguish.
#[test]
fn fingerprints_are_as_defined_and_see_every_sign() {
    fn mix(mut x: u32) -> u32 {
        x ^= x >> 16;
        x = x.wrapping_mul(0x85eb_ca6b);
        x ^= x >> 13;
        x = x.wrapping_mul(0xc2b2_ae35);
        x ^ (x >> 16)
    }
    fn expected(bits: impl Iterator<Item = u32>) -> Vec<i32> {
        let bits: Vec<u32> = bits.collect();
        let word = |seed: u32| {
            let terms = bits.iter().zip(0u32..);
            let terms = terms.map(|(&bits, i)| mix(bits ^ mix(i ^ seed)));
            terms.fold(0u32, u32::wrapping_add) as i32
        };
        [0x9e37_79b9, 0x85eb_ca77].map(word).to_vec()
    }
    fn found(x: Tensor<2>) -> Vec<i32> {
        let words = Dispatch::hd_pissa_fingerprint(x.into_dispatch());
        let words = Tensor::<1, Int>::from_dispatch(words).into_data();
        words.iter::<i32>().collect()
    }
    for device in devices() {
        let x = normal([7, 13], &Device::flex());
        let host = values(x.clone());
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            if !device.supports_dtype(dtype) {
                continue;
            }
            let x = Tensor::<2>::from_data(bits(&x.clone().cast(dtype)), (&device, dtype));
            let rounded = values(x.clone().cast(DType::F32));
            let expected = expected(rounded.iter().map(|x| x.to_bits()));
            assert_eq!(found(x.clone()), expected, "{dtype:?}");
            // The same values, held column by column.
            let columns = (x.transpose() + 0.0).transpose();
            assert_eq!(found(columns), expected, "{dtype:?}");
        }
        let flip = |elements: &[usize]| {
            let mut host = host.clone();
            for &element in elements {
                host[element] = -host[element];
            }
            let data = TensorData::new(host, [7, 13]);
            found(Tensor::from_data(data, &device))
        };
        let mut seen = vec![flip(&[])];
        for i in 0..20 {
            for j in i..20 {
                let words = if i == j { flip(&[i]) } else { flip(&[i, j]) };
                assert!(!seen.contains(&words), "signs of {i} and {j}");
                seen.push(words);
            }
        }
        let integers = Tensor::<2, Int>::from_data(
            TensorData::from([[1i32, -1, i32::MIN], [i32::MAX, 0, 7]]),
            (&device, DType::I32),
        );
        let words = Dispatch::hd_pissa_fingerprint_int(integers.into_dispatch());
        let words = Tensor::<1, Int>::from_dispatch(words).into_data();
        let host = [1i32, -1, i32::MIN, i32::MAX, 0, 7];
        let words: Vec<i32> = words.iter::<i32>().collect();
        assert_eq!(words, expected(host.iter().map(|&x| x as u32)));
    }
}

/// An update whose parts cancel: `Δa = εa`, `Δb = −εb` leaves `−ε²·a·b`, and the Gram matrices of its
/// parts are larger by `ε⁻²`.
#[test]
fn the_norm_of_an_update_that_cancels() {
    let device = Device::flex();
    let (d_input, d_output, rank, size) = (60, 50, 3, 1e-3f32);
    let (a, b) = (
        normal([d_input, rank], &device),
        normal([rank, d_output], &device),
    );
    let pack = |a: Tensor<2>, b: Tensor<2>| {
        let parts = vec![a.flatten::<1>(0, 1), b.flatten::<1>(0, 1)];
        Tensor::cat(parts, 0).unsqueeze::<2>()
    };
    let (moved_a, moved_b) = (a.clone() * size, b.clone() * -size);
    let zeros = Tensor::<1>::zeros([1], &device);
    let (_, squares) = Dispatch::hd_pissa_merge(
        Tensor::<2>::zeros([d_input, d_output], &device).into_dispatch(),
        pack(a.clone(), b.clone()).into_dispatch(),
        pack(moved_a.clone(), moved_b.clone()).into_dispatch(),
        zeros.into_dispatch(),
        rank,
        Rounding::Nearest,
        true,
    );
    let norm = Tensor::<1>::from_dispatch(squares)
        .into_scalar::<f32>()
        .sqrt();
    let host = |t: Tensor<2>| -> Vec<f64> { values(t).iter().map(|&v| v.into()).collect() };
    let (a, b, moved_a, moved_b) = (host(a), host(b), host(moved_a), host(moved_b));
    let mut expected = 0.0;
    for row in 0..d_input {
        for column in 0..d_output {
            let terms = (0..rank).map(|k| {
                let (a, moved_a) = (a[row * rank + k], moved_a[row * rank + k]);
                let (b, moved_b) = (b[k * d_output + column], moved_b[k * d_output + column]);
                // In `f32`, as in the merge.
                f64::from((a + moved_a) as f32) * moved_b + moved_a * b
            });
            expected += terms.sum::<f64>().powi(2);
        }
    }
    let error = f64::from(norm) / expected.sqrt() - 1.0;
    assert!(error.abs() < 1e-3, "{norm} {}", expected.sqrt());
}

#[test]
#[should_panic(expected = "b must be [4, 15]")]
fn shapes_that_do_not_fit_panic() {
    let device = Device::flex();
    let case = Case::new([9, 8, 15, 4], &device);
    adapter_linear(case.x, case.w, case.a, case.b.transpose(), SCALE);
}
