//! The low-rank product on CubeCL, in one launch or in two.
//!
//! One launch reads `x` once, on the device's ordinary units. Two launches read it twice, but one
//! of them is Burn's product, which may use matrix units. CubeCL's autotuner measures both on the
//! user's device and keeps the faster one for the shape.

use std::fmt;

use burn::backend::TensorMetadata;
use burn::tensor::{DType, Shape};
use burn_cubecl::{
    CubeTuneId,
    cubecl::tune::{AutotuneKey, LocalTuner, Tunable, TunableSet, anchor, local_tuner},
    kernel::matmul::{MatmulStrategy, matmul},
    ops::numeric::empty_device_contiguous_dtype,
    tensor::CubeTensor,
};
use hd_pissa_kernels::{DenseProduct, KernelError, LowRankProduct};
use serde::{Deserialize, Serialize};

use super::view::matrix;

/// `x · f`, `[m, rank]`, for `x: [m, n]` and an `f32` matrix `f: [n, rank]`.
///
/// # Panics
///
/// If the kernel does not take the operands.
pub(super) fn factor_product(x: CubeTensor, f: CubeTensor) -> CubeTensor {
    let p = empty(&x, &f, f.dtype);
    if let Err(error) = launch(&x, None, &f, &p) {
        panic!("multiplying by a factor on {:?}: {error}", x.device);
    }
    p
}

/// `x · w`, `[m, columns]`, and `x · f`, `[m, rank]`, for `w: [n, columns]` of the dtype of `x`.
pub(super) fn low_rank_product(
    x: CubeTensor,
    w: CubeTensor,
    f: CubeTensor,
) -> (CubeTensor, CubeTensor) {
    let (y, p) = (empty(&x, &w, x.dtype), empty(&x, &f, f.dtype));
    let operands = Operands {
        x,
        w,
        f,
        y: y.clone(),
        p: p.clone(),
    };
    if operands.is_empty() {
        // Nothing to measure. If only the inner dimension is empty, the result is zeros.
        if let Err(error) = operands.one_launch() {
            panic!("multiplying on {:?}: {error}", p.device);
        }
    } else {
        operands.faster();
    }
    (y, p)
}

fn empty(x: &CubeTensor, right: &CubeTensor, dtype: DType) -> CubeTensor {
    let shape = Shape::new([x.shape()[0], right.shape()[1]]);
    empty_device_contiguous_dtype(x.client.clone(), x.device.clone(), shape, dtype)
}

/// `p = x · f`, and `y = x · w` where given.
fn launch(
    x: &CubeTensor,
    dense: Option<[&CubeTensor; 2]>,
    f: &CubeTensor,
    p: &CubeTensor,
) -> Result<(), KernelError> {
    let product = LowRankProduct {
        input: matrix(x),
        factor: matrix(f),
        projection: matrix(p),
        dense: dense.map(|[w, y]| DenseProduct {
            weight: matrix(w),
            output: matrix(y),
        }),
    };
    hd_pissa_kernels::low_rank_product(&x.client, product)
}

/// The operands and results of a product. Clones share the memory.
#[derive(Clone)]
struct Operands {
    x: CubeTensor,
    w: CubeTensor,
    f: CubeTensor,
    y: CubeTensor,
    p: CubeTensor,
}

impl Operands {
    fn is_empty(&self) -> bool {
        [&self.x, &self.w, &self.f]
            .iter()
            .any(|operand| operand.shape().num_elements() == 0)
    }

    fn one_launch(&self) -> Result<(), KernelError> {
        launch(&self.x, Some([&self.w, &self.y]), &self.f, &self.p)
    }

    /// Burn's product with the weight. The product with the factor is Burn's if `x` is `f32`, else
    /// ours, because Burn would need a copy of `x` in `f32`.
    fn two_launches(self) -> Result<(), String> {
        let burn = |right: CubeTensor, output: CubeTensor| {
            let dtype = output.dtype;
            let strategy = MatmulStrategy::default();
            matmul(self.x.clone(), right, Some(output), strategy, dtype)
                .map(drop)
                .map_err(|error| error.to_string())
        };
        burn(self.w, self.y)?;
        match self.x.dtype {
            DType::F32 => burn(self.f, self.p),
            _ => launch(&self.x, None, &self.f, &self.p).map_err(|error| error.to_string()),
        }
    }

    /// Runs the faster variant for the shape on this device, measured at the first call.
    fn faster(self) {
        static TUNER: LocalTuner<Key, CubeTuneId> = local_tuner!();
        let client = self.x.client.clone();
        let device = CubeTuneId::new(&client, &self.x.device);
        let variants = TUNER.init(&device, || {
            TunableSet::<Key, Operands, ()>::new_cloning_inputs(Key::new)
                .with(Tunable::new("two_launches", Operands::two_launches))
                .with(Tunable::new("one_launch", |operands: Operands| {
                    // A key stands for many numbers of rows. Some of them may be too large for one
                    // launch although the measured number was not.
                    operands.one_launch().or_else(|_| operands.two_launches())
                }))
        });
        TUNER.execute(&device, &client, variants, self);
    }
}

/// The key of a choice: products with the same key run the same way.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
struct Key {
    /// Rows of `x`, rounded up to a power of the tuner's base.
    rows: usize,
    depth: usize,
    columns: usize,
    rank: usize,
    dtype: DType,
    /// Whether `x`, `w` and `f` are stored column by column.
    column_major: [bool; 3],
}

impl Key {
    fn new(operands: &Operands) -> Self {
        let Operands { x, w, f, .. } = operands;
        let column_major = [x, w, f].map(|operand| {
            let strides = operand.meta.strides();
            strides[0] < strides[1]
        });
        Self {
            rows: anchor(x.shape()[0], None, None, None),
            depth: x.shape()[1],
            columns: w.shape()[1],
            rank: f.shape()[1],
            dtype: x.dtype,
            column_major,
        }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        write!(formatter, "{self:?}")
    }
}

impl AutotuneKey for Key {}

#[cfg(all(test, feature = "wgpu", feature = "flex"))]
mod tests {
    use burn::backend::{ops::FloatTensorOps, read_sync};
    use burn::tensor::{Device, Distribution, Tensor, TensorData};
    use burn_cubecl::{CubeBackend, CubeDevice};

    use super::*;
    use crate::ops::adapter_linear;

    /// `None` if there is none, which is a failure if `HD_PISSA_REQUIRE_WGPU` is 1.
    fn device() -> Option<Device> {
        let found = std::panic::catch_unwind(|| {
            let device = Device::wgpu(Default::default());
            Tensor::<1>::zeros([1], &device).into_data();
            device
        });
        let is_required = std::env::var_os("HD_PISSA_REQUIRE_WGPU").is_some_and(|x| x == "1");
        assert!(found.is_ok() || !is_required, "no device was found");
        found.ok()
    }

    fn random(shape: [usize; 2]) -> Vec<f32> {
        let uniform = Distribution::Uniform(-1.0, 1.0);
        let values = Tensor::<2>::random(shape, uniform, &Device::flex()).into_data();
        values.iter::<f32>().collect()
    }

    /// One launch, two, and the tuner's choice, with a transposed weight as in the backward pass.
    #[test]
    fn every_variant_gives_the_products() {
        if device().is_none() {
            return;
        }
        let device = CubeDevice::wgpu(Default::default()).expect("it was found");
        let [m, n, columns, rank] = [37, 19, 23, 3];
        let (x, w, f) = (random([m, n]), random([columns, n]), random([n, rank]));
        let variants: [fn(Operands); 3] = [
            |operands| operands.one_launch().unwrap(),
            |operands| operands.two_launches().unwrap(),
            Operands::faster,
        ];
        for (dtype, step) in [(DType::F32, 1e-6), (DType::F16, 1e-3)] {
            let tensor = |values: &[f32], shape: [usize; 2], dtype: DType| {
                let data = TensorData::new(values.to_vec(), shape).convert_dtype(dtype);
                CubeBackend::float_from_data(data, &device)
            };
            let host = |tensor: &CubeTensor| -> Vec<f64> {
                let data = CubeBackend::float_into_data(tensor.clone());
                let data = read_sync(data).expect("the kernels ran");
                data.iter::<f64>().collect()
            };
            let x = tensor(&x, [m, n], dtype);
            let w = CubeBackend::float_transpose(tensor(&w, [columns, n], dtype));
            let f = tensor(&f, [n, rank], DType::F32);
            for (which, variant) in variants.into_iter().enumerate() {
                let (y, p) = (empty(&x, &w, x.dtype), empty(&x, &f, f.dtype));
                variant(Operands {
                    x: x.clone(),
                    w: w.clone(),
                    f: f.clone(),
                    y: y.clone(),
                    p: p.clone(),
                });
                let exact = |i: usize, right: &[f64], columns: usize, j: usize| -> f64 {
                    let x = &host(&x)[i * n..][..n];
                    let terms = x.iter().enumerate();
                    terms.map(|(k, x)| x * right[k * columns + j]).sum()
                };
                for (found, right, columns, step) in [(&y, &w, columns, step), (&p, &f, rank, 1e-6)]
                {
                    let (found, right) = (host(found), host(right));
                    for (i, j) in [(0, 0), (m - 1, columns - 1), (m / 2, 1)] {
                        let expected = exact(i, &right, columns, j);
                        let error = (found[i * columns + j] - expected).abs();
                        // At most `n` terms of at most 1.
                        assert!(
                            error <= step * n as f64,
                            "variant {which}, {dtype:?}: {error:e}"
                        );
                    }
                }
            }
        }
    }

    /// The adapter through the tuner, forward and backward, as in a build with `autotune`.
    #[test]
    fn the_adapter_has_the_gradients_of_flex() {
        let Some(gpu) = device() else { return };
        let [tokens, d_input, d_output, rank] = [12, 19, 23, 3];
        let shapes = [
            [tokens, d_input],
            [d_input, d_output],
            [d_input, rank],
            [rank, d_output],
        ];
        let host = shapes.map(random);
        let run = |device: &Device| {
            let device = device.clone().autodiff();
            let mut leaves = host.iter().zip(shapes).map(|(values, shape)| {
                Tensor::<2>::from_data(TensorData::new(values.clone(), shape), &device)
            });
            let mut leaf = || leaves.next().expect("four of them");
            let (x, w) = (leaf().require_grad(), leaf());
            let (a, b) = (leaf().require_grad(), leaf().require_grad());
            let deep = x.clone().reshape([3, 4, d_input]);
            let y = adapter_linear(deep, w, a.clone(), b.clone(), 1.5);
            assert_eq!(y.dims(), [3, 4, d_output]);
            let grads = y.clone().tanh().sum().backward();
            let grads = [&x, &a, &b].map(|leaf| leaf.grad(&grads).expect("tracked"));
            let values = [y.reshape([tokens, d_output]).inner()]
                .into_iter()
                .chain(grads);
            // Copies: data read from WGPU can show the values of a later read.
            let values = values.map(|value| value.into_data().iter::<f32>().collect::<Vec<_>>());
            values.collect::<Vec<_>>()
        };
        for (found, expected) in run(&gpu).iter().zip(run(&Device::flex())) {
            let largest = expected
                .iter()
                .fold(0f32, |largest, x| largest.max(x.abs()));
            for (found, expected) in found.iter().zip(expected) {
                assert!(
                    (found - expected).abs() <= 1e-5 * largest,
                    "{found} {expected}"
                );
            }
        }
    }
}
