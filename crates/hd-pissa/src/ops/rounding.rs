//! How a merged `f32` value becomes an element of the weight.

#[cfg(feature = "flex")]
use half::{bf16, f16};

/// How the sum of a merge is rounded to a half-precision weight; an `f32` weight takes it as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Rounding {
    /// To the nearest value, ties to even.
    #[default]
    Nearest,
    /// Up or down at random, with the sum as the mean.
    Stochastic(StochasticKey),
}

/// What selects the random bits of stochastic rounding: equal keys draw equal bits for equal
/// element indices, on every worker and backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StochasticKey {
    /// The run's seed.
    pub seed: u64,
    /// The optimizer step.
    pub step: u64,
    /// Hash of the weight's path.
    pub path: u64,
}

#[cfg(feature = "flex")]
impl StochasticKey {
    fn words(self) -> [u32; 2] {
        // The finalizer of SplitMix64.
        let mix = |value: u64| {
            let mut x = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
            x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            x ^ (x >> 31)
        };
        let mixed = mix(mix(mix(self.seed) ^ self.step) ^ self.path);
        [mixed as u32, (mixed >> 32) as u32]
    }

    /// 32 random bits for every element: Threefry-2x32 with 20 rounds (Salmon et al., SC 2011),
    /// whose counter is the element's row and column.
    pub(super) fn generator(self) -> impl Fn(u32, u32) -> u32 + Sync {
        const ROTATIONS: [u32; 8] = [13, 15, 26, 6, 17, 29, 16, 24];
        let [key0, key1] = self.words();
        let keys = [key0, key1, key0 ^ key1 ^ 0x1bd1_1bda];
        move |row, column| {
            let (mut x0, mut x1) = (row.wrapping_add(keys[0]), column.wrapping_add(keys[1]));
            for group in 0..5 {
                for round in 0..4 {
                    x0 = x0.wrapping_add(x1);
                    x1 = x1.rotate_left(ROTATIONS[group % 2 * 4 + round]) ^ x0;
                }
                x0 = x0.wrapping_add(keys[(group + 1) % 3]);
                x1 = x1
                    .wrapping_add(keys[(group + 2) % 3])
                    .wrapping_add(group as u32 + 1);
            }
            x0
        }
    }
}

/// A 16-bit float as a weight.
///
/// Split in two halves it holds more than it can alone: the high half is the nearest value, the
/// low half, 16 bits of a companion, is what it misses.
#[cfg(feature = "flex")]
pub(super) trait Half: Copy + Send + Sync {
    fn widen(self) -> f32;
    fn nearest(value: f32) -> Self;
    /// A neighbour of `value`, chosen by random bits so that their mean is `value`.
    fn stochastic(value: f32, random: u32) -> Self;
    fn split(value: f32) -> (Self, u16);
    fn join(self, low: u16) -> f32;
}

/// Every `f32` exactly. Ties of the high half go away from zero: with ties to even, even values
/// would stand for 65537 `f32` values each, one more than 16 bits tell apart.
#[cfg(feature = "flex")]
impl Half for bf16 {
    fn widen(self) -> f32 {
        self.to_f32()
    }

    fn nearest(value: f32) -> Self {
        Self::from_f32(value)
    }

    fn stochastic(value: f32, random: u32) -> Self {
        let bits = value.to_bits().wrapping_add(random & 0xffff);
        Self::from_bits((bits >> 16) as u16)
    }

    fn split(value: f32) -> (Self, u16) {
        let bits = value.to_bits();
        let high = bits.wrapping_add(0x8000) >> 16;
        (Self::from_bits(high as u16), bits as u16)
    }

    fn join(self, low: u16) -> f32 {
        let high = u32::from(self.to_bits()) << 16;
        f32::from_bits(high.wrapping_add_signed(i32::from(low as i16)))
    }
}

/// Magnitudes from `2^-16` to the largest `f16` exactly, smaller ones to within `2^-39`.
#[cfg(feature = "flex")]
impl Half for f16 {
    fn widen(self) -> f32 {
        self.to_f32()
    }

    fn nearest(value: f32) -> Self {
        Self::from_f32(value)
    }

    fn stochastic(value: f32, random: u32) -> Self {
        if value.abs() >= F16_NORMAL {
            let bits = value.to_bits().wrapping_add(random & 0x1fff) & 0xffff_e000;
            return Self::from_f32(f32::from_bits(bits));
        }
        // Below the normal range the steps are 2^-24 wide whatever the exponent.
        const STEP: f32 = 1.0 / 16_777_216.0;
        let steps = value.abs() / STEP;
        let part = (steps.fract() / STEP) as u32;
        let up = f32::from(u8::from((random & 0xff_ffff) < part));
        Self::from_f32(((steps.trunc() + up) * STEP).copysign(value))
    }

    fn split(value: f32) -> (Self, u16) {
        let high = Self::from_f32(value);
        let wide = high.to_f32();
        let low = match wide.abs() < F16_NORMAL {
            true => ((value - wide) / F16_FINE) as i32 as u16,
            false => value.to_bits().wrapping_sub(wide.to_bits()) as u16,
        };
        (high, low)
    }

    fn join(self, low: u16) -> f32 {
        let (wide, low) = (self.to_f32(), low as i16);
        match wide.abs() < F16_NORMAL {
            true => wide + f32::from(low) * F16_FINE,
            false => f32::from_bits(wide.to_bits().wrapping_add_signed(i32::from(low))),
        }
    }
}

/// The smallest normal `f16`, `2^-14`.
#[cfg(feature = "flex")]
const F16_NORMAL: f32 = 1.0 / 16_384.0;
/// A step of the companion of an `f16` below it, `2^-39`.
#[cfg(feature = "flex")]
const F16_FINE: f32 = 1.0 / 549_755_813_888.0;

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn bf16_and_companion_make_every_finite_value(bits: u32) {
            let value = f32::from_bits(bits);
            prop_assume!(value.is_finite() && value.abs() < bf16::MAX.to_f32());
            let (high, low) = bf16::split(value);
            prop_assert_eq!(high.join(low).to_bits(), bits);
            let miss = (f64::from(high.to_f32()) - f64::from(value)).abs();
            let nearest = (f64::from(bf16::from_f32(value).to_f32()) - f64::from(value)).abs();
            prop_assert_eq!(miss, nearest);
        }

        #[test]
        fn f16_and_companion_make_every_value_in_range(value in -65504f32..65504.0, small: bool) {
            let value = if small { value * 1e-7 } else { value };
            let (high, low) = f16::split(value);
            let joined = high.join(low);
            if value.abs() >= 1.0 / 65536.0 {
                prop_assert_eq!(joined.to_bits(), value.to_bits());
            } else {
                prop_assert!((joined - value).abs() <= F16_FINE);
            }
        }

        #[test]
        fn stochastic_rounding_takes_a_neighbour(value in -60000f32..60000.0, random: u32) {
            let check = |low: f32, high: f32, got: f32| low.min(high) <= got && got <= low.max(high);
            let bf = bf16::stochastic(value, random).to_f32();
            let toward_zero = f32::from_bits(value.to_bits() & 0xffff_0000);
            let away = f32::from_bits((value.to_bits() & 0xffff_0000) + 0x1_0000);
            prop_assert!(check(toward_zero, away, bf));
            let held = f16::from_f32(value).to_f32();
            prop_assert_eq!(f16::stochastic(held, random).to_f32(), held);
        }
    }

    #[test]
    fn the_generator_is_threefry() {
        // Known answer of Threefry-2x32-20 for a zero key and counter (Random123's test vectors).
        let rounds = |key: [u32; 2], counter: [u32; 2]| {
            let mut x = [
                counter[0].wrapping_add(key[0]),
                counter[1].wrapping_add(key[1]),
            ];
            let ks = [key[0], key[1], key[0] ^ key[1] ^ 0x1bd1_1bda];
            let rotations = [13, 15, 26, 6, 17, 29, 16, 24];
            for round in 0..20 {
                x[0] = x[0].wrapping_add(x[1]);
                x[1] = x[1].rotate_left(rotations[round % 8]) ^ x[0];
                if round % 4 == 3 {
                    let group = round / 4 + 1;
                    x[0] = x[0].wrapping_add(ks[group % 3]);
                    x[1] = x[1]
                        .wrapping_add(ks[(group + 1) % 3])
                        .wrapping_add(group as u32);
                }
            }
            x[0]
        };
        assert_eq!(rounds([0, 0], [0, 0]), 0x6b20_0159);
        let key = StochasticKey {
            seed: 3,
            step: 5,
            path: 7,
        };
        assert_eq!(key.generator()(11, 13), rounds(key.words(), [11, 13]));
    }
}
