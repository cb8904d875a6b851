//! Times of the kernels on the most capable device of the build:
//! `cargo bench -p hd-pissa-kernels --features wgpu` (or `cuda`).
//!
//! Every row is the median over rounds in which the compared ways alternate, each synchronized.

#[path = "../tests/common/mod.rs"]
mod common;

use std::time::Instant;

use common::*;
use cubecl::client::Client;
use cubecl::server::Handle;
use hd_pissa_kernels::{
    FloatType, LowRankProduct, Merge, MergePrecision, low_rank_product, merge, new_counter,
    reference,
};

const ROUNDS: usize = 7;
const SIZES: [[usize; 2]; 3] = [[576, 576], [576, 1536], [1024, 1024]];

fn main() {
    let Some(client) = client() else { return };
    println!("device: {}", client.name());
    merges(&client);
    products(&client);
}

/// Waits until the device has done everything queued so far: by reading one word of its memory.
fn wait(client: &Client, word: &Handle) {
    drop(client.read_one(word.clone()).expect("the device runs"));
}

/// Medians in milliseconds of the ways, run in turn.
fn medians<const N: usize>(
    client: &Client,
    word: &Handle,
    mut ways: [Box<dyn FnMut() + '_>; N],
) -> [f64; N] {
    let mut times = [const { Vec::new() }; N];
    for round in 0..=ROUNDS {
        for (way, times) in ways.iter_mut().zip(&mut times) {
            wait(client, word);
            let start = Instant::now();
            way();
            wait(client, word);
            // The first round compiles.
            if round > 0 {
                times.push(start.elapsed().as_secs_f64() * 1e3);
            }
        }
    }
    times.map(|mut times| {
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    })
}

fn merges(client: &Client) {
    println!("\n| merge | K | r | f32 ms | GFLOP/s | f16 split ms | f16 stochastic ms |");
    println!("|---|---|---|---|---|---|---|");
    let tight = Packing {
        before: 0,
        between: 0,
        after: 0,
    };
    for [d_input, d_output] in SIZES {
        for (count, rank) in [(1, 16), (4, 16), (8, 16), (8, 64)] {
            let random = &mut Random(1);
            let shards = shards(random, count, [d_input, rank, d_output], 1e-3);
            let frames = pack(client, &frames(&shards), tight);
            let deltas = pack(client, &deltas(&shards), tight);
            let (counter, squares) = (new_counter(client), new_counter(client));
            let before = random.values(d_input * d_output, 1.0);
            let key = hd_pissa_kernels::StochasticKey {
                seed: 1,
                step: 1,
                path: 1,
            };
            let ways = [
                (FloatType::F32, MergePrecision::Plain),
                (FloatType::F16, MergePrecision::Split),
                (FloatType::F16, MergePrecision::Stochastic(key)),
            ]
            .map(|(dtype, precision)| {
                let shape = [d_input, d_output];
                let weight = matrix(client, &before, shape, Layout::RowMajor, dtype);
                let words = hd_pissa_kernels::companion_len(&weight);
                let arguments = Merge {
                    weight,
                    frames: frames.clone(),
                    deltas: deltas.clone(),
                    rank,
                    shards: count,
                    precision,
                    companion: Some(upload_words(client, &vec![0; words])),
                    non_finite: counter.clone(),
                    squares: squares.clone(),
                    square_slot: 0,
                };
                let way = move || merge(client, arguments.clone()).expect("the operands fit");
                Box::new(way) as Box<dyn FnMut()>
            });
            let [wide, split, stochastic] = medians(client, &counter, ways);
            let flops = 4.0 * (d_input * d_output * count * rank) as f64;
            println!(
                "| {d_input}×{d_output} | {count} | {rank} | {wide:.2} | {:.1} | {split:.2} | \
                 {stochastic:.2} |",
                flops / wide / 1e6
            );
        }
    }
}

fn products(client: &Client) {
    println!("\n| product | tokens | r | y and p ms | GFLOP/s | y, then p ms | y alone ms |");
    println!("|---|---|---|---|---|---|---|");
    for [d_input, d_output] in SIZES {
        for (tokens, rank) in [(256, 16), (1024, 8), (1024, 64)] {
            let random = &mut Random(2);
            let dtype = FloatType::F32;
            let x = random.values(tokens * d_input, 1.0);
            let w = random.values(d_input * d_output, 1.0);
            let a = random.values(d_input * rank, 1.0);
            let poison = vec![f32::NAN; tokens * d_output.max(rank)];
            let operand =
                |values: &[f32], shape| matrix(client, values, shape, Layout::RowMajor, dtype);
            let both = LowRankProduct {
                input: operand(&x, [tokens, d_input]),
                weight: operand(&w, [d_input, d_output]),
                factor: operand(&a, [d_input, rank]),
                bias: None,
                output: operand(&poison, [tokens, d_output]),
                projection: operand(&poison, [tokens, rank]),
            };
            let y = LowRankProduct {
                factor: operand(&[], [d_input, 0]),
                projection: operand(&[], [tokens, 0]),
                ..both.clone()
            };
            let p = LowRankProduct {
                weight: operand(&[], [d_input, 0]),
                output: operand(&[], [tokens, 0]),
                ..both.clone()
            };
            low_rank_product(client, both.clone()).expect("the operands fit");
            let found = read(client, &both.projection);
            let exact = reference::product(&x, &a, [tokens, d_input, rank]);
            for (place, value) in found.iter().enumerate() {
                let bound = d_input as f64 * f64::from(f32::EPSILON) * exact.magnitude[place];
                assert!((f64::from(*value) - exact.value[place]).abs() <= bound);
            }
            let word = new_counter(client);
            let launch =
                |product: &LowRankProduct| low_rank_product(client, product.clone()).expect("fits");
            let [fused, pair, alone] = medians(
                client,
                &word,
                [
                    Box::new(|| launch(&both)),
                    Box::new(|| {
                        launch(&y);
                        launch(&p);
                    }),
                    Box::new(|| launch(&y)),
                ],
            );
            let flops = 2.0 * (tokens * d_input * (d_output + rank)) as f64;
            println!(
                "| {d_input}×{d_output} | {tokens} | {rank} | {fused:.2} | {:.1} | {pair:.2} | \
                 {alone:.2} |",
                flops / fused / 1e6
            );
        }
    }
}
