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
        left: FloatTensor<Self>,
        right: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        let dtype = w.dtype();
        // A no-op for f32, where the product is then accumulated in the storage of `w` itself.
        let mut w = cast::<Self>(w, DType::F32);
        if layout(&w).is_none() {
            w = w.to_contiguous();
        }
        let (left, right) = (readable(left), readable(right));
        accumulate(&mut w, &left, &right);
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

/// `tensor` as a matrix that [`view`] can read, copied only if it is a view with gaps.
fn readable(tensor: FlexTensor) -> FlexTensor {
    let whole = tensor.is_contiguous()
        && tensor.layout().start_offset() == 0
        && tensor.storage::<f32>().len() == tensor.layout().num_elements();
    if whole || (tensor.layout().num_dims() == 2 && layout(&tensor).is_some()) {
        tensor
    } else {
        tensor.to_contiguous()
    }
}

fn view(tensor: &FlexTensor) -> MatRef<'_, f32> {
    let (rows, cols) = (tensor.layout().shape()[0], tensor.layout().shape()[1]);
    match layout(tensor) {
        Some(Order::ColumnMajor) => MatRef::from_column_major_slice(tensor.storage(), rows, cols),
        _ => MatRef::from_row_major_slice(tensor.storage(), rows, cols),
    }
}

/// `w += left · right`, in place if `w` is the only handle to its storage.
fn accumulate(w: &mut FlexTensor, left: &FlexTensor, right: &FlexTensor) {
    let (rows, cols) = (w.layout().shape()[0], w.layout().shape()[1]);
    let order = layout(w);
    // Copies first if someone else holds the storage.
    let storage = w.storage_mut::<f32>();
    let w = match order {
        Some(Order::ColumnMajor) => MatMut::from_column_major_slice_mut(storage, rows, cols),
        _ => MatMut::from_row_major_slice_mut(storage, rows, cols),
    };
    matmul(w, Accum::Add, view(left), view(right), 1.0, Par::rayon(0));
}
