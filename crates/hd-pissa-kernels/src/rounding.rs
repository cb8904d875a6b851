//! Rounding of merged `f32` values to elements of the weight, in kernels. `hd-pissa-bits` defines
//! every bit.

use cubecl::prelude::*;
use hd_pissa_bits::{F16_FINE, F16_NORMAL, KEY_PARITY, ROTATIONS};

use crate::FloatType;

/// How a kernel stores a sum.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Store {
    /// The nearest value; `f32` unchanged.
    Nearest,
    /// Up or down at random, with the value as the mean.
    Stochastic(FloatType),
    /// The nearest value, and the difference in the residual bits.
    Compensated(FloatType),
}

/// The first word of Threefry-2x32 with 20 rounds.
#[cube]
fn threefry(counter0: u32, counter1: u32, key0: u32, key1: u32) -> u32 {
    let key2 = key0 ^ key1 ^ KEY_PARITY;
    let mut x0 = counter0 + key0;
    let mut x1 = counter1 + key1;
    #[unroll]
    for group in 0..5u32 {
        #[unroll]
        for round in 0..4u32 {
            let rotation = comptime!(ROTATIONS[((group % 2) * 4 + round) as usize]);
            x0 += x1;
            x1 = (x1 << rotation) | (x1 >> comptime!(32 - rotation));
            x1 ^= x0;
        }
        let (first, second) = if comptime!(group % 3 == 0) {
            (key1, key2)
        } else if comptime!(group % 3 == 1) {
            (key2, key0)
        } else {
            (key0, key1)
        };
        x0 += first;
        x1 += second + comptime!(group + 1);
    }
    x0
}

/// `value` moved up or down to a neighbour that the weight's type holds exactly, or unchanged if
/// the type holds it. The mean over the random bits is `value`.
#[cube]
pub(crate) fn stochastic(
    value: f32,
    row: u32,
    column: u32,
    key0: u32,
    key1: u32,
    #[comptime] dtype: FloatType,
) -> f32 {
    let random = threefry(row, column, key0, key1);
    let bits = u32::reinterpret(value);
    if comptime!(dtype == FloatType::BF16) {
        f32::reinterpret((bits + (random & 0xffffu32)) & 0xffff_0000u32)
    } else {
        let magnitude = bits & 0x7fff_ffffu32;
        let mut rounded = (bits + (random & 0x1fffu32)) & 0xffff_e000u32;
        if magnitude < comptime!(F16_NORMAL.to_bits()) {
            // Below the normal range all steps are 2^-24 wide.
            let steps = f32::reinterpret(magnitude) * 16_777_216.0f32;
            let whole = u32::cast_from(steps);
            let part = u32::cast_from((steps - f32::cast_from(whole)) * 16_777_216.0f32);
            let up = u32::cast_from((random & 0xff_ffffu32) < part);
            let result = f32::cast_from(whole + up) * (1.0f32 / 16_777_216.0f32);
            rounded = u32::reinterpret(result) | (bits & 0x8000_0000u32);
        }
        f32::reinterpret(rounded)
    }
}

/// The high half of a split value as an `f32` that the weight's type holds exactly, and the low
/// half in the low 16 bits.
#[cube]
pub(crate) fn split<F: Float>(value: f32, #[comptime] dtype: FloatType) -> (f32, u32) {
    let bits = u32::reinterpret(value);
    if comptime!(dtype == FloatType::BF16) {
        let high = f32::reinterpret((bits + 0x8000u32) & 0xffff_0000u32);
        (high, bits & 0xffffu32)
    } else {
        let high = f32::cast_from(F::cast_from(value));
        let high_bits = u32::reinterpret(high);
        let mut low = (bits - high_bits) & 0xffffu32;
        if (high_bits & 0x7fff_ffffu32) < comptime!(F16_NORMAL.to_bits()) {
            let steps = (value - high) * comptime!(1.0 / F16_FINE);
            low = u32::cast_from(i32::cast_from(steps)) & 0xffffu32;
        }
        (high, low)
    }
}

/// The value whose halves are `high` and the low 16 bits of `low`.
#[cube]
pub(crate) fn join(high: f32, low: u32, #[comptime] dtype: FloatType) -> f32 {
    let bits = u32::reinterpret(high);
    // The sign of the low half in all upper bits.
    let extended = ((low & 0xffffu32) ^ 0x8000u32) - 0x8000u32;
    let exact = f32::reinterpret(bits + extended);
    if comptime!(dtype == FloatType::BF16) {
        exact
    } else {
        let mut value = exact;
        if (bits & 0x7fff_ffffu32) < comptime!(F16_NORMAL.to_bits()) {
            let steps = f32::cast_from(i32::cast_from(extended));
            value = high + steps * F16_FINE;
        }
        value
    }
}
