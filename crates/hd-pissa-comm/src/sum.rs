//! The sum of a reduce_scatter: the chunk for each worker, and the order of additions.

use burn::tensor::{DType, Tensor, s};

/// Number of values for each worker in a buffer `[workers · n]`.
///
/// # Panics
///
/// If the length is not a multiple of `workers`, or the values are not f32.
pub(crate) fn chunk_len(buffer: &Tensor<1>, workers: usize) -> usize {
    let ([len], dtype) = (buffer.dims(), buffer.dtype());
    assert!(
        dtype == DType::F32,
        "reduce_scatter sums F32 values, not {dtype:?}"
    );
    assert!(
        len.is_multiple_of(workers),
        "reduce_scatter of {len} values, which is not a multiple of {workers} workers"
    );
    len / workers
}

/// The values for a worker.
pub(crate) fn chunk(buffer: Tensor<1>, worker: usize, len: usize) -> Tensor<1> {
    buffer.slice(s![worker * len..(worker + 1) * len])
}

/// The sum of tensors of equal shape: neighbours in pairs, then those sums in pairs, until one is
/// left.
pub(crate) fn tree_sum(mut terms: Vec<Tensor<1>>) -> Tensor<1> {
    while terms.len() > 1 {
        let mut rest = terms.into_iter();
        terms = Vec::new();
        while let Some(first) = rest.next() {
            terms.push(match rest.next() {
                Some(second) => first + second,
                None => first,
            });
        }
    }
    terms.pop().expect("a group has workers")
}
