//! The learning rates that are tried, and the choice of the best.

use std::collections::BTreeMap;

use super::row::Row;
use super::task::{Kind, Task};
use super::trial::TrialResult;

/// Rates that every row is tried at before more are added.
pub const AT_LEAST: usize = 4;
/// Rates that a row is tried at in the end.
const AT_MOST: usize = 9;

/// A learning rate of the series 1, 2, 5, 10, 20, 50, ..., by its place: 0 is 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rate(i32);

impl Rate {
    /// Its value.
    pub fn value(self) -> f64 {
        let digit = [1, 2, 5][self.0.rem_euclid(3) as usize];
        let exponent = self.0.div_euclid(3);
        let text = format!("{digit}e{exponent}");
        text.parse().expect("the text is a number")
    }

    /// The one nearest to a value above 0, by ratio.
    pub fn nearest(value: f64) -> Self {
        let distance = |rate: &Self| (rate.value() / value).ln().abs();
        let all = (-60..60).map(Self);
        all.min_by(|a, b| distance(a).total_cmp(&distance(b)))
            .expect("the series is not empty")
    }
}

/// The first rates of a row.
pub fn first(task: Task, row: Row) -> Vec<Rate> {
    let least = match (task.kind(), row) {
        (Kind::Layer(_), Row::Lora | Row::Pissa) => 2e-3,
        (Kind::Layer(_), Row::LoraWide | Row::PissaWide | Row::LoraDouble) => 1e-3,
        (Kind::Layer(_), _) => 2e-4,
        (Kind::Records, Row::Lora) => 2e-3,
        (Kind::Records, Row::LoraWide | Row::LoraDouble) => 1e-3,
        (Kind::Records, Row::Pissa) => 5e-4,
        (Kind::Records, Row::Full) => 5e-5,
        (Kind::Records, _) => 2e-4,
        (_, Row::Lora | Row::Pissa) => 5e-3,
        (_, Row::Published | Row::PerShardRandom) => 2e-3,
        (_, Row::LoraWide | Row::PissaWide | Row::LoraDouble) => 2e-3,
        (_, Row::Full) => 1e-3,
        (Kind::Questions(_), _) => 1e-3,
        (Kind::Facts, _) => 2e-3,
    };
    let Rate(place) = Rate::nearest(least);
    (place..).take(AT_LEAST).map(Rate).collect()
}

/// A rate with the means of its results.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tried {
    /// The rate.
    pub rate: Rate,
    /// Mean share of right answers.
    pub score: f64,
    /// Mean loss per target token.
    pub loss: f64,
}

/// The means of the results of each rate, by rate.
pub fn tried(results: &[TrialResult]) -> Vec<Tried> {
    let mut by_rate: BTreeMap<Rate, Vec<&TrialResult>> = BTreeMap::new();
    for result in results {
        let rate = Rate::nearest(result.trial.lr);
        by_rate.entry(rate).or_default().push(result);
    }
    let means = by_rate.into_iter().map(|(rate, results)| {
        let mean = |of: fn(&TrialResult) -> f64| {
            results.iter().map(|result| of(result)).sum::<f64>() / results.len() as f64
        };
        Tried {
            rate,
            score: mean(TrialResult::score),
            loss: mean(TrialResult::loss),
        }
    });
    means.collect()
}

/// The best rate, by what the task is judged by, and among equals the one of the smallest loss.
///
/// # Panics
///
/// If there is no result.
pub fn best(results: &[TrialResult]) -> Rate {
    let judge = results
        .first()
        .expect("a row has results")
        .trial
        .task
        .judge();
    let gain = |tried: &Tried| judge.gain(tried.score, tried.loss);
    let order = |a: &Tried, b: &Tried| {
        let by_gain = gain(a).total_cmp(&gain(b));
        by_gain.then(b.loss.total_cmp(&a.loss))
    };
    let best = tried(results).into_iter().max_by(order);
    best.expect("a row has results").rate
}

/// The rate to try next: one step beyond the best while that is the smallest or the largest.
pub fn next(results: &[TrialResult]) -> Option<Rate> {
    let tried = tried(results);
    let (least, most) = (tried.first()?.rate, tried.last()?.rate);
    match best(results) {
        _ if tried.len() >= AT_MOST => None,
        Rate(place) if Rate(place) == most => Some(Rate(place + 1)),
        Rate(place) if Rate(place) == least => Some(Rate(place - 1)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::trial::{Measured, Outcome, Trial};
    use super::*;

    fn result(lr: f64, correct: usize, loss: f64) -> TrialResult {
        let outcome = Outcome::Trained(Box::new(Measured {
            losses: vec![],
            loss,
            correct,
            numeric_rank: 1.0,
            effective_rank: 1.0,
            ranks: vec![],
            text_loss: None,
            trainable: 1,
            seconds: 1.0,
            tokens_per_second: 1.0,
            peak_memory: None,
            used: None,
            answers: vec![],
            record: None,
        }));
        let trial = Trial {
            task: Task::Problems,
            row: Row::Lora,
            lr,
            seed: 1,
            steps: 1,
            items: 100,
            rank: 4,
            shards: 8,
            loss_only: false,
        };
        TrialResult { trial, outcome }
    }

    #[test]
    fn rates_follow_the_series() {
        let values = (-7..2).map(|place| Rate(place).value());
        let expected = [5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0, 2.0];
        assert_eq!(values.collect::<Vec<_>>(), expected);
        assert!(
            expected
                .iter()
                .all(|&value| Rate::nearest(value).value() == value)
        );
        assert_eq!(Rate::nearest(1.1e-4).value(), 1e-4);
    }

    #[test]
    fn a_best_rate_at_an_edge_asks_for_the_next() {
        let mut results = vec![
            result(1e-2, 10, 0.3),
            result(2e-2, 10, 0.2),
            result(5e-3, 9, 0.1),
        ];
        assert_eq!(best(&results).value(), 2e-2);
        assert_eq!(next(&results).unwrap().value(), 5e-2);
        results.push(result(5e-2, 3, 1.0));
        assert_eq!(next(&results), None);
        results.push(result(2e-3, 20, 0.1));
        assert_eq!(next(&results).unwrap().value(), 1e-3);
    }

    #[test]
    fn a_divergence_is_never_the_best() {
        let mut diverged = result(1e-1, 0, 0.0);
        diverged.outcome = Outcome::Diverged("step 3".into());
        let results = [diverged, result(1e-2, 0, 9.0)];
        assert_eq!(best(&results).value(), 1e-2);
    }

    #[test]
    fn on_records_the_smallest_loss_is_the_best_whatever_the_answers() {
        let of_records = |lr, correct, loss| {
            let mut result = result(lr, correct, loss);
            result.trial.task = Task::Gsm8k;
            result.trial.loss_only = true;
            result
        };
        let mut results = vec![
            of_records(1e-4, 9, 1.3),
            of_records(2e-4, 0, 1.1),
            of_records(5e-4, 5, 1.2),
        ];
        assert_eq!(best(&results).value(), 2e-4);
        assert_eq!(next(&results), None);
        results.push(of_records(1e-3, 0, 1.0));
        assert_eq!(next(&results).unwrap().value(), 2e-3);
        results.last_mut().unwrap().outcome = Outcome::Diverged("step 3".into());
        assert_eq!(best(&results).value(), 2e-4);
    }

    #[test]
    fn a_rate_that_does_well_with_one_seed_alone_is_not_the_best() {
        let mut results = [(1e-2, 60, 1), (1e-2, 0, 5), (5e-3, 40, 1), (5e-3, 40, 5)].map(
            |(lr, correct, seed)| {
                let mut result = result(lr, correct, 1.0);
                result.trial.seed = seed;
                result
            },
        );
        assert_eq!(best(&results).value(), 5e-3);
        assert_eq!(tried(&results).len(), 2);
        results.reverse();
        assert_eq!(best(&results).value(), 5e-3);
    }
}
