//! Merges on Flex: the update is a product. Each tile of it is computed, then added to the weight.

use burn_flex::FlexTensor;
use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use half::{bf16, f16};
use hd_pissa_bits::Half;
use rayon::prelude::*;

use super::layout::{Order, order, readable, row_major};
use super::simd::vectorized;
use super::squares::finite_squares;
use crate::ops::Rounding;

/// Largest size of a tile; it fits in the cache of a core. A task merges all tiles of its rows. The number of
/// columns is even, because a word holds the residual bits of two of them.
const ROWS: usize = 256;
const COLUMNS: usize = 256;
/// A weight of few rows is divided among this many tasks, if each has this many rows.
const TASKS: usize = 4;
const FEWEST_ROWS: usize = 64;

/// The update of a merge as one product: `left = [a + Δa | Δa]` and `right = [Δb ; b]` over all
/// shards, row by row.
pub(super) struct Update {
    d_input: usize,
    d_output: usize,
    inner: usize,
    left: Vec<f32>,
    right: Vec<f32>,
    /// Whether merges return the sum of the squares of the update, or zero.
    measure: bool,
}

impl Update {
    pub(super) fn new(
        w: &FlexTensor,
        rank: usize,
        frames: FlexTensor,
        deltas: FlexTensor,
        measure: bool,
    ) -> Self {
        let (d_input, d_output) = (w.layout().shape()[0], w.layout().shape()[1]);
        let (frames, deltas) = (readable(frames), readable(deltas));
        let (frames, deltas) = (frames.storage::<f32>(), deltas.storage::<f32>());
        let (row, split) = (rank * (d_input + d_output), rank * d_input);
        let shards = frames.len() / row;
        let inner = 2 * shards * rank;
        let mut left = vec![0.0; d_input * inner];
        let rows = left.par_chunks_mut(inner).enumerate();
        rows.with_min_len(ROWS).for_each(|(i, left)| {
            let (moved, fixed) = left.split_at_mut(inner / 2);
            let moved = moved.chunks_mut(rank).zip(fixed.chunks_mut(rank));
            for (shard, (moved, delta)) in moved.enumerate() {
                let own = shard * row + i * rank..shard * row + (i + 1) * rank;
                delta.copy_from_slice(&deltas[own.clone()]);
                for (moved, (a, delta_a)) in moved.iter_mut().zip(frames[own].iter().zip(delta)) {
                    *moved = a + *delta_a;
                }
            }
        });
        let mut right = Vec::with_capacity(inner * d_output);
        for packed in [deltas, frames] {
            for row in packed.chunks(row) {
                right.extend_from_slice(&row[split..]);
            }
        }
        Self {
            d_input,
            d_output,
            inner,
            left,
            right,
            measure,
        }
    }

    /// `w += update` for an `f32` weight, in place if `w` is the only handle to its storage, and the
    /// sum of the squares of the update.
    pub(super) fn add_to(&self, mut w: FlexTensor) -> (FlexTensor, f32) {
        if order(&w).is_none() {
            w = w.to_contiguous();
        }
        let order = order(&w).unwrap_or(Order::RowMajor);
        // Copies first if someone else holds the storage.
        let storage = w.storage_mut::<f32>();
        let squares = self.merge(
            storage,
            &mut [],
            order,
            #[inline(always)]
            |_, w, _, update| {
                w.iter_mut()
                    .zip(update)
                    .for_each(|(w, update)| *w += update);
            },
        );
        (w, squares)
    }

    /// The sum with a half-precision weight, rounded to it, and that of the squares of the update.
    pub(super) fn round_to<H: Storage>(
        &self,
        w: FlexTensor,
        rounding: Rounding,
    ) -> (FlexTensor, f32) {
        let mut w = row_major(w);
        let storage = H::storage_mut(&mut w);
        let squares = match rounding {
            Rounding::Nearest => self.merge(
                storage,
                &mut [],
                Order::RowMajor,
                #[inline(always)]
                |_, w, _, update| {
                    for (w, update) in w.iter_mut().zip(update) {
                        *w = H::nearest(w.widen() + update);
                    }
                },
            ),
            Rounding::Stochastic(key) => {
                let random = key.generator();
                self.merge(
                    storage,
                    &mut [],
                    Order::RowMajor,
                    #[inline(always)]
                    |place, w, _, update| {
                        for (j, (w, update)) in w.iter_mut().zip(update).enumerate() {
                            let random = random(place.0 as u32, (place.1 + j) as u32);
                            *w = H::stochastic(w.widen() + update, random);
                        }
                    },
                )
            }
        };
        (w, squares)
    }

    /// The sum with a half-precision weight and its residual bits, divided between both, and that of
    /// the squares of the update.
    pub(super) fn compensate<H: Storage>(
        &self,
        w: FlexTensor,
        residual: FlexTensor,
    ) -> (FlexTensor, FlexTensor, f32) {
        let (mut w, mut residual) = (row_major(w), row_major(residual));
        let storage = H::storage_mut(&mut w);
        let words = residual.storage_mut::<i32>();
        let squares = self.merge(
            storage,
            words,
            Order::RowMajor,
            #[inline(always)]
            |_, w, words, update| {
                for (j, (w, update)) in w.iter_mut().zip(update).enumerate() {
                    let (word, shift) = (&mut words[j / 2], 16 * (j % 2));
                    let (high, low) = H::split(w.join((*word as u32 >> shift) as u16) + update);
                    *w = high;
                    let kept = *word as u32 & !(0xffff << shift);
                    *word = (kept | u32::from(low) << shift) as i32;
                }
            },
        );
        (w, residual, squares)
    }

    /// Hands every part of a row of a tile to `add`: its row and first column in the storage, the values
    /// there, their words of residual bits, and their update. `words` are those of all rows, or empty.
    /// Returns the sum of the squares of the update, if it is measured.
    ///
    /// Tiles do not depend on the number of threads, and neither does a bit of the result.
    fn merge<H: Send>(
        &self,
        storage: &mut [H],
        words: &mut [i32],
        order: Order,
        add: impl Fn((usize, usize), &mut [H], &mut [i32], &[f32]) + Sync,
    ) -> f32 {
        let left = MatRef::from_row_major_slice(&self.left, self.d_input, self.inner);
        let right = MatRef::from_row_major_slice(&self.right, self.inner, self.d_output);
        let (left, right) = match order {
            Order::RowMajor => (left, right),
            Order::ColumnMajor => (right.transpose(), left.transpose()),
        };
        let (rows, cols) = (left.nrows(), right.ncols());
        let words_per_row = words.len() / rows;
        let height = rows.div_ceil(TASKS).clamp(FEWEST_ROWS, ROWS);
        let bands = storage.par_chunks_mut(height * cols);
        let mut words: Vec<&mut [i32]> = match words_per_row {
            0 => Vec::new(),
            count => words.chunks_mut(height * count).collect(),
        };
        words.resize_with(bands.len(), Default::default);
        let squares = bands.zip(words).enumerate().map_init(
            || vec![0.0; height * COLUMNS.min(cols)],
            |tile, (band, (storage, words))| {
                let first = band * height;
                let rows = storage.len() / cols;
                let mut squares = 0.0;
                for col in (0..cols).step_by(COLUMNS) {
                    let width = COLUMNS.min(cols - col);
                    let tile = &mut tile[..rows * width];
                    matmul(
                        MatMut::from_row_major_slice_mut(&mut *tile, rows, width),
                        Accum::Replace,
                        left.subrows(first, rows),
                        right.subcols(col, width),
                        1.0,
                        Par::Seq,
                    );
                    if self.measure {
                        squares += finite_squares(tile).1;
                    }
                    vectorized(
                        #[inline(always)]
                        || {
                            for (i, update) in tile.chunks(width).enumerate() {
                                let held = &mut storage[i * cols + col..][..width];
                                let words = match words_per_row {
                                    0 => &mut [],
                                    count => &mut words[i * count + col / 2..(i + 1) * count],
                                };
                                add((first + i, col), held, words, update);
                            }
                        },
                    );
                }
                squares
            },
        );
        squares.collect::<Vec<f64>>().iter().sum::<f64>() as f32
    }
}

/// A half-precision float that Flex stores.
pub(super) trait Storage: Half {
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
