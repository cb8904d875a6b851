//! Generated grade-school problems, and the text that the tiny model is pre-trained on.
//!
//! Every number stands after a space, so that the tiny tokenizer needs one token for it.

use std::collections::HashSet;

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};

use crate::data::Record;
use crate::prompt::PromptTemplate;

pub(crate) const NAMES: [&str; 12] = [
    "Ada", "Ben", "Cora", "Dan", "Eva", "Finn", "Gina", "Hugo", "Iris", "Jon", "Kate", "Leo",
];
pub(crate) const ITEMS: [&str; 12] = [
    "apples", "books", "cards", "coins", "eggs", "marbles", "pencils", "plums", "shells", "stamps",
    "stickers", "toys",
];
/// The largest number that occurs.
pub const LARGEST: u32 = 101;

/// A kind of problem, by what its two steps compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Kind {
    /// a + b − c
    GainAndLoss,
    /// paid − n · price
    Change,
    /// n / k − c
    Share,
    /// a + k · a
    Multiple,
    /// a + (a − b)
    Fewer,
}

const KINDS: [Kind; 5] = [
    Kind::GainAndLoss,
    Kind::Change,
    Kind::Share,
    Kind::Multiple,
    Kind::Fewer,
];

/// Train and test problems that share no combination of kind and numbers.
pub fn problems(seed: u64, train: usize, test: usize) -> (Vec<Record>, Vec<Record>) {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut tested = HashSet::new();
    let mut test_records = Vec::with_capacity(test);
    while test_records.len() < test {
        let kind = KINDS[test_records.len() % KINDS.len()];
        let (numbers, record) = problem(kind, &mut rng);
        if tested.insert((kind, numbers)) {
            test_records.push(record);
        }
    }
    let mut train_records = Vec::with_capacity(train);
    while train_records.len() < train {
        let kind = KINDS[rng.random_range(0..KINDS.len())];
        let (numbers, record) = problem(kind, &mut rng);
        if !tested.contains(&(kind, numbers)) {
            train_records.push(record);
        }
    }
    (train_records, test_records)
}

/// Two different words of a list.
fn pair(words: &[&'static str], rng: &mut StdRng) -> (&'static str, &'static str) {
    let mut chosen = words.sample(rng, 2);
    let mut next = || *chosen.next().expect("the lists have two words");
    (next(), next())
}

fn problem(kind: Kind, rng: &mut StdRng) -> ([u32; 3], Record) {
    let (name, friend) = pair(&NAMES, rng);
    let (items, _) = pair(&ITEMS, rng);
    let (numbers, instruction, answer) = match kind {
        Kind::GainAndLoss => {
            let (a, b) = (rng.random_range(2..=20), rng.random_range(2..=20));
            let sum = a + b;
            let c = rng.random_range(1..=sum.min(21) - 1);
            let result = sum - c;
            (
                [a, b, c],
                format!(
                    "{name} has {a} {items}. {name} buys {b} more {items} and gives {c} {items} \
                     to {friend}. How many {items} does {name} have now?"
                ),
                format!(
                    "{name} has {a} + {b} = {sum} {items}. Then {sum} - {c} = {result} {items}.\n\
                     #### {result}"
                ),
            )
        }
        Kind::Change => {
            let (n, price) = (rng.random_range(2..=9), rng.random_range(2..=9));
            let cost = n * price;
            let paid = cost + rng.random_range(1..=20);
            let result = paid - cost;
            (
                [n, price, paid],
                format!(
                    "{name} buys {n} {items} for {price} dollars each and pays with {paid} \
                     dollars. How many dollars does {name} get back?"
                ),
                format!(
                    "{name} pays {n} * {price} = {cost} dollars. Then {paid} - {cost} = {result} \
                     dollars.\n#### {result}"
                ),
            )
        }
        Kind::Share => {
            let (k, each) = (rng.random_range(2..=9), rng.random_range(2..=9));
            let (n, c) = (k * each, rng.random_range(1..each));
            let result = each - c;
            (
                [n, k, c],
                format!(
                    "{name} shares {n} {items} equally among {k} friends. Each friend gives {c} \
                     {items} to {friend}. How many {items} does each friend have now?"
                ),
                format!(
                    "Each friend has {n} / {k} = {each} {items}. Then {each} - {c} = {result} \
                     {items}.\n#### {result}"
                ),
            )
        }
        Kind::Multiple => {
            let (a, k) = (rng.random_range(2..=9), rng.random_range(2..=9));
            let (other, b) = (a * k, rng.random_range(1..=20));
            let result = other + b;
            (
                [a, k, b],
                format!(
                    "{name} has {a} {items}. {friend} has {k} times as many {items} and buys {b} \
                     more. How many {items} does {friend} have now?"
                ),
                format!(
                    "{friend} has {a} * {k} = {other} {items}. Then {other} + {b} = {result} \
                     {items}.\n#### {result}"
                ),
            )
        }
        Kind::Fewer => {
            let a = rng.random_range(3..=20);
            let b = rng.random_range(1..a);
            let other = a - b;
            let result = a + other;
            (
                [a, b, 0],
                format!(
                    "{name} has {a} {items}. {friend} has {b} fewer {items}. How many {items} do \
                     {name} and {friend} have together?"
                ),
                format!(
                    "{friend} has {a} - {b} = {other} {items}. Then {a} + {other} = {result} \
                     {items}.\n#### {result}"
                ),
            )
        }
    };
    (
        numbers,
        Record {
            instruction,
            answer,
            ..Record::default()
        },
    )
}

/// A sum, difference, product or quotient, as an equation.
fn equation(rng: &mut StdRng) -> String {
    let (a, b): (u32, u32) = (rng.random_range(1..=81), rng.random_range(1..=20));
    let (m, n): (u32, u32) = (rng.random_range(2..=9), rng.random_range(2..=9));
    match rng.random_range(0..8) {
        0..=2 => format!(" {a} + {b} = {}", a + b),
        3 | 4 => format!(" {} - {b} = {a}", a + b),
        5 => format!(" {} - {a} = {b}", a + b),
        6 => format!(" {m} * {n} = {}", m * n),
        _ => format!(" {} / {m} = {n}", m * n),
    }
}

/// A problem of one step.
fn one_step_problem(rng: &mut StdRng) -> Record {
    let (name, friend) = pair(&NAMES, rng);
    let (items, _) = pair(&ITEMS, rng);
    let (a, b): (u32, u32) = (rng.random_range(2..=20), rng.random_range(2..=20));
    let (m, n): (u32, u32) = (rng.random_range(2..=9), rng.random_range(2..=9));
    let product = m * n;
    let how_many = format!("How many {items} does");
    let (instruction, answer, result) = match rng.random_range(0..5) {
        0 => (
            format!(
                "{name} has {a} {items}. {name} buys {b} more {items}. {how_many} {name} have now?"
            ),
            format!("{name} has {a} + {b} = {} {items}.", a + b),
            a + b,
        ),
        1 => (
            format!(
                "{name} has {} {items}. {name} gives {b} {items} to {friend}. {how_many} {name} have now?",
                a + b
            ),
            format!("{name} has {} - {b} = {a} {items}.", a + b),
            a,
        ),
        2 => (
            format!(
                "{name} buys {m} {items} for {n} dollars each. How many dollars does {name} pay?"
            ),
            format!("{name} pays {m} * {n} = {product} dollars."),
            product,
        ),
        3 => (
            format!(
                "{name} shares {product} {items} equally among {m} friends. {how_many} each friend have now?"
            ),
            format!("Each friend has {product} / {m} = {n} {items}."),
            n,
        ),
        _ => (
            format!(
                "{name} has {m} {items}. {friend} has {n} times as many {items}. {how_many} {friend} have now?"
            ),
            format!("{friend} has {m} * {n} = {product} {items}."),
            product,
        ),
    };
    Record {
        instruction,
        answer: format!("{answer}\n#### {result}"),
        ..Record::default()
    }
}

/// A text for the pre-training: plain equations, or a problem of one step with its answer, where
/// those of the comparison have two steps.
pub fn pretraining_text(template: &PromptTemplate, rng: &mut StdRng) -> String {
    if rng.random_range(0..5) < 2 {
        return (0..8).map(|_| equation(rng)).collect::<Vec<_>>().join(",");
    }
    let record = one_step_problem(rng);
    template.text(&record) + &record.answer
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::score::final_answer;

    #[test]
    fn train_and_test_are_disjoint_and_reproducible() {
        let (train, test) = problems(3, 400, 100);
        assert_eq!((train.len(), test.len()), (400, 100));
        assert_eq!(problems(3, 400, 100).0, train);
        assert_ne!(problems(4, 400, 100).0, train);
        // The numbers with the words between them tell kind and numbers.
        let signature = |record: &Record| -> String {
            let names = |word: &str| NAMES.contains(&word) || ITEMS.contains(&word);
            let words = record.instruction.split([' ', '.', '?']);
            words
                .filter(|word| !names(word))
                .collect::<Vec<_>>()
                .join(" ")
        };
        let tested: HashSet<String> = test.iter().map(signature).collect();
        assert!(
            train
                .iter()
                .all(|record| !tested.contains(&signature(record)))
        );
    }

    #[test]
    fn every_equation_holds_and_the_last_one_is_the_answer() {
        let (train, test) = problems(11, 600, 100);
        for record in train.iter().chain(&test) {
            let mut last = 0.0;
            for part in record.answer.split(" = ").collect::<Vec<_>>().windows(2) {
                let left: Vec<&str> = part[0].split(' ').rev().take(3).collect();
                let number = |text: &str| text.parse::<f64>().unwrap();
                let (b, a) = (number(left[0]), number(left[2]));
                last = number(part[1].split(' ').next().unwrap());
                let value = match left[1] {
                    "+" => a + b,
                    "-" => a - b,
                    "*" => a * b,
                    "/" => a / b,
                    other => panic!("{other}"),
                };
                assert_eq!(value, last, "{}", record.answer);
                assert!(value >= 0.0 && value <= f64::from(LARGEST));
            }
            assert_eq!(final_answer(&record.answer), Some(last.to_string()));
        }
    }
}
