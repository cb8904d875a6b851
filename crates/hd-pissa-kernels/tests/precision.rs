//! 200 steps at a learning rate of 2e-5 into a half-precision weight: what each
//! [`MergePrecision`] keeps of the `f32` trajectory. On the device in `f16`, and in `bf16` (which
//! WGSL lacks) through the references that define the kernels' bits.

mod common;

use common::*;
use half::bf16;
use hd_pissa_kernels::reference::{self, Shard};
use hd_pissa_kernels::{FloatType, StochasticKey, path_hash};

const SHAPE: [usize; 2] = [24, 18];
const RANK: usize = 4;
const SHARDS: usize = 2;
const STEPS: usize = 200;
const SEEDS: u64 = 64;

/// Weights of the size of a trained layer's, away from zero where `f16` pairs are not exact.
fn start(dtype: FloatType) -> Vec<f32> {
    let values = Random(1).values(SHAPE[0] * SHAPE[1], 0.04);
    rounded(
        &values
            .iter()
            .map(|v| v + v.signum() * 0.01)
            .collect::<Vec<_>>(),
        dtype,
    )
}

/// Fixed frames, and for each step the deltas of an Adam-like optimizer: about `2e-5` each, with a
/// part that keeps its sign over the steps.
fn steps() -> Vec<Vec<Shard>> {
    let random = &mut Random(2);
    let base = shards(random, SHARDS, [SHAPE[0], RANK, SHAPE[1]], 1e-5);
    (0..STEPS)
        .map(|_| {
            let noise = shards(random, SHARDS, [SHAPE[0], RANK, SHAPE[1]], 1e-5);
            let sum = |drift: &[f32], noise: &[f32]| -> Vec<f32> {
                drift
                    .iter()
                    .zip(noise)
                    .map(|(drift, noise)| drift + noise)
                    .collect()
            };
            base.iter()
                .zip(&noise)
                .map(|(base, noise)| Shard {
                    a: base.a.iter().map(|v| v * 0.2).collect(),
                    b: base.b.iter().map(|v| v * 0.2).collect(),
                    delta_a: sum(&base.delta_a, &noise.delta_a),
                    delta_b: sum(&base.delta_b, &noise.delta_b),
                })
                .collect()
        })
        .collect()
}

/// Final weights of every way.
struct Outcome {
    wide: Vec<f32>,
    split: Vec<f32>,
    plain: Vec<f32>,
    stochastic: Vec<Vec<f32>>,
}

fn judge(name: &str, start: &[f32], outcome: &Outcome) {
    assert_eq!(
        outcome.split, outcome.wide,
        "the pair left the f32 trajectory"
    );

    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let apart = |values: &[f32], from: &[f32]| {
        norm(
            &mut values
                .iter()
                .zip(from)
                .map(|(v, w)| f64::from(*v) - f64::from(*w)),
        )
    };
    let signal = apart(&outcome.wide, start);
    let plain = apart(&outcome.plain, &outcome.wide);
    let moved = outcome
        .plain
        .iter()
        .zip(start)
        .filter(|(v, w)| v != w)
        .count();

    let seeds = outcome.stochastic.len() as f64;
    let (mut bias, mut variance, mut noise) = (0.0f64, 0.0f64, 0.0f64);
    for place in 0..start.len() {
        let errors: Vec<f64> = outcome
            .stochastic
            .iter()
            .map(|weight| f64::from(weight[place]) - f64::from(outcome.wide[place]))
            .collect();
        let mean = errors.iter().sum::<f64>() / seeds;
        let spread = errors.iter().map(|e| (e - mean).powi(2)).sum::<f64>() / (seeds - 1.0);
        bias += mean;
        variance += spread / seeds;
        noise += errors.iter().map(|e| e * e).sum::<f64>() / seeds;
    }
    let score = bias / variance.sqrt();
    println!(
        "{name}: after {STEPS} steps the f32 weight moved by {signal:.3e}; split is equal to it; \
         plain is off by {:.1} % and moved {moved} of {} elements; stochastic is off by {:.1} % \
         for one seed, its mean over {seeds} seeds by {score:.2} standard errors",
        100.0 * plain / signal,
        start.len(),
        100.0 * noise.sqrt() / signal,
    );
    // The chance of four standard errors is 6e-5, and the seeds are fixed.
    assert!(
        score.abs() < 4.0,
        "stochastic rounding is biased by {score} standard errors"
    );
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
    let path = path_hash("layers.3.feed_forward.up");
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
        split: run(&mut |_, place, _, update| {
            let (high, low) = pairs[place];
            pairs[place] = reference::split_bf16(reference::join_bf16(high, low) + update);
            reference::join_bf16(pairs[place].0, pairs[place].1)
        }),
        plain: run(&mut |_, _, old, update| bf16::from_f32(old + update).to_f32()),
        stochastic: (0..SEEDS)
            .map(|seed| {
                run(&mut |step, place, old, update| {
                    let key = StochasticKey {
                        seed,
                        step: step as u64,
                        path,
                    };
                    let index = [place / SHAPE[1], place % SHAPE[1]].map(|index| index as u32);
                    reference::stochastic(old + update, index, key, dtype)
                })
            })
            .collect(),
    };
    judge("bf16", &start, &outcome);
}

#[test]
fn f16_on_the_device() {
    use hd_pissa_kernels::{Merge, MergePrecision, companion_len, merge, new_counter};

    let Some(client) = client() else { return };
    let dtype = FloatType::F16;
    if !dtype.is_supported(&client) {
        return eprintln!("skipped: the device has no f16");
    }
    let start = start(dtype);
    let packing = Packing {
        before: 0,
        between: 0,
        after: 0,
    };
    let steps: Vec<_> = steps()
        .iter()
        .map(|shards| {
            (
                pack(&client, &frames(shards), packing),
                pack(&client, &deltas(shards), packing),
            )
        })
        .collect();
    let counter = new_counter(&client);
    let path = path_hash("layers.3.feed_forward.up");
    let run = |dtype: FloatType, precision: &dyn Fn(u64) -> MergePrecision| {
        let weight = matrix(&client, &start, SHAPE, Layout::RowMajor, dtype);
        let companion = upload_words(&client, &vec![0; companion_len(&weight)]);
        let squares = new_counter(&client);
        for (step, (frames, deltas)) in steps.iter().enumerate() {
            let arguments = Merge {
                weight: weight.clone(),
                frames: frames.clone(),
                deltas: deltas.clone(),
                rank: RANK,
                shards: SHARDS,
                precision: precision(step as u64),
                companion: Some(companion.clone()),
                non_finite: counter.clone(),
                squares: squares.clone(),
                square_slot: 0,
            };
            merge(&client, arguments).unwrap();
        }
        (read(&client, &weight), download_words(&client, &companion))
    };
    let (high, words) = run(dtype, &|_| MergePrecision::Split);
    let split = high.iter().enumerate().map(|(place, high)| {
        let (row, column) = (place / SHAPE[1], place % SHAPE[1]);
        let word = words[row * SHAPE[1].div_ceil(2) + column / 2];
        reference::join_f16(
            half::f16::from_f32(*high),
            (word >> (16 * (column % 2))) as u16,
        )
    });
    let outcome = Outcome {
        wide: run(FloatType::F32, &|_| MergePrecision::Plain).0,
        split: split.collect(),
        plain: run(dtype, &|_| MergePrecision::Plain).0,
        stochastic: (0..SEEDS)
            .map(|seed| {
                run(dtype, &|step| {
                    MergePrecision::Stochastic(StochasticKey { seed, step, path })
                })
                .0
            })
            .collect(),
    };
    judge("f16", &start, &outcome);
}
