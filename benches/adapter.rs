//! Forward and backward of the adapter against a frozen linear layer, Burn's `Lora` and the
//! published way, which builds the dense product in every forward pass.
//!
//! All of them compute the gradient of the input. `cargo bench -p hd-pissa-benches --bench adapter`

use burn::module::{Lora, Module, Param};
use burn::nn::{Linear, LinearConfig};
use burn::tensor::{Device, Distribution, Tensor};
use hd_pissa::{HdPissaAdapter, HdPissaConfig, HdPissaLinear, HdPissaModule};
use hd_pissa_benches::{alternate, device, median, median_ratio, write_rows};
use serde::Serialize;

#[derive(Serialize)]
struct Row {
    device: &'static str,
    tokens: usize,
    d_input: usize,
    d_output: usize,
    rank: usize,
    frozen_ms: f64,
    adapter_ms: f64,
    ratio_to_frozen: f64,
    lora_ms: f64,
    ratio_of_lora: f64,
    dense_lora_ms: f64,
    ratio_of_dense_lora: f64,
}

/// One layer in the forms to compare, with an input and a gradient of its output.
struct Case {
    x: Tensor<2>,
    g: Tensor<2>,
    frozen: Linear,
    adapter: HdPissaLinear,
    lora: Linear,
}

impl Case {
    fn new([tokens, d_input, d_output, rank]: [usize; 4], device: &Device) -> Self {
        let normal = Distribution::Normal(0.0, 1.0);
        let linear = LinearConfig::new(d_input, d_output)
            .with_bias(false)
            .init(device);
        let config = HdPissaConfig::new().with_rank(rank).with_shards(1);
        Self {
            x: Tensor::random([tokens, d_input], normal, device).require_grad(),
            g: Tensor::random([tokens, d_output], normal, device),
            frozen: linear.clone().no_grad(),
            adapter: linear
                .clone()
                .apply_hd_pissa(&config, 0..1)
                .expect("the shape fits the rank")
                .into(),
            lora: linear.apply_lora(Lora::new(rank, rank as f64)),
        }
    }

    fn factors(&self) -> (&Param<Tensor<2>>, &Param<Tensor<2>>) {
        let adapter = self.adapter.weight.reparameterization::<HdPissaAdapter>();
        let shard = &adapter.expect("attached above").shards[0];
        (&shard.a, &shard.b)
    }

    /// The published layer: `x·W + x·(c·a·b)` with the dense product built every time.
    fn dense(&self) -> Tensor<2> {
        let (a, b) = self.factors();
        let product = a.val().matmul(b.val()) * 1e-16;
        self.x.clone().matmul(self.adapter.weight.base()) + self.x.clone().matmul(product)
    }

    /// Backward pass of `y` with the gradient `self.g`; the gradients of the input and `of`.
    fn backward(&self, y: Tensor<2>, of: &[&Tensor<2>]) -> Vec<Tensor<2>> {
        let grads = (y * self.g.clone()).sum().backward();
        std::iter::once(&self.x)
            .chain(of.iter().copied())
            .map(|leaf| leaf.grad(&grads).expect("the leaf is tracked"))
            .collect()
    }

    /// The adapter's value and gradients against those of the dense formula.
    fn verify(&self) {
        let (a, b) = self.factors();
        let (a, b) = (a.val(), b.val());
        let y = self.adapter.forward(self.x.clone());
        let expected = self.frozen.forward(self.x.clone());
        close("value", y.clone(), expected.clone());
        let ours = self.backward(y, &[&a, &b]);
        close(
            "input",
            ours[0].clone(),
            self.backward(expected, &[]).remove(0),
        );
        let dense = self
            .x
            .clone()
            .inner()
            .transpose()
            .matmul(self.g.clone().inner());
        close(
            "a",
            ours[1].clone(),
            dense.clone().matmul(b.inner().transpose()),
        );
        close("b", ours[2].clone(), a.inner().transpose().matmul(dense));
    }
}

fn close(what: &str, actual: Tensor<2>, expected: Tensor<2>) {
    let (actual, expected) = (actual.inner(), expected.inner());
    let scale = expected.clone().abs().max().into_scalar::<f32>();
    let error = (actual - expected).abs().max().into_scalar::<f32>() / scale;
    assert!(error < 1e-4, "{what}: relative error {error}");
}

fn main() {
    let (name, plain) = device();
    let device = plain.clone().autodiff();
    println!(
        "{:>6} {:>11} {:>4}  {:>9} {:>9} {:>6}  {:>9} {:>6}  {:>9} {:>6}",
        "tokens",
        "shape",
        "r",
        "frozen",
        "adapter",
        "ratio",
        "Burn Lora",
        "ratio",
        "dense",
        "ratio"
    );
    let mut rows = Vec::new();
    for [d_input, d_output] in [[1024, 1024], [576, 1536], [1536, 576]] {
        for rank in [16, 64] {
            let (tokens, shape) = (1024, format!("{d_input}x{d_output}"));
            let case = Case::new([tokens, d_input, d_output, rank], &device);
            case.verify();

            let (a, b) = case.factors();
            let (a, b) = (a.val(), b.val());
            let lora = case.lora.weight.adapter().expect("attached above");
            let (lora_a, lora_b) = (lora.a.val(), lora.b.val());
            let sync = || plain.sync().expect("the device works");
            let times = alternate(&mut [
                &mut || {
                    case.backward(case.frozen.forward(case.x.clone()), &[]);
                    sync();
                },
                &mut || {
                    case.backward(case.adapter.forward(case.x.clone()), &[&a, &b]);
                    sync();
                },
                &mut || {
                    case.backward(case.lora.forward(case.x.clone()), &[&lora_a, &lora_b]);
                    sync();
                },
                &mut || {
                    case.backward(case.dense(), &[&a, &b]);
                    sync();
                },
            ]);
            let milliseconds = |which: usize| median(times[which].iter().copied());
            let ratio = |which: usize| median_ratio(&times[which], &times[0]);
            let row = Row {
                device: name,
                tokens,
                d_input,
                d_output,
                rank,
                frozen_ms: milliseconds(0),
                adapter_ms: milliseconds(1),
                ratio_to_frozen: ratio(1),
                lora_ms: milliseconds(2),
                ratio_of_lora: ratio(2),
                dense_lora_ms: milliseconds(3),
                ratio_of_dense_lora: ratio(3),
            };
            println!(
                "{tokens:>6} {shape:>11} {rank:>4}  {:>6.2} ms {:>6.2} ms {:>6.3}  {:>6.2} ms \
                 {:>6.3}  {:>6.2} ms {:>6.3}",
                row.frozen_ms,
                row.adapter_ms,
                row.ratio_to_frozen,
                row.lora_ms,
                row.ratio_of_lora,
                row.dense_lora_ms,
                row.ratio_of_dense_lora,
            );
            rows.push(row);
        }
    }
    write_rows("adapter", &rows, env!("CARGO_TARGET_TMPDIR"));
}
