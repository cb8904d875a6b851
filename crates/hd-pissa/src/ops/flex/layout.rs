//! How matrices lie in the storage of Flex.

use burn_flex::FlexTensor;

/// The order in which a matrix fills its storage.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Order {
    RowMajor,
    ColumnMajor,
}

/// The order of a matrix that fills its storage without gaps, `None` for any other view.
pub(super) fn order(tensor: &FlexTensor) -> Option<Order> {
    let layout = tensor.layout();
    let (rows, cols) = (layout.shape()[0], layout.shape()[1]);
    let strides = (layout.strides()[0], layout.strides()[1]);
    if !is_whole(tensor) {
        None
    } else if strides == (cols as isize, 1) {
        Some(Order::RowMajor)
    } else if strides == (1, rows as isize) {
        Some(Order::ColumnMajor)
    } else {
        None
    }
}

/// Whether the storage holds only the tensor's elements.
fn is_whole(tensor: &FlexTensor) -> bool {
    let layout = tensor.layout();
    let bytes = layout.num_elements() * tensor.dtype().size();
    layout.start_offset() == 0 && tensor.bytes().len() == bytes
}

/// `tensor` with its values one after the other from the start of its storage.
pub(super) fn readable(tensor: FlexTensor) -> FlexTensor {
    if tensor.is_contiguous() && is_whole(&tensor) {
        tensor
    } else {
        tensor.to_contiguous()
    }
}

/// `tensor` as the only content of its storage, row by row.
pub(super) fn row_major(tensor: FlexTensor) -> FlexTensor {
    match order(&tensor) {
        Some(Order::RowMajor) => tensor,
        _ => tensor.to_contiguous(),
    }
}
