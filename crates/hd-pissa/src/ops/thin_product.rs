//! Products of a large matrix and a factor of few columns, on the CPU.
//!
//! A general product first copies both operands into blocks. For a factor of 16 columns, that takes
//! as long as the arithmetic. This product reads the large matrix once, in place.

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

/// Columns of the factor that are multiplied together: as many as fit in registers with the sums of
/// some rows, or half as many for the rest. A factor is padded to these.
const WIDE: usize = 32;
const NARROW: usize = 16;
/// Rows of the output that one task computes.
const ROWS: usize = 64;
/// Terms of a sum that are added before the next rows.
const TERMS: usize = 128;

/// A large matrix `[rows, cols]` whose rows or columns are contiguous.
#[derive(Clone, Copy)]
pub(super) struct Large<'a, E> {
    pub(super) values: &'a [E],
    pub(super) rows: usize,
    pub(super) cols: usize,
    /// Distance between neighbours in a column; 1 if columns are contiguous.
    pub(super) row_stride: usize,
    /// Distance between neighbours in a row; 1 if rows are contiguous.
    pub(super) col_stride: usize,
}

/// `large · factor`, `[rows, rank]` row by row, for `factor: [cols, rank]`, row by row.
///
/// Each sum runs over the columns in order, in `f32`, in groups of [`TERMS`]. It does not depend on
/// the number of threads.
///
/// # Panics
///
/// If neither stride of `large` is 1.
pub(super) fn multiply<E: Copy + Sync>(
    large: Large<'_, E>,
    factor: &[f32],
    rank: usize,
    widen: impl Fn(E) -> f32 + Copy + Sync,
) -> Vec<f32> {
    assert!(large.row_stride == 1 || large.col_stride == 1);
    let mut output = vec![0.0; large.rows * rank];
    if output.is_empty() || large.cols == 0 {
        return output;
    }
    let panels: Vec<Panel> = (0..rank)
        .step_by(WIDE)
        .map(|start| Panel::new(factor, rank, start))
        .collect();
    let arch = Arch::new();
    let tasks = output.par_chunks_mut(ROWS * rank).enumerate();
    tasks.for_each(|(task, output)| {
        let rows = output.len() / rank;
        let mut sums = [0.0; ROWS * WIDE];
        for panel in &panels {
            let sums = &mut sums[..rows * panel.width];
            sums.fill(0.0);
            arch.dispatch(Block {
                large,
                first: task * ROWS,
                panel,
                sums,
                widen,
            });
            let used = panel.width.min(rank - panel.start);
            let rows = output.chunks_mut(rank).zip(sums.chunks(panel.width));
            for (output, sums) in rows {
                output[panel.start..panel.start + used].copy_from_slice(&sums[..used]);
            }
        }
    });
    output
}

/// Some neighbouring columns of a factor, row by row, padded with zeros.
struct Panel {
    /// The first column.
    start: usize,
    /// [`WIDE`] or [`NARROW`].
    width: usize,
    /// `[cols, width]`
    values: Vec<f32>,
}

impl Panel {
    fn new(factor: &[f32], rank: usize, start: usize) -> Self {
        let left = rank - start;
        let width = if left > NARROW { WIDE } else { NARROW };
        let used = width.min(left);
        let mut values = vec![0.0; factor.len() / rank * width];
        for (panel, row) in values.chunks_mut(width).zip(factor.chunks(rank)) {
            panel[..used].copy_from_slice(&row[start..start + used]);
        }
        Self {
            start,
            width,
            values,
        }
    }
}

/// Some rows of a product with a panel.
struct Block<'a, E, F> {
    large: Large<'a, E>,
    /// The first row.
    first: usize,
    panel: &'a Panel,
    /// `[rows, width]`
    sums: &'a mut [f32],
    widen: F,
}

impl<E: Copy, F: Fn(E) -> f32 + Copy> WithSimd for Block<'_, E, F> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        // As many rows at a time as keep their sums in registers.
        match (S::F32_LANES, self.panel.width) {
            (16, WIDE) => self.run::<S, 8, 2>(simd),
            (16, _) => self.run::<S, 8, 1>(simd),
            (8, WIDE) => self.run::<S, 2, 4>(simd),
            (8, _) => self.run::<S, 4, 2>(simd),
            (4, WIDE) => self.run::<S, 2, 8>(simd),
            (4, _) => self.run::<S, 4, 4>(simd),
            (_, WIDE) => self.run::<S, 1, WIDE>(simd),
            _ => self.run::<S, 1, NARROW>(simd),
        }
    }
}

impl<E: Copy, F: Fn(E) -> f32 + Copy> Block<'_, E, F> {
    #[inline(always)]
    fn run<S: Simd, const GROUP: usize, const VECTORS: usize>(self, simd: S) {
        let Self {
            large,
            first,
            panel,
            sums,
            widen,
        } = self;
        let (factor, _) = S::as_simd_f32s(&panel.values);
        let (factor, _) = factor.as_chunks::<VECTORS>();
        let (sums, _) = S::as_mut_simd_f32s(sums);
        let (sums, _) = sums.as_chunks_mut::<VECTORS>();
        for (start, factor) in (0..large.cols).step_by(TERMS).zip(factor.chunks(TERMS)) {
            let (groups, rest) = sums.as_chunks_mut::<GROUP>();
            for (index, sums) in groups.iter_mut().enumerate() {
                let row = first + index * GROUP;
                add::<S, E, GROUP, VECTORS>(simd, large, [row, start], factor, sums, widen);
            }
            let done = first + groups.len() * GROUP;
            for (index, sums) in rest.iter_mut().enumerate() {
                let sums = std::array::from_mut(sums);
                add::<S, E, 1, VECTORS>(simd, large, [done + index, start], factor, sums, widen);
            }
        }
    }
}

/// Adds the terms of a group of rows that start at `[row, col]` of the large matrix.
#[inline(always)]
fn add<S: Simd, E: Copy, const GROUP: usize, const VECTORS: usize>(
    simd: S,
    large: Large<'_, E>,
    [row, col]: [usize; 2],
    factor: &[[S::f32s; VECTORS]],
    sums: &mut [[S::f32s; VECTORS]; GROUP],
    widen: impl Fn(E) -> f32,
) {
    let mut partial = [[simd.splat_f32s(0.0); VECTORS]; GROUP];
    let mut step = |values: [E; GROUP], factor: &[S::f32s; VECTORS]| {
        for (partial, value) in partial.iter_mut().zip(values) {
            let value = simd.splat_f32s(widen(value));
            for (partial, &factor) in partial.iter_mut().zip(factor) {
                *partial = simd.mul_add_e_f32s(value, factor, *partial);
            }
        }
    };
    if large.col_stride == 1 {
        let rows: [&[E]; GROUP] = std::array::from_fn(|index| {
            let start = (row + index) * large.row_stride + col;
            &large.values[start..start + factor.len()]
        });
        for (k, factor) in factor.iter().enumerate() {
            step(rows.map(|row| row[k]), factor);
        }
    } else {
        for (k, factor) in factor.iter().enumerate() {
            let start = (col + k) * large.col_stride + row;
            let values = &large.values[start..start + GROUP];
            step(std::array::from_fn(|index| values[index]), factor);
        }
    }
    for (sums, partial) in sums.iter_mut().zip(partial) {
        for (sum, partial) in sums.iter_mut().zip(partial) {
            *sum = simd.add_f32s(*sum, partial);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn products_are_those_of_a_plain_loop(
            rows in 0usize..150,
            cols in 0usize..300,
            rank in 1usize..70,
            columns_contiguous: bool,
            seed: u32,
        ) {
            let value = |i: usize| {
                let mixed = (i as u32).wrapping_mul(2_654_435_761).wrapping_add(seed);
                f32::from((mixed >> 16) as u16) / 32768.0 - 1.0
            };
            let values: Vec<f32> = (0..rows * cols).map(value).collect();
            let factor: Vec<f32> = (0..cols * rank).map(|i| value(i + 7_777)).collect();
            let (row_stride, col_stride) = match columns_contiguous {
                true => (1, rows),
                false => (cols, 1),
            };
            let large = Large { values: &values, rows, cols, row_stride, col_stride };
            let found = multiply(large, &factor, rank, |x| x);
            prop_assert_eq!(found.len(), rows * rank);
            for row in 0..rows {
                for column in 0..rank {
                    let terms = (0..cols).map(|k| {
                        let value = values[row * row_stride + k * col_stride];
                        f64::from(value) * f64::from(factor[k * rank + column])
                    });
                    let expected: f64 = terms.sum();
                    let error = f64::from(found[row * rank + column]) - expected;
                    prop_assert!(error.abs() <= 1e-6 * cols as f64, "{error}");
                }
            }
        }
    }
}
