use cubecl::prelude::*;

use crate::FloatType;

/// What selects the random bits of a stochastic merge: equal keys draw equal bits for equal
/// element indices, on every worker and after every resume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct StochasticKey {
    /// The run's seed.
    pub seed: u64,
    /// The optimizer step.
    pub step: u64,
    /// [`path_hash`] of the weight's path in the model.
    pub path: u64,
}

impl StochasticKey {
    /// The key words of the generator.
    pub(crate) fn words(self) -> [u32; 2] {
        let mixed = mix(mix(mix(self.seed) ^ self.step) ^ self.path);
        [mixed as u32, (mixed >> 32) as u32]
    }
}

/// The finalizer of SplitMix64, a bijection that spreads every bit.
fn mix(value: u64) -> u64 {
    let mut x = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// The 64-bit FNV-1a hash of a path, the same in every process and version.
pub fn path_hash(path: &str) -> u64 {
    path.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// How a merged `f32` value becomes an element of the weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Rounding {
    /// The nearest value; `f32` as it is.
    Nearest,
    /// Up or down at random, with the value as the mean.
    Stochastic(FloatType),
    /// Nearest, and what is missing goes to the companion.
    Split(FloatType),
}

/// Rotations and key schedule of Threefry-2x32 (Salmon et al., SC 2011).
pub(crate) const ROTATIONS: [u32; 8] = [13, 15, 26, 6, 17, 29, 16, 24];
pub(crate) const KEY_PARITY: u32 = 0x1bd1_1bda;

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

/// The exponent bits of the smallest normal `f16`, `2^-14`, as an `f32`.
pub(crate) const F16_NORMAL: u32 = 0x3880_0000;
/// Steps of the companion of an `f16` weight below `2^-14`: `2^-39` and its inverse.
pub(crate) const F16_FINE: f32 = 1.0 / 549_755_813_888.0;
pub(crate) const F16_FINE_INVERSE: f32 = 549_755_813_888.0;

/// `value` moved up or down to a neighbour that the weight's type holds exactly; a value that it
/// holds already stays. The chance of each neighbour makes the mean `value`.
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
        if magnitude < F16_NORMAL {
            // Below the normal range the steps are 2^-24 wide whatever the exponent.
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
        if (high_bits & 0x7fff_ffffu32) < F16_NORMAL {
            let steps = (value - high) * F16_FINE_INVERSE;
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
        if (bits & 0x7fff_ffffu32) < F16_NORMAL {
            let steps = f32::cast_from(i32::cast_from(extended));
            value = high + steps * F16_FINE;
        }
        value
    }
}
