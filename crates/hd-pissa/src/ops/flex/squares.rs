//! Sums of squares.

use super::simd::vectorized;

const LANES: usize = 16;

/// The number of NaN and infinite values, and the sum of the squares of all others.
pub(super) fn finite_squares(values: &[f32]) -> (usize, f64) {
    let (mut bad, mut sums) = ([0; LANES], [0.0; LANES]);
    vectorized(
        #[inline(always)]
        || {
            let (chunks, rest) = values.as_chunks();
            for chunk in chunks {
                add(chunk, &mut bad, &mut sums);
            }
            let mut last = [0.0; LANES];
            last[..rest.len()].copy_from_slice(rest);
            add(&last, &mut bad, &mut sums);
        },
    );
    (bad.iter().map(|&bad| bad as usize).sum(), sums.iter().sum())
}

#[inline(always)]
fn add(values: &[f32; LANES], bad: &mut [u32; LANES], sums: &mut [f64; LANES]) {
    for ((&value, bad), sum) in values.iter().zip(bad).zip(sums) {
        let finite = value.is_finite();
        let value = if finite { f64::from(value) } else { 0.0 };
        *bad += u32::from(!finite);
        *sum += value * value;
    }
}
