//! What the kernels compute, in plain Rust: slow, in `f64` where a bound is wanted, and the
//! definition of every bit where the kernels promise bits.

use half::{bf16, f16};

use crate::fingerprint::SEEDS;
use crate::rounding::{F16_FINE, F16_FINE_INVERSE, F16_NORMAL, KEY_PARITY, ROTATIONS};
use crate::{FloatType, StochasticKey};

/// A matrix product, row-major, in `f64`.
#[derive(Clone, Debug)]
pub struct Exact {
    /// The sums.
    pub value: Vec<f64>,
    /// The same sums of absolute values: what bounds a rounding error.
    pub magnitude: Vec<f64>,
}

/// `left · right` for `left: [rows, inner]` and `right: [inner, columns]`, both row-major.
pub fn product(left: &[f32], right: &[f32], [rows, inner, columns]: [usize; 3]) -> Exact {
    let mut exact = Exact {
        value: vec![0.0; rows * columns],
        magnitude: vec![0.0; rows * columns],
    };
    for i in 0..rows {
        for k in 0..inner {
            for j in 0..columns {
                let term = f64::from(left[i * inner + k]) * f64::from(right[k * columns + j]);
                exact.value[i * columns + j] += term;
                exact.magnitude[i * columns + j] += term.abs();
            }
        }
    }
    exact
}

/// The factors of one shard, row-major.
#[derive(Clone, Debug)]
pub struct Shard {
    /// `a`, `[d_input, rank]`.
    pub a: Vec<f32>,
    /// `b`, `[rank, d_output]`.
    pub b: Vec<f32>,
    /// `Δa`, as `a`.
    pub delta_a: Vec<f32>,
    /// `Δb`, as `b`.
    pub delta_b: Vec<f32>,
}

/// `Σ_k (a_k + Δa_k)·Δb_k + Δa_k·b_k`, with `a + Δa` rounded to `f32` as the kernel does.
pub fn update(shards: &[Shard], [d_input, rank, d_output]: [usize; 3]) -> Exact {
    let mut total = Exact {
        value: vec![0.0; d_input * d_output],
        magnitude: vec![0.0; d_input * d_output],
    };
    for shard in shards {
        let moved: Vec<f32> = shard
            .a
            .iter()
            .zip(&shard.delta_a)
            .map(|(a, d)| a + d)
            .collect();
        for part in [
            product(&moved, &shard.delta_b, [d_input, rank, d_output]),
            product(&shard.delta_a, &shard.b, [d_input, rank, d_output]),
        ] {
            for (sum, term) in total.value.iter_mut().zip(part.value) {
                *sum += term;
            }
            for (sum, term) in total.magnitude.iter_mut().zip(part.magnitude) {
                *sum += term;
            }
        }
    }
    total
}

/// The number of NaN and infinite values.
pub fn count_non_finite(values: &[f32]) -> u32 {
    values.iter().filter(|value| !value.is_finite()).count() as u32
}

/// What [`row_statistics`](crate::row_statistics()) gives for one row, in `f64`.
pub fn row_statistics(row: &[f32], split: usize) -> [f64; 4] {
    let scale = 2f64.powi(-80);
    let mut statistics = [0.0; 4];
    for (column, value) in row.iter().enumerate() {
        let square = f64::from(*value).powi(2);
        if value.is_finite() {
            statistics[if column < split { 1 } else { 2 }] += square;
            statistics[3] += square * scale * scale;
        } else {
            statistics[0] += 1.0;
        }
    }
    statistics
}

/// What [`fingerprint`](crate::fingerprint()) gives for the bits of the elements, row by row.
pub fn fingerprint(bits: impl IntoIterator<Item = u32>) -> [u32; 2] {
    let mut words = [0u32; 2];
    for (index, bits) in bits.into_iter().enumerate() {
        for (word, seed) in words.iter_mut().zip(SEEDS) {
            *word = word.wrapping_add(mix(bits ^ mix(index as u32 ^ seed)));
        }
    }
    words
}

/// The finalizer of MurmurHash3.
fn mix(mut x: u32) -> u32 {
    x ^= x >> 16;
    x = x.wrapping_mul(0x85eb_ca6b);
    x ^= x >> 13;
    x = x.wrapping_mul(0xc2b2_ae35);
    x ^ x >> 16
}

/// The nearest `bf16` (ties away from zero) and the 16 bits that [`join_bf16`] needs to recover the
/// value.
pub fn split_bf16(value: f32) -> (bf16, u16) {
    let bits = value.to_bits();
    (
        bf16::from_bits((bits.wrapping_add(0x8000) >> 16) as u16),
        bits as u16,
    )
}

/// The value that [`split_bf16`] took apart, bit for bit.
pub fn join_bf16(high: bf16, low: u16) -> f32 {
    let high = u32::from(high.to_bits()) << 16;
    f32::from_bits(high.wrapping_add(i32::from(low as i16) as u32))
}

/// The nearest `f16` and the 16 bits that [`join_f16`] needs to recover the value: exactly from
/// `2^-16` to the largest `f16`, to within `2^-39` below.
pub fn split_f16(value: f32) -> (f16, u16) {
    let high = f16::from_f32(value);
    let wide = high.to_f32();
    let low = if wide.abs().to_bits() < F16_NORMAL {
        ((value - wide) * F16_FINE_INVERSE) as i32 as u16
    } else {
        value.to_bits().wrapping_sub(wide.to_bits()) as u16
    };
    (high, low)
}

/// The value that [`split_f16`] took apart.
pub fn join_f16(high: f16, low: u16) -> f32 {
    let wide = high.to_f32();
    let low = i32::from(low as i16);
    if wide.abs().to_bits() < F16_NORMAL {
        wide + low as f32 * F16_FINE
    } else {
        f32::from_bits(wide.to_bits().wrapping_add(low as u32))
    }
}

/// `value` rounded at random to a neighbour that `dtype` holds, for element `[row, column]` of the
/// weight that `key` names.
pub fn stochastic(
    value: f32,
    [row, column]: [u32; 2],
    key: StochasticKey,
    dtype: FloatType,
) -> f32 {
    let random = threefry([row, column], key.words())[0];
    let bits = value.to_bits();
    match dtype {
        FloatType::F32 => value,
        FloatType::BF16 => f32::from_bits(bits.wrapping_add(random & 0xffff) & 0xffff_0000),
        FloatType::F16 if value.abs().to_bits() >= F16_NORMAL => {
            f32::from_bits(bits.wrapping_add(random & 0x1fff) & 0xffff_e000)
        }
        FloatType::F16 => {
            let scale = 16_777_216.0f32;
            let steps = value.abs() * scale;
            let whole = steps as u32;
            let part = ((steps - whole as f32) * scale) as u32;
            let up = u32::from((random & 0xff_ffff) < part);
            ((whole + up) as f32 / scale).copysign(value)
        }
    }
}

/// Threefry-2x32 with 20 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
/// SC 2011).
pub fn threefry(counter: [u32; 2], key: [u32; 2]) -> [u32; 2] {
    let keys = [key[0], key[1], key[0] ^ key[1] ^ KEY_PARITY];
    let mut x = [
        counter[0].wrapping_add(key[0]),
        counter[1].wrapping_add(key[1]),
    ];
    for group in 0..5usize {
        for round in 0..4 {
            x[0] = x[0].wrapping_add(x[1]);
            x[1] = x[1].rotate_left(ROTATIONS[group % 2 * 4 + round]) ^ x[0];
        }
        x[0] = x[0].wrapping_add(keys[(group + 1) % 3]);
        x[1] = x[1]
            .wrapping_add(keys[(group + 2) % 3])
            .wrapping_add(group as u32 + 1);
    }
    x
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers of the generator's authors.
    #[test]
    fn threefry_gives_the_published_words() {
        assert_eq!(threefry([0; 2], [0; 2]), [0x6b20_0159, 0x99ba_4efe]);
        assert_eq!(
            threefry([u32::MAX; 2], [u32::MAX; 2]),
            [0x1cb9_96fc, 0xbb00_2be7]
        );
        assert_eq!(
            threefry([0x243f_6a88, 0x85a3_08d3], [0x1319_8a2e, 0x0370_7344]),
            [0xc492_3a9c, 0x483d_f7a0]
        );
    }

    /// Published hashes of the empty text by MurmurHash3 for these seeds: the finalizer of the seed.
    #[test]
    fn mix_gives_the_published_words() {
        let seeds = [0, 1, u32::MAX];
        assert_eq!(seeds.map(mix), [0, 0x514e_28b7, 0x81f1_6f39]);
    }

    /// A walk over all exponents and both signs, with ties and their neighbours.
    fn samples() -> impl Iterator<Item = f32> {
        (0..=u32::MAX >> 7)
            .map(|step| f32::from_bits(step.wrapping_mul(128).wrapping_add(step & 3)))
    }

    #[test]
    fn split_bf16_recovers_every_value() {
        for value in samples().filter(|value| value.is_finite()) {
            let (high, low) = split_bf16(value);
            assert_eq!(join_bf16(high, low).to_bits(), value.to_bits(), "{value:e}");
            let nearest = bf16::from_f32(value);
            if nearest.is_finite() && high != nearest {
                // Only a tie may fall on the other side.
                assert_eq!(low, 0x8000, "{value:e}");
            }
        }
    }

    #[test]
    fn split_f16_recovers_values_in_its_range() {
        for value in samples().filter(|value| value.abs() <= 65504.0) {
            let (high, low) = split_f16(value);
            let back = join_f16(high, low);
            if value.abs() >= 2f32.powi(-16) {
                assert_eq!(back, value, "{value:e}");
            } else {
                assert!((back - value).abs() <= 2f32.powi(-39), "{value:e} {back:e}");
            }
            assert_eq!(high, f16::from_f32(value));
        }
    }

    /// The chance of rounding up is the distance in units of the random bits, so over all of them
    /// the mean is the value.
    #[test]
    fn stochastic_rounding_picks_a_neighbour_and_is_unbiased() {
        let draws = 4096u32;
        let values = [
            1.003, -0.4071, 3.3e-5, -2.2e-5, 1.7e-6, 7.0e-8, 300.3, 1.0, -0.5, 0.0,
        ];
        for dtype in [FloatType::BF16, FloatType::F16] {
            for value in values.map(|value| value as f32) {
                let rounded: Vec<f64> = (0..draws)
                    .map(|seed| {
                        let key = StochasticKey {
                            seed: seed.into(),
                            step: 3,
                            path: 9,
                        };
                        f64::from(stochastic(value, [5, 11], key, dtype))
                    })
                    .collect();
                let low = rounded.iter().copied().fold(f64::INFINITY, f64::min);
                let high = rounded.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                assert!(low <= f64::from(value) && f64::from(value) <= high);
                for value in [low, high] {
                    let exact = match dtype {
                        FloatType::BF16 => bf16::from_f64(value).to_f64(),
                        _ => f16::from_f64(value).to_f64(),
                    };
                    assert_eq!(exact, value);
                }
                assert!(rounded.iter().all(|value| *value == low || *value == high));
                let mean = rounded.iter().sum::<f64>() / f64::from(draws);
                // Five standard errors of a two-valued variable, at most half the step.
                let bound = 5.0 * 0.5 * (high - low) / f64::from(draws).sqrt();
                assert!(
                    (mean - f64::from(value)).abs() <= bound,
                    "{dtype:?} {value:e} {mean:e}"
                );
            }
        }
    }
}
