//! The operations on CubeCL, behind every GPU backend of Burn.

use burn::backend::{
    TensorMetadata,
    tensor::{Device, FloatTensor, IntTensor},
};
use burn::tensor::{DType, Shape};
use burn_cubecl::{
    CubeBackend,
    kernel::{into_contiguous, untile},
    ops::numeric::empty_device_contiguous_dtype,
    tensor::CubeTensor,
};
use hd_pissa_kernels::{
    Buffer, FactorProduct as FactorProductArguments, FloatType, Matrix, Merge, MergePrecision,
    ShardedFactors, factor_product, fingerprint, join, merge, row_statistics,
};

use super::contract::cast;
use super::{FactorProduct, HdPissaOps, Rounding};

impl FactorProduct for CubeBackend {
    fn has_factor_product(device: &Device<Self>, dtype: DType) -> bool {
        let known = known(dtype).filter(|_| dtype != DType::F32);
        known.is_some_and(|dtype| dtype.is_supported(&device.client()))
    }
}

impl HdPissaOps for CubeBackend {
    fn hd_pissa_factor_product(x: FloatTensor<Self>, f: FloatTensor<Self>) -> FloatTensor<Self> {
        let [x, f] = [x, f].map(untile);
        let shape = Shape::new([x.shape()[0], f.shape()[1]]);
        let (client, device) = (x.client.clone(), x.device.clone());
        let p = empty_device_contiguous_dtype(client, device, shape, f.dtype);
        let [input, factor, output] = [&x, &f, &p].map(matrix);
        let arguments = FactorProductArguments {
            input,
            factor,
            output,
        };
        if let Err(error) = factor_product(&x.client, arguments) {
            panic!("multiplying by a factor on {:?}: {error}", x.device);
        }
        p
    }

    fn hd_pissa_merge(
        w: FloatTensor<Self>,
        frames: FloatTensor<Self>,
        deltas: FloatTensor<Self>,
        gate: FloatTensor<Self>,
        rank: usize,
        rounding: Rounding,
        _measure: bool,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let precision = match rounding {
            Rounding::Nearest => MergePrecision::Plain,
            Rounding::Stochastic(key) => {
                MergePrecision::Stochastic(hd_pissa_kernels::StochasticKey {
                    seed: key.seed,
                    step: key.step,
                    path: key.path,
                })
            }
        };
        let update = Update {
            frames,
            deltas,
            gate,
            rank,
            precision,
        };
        let w = writable(untile(w));
        let squares = update.add_to(&w, None);
        (w, squares)
    }

    fn hd_pissa_merge_split(
        w: FloatTensor<Self>,
        companion: IntTensor<Self>,
        frames: FloatTensor<Self>,
        deltas: FloatTensor<Self>,
        gate: FloatTensor<Self>,
        rank: usize,
        _measure: bool,
    ) -> (FloatTensor<Self>, IntTensor<Self>, FloatTensor<Self>) {
        let update = Update {
            frames,
            deltas,
            gate,
            rank,
            precision: MergePrecision::Split,
        };
        // The kernel's companion follows the memory of the weight, ours its rows.
        let w = writable(into_contiguous(untile(w)));
        let companion = writable(into_contiguous(companion));
        let squares = update.add_to(&w, Some(&companion));
        (w, companion, squares)
    }

    fn hd_pissa_row_statistics(x: FloatTensor<Self>, split: usize) -> FloatTensor<Self> {
        let x = untile(x);
        let shape = Shape::new([x.shape()[0], 4]);
        let statistics = match row_statistics(&x.client, matrix(&x), split) {
            Ok(statistics) => statistics,
            Err(error) => panic!("statistics of rows on {:?}: {error}", x.device),
        };
        CubeTensor::new_contiguous(x.client, x.device, shape, statistics, DType::F32)
    }

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
        let parts = [p0, p1, p2, p3, p4, p5, p6, p7].into_iter();
        let parts: Vec<CubeTensor> = parts.take(count).map(untile).collect();
        let target = writable(target);
        let buffer = Buffer {
            handle: target.handle.clone(),
            len: target.shape().num_elements(),
            dtype: FloatType::F32,
        };
        let matrices = parts.iter().map(matrix).collect();
        if let Err(error) = join(&target.client, matrices, buffer, start) {
            panic!("joining matrices on {:?}: {error}", target.device);
        }
        target
    }

    fn hd_pissa_fingerprint(x: FloatTensor<Self>) -> IntTensor<Self> {
        let x = match known(x.dtype) {
            Some(_) => untile(x),
            // Adapted weights have other dtypes; this is for the rest of a model.
            None => untile(cast::<Self>(x, DType::F32)),
        };
        let matrix = matrix(&x);
        words_of(x, matrix)
    }

    fn hd_pissa_fingerprint_int(x: IntTensor<Self>) -> IntTensor<Self> {
        let x = untile(x);
        // Elements of 32 bits count by their bits.
        let matrix = matrix_of(&x, FloatType::F32);
        words_of(x, matrix)
    }
}

fn words_of(x: CubeTensor, matrix: Matrix) -> CubeTensor {
    let words = match fingerprint(&x.client, matrix) {
        Ok(words) => words,
        Err(error) => panic!("fingerprint on {:?}: {error}", x.device),
    };
    CubeTensor::new_contiguous(x.client, x.device, Shape::new([2]), words, DType::I32)
}

/// `tensor`, or a copy of it if someone else holds its memory.
fn writable(tensor: CubeTensor) -> CubeTensor {
    if tensor.can_mut() {
        tensor
    } else {
        tensor.copy()
    }
}

/// What a merge adds to a weight.
struct Update {
    frames: CubeTensor,
    deltas: CubeTensor,
    gate: CubeTensor,
    rank: usize,
    precision: MergePrecision,
}

impl Update {
    /// Merges in place; the sum of the squares of the update, `[1]`.
    fn add_to(self, w: &CubeTensor, companion: Option<&CubeTensor>) -> CubeTensor {
        let client = w.client.clone();
        let weight = matrix(w);
        let [d_input, d_output] = weight.shape;
        let shards = self.frames.shape()[0];
        let row = self.rank * (d_input + d_output);
        let factors = |rows: CubeTensor| ShardedFactors {
            buffer: Buffer {
                handle: into_contiguous(rows).handle,
                len: shards * row,
                dtype: FloatType::F32,
            },
            left: 0,
            right: self.rank * d_input,
            shard_stride: row,
        };
        let squares = client.empty(size_of::<f32>());
        let arguments = Merge {
            frames: factors(self.frames),
            deltas: factors(self.deltas),
            weight,
            rank: self.rank,
            shards,
            precision: self.precision,
            companion: companion.map(|companion| companion.handle.clone()),
            // Of all floats only +0 has the bits of the integer zero, and a count is never -0.
            non_finite: into_contiguous(self.gate).handle,
            squares: squares.clone(),
            square_slot: 0,
        };
        if let Err(error) = merge(&client, arguments) {
            panic!("merging an update on {:?}: {error}", w.device);
        }
        CubeTensor::new_contiguous(
            client,
            w.device.clone(),
            Shape::new([1]),
            squares,
            DType::F32,
        )
    }
}

/// What the kernels see of a tensor of two dimensions.
fn matrix(tensor: &CubeTensor) -> Matrix {
    let dtype = known(tensor.dtype)
        .unwrap_or_else(|| panic!("{:?} is refused when adapters are attached", tensor.dtype));
    matrix_of(tensor, dtype)
}

/// As [`matrix`], of elements that count as `dtype`.
fn matrix_of(tensor: &CubeTensor, dtype: FloatType) -> Matrix {
    let (shape, strides) = (tensor.shape(), tensor.meta.strides());
    Matrix {
        handle: tensor.handle.clone(),
        shape: [shape[0], shape[1]],
        strides: [strides[0], strides[1]],
        dtype,
    }
}

fn known(dtype: DType) -> Option<FloatType> {
    match dtype {
        DType::F32 => Some(FloatType::F32),
        DType::F16 => Some(FloatType::F16),
        DType::BF16 => Some(FloatType::BF16),
        _ => None,
    }
}
