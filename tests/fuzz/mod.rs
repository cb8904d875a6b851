//! Damaged inputs for readers of files: good inputs of a corpus, edited at random.

#[path = "../allocator.rs"]
mod allocator;

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::time::Instant;

use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::{Config, RngSeed, TestRunner};

/// Inputs per target without `HD_PISSA_FUZZ_INPUTS`.
const INPUTS: u32 = 1000;
/// The limit for a reader's allocations: JSON values take many times the bytes of their text.
const PER_BYTE: usize = 100;
const BESIDE: usize = 1 << 20;

#[derive(Clone, Debug)]
enum Edit {
    Flip {
        at: Index,
        bit: u8,
    },
    Set {
        at: Index,
        byte: u8,
    },
    Cut {
        at: Index,
    },
    Remove {
        at: Index,
        len: usize,
    },
    Insert {
        at: Index,
        bytes: Vec<u8>,
    },
    Copy {
        from: Index,
        len: usize,
        to: Index,
    },
    /// Changes a digit of the text, if there is one.
    Digit {
        nth: Index,
        digit: u8,
    },
    /// Replaces a number of the text by another number, if there is one.
    Number {
        nth: Index,
        value: &'static str,
    },
}

const NUMBERS: [&str; 12] = [
    "0",
    "1",
    "-1",
    "2",
    "255",
    "65536",
    "4294967296",
    "9223372036854775808",
    "1e308",
    "1e999",
    "0.5",
    "null",
];

fn edit() -> impl Strategy<Value = Edit> {
    let at = any::<Index>;
    prop_oneof![
        (at(), 0u8..8).prop_map(|(at, bit)| Edit::Flip { at, bit }),
        (
            at(),
            prop_oneof![Just(0), Just(0xff), Just(0x7f), Just(b'"'), any::<u8>()]
        )
            .prop_map(|(at, byte)| Edit::Set { at, byte }),
        at().prop_map(|at| Edit::Cut { at }),
        (at(), 1usize..64).prop_map(|(at, len)| Edit::Remove { at, len }),
        (at(), prop::collection::vec(any::<u8>(), 1..16))
            .prop_map(|(at, bytes)| Edit::Insert { at, bytes }),
        (at(), 1usize..256, at()).prop_map(|(from, len, to)| Edit::Copy { from, len, to }),
        (at(), b'0'..=b'9').prop_map(|(nth, digit)| Edit::Digit { nth, digit }),
        (at(), prop::sample::select(&NUMBERS[..]))
            .prop_map(|(nth, value)| Edit::Number { nth, value }),
    ]
}

/// Ranges of the numbers of a text.
fn numbers(bytes: &[u8]) -> Vec<std::ops::Range<usize>> {
    let mut ranges: Vec<std::ops::Range<usize>> = Vec::new();
    for (at, byte) in bytes.iter().enumerate() {
        if byte.is_ascii_digit() {
            match ranges.last_mut() {
                Some(last) if last.end == at => last.end = at + 1,
                _ => ranges.push(at..at + 1),
            }
        }
    }
    ranges
}

impl Edit {
    fn apply(&self, bytes: &mut Vec<u8>) {
        if bytes.is_empty() {
            return;
        }
        let end = |at: usize, len: usize| (at + len).min(bytes.len());
        match self {
            Self::Flip { at, bit } => {
                let at = at.index(bytes.len());
                bytes[at] ^= 1 << bit;
            }
            Self::Set { at, byte } => {
                let at = at.index(bytes.len());
                bytes[at] = *byte;
            }
            Self::Cut { at } => bytes.truncate(at.index(bytes.len())),
            Self::Remove { at, len } => {
                let at = at.index(bytes.len());
                let range = at..end(at, *len);
                bytes.drain(range);
            }
            Self::Insert { at, bytes: new } => {
                let at = at.index(bytes.len());
                bytes.splice(at..at, new.iter().copied());
            }
            Self::Copy { from, len, to } => {
                let from = from.index(bytes.len());
                let part = bytes[from..end(from, *len)].to_vec();
                let to = to.index(bytes.len());
                bytes.splice(to..to, part);
            }
            Self::Digit { nth, digit } => {
                let digits = (0..bytes.len()).filter(|&at| bytes[at].is_ascii_digit());
                let digits: Vec<usize> = digits.collect();
                if !digits.is_empty() {
                    bytes[*nth.get(&digits)] = *digit;
                }
            }
            Self::Number { nth, value } => {
                let numbers = numbers(bytes);
                if !numbers.is_empty() {
                    bytes.splice(nth.get(&numbers).clone(), value.bytes());
                }
            }
        }
    }
}

/// Reads edited inputs of `corpus`. The good inputs must be accepted. An input fails the test if
/// `read` panics on it, or allocates far more than `size` bytes in addition to the input. It is
/// then made as small as possible.
///
/// `read` returns the message of a typed error.
pub fn fuzz(
    target: &str,
    corpus: &[Vec<u8>],
    size: usize,
    read: impl Fn(&[u8]) -> Result<(), String>,
) {
    let _guard = allocator::one_at_a_time();
    for good in corpus {
        assert_eq!(read(good), Ok(()), "{target}");
    }
    let inputs = std::env::var("HD_PISSA_FUZZ_INPUTS").ok();
    let inputs = inputs.map_or(INPUTS, |inputs| inputs.parse().unwrap());
    let mut runner = TestRunner::new(Config {
        cases: inputs,
        failure_persistence: None,
        rng_seed: RngSeed::Fixed(20251124),
        ..Config::default()
    });
    let start = Instant::now();
    let (accepted, largest) = (Cell::new(0), Cell::new(0));
    let messages = RefCell::new(BTreeSet::new());
    let strategy = (any::<Index>(), prop::collection::vec(edit(), 1..6));
    let result = runner.run(&strategy, |(choice, edits)| {
        let mut input = choice.get(corpus).clone();
        edits.iter().for_each(|edit| edit.apply(&mut input));
        let (result, _, peak) = allocator::measure(|| read(&input));
        let limit = PER_BYTE * (input.len() + size) + BESIDE;
        prop_assert!(
            peak <= limit,
            "{peak} bytes for an input of {}",
            input.len()
        );
        largest.set(largest.get().max(peak));
        match result {
            Ok(()) => accepted.set(accepted.get() + 1),
            Err(message) => {
                prop_assert!(!message.is_empty());
                // Without the parts that differ from input to input.
                let kind = message
                    .chars()
                    .filter(|c| c.is_ascii_alphabetic())
                    .take(160);
                messages.borrow_mut().insert(kind.collect::<String>());
            }
        }
        Ok(())
    });
    println!(
        "{target}: {inputs} inputs, {} accepted, {} different messages, largest peak of memory {} \
         KiB, {:.0} s",
        accepted.get(),
        messages.borrow().len(),
        largest.get() / 1024,
        start.elapsed().as_secs_f64()
    );
    if let Err(error) = result {
        panic!("{target}: {error}");
    }
}
