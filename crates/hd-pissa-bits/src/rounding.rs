//! Rounding of `f32` values to elements of a half-precision weight.

use half::{bf16, f16};

use crate::StochasticKey;

/// How the sum of a merge is rounded to a half-precision weight. An `f32` weight takes the sum
/// unchanged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Rounding {
    /// To the nearest value, ties to even.
    #[default]
    Nearest,
    /// Up or down at random, with the sum as the mean.
    Stochastic(StochasticKey),
}

/// A 16-bit float as an element of a weight.
///
/// Two halves hold a value more closely than one element: the high half is the nearest value, and
/// the low half, 16 residual bits, is the difference.
pub trait Half: Copy + Send + Sync {
    /// The value, exactly.
    fn widen(self) -> f32;

    /// The nearest value, ties to even.
    fn nearest(value: f32) -> Self;

    /// A neighbour of `value`; over all `random` bits the mean is `value`.
    fn stochastic(value: f32, random: u32) -> Self;

    /// The high half and the low half of `value`.
    fn split(value: f32) -> (Self, u16);

    /// The value of two halves.
    fn join(self, low: u16) -> f32;
}

/// Two halves hold every `f32` exactly. Ties of the high half go away from zero: with ties to even,
/// even values would stand for 65537 `f32` values each, one more than 16 bits tell apart.
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

/// Two halves hold magnitudes from `2^-16` to the largest `f16` exactly, smaller ones to within
/// `2^-39`.
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
        // Below the normal range all steps are 2^-24 wide.
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
pub const F16_NORMAL: f32 = 1.0 / 16_384.0;
/// The unit of the low half of a smaller `f16`, `2^-39`.
pub const F16_FINE: f32 = 1.0 / 549_755_813_888.0;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn bf16_and_residual_bits_make_every_finite_value(bits: u32) {
            let value = f32::from_bits(bits);
            prop_assume!(value.is_finite() && value.abs() < bf16::MAX.to_f32());
            let (high, low) = bf16::split(value);
            prop_assert_eq!(high.join(low).to_bits(), bits);
            let miss = (f64::from(high.to_f32()) - f64::from(value)).abs();
            let nearest = (f64::from(bf16::from_f32(value).to_f32()) - f64::from(value)).abs();
            prop_assert_eq!(miss, nearest);
        }

        #[test]
        fn f16_and_residual_bits_make_every_value_in_range(value in -65504f32..65504.0, small: bool) {
            let value = if small { value * 1e-7 } else { value };
            let (high, low) = f16::split(value);
            let joined = high.join(low);
            if value.abs() >= 1.0 / 65536.0 {
                prop_assert_eq!(joined.to_bits(), value.to_bits());
            } else {
                prop_assert!((joined - value).abs() <= F16_FINE);
            }
            prop_assert_eq!(high, f16::from_f32(value));
        }
    }

    /// Covers all exponents and both signs, with ties and their neighbours.
    #[test]
    fn halves_recover_values_of_every_exponent() {
        for step in 0..=u32::MAX >> 7 {
            let value = f32::from_bits(step.wrapping_mul(128).wrapping_add(step & 3));
            if !value.is_finite() {
                continue;
            }
            let (high, low) = bf16::split(value);
            assert_eq!(high.join(low).to_bits(), value.to_bits(), "{value:e}");
            if value.abs() <= 65504.0 {
                let (high, low) = f16::split(value);
                let miss = (high.join(low) - value).abs();
                let bound = if value.abs() >= 2f32.powi(-16) {
                    0.0
                } else {
                    F16_FINE
                };
                assert!(miss <= bound, "{value:e}");
            }
        }
    }

    /// The chance of rounding up is the distance in units of the random bits. The mean over all
    /// random bits is therefore the value.
    fn check_stochastic<H: Half + PartialEq>(nearest: fn(f64) -> H) {
        let draws = 4096u32;
        let values = [
            1.003, -0.4071, 3.3e-5, -2.2e-5, 1.7e-6, 7.0e-8, 300.3, 1.0, -0.5, 0.0,
        ];
        for value in values.map(|value| value as f32) {
            let rounded: Vec<f64> = (0..draws)
                .map(|seed| {
                    let key = StochasticKey {
                        seed: seed.into(),
                        step: 3,
                        path: 9,
                    };
                    let random = key.generator();
                    f64::from(H::stochastic(value, random(5, 11)).widen())
                })
                .collect();
            let low = rounded.iter().copied().fold(f64::INFINITY, f64::min);
            let high = rounded.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            assert!(low <= f64::from(value) && f64::from(value) <= high);
            // Neighbours: the type has no value between them.
            let between = f64::from(nearest((low + high) / 2.0).widen());
            assert!(between == low || between == high, "{value:e}");
            assert!(rounded.iter().all(|value| *value == low || *value == high));
            let mean = rounded.iter().sum::<f64>() / f64::from(draws);
            // Five standard errors of a two-valued variable, at most half the step.
            let bound = 5.0 * 0.5 * (high - low) / f64::from(draws).sqrt();
            assert!(
                (mean - f64::from(value)).abs() <= bound,
                "{value:e} {mean:e}"
            );
        }
    }

    #[test]
    fn stochastic_rounding_picks_a_neighbour_and_is_unbiased() {
        check_stochastic(bf16::from_f64);
        check_stochastic(f16::from_f64);
    }
}
