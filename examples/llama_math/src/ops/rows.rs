//! Loops over rows of numbers that the compiler turns into vector instructions.

use std::array::from_fn;

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

/// Numbers that a loop processes at once; sums have the same number of partial sums.
const LANES: usize = 16;
/// The least numbers of a task.
const TASK: usize = 1 << 14;

/// `e^x`, to 2 units in the last place; `e^-87` below -87, and `e^88` above 88. NaN stays NaN.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    let x = if x < -87.0 { -87.0 } else { x };
    let x = if x > 88.0 { 88.0 } else { x };
    // The nearest multiple of ln 2: adding 1.5 · 2²³ leaves no bits for a fraction.
    const ROUND: f32 = 12_582_912.0;
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    // ln 2 in two parts; the first has few bits.
    let r = x - n * 0.693_359_4 + n * 2.121_944_4e-4;
    let series = ((((1.987_569_1e-4 * r + 1.398_2e-3) * r + 8.333_452e-3) * r + 4.166_579_6e-2)
        * r
        + 0.166_666_66)
        * r
        + 0.5;
    let fraction = series * r * r + r + 1.0;
    let power = (shifted.to_bits() << 23).wrapping_add(0x3f80_0000);
    fraction * f32::from_bits(power)
}

/// The sum of `term(i)` for `i` below `len`, as [`LANES`] partial sums that are added at the end.
#[inline(always)]
pub(super) fn sum(len: usize, term: impl Fn(usize) -> f32) -> f32 {
    let mut sums = [0.0f32; LANES];
    let whole = len / LANES * LANES;
    for start in (0..whole).step_by(LANES) {
        let terms: [f32; LANES] = from_fn(|lane| term(start + lane));
        for (sum, term) in sums.iter_mut().zip(terms) {
            *sum += term;
        }
    }
    let rest: f32 = (whole..len).map(term).sum();
    sums.iter().sum::<f32>() + rest
}

/// The larger value; NaN if there is one.
#[inline(always)]
fn larger(x: f32, y: f32) -> f32 {
    if x > y || x.is_nan() { x } else { y }
}

/// The largest value; NaN if there is one.
#[inline(always)]
pub(super) fn largest(row: &[f32]) -> f32 {
    let mut all = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = row.as_chunks::<LANES>();
    for chunk in chunks {
        for (best, &x) in all.iter_mut().zip(chunk) {
            *best = larger(*best, x);
        }
    }
    let all = all.into_iter().chain(rest.iter().copied());
    all.fold(f32::NEG_INFINITY, larger)
}

/// Replaces each number by `e^(scale · (x − largest))` and returns their sum.
#[inline(always)]
pub(super) fn exponentials(row: &mut [f32], largest: f32, scale: f32) -> f32 {
    let mut sums = [0.0f32; LANES];
    let (chunks, rest) = row.as_chunks_mut::<LANES>();
    for chunk in chunks {
        for (sum, x) in sums.iter_mut().zip(chunk) {
            *x = exp((*x - largest) * scale);
            *sum += *x;
        }
    }
    let mut sum = sums.iter().sum::<f32>();
    for x in rest {
        *x = exp((*x - largest) * scale);
        sum += *x;
    }
    sum
}

/// Calls `work` for the rows of `output`, of `len` numbers each, with their index, and returns its
/// results in order. None depends on the number of threads.
///
/// The loops of `work` use the best instructions that the processor has, if it and all that it calls are
/// `#[inline(always)]`: they are compiled once for each set of instructions.
pub(super) fn each_row<R: Send>(
    output: &mut [f32],
    len: usize,
    work: impl Fn(usize, &mut [f32]) -> R + Sync,
) -> Vec<R> {
    if len == 0 || output.is_empty() {
        return Vec::new();
    }
    let rows = TASK.div_ceil(len);
    let arch = Arch::new();
    let tasks = output.par_chunks_mut(rows * len).enumerate();
    let results = tasks.map(|(task, output)| {
        arch.dispatch(Rows {
            output,
            len,
            first: task * rows,
            work: &work,
        })
    });
    results
        .collect::<Vec<Vec<R>>>()
        .into_iter()
        .flatten()
        .collect()
}

/// Rows of one task, from row `first` on.
struct Rows<'a, W> {
    output: &'a mut [f32],
    len: usize,
    first: usize,
    work: &'a W,
}

impl<R, W: Fn(usize, &mut [f32]) -> R> WithSimd for Rows<'_, W> {
    type Output = Vec<R>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> Vec<R> {
        let mut results = Vec::with_capacity(self.output.len().div_ceil(self.len));
        for (row, output) in self.output.chunks_mut(self.len).enumerate() {
            results.push((self.work)(self.first + row, output));
        }
        results
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exponentials_are_those_of_the_library() {
        let mut worst = 0.0f64;
        for step in -870_000..=880_000 {
            let x = step as f32 / 10_000.0;
            let expected = f64::from(x).exp();
            worst = worst.max((f64::from(exp(x)) / expected - 1.0).abs());
        }
        assert!(worst < 2.0 * f64::from(f32::EPSILON), "{worst:e}");
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(f32::NAN).is_nan());
        assert!(exp(-1e30) < 2e-38 && exp(f32::INFINITY) > 1e38);
    }

    #[test]
    fn the_largest_is_found_wherever_it_is() {
        for len in [1, 15, 16, 17, 40] {
            for place in 0..len {
                let mut row = vec![-3.0; len];
                row[place] = 2.0;
                assert_eq!(largest(&row), 2.0);
                row[place] = f32::NAN;
                assert!(largest(&row).is_nan(), "{place} of {len}");
            }
        }
    }
}
