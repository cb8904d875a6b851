//! Records of about the same length in one micro-batch, so that little of it is padding.

use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;

use crate::dealing::Dealing;

/// Puts records of about the same length into the same micro-batch of `order`, and these into a random
/// order. Every record stays in its window of so many places.
pub(crate) fn group(
    order: &mut [usize],
    dealing: Dealing,
    window: usize,
    seed: u64,
    length: impl Fn(usize) -> usize,
) {
    let mut rng = StdRng::seed_from_u64(seed);
    for window in order.chunks_mut(window) {
        // What is left over at the end of an epoch fills no micro-batch of every shard.
        let whole = window.len() / dealing.round() * dealing.round();
        let window = &mut window[..whole];
        let mut sorted = window.to_vec();
        sorted.sort_by_key(|&record| length(record));
        let mut groups: Vec<&[usize]> = sorted.chunks(dealing.batch_size).collect();
        groups.shuffle(&mut rng);
        for (index, group) in groups.into_iter().enumerate() {
            for (place, &record) in dealing.places(index).zip(group) {
                window[place] = record;
            }
        }
    }
}
