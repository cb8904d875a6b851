//! A whole optimizer step (Adam on the factors of every shard, and the merge) against a plain
//! product of the merge's size added to the weight.
//!
//! `cargo bench -p hd-pissa-benches --bench step`

use burn::nn::LinearConfig;
use burn::optim::{AdamConfig, GradientsParams};
use burn::tensor::{Distribution, Tensor};
use hd_pissa::comm::Solo;
use hd_pissa::{
    HdPissaAdapter, HdPissaConfig, HdPissaLinear, HdPissaModule, HdPissaOptimizer, ShardGradients,
};
use hd_pissa_benches::{alternate, device, median, median_ratio, write_rows};
use serde::Serialize;

#[derive(Serialize)]
struct Row {
    device: &'static str,
    d_input: usize,
    d_output: usize,
    rank: usize,
    shards: usize,
    product_ms: f64,
    step_ms: f64,
    ratio_to_product: f64,
}

fn main() {
    let (name, plain) = device();
    let device = plain.clone().autodiff();
    println!(
        "{:>11} {:>4} {:>3}  {:>10} {:>10} {:>6}",
        "shape", "r", "K", "product", "step", "ratio"
    );
    let mut rows = Vec::new();
    for ([d_input, d_output], shards) in [
        ([1024, 1024], 1),
        ([1024, 1024], 4),
        ([1024, 1024], 8),
        ([576, 1536], 8),
    ] {
        let rank = 16;
        let normal = Distribution::Normal(0.0, 1e-2);
        let config = HdPissaConfig::new().with_rank(rank).with_shards(shards);
        let mut model: Option<HdPissaLinear> = Some(
            LinearConfig::new(d_input, d_output)
                .with_bias(false)
                .init(&device)
                .apply_hd_pissa(&config, 0..shards)
                .expect("the shape fits the rank")
                .into(),
        );
        let adam = AdamConfig::new().with_epsilon(1e-8).init();
        let mut optim = HdPissaOptimizer::new(adam, Solo).expect("Adam is supported");

        let inner = 2 * shards * rank;
        let left = Tensor::<2>::random([d_input, inner], normal, &plain);
        let right = Tensor::<2>::random([inner, d_output], normal, &plain);
        let mut weight = Some(Tensor::<2>::zeros([d_input, d_output], &plain));
        let sync = || plain.sync().expect("the device works");
        let times = alternate(&mut [
            &mut || {
                let sum = weight.take().expect("put back") + left.clone().matmul(right.clone());
                weight = Some(sum);
                sync();
            },
            &mut || {
                let current = model.take().expect("put back");
                let gradients = gradients(&current);
                let stepped = optim.step(2e-5, current, gradients);
                model = Some(stepped.expect("finite gradients"));
                sync();
            },
        ]);
        let row = Row {
            device: name,
            d_input,
            d_output,
            rank,
            shards,
            product_ms: median(times[0].iter().copied()),
            step_ms: median(times[1].iter().copied()),
            ratio_to_product: median_ratio(&times[1], &times[0]),
        };
        println!(
            "{:>11} {rank:>4} {shards:>3}  {:>7.2} ms {:>7.2} ms {:>6.2}",
            format!("{d_input}x{d_output}"),
            row.product_ms,
            row.step_ms,
            row.ratio_to_product
        );
        rows.push(row);
    }
    write_rows("step", &rows);
}

/// Gradients as a backward pass leaves them; the factors themselves serve as values.
fn gradients(model: &HdPissaLinear) -> ShardGradients {
    let adapter = model.weight.reparameterization::<HdPissaAdapter>();
    let mut gradients = ShardGradients::new(model);
    for shard in &adapter.expect("attached above").shards {
        let mut grads = GradientsParams::new();
        grads.register(shard.a.id, shard.a.val().inner());
        grads.register(shard.b.id, shard.b.val().inner());
        gradients.push(shard.index, grads);
    }
    gradients
}
