//! 200 steps of Adam at a learning rate of 2e-5 into a half-precision weight: the part of the `f32`
//! trajectory that each way of rounding keeps. The device runs the types that it has; `bf16` (which
//! WGSL lacks) uses the references that define the kernels' bits.
//!
//! `cargo test --release --workspace --test precision -- --nocapture` prints a table for
//! each type.

mod common;

use common::*;
use cubecl::server::Handle;
use half::{bf16, f16};
use hd_pissa_bits::{Half, Rounding, StochasticKey};
use hd_pissa_kernels::reference::{self, Shard};
use hd_pissa_kernels::{FloatType, Merge, merge};

const SHAPE: [usize; 2] = [72, 54];
const RANK: usize = 4;
const SHARDS: usize = 2;
const STEPS: usize = 200;
const LEARNING_RATE: f32 = 2e-5;
const SEEDS: u64 = 64;

/// Weights of the size of a trained layer's, away from zero where `f16` pairs are not exact.
fn start(dtype: FloatType) -> Vec<f32> {
    let values = Random(1).values(SHAPE[0] * SHAPE[1], 0.04);
    let values: Vec<f32> = values.iter().map(|v| v + v.signum() * 0.01).collect();
    rounded(&values, dtype)
}

/// Adam with its usual settings on gradients that drift in one direction, with noise of the same
/// size.
struct Adam {
    drift: Vec<f32>,
    first: Vec<f32>,
    second: Vec<f32>,
    step: i32,
}

impl Adam {
    fn new(random: &mut Random, len: usize) -> Self {
        Self {
            drift: random.values(len, 1.0),
            first: vec![0.0; len],
            second: vec![0.0; len],
            step: 0,
        }
    }

    fn delta(&mut self, random: &mut Random) -> Vec<f32> {
        self.step += 1;
        let noise = random.values(self.drift.len(), 1.0);
        let unbias = |beta: f32| 1.0 - beta.powi(self.step);
        let moments = self.first.iter_mut().zip(&mut self.second);
        moments
            .zip(self.drift.iter().zip(noise))
            .map(|((first, second), (drift, noise))| {
                let gradient = drift + noise;
                *first = 0.9 * *first + 0.1 * gradient;
                *second = 0.999 * *second + 0.001 * gradient * gradient;
                let (first, second) = (*first / unbias(0.9), *second / unbias(0.999));
                -LEARNING_RATE * first / (second.sqrt() + 1e-8)
            })
            .collect()
    }
}

/// Fixed frames and the deltas of every step.
fn steps() -> Vec<Vec<Shard>> {
    let random = &mut Random(2);
    let lens = [SHAPE[0] * RANK, RANK * SHAPE[1]];
    let frames = [(); SHARDS].map(|()| lens.map(|len| random.values(len, 0.2)));
    let mut optimizers = [(); SHARDS].map(|()| lens.map(|len| Adam::new(random, len)));
    (0..STEPS)
        .map(|_| {
            let shards = frames.iter().zip(&mut optimizers);
            shards
                .map(|([a, b], [adam_a, adam_b])| Shard {
                    a: a.clone(),
                    b: b.clone(),
                    delta_a: adam_a.delta(random),
                    delta_b: adam_b.delta(random),
                })
                .collect()
        })
        .collect()
}

fn key(seed: u64, step: usize) -> StochasticKey {
    StochasticKey {
        seed,
        step: step as u64,
        path: 0x0123_4567_89ab_cdef,
    }
}

/// Final weights of every way.
struct Outcome {
    wide: Vec<f32>,
    compensated: Vec<f32>,
    nearest: Vec<f32>,
    stochastic: Vec<Vec<f32>>,
}

/// A value and its standard error.
struct Estimate {
    mean: f64,
    standard_error: f64,
}

impl Estimate {
    fn new(values: &[f64]) -> Self {
        let count = values.len() as f64;
        let mean = values.iter().sum::<f64>() / count;
        let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (count - 1.0);
        Self {
            mean,
            standard_error: (variance / count).sqrt(),
        }
    }

    /// The chance of four standard errors is 6e-5, and the seeds are fixed.
    fn assert_zero(&self, what: &str) {
        assert!(
            self.mean.abs() < 4.0 * self.standard_error,
            "{what}: {:e} is more than chance, {:e}",
            self.mean,
            self.standard_error
        );
    }
}

fn difference(values: &[f32], from: &[f32]) -> Vec<f64> {
    let pairs = values.iter().zip(from);
    pairs.map(|(v, w)| f64::from(*v) - f64::from(*w)).collect()
}

fn dot(left: &[f64], right: &[f64]) -> f64 {
    left.iter().zip(right).map(|(l, r)| l * r).sum()
}

/// Prints the table and checks its claims. Returns the share of the update that merges to the
/// nearest value lose.
fn judge(name: &str, start: &[f32], outcome: &Outcome) -> f64 {
    let update = difference(&outcome.wide, start);
    let signal = dot(&update, &update).sqrt();
    let row = |way: &str, weight: &[f32], rest: &str| {
        let moved = weight.iter().zip(start).filter(|(v, w)| v != w).count();
        let error = difference(weight, &outcome.wide);
        println!(
            "| {way} | {:.1} % | {:.1} % | {rest} |",
            100.0 * moved as f64 / start.len() as f64,
            100.0 * dot(&error, &error).sqrt() / signal,
        );
    };
    let root = (signal * signal / start.len() as f64).sqrt();
    println!(
        "\n{name}, {STEPS} steps, {SEEDS} seeds; root mean square of the update {root:.2e}, of the \
         weight {:.2e}\n\n| way | entries changed | error / update | bias along the update | mean of \
         all errors |\n|---|---|---|---|---|",
        (start.iter().map(|w| f64::from(w * w)).sum::<f64>() / start.len() as f64).sqrt(),
    );
    row("f32", &outcome.wide, "|");
    row("compensated", &outcome.compensated, "|");
    row("nearest", &outcome.nearest, "|");

    let errors: Vec<Vec<f64>> = outcome
        .stochastic
        .iter()
        .map(|weight| difference(weight, &outcome.wide))
        .collect();
    let along = |error: &Vec<f64>| dot(error, &update) / (signal * signal);
    let mean = |error: &Vec<f64>| error.iter().sum::<f64>() / error.len() as f64;
    let along = Estimate::new(&errors.iter().map(along).collect::<Vec<_>>());
    let overall = Estimate::new(&errors.iter().map(mean).collect::<Vec<_>>());
    let rest = format!(
        "({:.2} ± {:.2}) % | ({:.1} ± {:.1})e-8",
        100.0 * along.mean,
        100.0 * along.standard_error,
        1e8 * overall.mean,
        1e8 * overall.standard_error
    );
    row("stochastic, one seed", &outcome.stochastic[0], &rest);
    let mean_weight: Vec<f32> = (0..start.len())
        .map(|place| {
            let values = outcome.stochastic.iter().map(|w| f64::from(w[place]));
            (values.sum::<f64>() / SEEDS as f64) as f32
        })
        .collect();
    row("stochastic, mean of the seeds", &mean_weight, "|");

    assert_eq!(
        outcome.compensated, outcome.wide,
        "the pair left the f32 trajectory"
    );
    along.assert_zero("bias along the update");
    overall.assert_zero("mean of all errors");
    let lost = difference(&outcome.nearest, &outcome.wide);
    dot(&lost, &lost).sqrt() / signal
}

#[test]
fn bf16_by_the_references() {
    let dtype = FloatType::BF16;
    let start = start(dtype);
    let updates: Vec<Vec<f32>> = steps()
        .iter()
        .map(|shards| {
            let exact = reference::update(shards, [SHAPE[0], RANK, SHAPE[1]]);
            exact.value.iter().map(|value| *value as f32).collect()
        })
        .collect();
    let run = |merge: &mut dyn FnMut(usize, usize, f32, f32) -> f32| {
        let mut weight = start.clone();
        for (step, update) in updates.iter().enumerate() {
            for (place, value) in weight.iter_mut().enumerate() {
                *value = merge(step, place, *value, update[place]);
            }
        }
        weight
    };
    let mut pairs: Vec<(bf16, u16)> = start.iter().map(|v| (bf16::from_f32(*v), 0)).collect();
    let outcome = Outcome {
        wide: run(&mut |_, _, old, update| old + update),
        compensated: run(&mut |_, place, _, update| {
            let (high, low) = pairs[place];
            pairs[place] = bf16::split(high.join(low) + update);
            pairs[place].0.join(pairs[place].1)
        }),
        nearest: run(&mut |_, _, old, update| bf16::from_f32(old + update).to_f32()),
        stochastic: (0..SEEDS)
            .map(|seed| {
                run(&mut |step, place, old, update| {
                    let [row, column] = [place / SHAPE[1], place % SHAPE[1]].map(|i| i as u32);
                    let word = key(seed, step).generator()(row, column);
                    bf16::stochastic(old + update, word).widen()
                })
            })
            .collect(),
    };
    let lost = judge("bf16 by the references", &start, &outcome);
    assert!(
        lost > 0.5,
        "merges to the nearest value keep more than the documentation says"
    );
}

fn on_the_device(dtype: FloatType) {
    let Some(client) = client() else { return };
    if !dtype.is_supported(&client) {
        return eprintln!("skipped: the device has no {dtype:?}");
    }
    let start = start(dtype);
    let steps: Vec<_> = steps()
        .iter()
        .map(|shards| (frames(&client, shards), deltas(&client, shards)))
        .collect();
    let gate = upload_words(&client, &[0]);
    let run = |dtype: FloatType, residual: Option<Handle>, rounding: &dyn Fn(usize) -> Rounding| {
        let weight = matrix(&client, &start, SHAPE, Layout::RowMajor, dtype);
        for (step, (frames, deltas)) in steps.iter().enumerate() {
            let arguments = Merge {
                weight: weight.clone(),
                frames: frames.clone(),
                deltas: deltas.clone(),
                rank: RANK,
                shards: SHARDS,
                rounding: rounding(step),
                residual: residual.clone(),
                gate: gate.clone(),
            };
            merge(&client, arguments).unwrap();
        }
        read(&client, &weight)
    };
    let to_nearest = |_| Rounding::Nearest;
    // Row by row, two elements to a word.
    let words = SHAPE[0] * SHAPE[1].div_ceil(2);
    let residual = upload_words(&client, &vec![0; words]);
    let high = run(dtype, Some(residual.clone()), &to_nearest);
    let words = download_words(&client, &residual);
    let compensated = high.iter().enumerate().map(|(place, high)| {
        let (row, column) = (place / SHAPE[1], place % SHAPE[1]);
        let word = words[row * SHAPE[1].div_ceil(2) + column / 2];
        let low = (word >> (16 * (column % 2))) as u16;
        match dtype {
            FloatType::BF16 => bf16::from_f32(*high).join(low),
            _ => f16::from_f32(*high).join(low),
        }
    });
    let outcome = Outcome {
        compensated: compensated.collect(),
        wide: run(FloatType::F32, None, &to_nearest),
        nearest: run(dtype, None, &to_nearest),
        stochastic: (0..SEEDS)
            .map(|seed| run(dtype, None, &|step| Rounding::Stochastic(key(seed, step))))
            .collect(),
    };
    judge(&format!("{dtype:?} on {}", client.name()), &start, &outcome);
}

#[test]
fn f16_on_the_device() {
    on_the_device(FloatType::F16);
}

#[test]
fn bf16_on_the_device() {
    on_the_device(FloatType::BF16);
}
