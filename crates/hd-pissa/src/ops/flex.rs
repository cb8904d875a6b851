use burn::backend::{Flex, tensor::FloatTensor};
use burn::tensor::{BoolDType, DType, TensorData};
use burn_flex::FlexTensor;
use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};

use super::HdPissaOps;
use super::contract::cast;

impl HdPissaOps for Flex {
    fn hd_pissa_merge(
        w: FloatTensor<Self>,
        frames: FloatTensor<Self>,
        deltas: FloatTensor<Self>,
        rank: usize,
    ) -> FloatTensor<Self> {
        let dtype = w.dtype();
        // A no-op for f32, where the product is then accumulated in the storage of `w` itself.
        let mut w = cast::<Self>(w, DType::F32);
        if layout(&w).is_none() {
            w = w.to_contiguous();
        }
        let stacked = Stacked::new(
            w.layout().shape()[0],
            w.layout().shape()[1],
            rank,
            readable(frames).storage::<f32>(),
            readable(deltas).storage::<f32>(),
        );
        stacked.add_to(&mut w);
        cast::<Self>(w, dtype)
    }

    fn hd_pissa_count_non_finite(x: FloatTensor<Self>, _: BoolDType) -> FloatTensor<Self> {
        let count = match x.dtype() {
            DType::F32 => readable(x)
                .storage::<f32>()
                .iter()
                .filter(|value| !value.is_finite())
                .count(),
            _ => {
                return Self::hd_pissa_count_non_finite(
                    cast::<Self>(x, DType::F32),
                    BoolDType::Native,
                );
            }
        };
        FlexTensor::from_data(TensorData::from([count as f32]))
    }
}

/// How a matrix fills the whole of its storage.
#[derive(Clone, Copy)]
enum Order {
    RowMajor,
    ColumnMajor,
}

/// The order of a matrix that fills its storage without gaps, `None` for any other view.
fn layout(tensor: &FlexTensor) -> Option<Order> {
    let layout = tensor.layout();
    let (rows, cols) = (layout.shape()[0], layout.shape()[1]);
    let whole = layout.start_offset() == 0 && tensor.storage::<f32>().len() == rows * cols;
    let strides = (layout.strides()[0], layout.strides()[1]);
    if whole && strides == (cols as isize, 1) {
        Some(Order::RowMajor)
    } else if whole && strides == (1, rows as isize) {
        Some(Order::ColumnMajor)
    } else {
        None
    }
}

/// `tensor` with its values one after the other from the start of its storage.
fn readable(tensor: FlexTensor) -> FlexTensor {
    let whole = tensor.is_contiguous()
        && tensor.layout().start_offset() == 0
        && tensor.storage::<f32>().len() == tensor.layout().num_elements();
    if whole {
        tensor
    } else {
        tensor.to_contiguous()
    }
}

/// The update of a merge as one product: `left = [a + Δa | Δa]` and `right = [Δb ; b]` over all
/// shards, row by row.
struct Stacked {
    d_input: usize,
    d_output: usize,
    inner: usize,
    left: Vec<f32>,
    right: Vec<f32>,
}

impl Stacked {
    fn new(d_input: usize, d_output: usize, rank: usize, frames: &[f32], deltas: &[f32]) -> Self {
        let row = rank * (d_input + d_output);
        let shards = frames.len() / row;
        let inner = 2 * shards * rank;
        let mut left = vec![0.0; d_input * inner];
        let mut right = vec![0.0; inner * d_output];
        let (moved_b, fixed_b) = right.split_at_mut(inner / 2 * d_output);
        for (shard, (frame, delta)) in frames.chunks(row).zip(deltas.chunks(row)).enumerate() {
            let (a, b) = frame.split_at(rank * d_input);
            let (delta_a, delta_b) = delta.split_at(rank * d_input);
            let rows = left
                .chunks_mut(inner)
                .zip(a.chunks(rank).zip(delta_a.chunks(rank)));
            for (left, (a, delta_a)) in rows {
                let (moved, deltas) = left.split_at_mut(inner / 2);
                let columns = shard * rank..(shard + 1) * rank;
                for (moved, (a, delta_a)) in
                    moved[columns.clone()].iter_mut().zip(a.iter().zip(delta_a))
                {
                    *moved = a + delta_a;
                }
                deltas[columns].copy_from_slice(delta_a);
            }
            let rows = shard * rank * d_output..(shard + 1) * rank * d_output;
            moved_b[rows.clone()].copy_from_slice(delta_b);
            fixed_b[rows].copy_from_slice(b);
        }
        Self {
            d_input,
            d_output,
            inner,
            left,
            right,
        }
    }

    /// `w += left · right`, in place if `w` is the only handle to its storage.
    fn add_to(&self, w: &mut FlexTensor) {
        let (rows, cols) = (self.d_input, self.d_output);
        let order = layout(w);
        // Copies first if someone else holds the storage.
        let storage = w.storage_mut::<f32>();
        let w = match order {
            Some(Order::ColumnMajor) => MatMut::from_column_major_slice_mut(storage, rows, cols),
            _ => MatMut::from_row_major_slice_mut(storage, rows, cols),
        };
        let left = MatRef::from_row_major_slice(&self.left, rows, self.inner);
        let right = MatRef::from_row_major_slice(&self.right, self.inner, cols);
        matmul(w, Accum::Add, left, right, 1.0, Par::rayon(0));
    }
}
