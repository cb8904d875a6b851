//! The decomposition of a weight when adapters are attached: once for each size, method and number of
//! triples, as it takes seconds. The weights are random, with rows and columns of very different lengths: as in
//! trained weights, a few singular values are much larger than the others. With `--flat` all have about the
//! same length, as before any training.
//!
//! `cargo bench --workspace --bench decomposition -- 1024x1024 4096x4096 --triples 32,128`; without sizes,
//! three.

use std::time::Instant;

use burn::module::Module;
use burn::nn::{Linear, LinearConfig};
use burn::tensor::{Distribution, Tensor};
use clap::Parser;
use hd_pissa::{
    Decomposition, HdPissa, HdPissaAdapter, HdPissaConfig, HdPissaLinear, SvdMethod, SvdPrecision,
};
use hd_pissa_check::measure::{device, size, write_rows};
use serde::Serialize;

const SHARDS: usize = 8;

#[derive(Serialize)]
struct Row {
    device: &'static str,
    d_input: usize,
    d_output: usize,
    method: &'static str,
    triples: usize,
    seconds: f64,
    /// Of the time of the exact method in `f32`.
    ratio: f64,
    /// Seconds per `max(d) · min(d)²`, in nanoseconds.
    ns_per_unit: f64,
    /// What was done in the end.
    decomposition: String,
}

#[derive(Parser)]
struct Options {
    /// Sizes of weights, as in `1024x1024 2048x5632`.
    #[arg(value_parser = size, default_values = ["576x1536", "1024x1024", "2048x2048"])]
    sizes: Vec<[usize; 2]>,
    /// Shards times rank; multiples of 8.
    #[arg(long, value_delimiter = ',', default_values_t = [32, 128])]
    triples: Vec<usize>,
    /// Rows and columns of about the same length.
    #[arg(long)]
    flat: bool,
    /// Leave out the exact method in `f64`.
    #[arg(long)]
    no_f64: bool,
    /// Given by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() {
    let options = Options::parse();
    let (name, device) = device();
    let device = device.autodiff();
    println!(
        "{:>11} {:>7} {:>10}  {:>9} {:>6}",
        "shape", "triples", "method", "time", "ratio"
    );
    let mut rows = Vec::new();
    let mut methods = vec![
        ("exact f32", SvdMethod::Exact(SvdPrecision::F32)),
        ("krylov", SvdMethod::Krylov),
    ];
    if !options.no_f64 {
        methods.push(("exact f64", SvdMethod::Exact(SvdPrecision::F64)));
    }
    for [d_input, d_output] in options.sizes {
        let layer = LinearConfig::new(d_input, d_output)
            .with_bias(false)
            .init(&device);
        let layer = match options.flat {
            true => layer,
            false => stretched(layer),
        };
        for &triples in &options.triples {
            let mut exact = None;
            for &(method, svd) in &methods {
                let config = HdPissaConfig::new()
                    .with_rank(triples / SHARDS)
                    .with_shards(SHARDS)
                    .with_svd(svd);
                let mut decomposition = Decomposition::None;
                let start = Instant::now();
                let hd_pissa = HdPissa::prepare(&layer, &config, 0..SHARDS, |weight| {
                    decomposition = weight.decomposition;
                });
                let seconds = start.elapsed().as_secs_f64();
                let hd_pissa = hd_pissa.expect("the shape fits the rank");
                let adapted = layer.clone().apply_reparameterization(hd_pissa);
                verify(&layer, &adapted.into());
                let ratio = seconds / *exact.get_or_insert(seconds);
                let unit = (d_input.max(d_output) * d_input.min(d_output).pow(2)) as f64;
                let shape = format!("{d_input}x{d_output}");
                println!(
                    "{shape:>11} {triples:>7} {method:>10}  {seconds:>7.2} s {ratio:>6.3}  \
                     {decomposition:?}"
                );
                rows.push(Row {
                    device: name,
                    d_input,
                    d_output,
                    method,
                    triples,
                    seconds,
                    ratio,
                    ns_per_unit: 1e9 * seconds / unit,
                    decomposition: format!("{decomposition:?}"),
                });
            }
        }
    }
    write_rows("decomposition", &rows, env!("CARGO_TARGET_TMPDIR"));
}

/// The layer with log-normal factors on the rows and columns of its weight.
fn stretched(mut layer: Linear) -> Linear {
    layer.weight = layer.weight.map(|weight| {
        let [rows, cols] = weight.dims();
        let factors = |shape| {
            let exponents = Distribution::Normal(0.0, 0.5);
            Tensor::<2>::random(shape, exponents, &weight.device()).exp()
        };
        let (rows, cols) = (factors([rows, 1]), factors([1, cols]));
        (weight * rows * cols).detach()
    });
    layer
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
