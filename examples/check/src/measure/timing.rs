//! Paired timing.

use std::time::Instant;

/// Pairs to take the median of.
pub const PAIRS: usize = 41;

/// Milliseconds of each of `works`, called in turn `PAIRS` times after three rounds of warm-up.
///
/// `works` must wait for the device. The order rotates from round to round, so none always follows
/// the same one.
pub fn alternate(works: &mut [&mut dyn FnMut()]) -> Vec<Vec<f64>> {
    rounds(works, 3);
    rounds(works, PAIRS)
}

/// As [`alternate`], with as many rounds as fit in about `seconds`: at least 5, at most `PAIRS`.
pub fn alternate_within(seconds: f64, works: &mut [&mut dyn FnMut()]) -> Vec<Vec<f64>> {
    rounds(works, 1);
    let round: f64 = rounds(works, 1).iter().flatten().sum();
    rounds(works, ((seconds * 1e3 / round) as usize).clamp(5, PAIRS))
}

fn rounds(works: &mut [&mut dyn FnMut()], count: usize) -> Vec<Vec<f64>> {
    let mut times = vec![Vec::with_capacity(count); works.len()];
    for round in 0..count {
        for turn in 0..works.len() {
            let which = match round % 2 {
                0 => turn,
                _ => works.len() - 1 - turn,
            };
            let start = Instant::now();
            works[which]();
            times[which].push(start.elapsed().as_secs_f64() * 1e3);
        }
    }
    times
}

pub fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Median of the ratios of simultaneous measurements.
pub fn median_ratio(of: &[f64], to: &[f64]) -> f64 {
    median(of.iter().zip(to).map(|(of, to)| of / to))
}
