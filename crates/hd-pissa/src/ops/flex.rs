//! The operations on Flex, Burn's CPU backend.

mod layout;
mod merge;
mod simd;
mod squares;

use burn::backend::{
    Flex,
    tensor::{Device, FloatTensor, IntTensor},
};
use burn::tensor::{DType, Element, TensorData};
use burn_flex::FlexTensor;
use bytemuck::Pod;
use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use half::{bf16, f16};
use hd_pissa_bits::mix;
use rayon::prelude::*;

use self::layout::{Order, order, readable};
use self::merge::{Storage, Update};
use self::squares::finite_squares;
use super::contract::{cast, product};
use super::thin_product::{Large, multiply};
use super::{HdPissaOps, ProductKernels, Rounding};

/// Every float that Flex holds in 32 bits or fewer.
impl ProductKernels for Flex {
    fn has_factor_product(_: &Device<Self>, dtype: DType) -> bool {
        matches!(dtype, DType::F32 | DType::F16 | DType::BF16)
    }

    fn has_low_rank_product(_: &Device<Self>, dtype: DType) -> bool {
        dtype == DType::F32
    }
}

impl HdPissaOps for Flex {
    fn hd_pissa_factor_product(x: FloatTensor<Self>, f: FloatTensor<Self>) -> FloatTensor<Self> {
        match x.dtype() {
            DType::F16 => factor_product(x, f, f16::to_f32),
            DType::BF16 => factor_product(x, f, bf16::to_f32),
            _ => factor_product(x, f, |x: f32| x),
        }
    }

    fn hd_pissa_low_rank_product(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        f: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let y = match order(&w) {
            Some(Order::ColumnMajor) => by_transposed(x.clone(), w),
            _ => product::<Self>(x.clone(), w),
        };
        (y, factor_product(x, f, |x: f32| x))
    }

    fn hd_pissa_merge(
        w: FloatTensor<Self>,
        frames: FloatTensor<Self>,
        deltas: FloatTensor<Self>,
        gate: FloatTensor<Self>,
        rank: usize,
        rounding: Rounding,
        measure: bool,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        if !is_open(gate) {
            return (w, scalar(0.0));
        }
        let update = Update::new(&w, rank, frames, deltas, measure);
        let (w, squares) = match w.dtype() {
            DType::F32 => update.add_to(w),
            DType::F16 => update.round_to::<f16>(w, rounding),
            DType::BF16 => update.round_to::<bf16>(w, rounding),
            other => panic!("weights of dtype {other:?} are refused when adapters are attached"),
        };
        (w, scalar(squares))
    }

    fn hd_pissa_merge_compensated(
        w: FloatTensor<Self>,
        residual: IntTensor<Self>,
        frames: FloatTensor<Self>,
        deltas: FloatTensor<Self>,
        gate: FloatTensor<Self>,
        rank: usize,
        measure: bool,
    ) -> (FloatTensor<Self>, IntTensor<Self>, FloatTensor<Self>) {
        if !is_open(gate) {
            return (w, residual, scalar(0.0));
        }
        let update = Update::new(&w, rank, frames, deltas, measure);
        let (w, residual, squares) = match w.dtype() {
            DType::F16 => update.compensate::<f16>(w, residual),
            DType::BF16 => update.compensate::<bf16>(w, residual),
            other => panic!("a weight of dtype {other:?} has no residual bits"),
        };
        (w, residual, scalar(squares))
    }

    fn hd_pissa_row_statistics(x: FloatTensor<Self>, split: usize) -> FloatTensor<Self> {
        let rows = x.layout().shape()[0];
        let x = readable(x);
        let columns = x.layout().shape()[1].max(1);
        let statistics = x.storage::<f32>().par_chunks(columns).flat_map_iter(|row| {
            let (left, right) = row.split_at(split.min(row.len()));
            let [(bad_left, left), (bad_right, right)] = [left, right].map(finite_squares);
            const SCALE: f64 = 1.0 / (1u128 << 80) as f64;
            let scaled = (left + right) * SCALE * SCALE;
            [
                (bad_left + bad_right) as f32,
                left as f32,
                right as f32,
                scaled as f32,
            ]
        });
        let mut statistics: Vec<f32> = statistics.collect();
        statistics.resize(4 * rows, 0.0);
        FlexTensor::from_data(TensorData::new(statistics, [rows, 4]))
    }

    fn hd_pissa_max_abs(w: FloatTensor<Self>) -> FloatTensor<Self> {
        fn largest<H: Storage>(w: FlexTensor) -> f32 {
            let values = H::storage(&w).par_iter();
            values.map(|w| w.widen().abs()).reduce(|| 0.0, f32::max)
        }
        let w = readable(w);
        scalar(match w.dtype() {
            DType::F16 => largest::<f16>(w),
            DType::BF16 => largest::<bf16>(w),
            other => panic!("the range of a weight of dtype {other:?} is not in question"),
        })
    }

    fn hd_pissa_fingerprint(x: FloatTensor<Self>) -> IntTensor<Self> {
        match x.dtype() {
            DType::F32 => fingerprint(&x, f32::to_bits),
            DType::F16 => fingerprint(&x, |x: f16| x.to_f32().to_bits()),
            DType::BF16 => fingerprint(&x, |x: bf16| x.to_f32().to_bits()),
            DType::F64 => fingerprint(&x, |x: f64| {
                let bits = x.to_bits();
                mix(bits as u32) ^ (bits >> 32) as u32
            }),
            _ => fingerprint(&cast::<Self>(x, DType::F32), f32::to_bits),
        }
    }

    fn hd_pissa_fingerprint_int(x: IntTensor<Self>) -> IntTensor<Self> {
        fingerprint(&x, |x: i32| x as u32)
    }
}

/// `x · w` in `f32` for a matrix `w` that is stored column by column: a transposed weight, as in backward
/// passes. Flex's own product is slow if these columns are long.
fn by_transposed(x: FlexTensor, w: FlexTensor) -> FlexTensor {
    let x = readable(x);
    let (rows, inner) = (x.layout().shape()[0], x.layout().shape()[1]);
    let columns = w.layout().shape()[1];
    let mut y = vec![0.0f32; rows * columns];
    matmul(
        MatMut::from_row_major_slice_mut(&mut y, rows, columns),
        Accum::Replace,
        MatRef::from_row_major_slice(x.storage::<f32>(), rows, inner),
        MatRef::from_column_major_slice(w.storage::<f32>(), inner, columns),
        1.0,
        Par::rayon(0),
    );
    FlexTensor::from_data(TensorData::new(y, [rows, columns]))
}

/// `x · f` for an `f32` matrix `f` of few columns.
fn factor_product<E: Element + Pod + Sync>(
    x: FlexTensor,
    f: FlexTensor,
    widen: impl Fn(E) -> f32 + Copy + Sync,
) -> FlexTensor {
    let f = readable(f);
    let rank = f.layout().shape()[1];
    let strides = |x: &FlexTensor| {
        let (row, col) = (x.layout().strides()[0], x.layout().strides()[1]);
        Some((usize::try_from(row).ok()?, usize::try_from(col).ok()?))
    };
    let (x, (row_stride, col_stride)) = match strides(&x) {
        Some(strides) if strides.0 == 1 || strides.1 == 1 => (x, strides),
        _ => {
            let x = x.to_contiguous();
            let cols = x.layout().shape()[1];
            (x, (cols, 1))
        }
    };
    let (rows, cols) = (x.layout().shape()[0], x.layout().shape()[1]);
    let large = Large {
        values: &x.storage::<E>()[x.layout().start_offset()..],
        rows,
        cols,
        row_stride,
        col_stride,
    };
    let product = multiply(large, f.storage::<f32>(), rank, widen);
    FlexTensor::from_data(TensorData::new(product, [rows, rank]))
}

/// The hash of a matrix of any strides, whose elements have the given bits.
fn fingerprint<E: Element + Pod + Sync>(
    x: &FlexTensor,
    bits: impl Fn(E) -> u32 + Sync,
) -> FlexTensor {
    let (layout, storage) = (x.layout(), x.storage::<E>());
    let (rows, cols) = (layout.shape()[0], layout.shape()[1]);
    let (row_stride, col_stride) = (layout.strides()[0], layout.strides()[1]);
    // Number of elements, stride in memory and step of the row-major index, of each dimension.
    let (row, col) = ((rows, row_stride, cols), (cols, col_stride, 1));
    let (outer, inner) = match row_stride.abs() < col_stride.abs() {
        true => (col, row),
        false => (row, col),
    };
    let start = layout.start_offset() as isize;
    let lines = (0..outer.0).into_par_iter().map(|line| {
        let (start, first) = (start + line as isize * outer.1, line * outer.2);
        hd_pissa_bits::fingerprint((0..inner.0).map(|i| {
            let bits = bits(storage[(start + i as isize * inner.1) as usize]);
            ((first + i * inner.2) as u32, bits)
        }))
    });
    let add = |x: [u32; 2], y: [u32; 2]| [x[0].wrapping_add(y[0]), x[1].wrapping_add(y[1])];
    let words = lines.reduce(|| [0; 2], add).map(|word| word as i32);
    FlexTensor::from_data(TensorData::from(words))
}

fn scalar(value: f32) -> FlexTensor {
    FlexTensor::from_data(TensorData::from([value]))
}

fn is_open(gate: FlexTensor) -> bool {
    readable(gate).storage::<f32>()[0] == 0.0
}
