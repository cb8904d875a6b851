//! The contract on CubeCL.

use burn::backend::{
    TensorMetadata,
    tensor::{Device, FloatTensor, IntTensor},
};
use burn::tensor::{DType, Shape};
use burn_cubecl::{
    CubeBackend, CubeDevice,
    kernel::{into_contiguous, untile},
    tensor::CubeTensor,
};
use hd_pissa_kernels::{FloatType, Matrix, Merge, fingerprint, join, merge, row_statistics};

use super::product;
use super::view::{known, matrix, matrix_of, writable};
use crate::ops::contract::cast;
use crate::ops::{HdPissaOps, ProductKernels, Rounding};

impl ProductKernels for CubeBackend {
    fn has_factor_product(device: &Device<Self>, dtype: DType) -> bool {
        dtype != DType::F32 && is_readable(device, dtype)
    }

    /// A build without `autotune` takes two products for every shape. They were faster in all
    /// measurements.
    fn has_low_rank_product(device: &Device<Self>, dtype: DType) -> bool {
        // The unit tests reach it without a build of Burn that tunes everything.
        cfg!(any(feature = "autotune", test)) && is_readable(device, dtype)
    }
}

/// Whether the kernels read and write the dtype on the device.
fn is_readable(device: &CubeDevice, dtype: DType) -> bool {
    known(dtype).is_some_and(|dtype| dtype.is_supported(&device.client()))
}

impl HdPissaOps for CubeBackend {
    fn hd_pissa_factor_product(x: FloatTensor<Self>, f: FloatTensor<Self>) -> FloatTensor<Self> {
        product::factor_product(untile(x), untile(f))
    }

    fn hd_pissa_low_rank_product(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        f: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        product::low_rank_product(untile(x), untile(w), untile(f))
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
        let update = Update {
            frames,
            deltas,
            gate,
            rank,
            rounding,
        };
        let w = writable(untile(w));
        let squares = update.add_to(&w, None);
        (w, squares)
    }

    fn hd_pissa_merge_compensated(
        w: FloatTensor<Self>,
        residual: IntTensor<Self>,
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
            rounding: Rounding::Nearest,
        };
        // The kernel's residual bits follow the memory of the weight, ours its rows.
        let w = writable(into_contiguous(untile(w)));
        let residual = writable(into_contiguous(residual));
        let squares = update.add_to(&w, Some(&residual));
        (w, residual, squares)
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
        let len = target.shape().num_elements();
        let row = Matrix::row_major(target.handle.clone(), [1, len], FloatType::F32);
        let matrices = parts.iter().map(matrix).collect();
        if let Err(error) = join(&target.client, matrices, row, start) {
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

/// The update of a merge.
struct Update {
    frames: CubeTensor,
    deltas: CubeTensor,
    gate: CubeTensor,
    rank: usize,
    rounding: Rounding,
}

impl Update {
    /// Merges in place. Returns the sum of the squares of the update, `[1]`.
    fn add_to(self, w: &CubeTensor, residual: Option<&CubeTensor>) -> CubeTensor {
        let client = w.client.clone();
        let arguments = Merge {
            weight: matrix(w),
            shards: self.frames.shape()[0],
            frames: into_contiguous(self.frames).handle,
            deltas: into_contiguous(self.deltas).handle,
            rank: self.rank,
            rounding: self.rounding,
            residual: residual.map(|residual| residual.handle.clone()),
            // Only the float +0 has the bits of the integer zero, and a count is never -0.
            gate: into_contiguous(self.gate).handle,
        };
        let squares = match merge(&client, arguments) {
            Ok(squares) => squares,
            Err(error) => panic!("merging an update on {:?}: {error}", w.device),
        };
        CubeTensor::new_contiguous(
            client,
            w.device.clone(),
            Shape::new([1]),
            squares,
            DType::F32,
        )
    }
}
