//! The decomposition of a weight when adapters are attached: once for each size, as it takes seconds.
//!
//! `cargo bench --workspace --bench decomposition -- 1024x1024 4096x4096`; without sizes, three.

use std::time::Instant;

use burn::nn::{Linear, LinearConfig};
use burn::tensor::Tensor;
use clap::Parser;
use hd_pissa::{
    HdPissaAdapter, HdPissaConfig, HdPissaLinear, HdPissaModule, SvdMethod, SvdPrecision,
};
use hd_pissa_check::measure::{device, size, write_rows};
use serde::Serialize;

const RANK: usize = 16;
const SHARDS: usize = 8;

#[derive(Serialize)]
struct Row {
    device: &'static str,
    d_input: usize,
    d_output: usize,
    precision: &'static str,
    rank: usize,
    shards: usize,
    seconds: f64,
    /// Seconds per `max(d) · min(d)²`, in nanoseconds.
    ns_per_unit: f64,
}

#[derive(Parser)]
struct Options {
    /// Sizes of weights, as in `1024x1024 2048x5632`.
    #[arg(value_parser = size, default_values = ["576x1536", "1024x1024", "2048x2048"])]
    sizes: Vec<[usize; 2]>,
    /// Given by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() {
    let Options { sizes, .. } = Options::parse();
    let (name, device) = device();
    let device = device.autodiff();
    println!("{:>11} {:>5}  {:>9}", "shape", "in", "time");
    let mut rows = Vec::new();
    for [d_input, d_output] in sizes {
        let layer = LinearConfig::new(d_input, d_output)
            .with_bias(false)
            .init(&device);
        for (precision, svd) in [("f32", SvdPrecision::F32), ("f64", SvdPrecision::F64)] {
            let config = HdPissaConfig::new()
                .with_rank(RANK)
                .with_shards(SHARDS)
                .with_svd(SvdMethod::Exact(svd));
            let start = Instant::now();
            let adapted: HdPissaLinear = layer
                .clone()
                .apply_hd_pissa(&config, 0..SHARDS)
                .expect("the shape fits the rank")
                .into();
            let seconds = start.elapsed().as_secs_f64();
            verify(&layer, &adapted);
            let unit = (d_input.max(d_output) * d_input.min(d_output).pow(2)) as f64;
            let shape = format!("{d_input}x{d_output}");
            println!("{shape:>11} {precision:>5}  {seconds:>7.2} s");
            rows.push(Row {
                device: name,
                d_input,
                d_output,
                precision,
                rank: RANK,
                shards: SHARDS,
                seconds,
                ns_per_unit: 1e9 * seconds / unit,
            });
        }
    }
    write_rows("decomposition", &rows, env!("CARGO_TARGET_TMPDIR"));
}

/// `W·bᵢᵀ` points along `aᵢ` for every component: `W` has not changed, and its singular vectors
/// are what `a` and `b` hold.
fn verify(layer: &Linear, adapted: &HdPissaLinear) {
    let weight = layer.weight.val().inner();
    let adapter = adapted.weight.reparameterization::<HdPissaAdapter>();
    for shard in &adapter.expect("attached above").shards {
        let (a, b) = (shard.a.val().inner(), shard.b.val().inner());
        let image = weight.clone().matmul(b.transpose());
        let sums = |x: Tensor<2>| x.sum_dim(0);
        let along = sums(image.clone() * a.clone()) / sums(a.clone().square());
        let error = sums((image.clone() - a * along).square()) / sums(image.square());
        let worst = error.max().into_scalar::<f32>().sqrt();
        assert!(worst < 1e-3, "a component is off by {worst} of its length");
    }
}
