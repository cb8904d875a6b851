//! Random bits that depend only on a key and a place.

/// The key of the random bits of stochastic rounding. Equal keys draw equal bits for equal element
/// indices, on every worker and backend and after every resume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct StochasticKey {
    /// The run's seed.
    pub seed: u64,
    /// The optimizer step.
    pub step: u64,
    /// Hash of the weight's path in the model.
    pub path: u64,
}

impl StochasticKey {
    /// The key words of the generator.
    pub fn words(self) -> [u32; 2] {
        let mix = |mut state: u64| splitmix(&mut state);
        let mixed = mix(mix(mix(self.seed) ^ self.step) ^ self.path);
        [mixed as u32, (mixed >> 32) as u32]
    }

    /// 32 random bits for every element of a matrix, by its row and column: the first word of
    /// [`threefry`].
    pub fn generator(self) -> impl Fn(u32, u32) -> u32 + Sync {
        let key = self.words();
        move |row, column| threefry([row, column], key)[0]
    }
}

/// The next word of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
pub fn splitmix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut x = *state;
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Rotations of [`threefry`].
pub const ROTATIONS: [u32; 8] = [13, 15, 26, 6, 17, 29, 16, 24];
/// Turns the first two key words of [`threefry`] into the third.
pub const KEY_PARITY: u32 = 0x1bd1_1bda;

/// Threefry-2x32 with 20 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
/// SC 2011).
#[inline]
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

    /// Known answers for the seed 1234567.
    #[test]
    fn splitmix_gives_the_published_words() {
        let mut state = 1_234_567;
        let words = [(); 3].map(|()| splitmix(&mut state));
        let expected = [
            6_457_827_717_110_365_317,
            3_203_168_211_198_807_973,
            9_817_491_932_198_370_423,
        ];
        assert_eq!(words, expected);
    }
}
