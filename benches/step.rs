//! The merge of all shards' deltas, and a whole optimizer step (Adam on the factors of every shard,
//! then the merge), against one plain product of the merge's size accumulated in the weight.
//!
//! `cargo bench --workspace --bench step`
//!
//! With `--launches`, in a build for a GPU, it prints the kernels that a step launches instead:
//! `cargo bench --workspace --features wgpu --bench step -- --launches`

use burn::nn::LinearConfig;
use burn::optim::{AdamConfig, GradientsParams};
use burn::tensor::{Distribution, Tensor};
use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use hd_pissa::comm::Solo;
use hd_pissa::ops::merge;
use hd_pissa::{
    HdPissaAdapter, HdPissaConfig, HdPissaLinear, HdPissaModule, HdPissaOptimizerConfig,
    ShardGradients,
};
use hd_pissa_check::measure::{alternate, device, median, median_ratio, write_rows};
use serde::Serialize;

#[cfg(feature = "cubecl-kernels")]
mod launches;

const RANK: usize = 16;

#[derive(Serialize)]
struct Row {
    device: &'static str,
    d_input: usize,
    d_output: usize,
    rank: usize,
    shards: usize,
    /// The plain product, in place, by faer on the CPU.
    product_ms: f64,
    merge_ms: f64,
    merge_to_product: f64,
    step_ms: f64,
    step_to_product: f64,
}

fn main() {
    let (name, plain) = device();
    if std::env::args().any(|argument| argument == "--launches") {
        #[cfg(feature = "cubecl-kernels")]
        return launches::print(name, &plain);
        #[cfg(not(feature = "cubecl-kernels"))]
        panic!("--launches needs the feature of a GPU backend, such as wgpu");
    }
    let device = plain.clone().autodiff();
    println!(
        "{:>11} {:>4} {:>3}  {:>10} {:>10} {:>6} {:>10} {:>6}",
        "shape", "r", "K", "product", "merge", "ratio", "step", "ratio"
    );
    let normal = Distribution::Normal(0.0, 1e-2);
    let sync = || plain.sync().expect("the device works");
    let mut rows = Vec::new();
    for ([d_input, d_output], shards) in [
        ([1024, 1024], 1),
        ([1024, 1024], 4),
        ([1024, 1024], 8),
        ([576, 1536], 8),
    ] {
        let config = HdPissaConfig::new().with_rank(RANK).with_shards(shards);
        let layer = LinearConfig::new(d_input, d_output)
            .with_bias(false)
            .init(&device);
        let layer: HdPissaLinear = layer
            .apply_hd_pissa(&config, 0..shards)
            .expect("the shape fits the rank")
            .into();
        let adam = AdamConfig::new().with_epsilon(1e-8).init();
        let mut optim = HdPissaOptimizerConfig::new()
            .init(adam, Solo)
            .expect("Adam is supported");

        let inner = 2 * shards * RANK;
        let host = |rows: usize, cols: usize| -> Vec<f32> {
            let tensor = Tensor::<2>::random([rows, cols], normal, &plain);
            tensor.into_data().iter().collect()
        };
        let (left, right) = (host(d_input, inner), host(inner, d_output));
        let mut sum = host(d_input, d_output);

        let row = [shards, RANK * (d_input + d_output)];
        let frames = Tensor::<2>::random(row, normal, &plain);
        let deltas = Tensor::<2>::random(row, normal, &plain);
        let mut weight = Some(Tensor::<2>::zeros([d_input, d_output], &plain));
        verify(weight.clone().expect("just made"), &frames, &deltas);

        let mut model = Some(layer);
        let times = alternate(&mut [
            &mut || {
                matmul(
                    MatMut::from_row_major_slice_mut(&mut sum, d_input, d_output),
                    Accum::Add,
                    MatRef::from_row_major_slice(&left, d_input, inner),
                    MatRef::from_row_major_slice(&right, inner, d_output),
                    1.0,
                    Par::rayon(0),
                );
            },
            &mut || {
                let current = weight.take().expect("put back");
                weight = Some(merge(current, frames.clone(), deltas.clone(), RANK));
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
            rank: RANK,
            shards,
            product_ms: median(times[0].iter().copied()),
            merge_ms: median(times[1].iter().copied()),
            merge_to_product: median_ratio(&times[1], &times[0]),
            step_ms: median(times[2].iter().copied()),
            step_to_product: median_ratio(&times[2], &times[0]),
        };
        println!(
            "{:>11} {RANK:>4} {shards:>3}  {:>7.2} ms {:>7.2} ms {:>6.2} {:>7.2} ms {:>6.2}",
            format!("{d_input}x{d_output}"),
            row.product_ms,
            row.merge_ms,
            row.merge_to_product,
            row.step_ms,
            row.step_to_product
        );
        rows.push(row);
    }
    write_rows("step", &rows, env!("CARGO_TARGET_TMPDIR"));
}

/// The merge against its formula, shard by shard.
fn verify(weight: Tensor<2>, frames: &Tensor<2>, deltas: &Tensor<2>) {
    let [d_input, d_output] = weight.dims();
    let split = |rows: &Tensor<2>, shard: usize| {
        let row = rows.clone().narrow(0, shard, 1);
        let (a, b) = (RANK * d_input, RANK * d_output);
        (
            row.clone().narrow(1, 0, a).reshape([d_input, RANK]),
            row.narrow(1, a, b).reshape([RANK, d_output]),
        )
    };
    let expected = (0..frames.dims()[0]).fold(weight.clone(), |sum, shard| {
        let ((a, b), (delta_a, delta_b)) = (split(frames, shard), split(deltas, shard));
        sum + (a + delta_a.clone()).matmul(delta_b) + delta_a.matmul(b)
    });
    let merged = merge(weight, frames.clone(), deltas.clone(), RANK);
    let scale = expected.clone().abs().max().into_scalar::<f32>();
    let error = (merged - expected).abs().max().into_scalar::<f32>() / scale;
    assert!(error < 1e-5, "merge: relative error {error}");
}

/// Gradients in the form of a backward pass, with the factors as values.
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
