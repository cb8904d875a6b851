use burn::backend::{TensorMetadata, tensor::FloatTensor};
use burn::tensor::DType;
use burn_cubecl::{
    CubeBackend,
    kernel::{into_contiguous, untile},
    tensor::CubeTensor,
};
use hd_pissa_kernels::{
    Buffer, FloatType, Matrix, Merge, MergePrecision, ShardedFactors, merge, new_counter,
};

use super::HdPissaOps;

impl HdPissaOps for CubeBackend {
    fn hd_pissa_merge(
        w: FloatTensor<Self>,
        frames: FloatTensor<Self>,
        deltas: FloatTensor<Self>,
        rank: usize,
    ) -> FloatTensor<Self> {
        let w = untile(w);
        let w = if w.can_mut() { w } else { w.copy() };
        let client = w.client.clone();
        let (shape, strides) = (w.shape(), w.meta.strides());
        let weight = Matrix {
            handle: w.handle.clone(),
            shape: [shape[0], shape[1]],
            strides: [strides[0], strides[1]],
            dtype: float_type(w.dtype),
        };
        let shards = frames.shape()[0];
        let factors = |rows: CubeTensor| {
            let [shards, row] = [rows.shape()[0], rows.shape()[1]];
            ShardedFactors {
                buffer: Buffer {
                    handle: into_contiguous(rows).handle,
                    len: shards * row,
                    dtype: FloatType::F32,
                },
                left: 0,
                right: rank * weight.shape[0],
                shard_stride: row,
            }
        };
        let arguments = Merge {
            frames: factors(frames),
            deltas: factors(deltas),
            weight: weight.clone(),
            rank,
            shards,
            precision: MergePrecision::Plain,
            companion: None,
            // The optimizer has looked for bad values before it merges.
            non_finite: new_counter(&client),
            squares: client.empty(size_of::<f32>()),
            square_slot: 0,
        };
        if let Err(error) = merge(&client, arguments) {
            panic!("merging an update on {:?}: {error}", w.device);
        }
        w
    }
}

fn float_type(dtype: DType) -> FloatType {
    match dtype {
        DType::F32 => FloatType::F32,
        DType::F16 => FloatType::F16,
        DType::BF16 => FloatType::BF16,
        other => panic!("weights of dtype {other:?} are refused when adapters are attached"),
    }
}
