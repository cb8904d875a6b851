//! The operations on Flex, Burn's CPU backend.

use burn::backend::{
    Flex,
    tensor::{Device, FloatTensor, IntTensor},
};
use burn::tensor::{DType, Element, TensorData};
use burn_flex::FlexTensor;
use bytemuck::Pod;
use faer::linalg::matmul::matmul;
use faer::linalg::matmul::triangular::{self, BlockStructure};
use faer::{Accum, Mat, MatMut, MatRef, Par};
use half::{bf16, f16};
use hd_pissa_bits::{Half, mix};
use rayon::prelude::*;

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
        let update = Stacked::new(&w, rank, frames, deltas);
        let squares = scalar(if measure { update.squared_norm() } else { 0.0 });
        let w = match w.dtype() {
            DType::F32 => update.add_to(w),
            DType::F16 => update.round_to::<f16>(w, rounding),
            DType::BF16 => update.round_to::<bf16>(w, rounding),
            other => panic!("weights of dtype {other:?} are refused when adapters are attached"),
        };
        (w, squares)
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
        let update = Stacked::new(&w, rank, frames, deltas);
        let squares = scalar(if measure { update.squared_norm() } else { 0.0 });
        let (w, residual) = match w.dtype() {
            DType::F16 => update.compensate::<f16>(w, residual),
            DType::BF16 => update.compensate::<bf16>(w, residual),
            other => panic!("a weight of dtype {other:?} has no residual bits"),
        };
        (w, residual, squares)
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

/// The number of NaN and infinite values, and the sum of the squares of all others.
fn finite_squares(values: &[f32]) -> (usize, f64) {
    const LANES: usize = 16;
    let (mut bad, mut sums) = ([0u32; LANES], [0.0f64; LANES]);
    let mut add = |lane: usize, value: f32| {
        let finite = value.is_finite();
        let value = if finite { f64::from(value) } else { 0.0 };
        bad[lane] += u32::from(!finite);
        sums[lane] += value * value;
    };
    let (chunks, rest) = values.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, &value) in chunk.iter().enumerate() {
            add(lane, value);
        }
    }
    for (lane, &value) in rest.iter().enumerate() {
        add(lane, value);
    }
    (bad.iter().map(|&bad| bad as usize).sum(), sums.iter().sum())
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

/// The order in which a matrix fills its storage.
#[derive(Clone, Copy, PartialEq)]
enum Order {
    RowMajor,
    ColumnMajor,
}

/// The order of a matrix that fills its storage without gaps, `None` for any other view.
fn order(tensor: &FlexTensor) -> Option<Order> {
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
fn readable(tensor: FlexTensor) -> FlexTensor {
    if tensor.is_contiguous() && is_whole(&tensor) {
        tensor
    } else {
        tensor.to_contiguous()
    }
}

/// Rows and columns of the tiles of a merge. Half-precision tiles are widened to `f32` one at a
/// time. All dtypes use the same tiles, so they have the same sums.
const TILE: usize = 1024;

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
    fn new(w: &FlexTensor, rank: usize, frames: FlexTensor, deltas: FlexTensor) -> Self {
        let (d_input, d_output) = (w.layout().shape()[0], w.layout().shape()[1]);
        let (frames, deltas) = (readable(frames), readable(deltas));
        let (frames, deltas) = (frames.storage::<f32>(), deltas.storage::<f32>());
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

    fn left(&self) -> MatRef<'_, f32> {
        MatRef::from_row_major_slice(&self.left, self.d_input, self.inner)
    }

    fn right(&self) -> MatRef<'_, f32> {
        MatRef::from_row_major_slice(&self.right, self.inner, self.d_output)
    }

    /// The squared Frobenius norm of the update: the inner product of the Gram matrices of both
    /// sides, which are as small as the product's inner size.
    ///
    /// In `f64`, because the terms cancel if the update is far smaller than its parts.
    fn squared_norm(&self) -> f32 {
        let gram = |lhs: MatRef<'_, f64>, rhs: MatRef<'_, f64>| {
            let mut gram = Mat::<f64>::zeros(self.inner, self.inner);
            triangular::matmul(
                gram.as_mut(),
                BlockStructure::TriangularLower,
                Accum::Replace,
                lhs,
                BlockStructure::Rectangular,
                rhs,
                BlockStructure::Rectangular,
                1.0,
                Par::rayon(0),
            );
            gram
        };
        let wide = |narrow: MatRef<'_, f32>| {
            Mat::from_fn(narrow.nrows(), narrow.ncols(), |i, j| {
                f64::from(narrow[(i, j)])
            })
        };
        let (left, right) = (wide(self.left()), wide(self.right()));
        let left = gram(left.transpose(), left.as_ref());
        let right = gram(right.as_ref(), right.transpose());
        // Both are symmetric: the elements below the diagonal count twice.
        let terms = (0..self.inner).map(|j| {
            let below = left.col(j).iter().zip(right.col(j).iter()).skip(j + 1);
            let below: f64 = below.map(|(l, r)| l * r).sum();
            left[(j, j)] * right[(j, j)] + 2.0 * below
        });
        terms.sum::<f64>().max(0.0) as f32
    }

    fn tiles(&self) -> impl Iterator<Item = Tile> + use<> {
        let (rows, cols) = (self.d_input, self.d_output);
        (0..rows).step_by(TILE).flat_map(move |row| {
            (0..cols).step_by(TILE).map(move |col| Tile {
                row,
                col,
                rows: TILE.min(rows - row),
                cols: TILE.min(cols - col),
            })
        })
    }

    /// `target += (left · right)` of one tile.
    fn add_tile(&self, tile: Tile, target: MatMut<'_, f32>) {
        let left = self.left().subrows(tile.row, tile.rows);
        let right = self.right().subcols(tile.col, tile.cols);
        matmul(target, Accum::Add, left, right, 1.0, Par::rayon(0));
    }

    /// `w += left · right` for an `f32` weight, in place if `w` is the only handle to its storage.
    fn add_to(&self, mut w: FlexTensor) -> FlexTensor {
        if order(&w).is_none() {
            w = w.to_contiguous();
        }
        let (rows, cols) = (self.d_input, self.d_output);
        let order = order(&w);
        // Copies first if someone else holds the storage.
        let storage = w.storage_mut::<f32>();
        let mut matrix = match order {
            Some(Order::ColumnMajor) => MatMut::from_column_major_slice_mut(storage, rows, cols),
            _ => MatMut::from_row_major_slice_mut(storage, rows, cols),
        };
        for tile in self.tiles() {
            let target = matrix
                .as_mut()
                .submatrix_mut(tile.row, tile.col, tile.rows, tile.cols);
            self.add_tile(tile, target);
        }
        w
    }

    /// The sum with a half-precision weight, rounded to it.
    fn round_to<H: Storage>(&self, w: FlexTensor, rounding: Rounding) -> FlexTensor {
        let mut w = row_major(w);
        let storage = H::storage_mut(&mut w);
        match rounding {
            Rounding::Nearest => self.merge_tiles(
                storage,
                &mut [],
                |h, _| h.widen(),
                |_, v| (H::nearest(v), 0),
            ),
            Rounding::Stochastic(key) => {
                let random = key.generator();
                self.merge_tiles(
                    storage,
                    &mut [],
                    |h, _| h.widen(),
                    |[row, col], v| (H::stochastic(v, random(row as u32, col as u32)), 0),
                )
            }
        }
        w
    }

    /// The sum with a half-precision weight and its residual bits, divided between both.
    fn compensate<H: Storage>(
        &self,
        w: FlexTensor,
        residual: FlexTensor,
    ) -> (FlexTensor, FlexTensor) {
        let (mut w, mut residual) = (row_major(w), row_major(residual));
        let storage = H::storage_mut(&mut w);
        let words = residual.storage_mut::<i32>();
        self.merge_tiles(storage, words, |h, low| h.join(low), |_, v| H::split(v));
        (w, residual)
    }

    /// Widens, adds and narrows one tile after the other. `words` holds the residual bits, or is empty.
    fn merge_tiles<H: Half>(
        &self,
        storage: &mut [H],
        words: &mut [i32],
        widen: impl Fn(H, u16) -> f32 + Sync,
        narrow: impl Fn([usize; 2], f32) -> (H, u16) + Sync,
    ) {
        let cols = self.d_output;
        let words_per_row = if words.is_empty() {
            0
        } else {
            cols.div_ceil(2)
        };
        let mut sums = vec![0.0f32; self.d_input.min(TILE) * cols.min(TILE)];
        for tile in self.tiles() {
            let sums = &mut sums[..tile.rows * tile.cols];
            let low = |words: &[i32], row: usize, col: usize| match words_per_row {
                0 => 0,
                n => (words[row * n + col / 2] as u32 >> (16 * (col % 2))) as u16,
            };
            let (held, residual) = (&*storage, &*words);
            sums.par_chunks_mut(tile.cols)
                .enumerate()
                .for_each(|(i, sums)| {
                    let row = tile.row + i;
                    for (j, sum) in sums.iter_mut().enumerate() {
                        let col = tile.col + j;
                        *sum = widen(held[row * cols + col], low(residual, row, col));
                    }
                });
            let target = MatMut::from_row_major_slice_mut(sums, tile.rows, tile.cols);
            self.add_tile(tile, target);
            let narrow_row = |row: usize, held: &mut [H], words: &mut [i32], sums: &[f32]| {
                for (j, &sum) in sums.iter().enumerate() {
                    let col = tile.col + j;
                    let (high, low) = narrow([row, col], sum);
                    held[col] = high;
                    if let Some(word) = words.get_mut(col / 2) {
                        let shift = 16 * (col % 2);
                        let kept = *word as u32 & !(0xffff << shift);
                        *word = (kept | u32::from(low) << shift) as i32;
                    }
                }
            };
            let rows = storage.par_chunks_mut(cols).enumerate().skip(tile.row);
            let sums = sums.par_chunks(tile.cols);
            if words_per_row == 0 {
                rows.zip(sums)
                    .for_each(|((row, held), sums)| narrow_row(row, held, &mut [], sums));
            } else {
                let words = words.par_chunks_mut(words_per_row).skip(tile.row);
                rows.zip(words)
                    .zip(sums)
                    .for_each(|(((row, held), words), sums)| narrow_row(row, held, words, sums));
            }
        }
    }
}

/// A rectangle of the weight.
#[derive(Clone, Copy)]
struct Tile {
    row: usize,
    col: usize,
    rows: usize,
    cols: usize,
}

/// `tensor` as the only content of its storage, row by row.
fn row_major(tensor: FlexTensor) -> FlexTensor {
    match order(&tensor) {
        Some(Order::RowMajor) => tensor,
        _ => tensor.to_contiguous(),
    }
}

/// A half-precision float that Flex stores.
trait Storage: Half {
    fn storage(tensor: &FlexTensor) -> &[Self];

    /// Copies first if someone else holds the storage.
    fn storage_mut(tensor: &mut FlexTensor) -> &mut [Self];
}

impl Storage for f16 {
    fn storage(tensor: &FlexTensor) -> &[Self] {
        tensor.storage()
    }

    fn storage_mut(tensor: &mut FlexTensor) -> &mut [Self] {
        tensor.storage_mut()
    }
}

impl Storage for bf16 {
    fn storage(tensor: &FlexTensor) -> &[Self] {
        tensor.storage()
    }

    fn storage_mut(tensor: &mut FlexTensor) -> &mut [Self] {
        tensor.storage_mut()
    }
}
