//! Families of short questions beside the problems: each asks for another skill, in the words that
//! the tiny tokenizer knows.
//!
//! Every answer is one number, so that it counts as the answers to problems do.

use std::collections::HashSet;

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};

use crate::data::Record;
use crate::problems::{ITEMS, NAMES, problems};

/// A family of questions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Problems of two steps.
    Problems,
    /// The sum of four numbers, one after the other.
    Sums,
    /// The largest of five numbers.
    Largest,
    /// The smallest of five numbers.
    Smallest,
    /// How often a word stands in a list.
    Count,
    /// What one of four people has.
    Lookup,
    /// The next number of a series with equal steps.
    Series,
}

impl Family {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Problems,
        Self::Sums,
        Self::Largest,
        Self::Smallest,
        Self::Count,
        Self::Lookup,
        Self::Series,
    ];

    fn record(self, rng: &mut StdRng) -> Record {
        let name = *NAMES.choose(rng).expect("there are names");
        let items = *ITEMS.choose(rng).expect("there are items");
        let mut numbers = |count: usize, most: u32| -> Vec<u32> {
            (0..count).map(|_| rng.random_range(2..=most)).collect()
        };
        let (instruction, answer, result) = match self {
            Self::Problems => unreachable!("problems have a generator of their own"),
            Self::Sums => {
                let all = numbers(4, 20);
                let mut sum = all[0];
                let mut steps = Vec::new();
                for next in &all[1..] {
                    steps.push(format!("{sum} + {next} = {}", sum + next));
                    sum += next;
                }
                (
                    format!("{name} has {} {items}. How many together?", list(&all)),
                    format!("{name} has {}.", steps.join(". Then ")),
                    sum,
                )
            }
            Self::Largest | Self::Smallest => {
                let all = numbers(5, 60);
                let (word, found) = match self {
                    Self::Largest => ("more", all.iter().max()),
                    _ => ("fewer", all.iter().min()),
                };
                let found = *found.expect("there are numbers");
                (
                    format!("{name} has {} {items}. How many {word}?", list(&all)),
                    format!("{name} has {found} {items}."),
                    found,
                )
            }
            Self::Count => {
                let words: Vec<&str> = ITEMS.sample(rng, 3).copied().collect();
                let length = rng.random_range(5..=9);
                let all: Vec<&str> = (0..length)
                    .map(|_| words[rng.random_range(0..words.len())])
                    .collect();
                let found = all.iter().filter(|word| **word == words[0]).count() as u32;
                (
                    format!("{name} has {}. How many {}?", all.join(", "), words[0]),
                    format!("{name} has {found} {}.", words[0]),
                    found,
                )
            }
            Self::Lookup => {
                let all = numbers(4, 60);
                let people: Vec<&str> = NAMES.sample(rng, 4).copied().collect();
                let asked = rng.random_range(0..people.len());
                let clauses = people.iter().zip(&all);
                let clauses: Vec<String> = clauses
                    .map(|(person, number)| format!("{person} has {number} {items}."))
                    .collect();
                (
                    format!(
                        "{} How many {items} does {} have?",
                        clauses.join(" "),
                        people[asked]
                    ),
                    format!("{} has {} {items}.", people[asked], all[asked]),
                    all[asked],
                )
            }
            Self::Series => {
                let [first, step] = numbers(2, 12)[..] else {
                    unreachable!("two numbers were drawn")
                };
                let all: Vec<u32> = (0..4).map(|place| first + place * step).collect();
                let last = all[3];
                (
                    format!("{name} has {} {items}. How many now?", list(&all)),
                    format!("{name} has {last} + {step} = {} {items}.", last + step),
                    last + step,
                )
            }
        };
        Record {
            earlier: Vec::new(),
            instruction,
            input: String::new(),
            answer: format!("{answer}\n#### {result}"),
        }
    }
}

fn list(numbers: &[u32]) -> String {
    let all: Vec<String> = numbers.iter().map(u32::to_string).collect();
    all.join(", ")
}

/// Train and test questions of these families in turn. No question is in both.
pub fn questions(
    families: &[Family],
    seed: u64,
    train: usize,
    test: usize,
) -> (Vec<Record>, Vec<Record>) {
    let share = |count: usize| count.div_ceil(families.len());
    let (mut of_train, mut of_test) = (Vec::new(), Vec::new());
    for &family in families {
        let (train, test) = of_family(family, seed, share(train), share(test));
        of_train.push(train.into_iter());
        of_test.push(test.into_iter());
    }
    (in_turn(of_train, train), in_turn(of_test, test))
}

fn of_family(family: Family, seed: u64, train: usize, test: usize) -> (Vec<Record>, Vec<Record>) {
    if family == Family::Problems {
        return problems(seed, train, test);
    }
    let mut rng = StdRng::seed_from_u64(seed);
    let mut tested = HashSet::new();
    let mut test_records = Vec::with_capacity(test);
    while test_records.len() < test {
        let record = family.record(&mut rng);
        if tested.insert(record.instruction.clone()) {
            test_records.push(record);
        }
    }
    let mut train_records = Vec::with_capacity(train);
    while train_records.len() < train {
        let record = family.record(&mut rng);
        if !tested.contains(&record.instruction) {
            train_records.push(record);
        }
    }
    (train_records, test_records)
}

/// The first of each, the second of each, and so on, up to `count`.
fn in_turn(mut lists: Vec<std::vec::IntoIter<Record>>, count: usize) -> Vec<Record> {
    let mut all = Vec::with_capacity(count);
    while all.len() < count {
        let next = lists.iter_mut().filter_map(Iterator::next);
        let before = all.len();
        all.extend(next);
        assert!(all.len() > before, "each list has its share");
    }
    all.truncate(count);
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::score::final_answer;
    use crate::tiny;
    use crate::tokenize::Tokens;

    #[test]
    fn the_tokenizer_knows_every_word_and_questions_are_disjoint() {
        let tokens = Tokens::of(&tiny::pretrained().unwrap()).unwrap();
        for family in Family::ALL {
            let (train, test) = questions(&[family], 3, 300, 60);
            assert_eq!((train.len(), test.len()), (300, 60));
            assert_eq!(questions(&[family], 3, 300, 60).0, train);
            assert_ne!(questions(&[family], 4, 300, 60).0, train);
            let tested: HashSet<&str> = test.iter().map(|r| &*r.instruction).collect();
            assert!(train.iter().all(|r| !tested.contains(&*r.instruction)));
            for record in train.iter().chain(&test) {
                let text = tiny::template().text(record) + &record.answer;
                let ids = tokens.encode(&text).unwrap();
                // Token 0 stands for what is not in the vocabulary.
                assert!(!ids.contains(&0), "{text}");
                assert!(ids.len() < 100, "{text}");
            }
        }
    }

    /// The numbers of a text, in order.
    fn numbers(text: &str) -> Vec<u32> {
        let words = text.split(|c: char| !c.is_ascii_digit());
        words.filter_map(|word| word.parse().ok()).collect()
    }

    #[test]
    fn answers_follow_from_the_questions() {
        for family in Family::ALL {
            for record in questions(&[family], 11, 100, 10).0 {
                let given = numbers(&record.instruction);
                let words: Vec<&str> = record.instruction.split([' ', ',', '.', '?']).collect();
                let expected = match family {
                    // Their own tests check them.
                    Family::Problems => continue,
                    Family::Sums => given.iter().sum(),
                    Family::Largest => *given.iter().max().unwrap(),
                    Family::Smallest => *given.iter().min().unwrap(),
                    Family::Count => {
                        let asked = words[words.len() - 2];
                        // It stands in the question itself once more.
                        words.iter().filter(|word| **word == asked).count() as u32 - 1
                    }
                    Family::Lookup => {
                        let person = words[words.len() - 3];
                        let place = words.iter().position(|word| *word == person).unwrap();
                        words[place + 2].parse().unwrap()
                    }
                    Family::Series => given[3] + given[1] - given[0],
                };
                let found = final_answer(&record.answer);
                assert_eq!(found, Some(expected.to_string()), "{record:?}");
                let last = *numbers(record.answer.split("\n####").next().unwrap())
                    .last()
                    .unwrap();
                assert_eq!(last, expected, "{record:?}");
            }
        }
    }

    #[test]
    fn a_mixture_takes_the_families_in_turn() {
        let (train, test) = questions(&Family::ALL, 5, 70, 10);
        assert_eq!((train.len(), test.len()), (70, 10));
        let alone = questions(&[Family::Sums], 5, 10, 2);
        assert_eq!(train[1].answer.split(". Then").count(), 3);
        assert_eq!(alone.1[0], test[1]);
        assert_eq!(alone.1[1], test[8]);
    }
}
