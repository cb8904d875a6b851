//! The hash by which workers compare their copies of a tensor.

/// The constants that are mixed with the index, one for each of the two words.
pub const SEEDS: [u32; 2] = [0x9e37_79b9, 0x85eb_ca77];

/// The finalizer of MurmurHash3 for 32 bits: a bijection in which every bit of the input affects
/// every bit of the output.
pub fn mix(mut x: u32) -> u32 {
    x ^= x >> 16;
    x = x.wrapping_mul(0x85eb_ca6b);
    x ^= x >> 13;
    x = x.wrapping_mul(0xc2b2_ae35);
    x ^ x >> 16
}

/// The fingerprint of elements with these numbers and bits, in any order.
///
/// Word `j` is the wrapping sum of `mix(bits ^ mix(number ^ SEEDS[j]))`. An element's bits are
/// mixed with its number before they enter a sum. A change of any bit of any element can thus
/// change every bit of the sum. The order of an integer sum does not matter: devices add in
/// parallel and agree on the result.
///
/// ```
/// use hd_pissa_bits::fingerprint;
/// assert_eq!(fingerprint([(0, 7), (1, 9)]), fingerprint([(1, 9), (0, 7)]));
/// assert_ne!(fingerprint([(0, 7), (1, 9)]), fingerprint([(0, 9), (1, 7)]));
/// ```
pub fn fingerprint(elements: impl IntoIterator<Item = (u32, u32)>) -> [u32; 2] {
    let mut words = [0u32; 2];
    for (number, bits) in elements {
        for (word, seed) in words.iter_mut().zip(SEEDS) {
            *word = word.wrapping_add(mix(bits ^ mix(number ^ seed)));
        }
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Published hashes of the empty text by MurmurHash3 for these seeds: the finalizer of the seed.
    #[test]
    fn mix_gives_the_published_words() {
        let seeds = [0, 1, u32::MAX];
        assert_eq!(seeds.map(mix), [0, 0x514e_28b7, 0x81f1_6f39]);
    }
}
