//! Random associations: a key of three tokens, and the three tokens that follow it.
//!
//! Nothing can be inferred, so that what a model recalls is what its weights took up.

use std::collections::HashSet;
use std::ops::Range;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::Llama;
use crate::batch::Sequence;
use crate::evaluate::greedy;

/// Tokens of a key, and of a value.
const LENGTH: usize = 3;

/// `count` facts with different keys, of tokens drawn uniformly from `vocabulary`. Keys are prompts,
/// values targets.
///
/// # Panics
///
/// If the vocabulary is too small for so many keys.
pub fn facts(seed: u64, count: usize, vocabulary: Range<u32>) -> Vec<Sequence> {
    let possible = vocabulary.len().pow(LENGTH as u32);
    assert!(
        count <= possible,
        "{count} keys of {possible} possible ones"
    );
    let mut rng = StdRng::seed_from_u64(seed);
    let mut keys = HashSet::new();
    let mut facts = Vec::with_capacity(count);
    while facts.len() < count {
        let token = |_| rng.random_range(vocabulary.clone());
        let tokens: Vec<u32> = (0..2 * LENGTH).map(token).collect();
        if keys.insert(tokens[..LENGTH].to_vec()) {
            facts.push(Sequence::new(tokens, LENGTH));
        }
    }
    facts
}

/// How many of the facts the model completes in full, each token the likeliest one.
pub fn recalled(model: &Llama, facts: &[Sequence]) -> usize {
    let keys: Vec<&[u32]> = facts.iter().map(|fact| &fact.tokens[..LENGTH]).collect();
    let values = greedy(model, &keys, LENGTH, |_| false, || ());
    facts
        .iter()
        .zip(values)
        .filter(|(fact, value)| fact.tokens[LENGTH..] == value[..])
        .count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_differ_and_a_seed_gives_the_same_facts() {
        // So many of 5³ that keys are drawn twice.
        let drawn = facts(7, 100, 2..7);
        let keys: HashSet<&[u32]> = drawn.iter().map(|fact| &fact.tokens[..3]).collect();
        assert_eq!(keys.len(), 100);
        assert!(drawn.iter().all(|fact| fact.tokens.len() == 6));
        assert!(drawn.iter().all(|fact| fact.num_targets() == 3));
        let all = drawn.iter().flat_map(|fact| &fact.tokens);
        assert!(all.into_iter().all(|token| (2..7).contains(token)));
        assert_eq!(drawn, facts(7, 100, 2..7));
        assert_ne!(drawn, facts(8, 100, 2..7));
    }
}
