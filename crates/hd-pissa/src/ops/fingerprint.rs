//! The hash by which workers compare their copies of a tensor.
//!
//! Each element's bits are mixed with its place before they enter a sum, so that every bit of every
//! element changes all bits of the sum, whatever else has changed. A sum of integers has no order:
//! devices can add up in parallel and agree on the result.

/// The seeds of the two words.
pub(super) const SEEDS: [u32; 2] = [0x9e37_79b9, 0x85eb_ca77];

/// A bijection in which every bit of the input affects every bit of the output: the finalizer of
/// MurmurHash3.
pub(super) fn mix(mut x: u32) -> u32 {
    x ^= x >> 16;
    x = x.wrapping_mul(0x85eb_ca6b);
    x ^= x >> 13;
    x = x.wrapping_mul(0xc2b2_ae35);
    x ^ x >> 16
}
