//! Forward and backward of the adapter against a frozen linear layer, Burn's `Lora` and the
//! published way, which builds the dense product in every forward pass.
//!
//! Inputs are those of a model: of two, three and four dimensions, with a batch of one and of
//! several. All ways compute the gradient of the input. Ratios are relative to one product of two
//! matrices with a frozen weight, the least work that any way can do.
//! `cargo bench --workspace --bench adapter`

use burn::module::{Lora, Module, Param};
use burn::nn::{Linear, LinearConfig, LinearLayout};
use burn::tensor::{Device, Distribution, Tensor};
use hd_pissa::{HdPissaAdapter, HdPissaConfig, HdPissaLinear, HdPissaModule};
use hd_pissa_check::measure::{alternate, device, median, median_ratio, write_rows};
use serde::Serialize;

const TOKENS: usize = 1024;

#[derive(Serialize)]
struct Row {
    device: &'static str,
    input: Vec<usize>,
    d_output: usize,
    layout: &'static str,
    rank: usize,
    frozen_ms: f64,
    adapter_ms: f64,
    ratio_to_frozen: f64,
    burn_frozen_ms: f64,
    ratio_of_burn_frozen: f64,
    lora_ms: f64,
    ratio_of_lora: f64,
    dense_lora_ms: f64,
    ratio_of_dense_lora: f64,
}

/// One layer in the forms to compare.
struct Layer {
    frozen: Linear,
    lean: HdPissaLinear,
    adapter: HdPissaLinear,
    lora: Linear,
}

impl Layer {
    fn new(
        [d_input, d_output]: [usize; 2],
        layout: LinearLayout,
        rank: usize,
        on: &Device,
    ) -> Self {
        let linear = LinearConfig::new(d_input, d_output)
            .with_bias(false)
            .with_layout(layout)
            .init(on);
        let config = HdPissaConfig::new().with_rank(rank).with_shards(1);
        let frozen = linear.clone().no_grad();
        Self {
            lean: frozen.clone().into(),
            frozen,
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
}

/// A layer with an input, and a gradient of its output.
struct Case<'a, const D: usize> {
    layer: &'a Layer,
    x: Tensor<D>,
    g: Tensor<D>,
}

impl<'a, const D: usize> Case<'a, D> {
    fn new(layer: &'a Layer, shape: [usize; D], device: &Device) -> Self {
        let normal = Distribution::Normal(0.0, 1.0);
        let mut output = shape;
        output[D - 1] = layer.frozen.weight.dims()[1];
        Self {
            layer,
            x: Tensor::random(shape, normal, device).require_grad(),
            g: Tensor::random(output, normal, device),
        }
    }

    /// The published layer: `x·W + x·(c·a·b)` with the dense product built every time.
    fn dense(&self) -> Tensor<D> {
        let (a, b) = self.layer.factors();
        let product = a.val().matmul(b.val()) * 1e-16;
        let weight = self.layer.adapter.weight.base();
        let x = || self.x.clone();
        x().matmul(weight.unsqueeze()) + x().matmul(product.unsqueeze())
    }

    /// Backward pass of `y` with the gradient `self.g`: the gradient of the input, and those of `of`.
    fn backward(&self, y: Tensor<D>, of: &[&Tensor<2>]) -> (Tensor<D>, Vec<Tensor<2>>) {
        let grads = (y * self.g.clone()).sum().backward();
        let of = of.iter().map(|leaf| leaf.grad(&grads).expect("tracked"));
        (self.x.grad(&grads).expect("tracked"), of.collect())
    }

    /// The adapter's value and gradients against those of the dense formula.
    fn verify(&self) {
        let flat = |tensor: Tensor<D>| {
            let width = tensor.dims()[D - 1];
            tensor.inner().reshape([TOKENS, width])
        };
        let (a, b) = self.layer.factors();
        let (a, b) = (a.val(), b.val());
        let y = self.layer.adapter.forward(self.x.clone());
        let (ours_x, ours) = self.backward(y.clone(), &[&a, &b]);
        let (x, g) = (flat(self.x.clone()), flat(self.g.clone()));
        let weight = self.layer.frozen.weight.val().inner();
        close("value", flat(y), x.clone().matmul(weight.clone()));
        close("input", flat(ours_x), g.clone().matmul(weight.transpose()));
        let dense = x.transpose().matmul(g);
        let expected = dense.clone().matmul(b.inner().transpose());
        close("a", ours[0].clone(), expected);
        close("b", ours[1].clone(), a.inner().transpose().matmul(dense));
    }

    /// Milliseconds of each way, in the order of the row's fields.
    fn times(&self, plain: &Device) -> Vec<Vec<f64>> {
        let (a, b) = self.layer.factors();
        let (a, b) = (a.val(), b.val());
        let lora = self.layer.lora.weight.adapter().expect("attached above");
        let (lora_a, lora_b) = (lora.a.val(), lora.b.val());
        let x = || self.x.clone();
        let run = |forward: &dyn Fn() -> Tensor<D>, of: &[&Tensor<2>]| {
            self.backward(forward(), of);
            plain.sync().expect("the device works");
        };
        alternate(&mut [
            &mut || run(&|| self.layer.lean.forward(x()), &[]),
            &mut || run(&|| self.layer.adapter.forward(x()), &[&a, &b]),
            &mut || run(&|| self.layer.frozen.forward(x()), &[]),
            &mut || run(&|| self.layer.lora.forward(x()), &[&lora_a, &lora_b]),
            &mut || run(&|| self.dense(), &[&a, &b]),
        ])
    }
}

fn close(what: &str, actual: Tensor<2>, expected: Tensor<2>) {
    let (actual, expected) = (actual.inner(), expected.inner());
    let scale = expected.clone().abs().max().into_scalar::<f32>();
    let error = (actual - expected).abs().max().into_scalar::<f32>() / scale;
    assert!(error < 1e-4, "{what}: relative error {error}");
}

/// The cases and their measurements.
struct Bench {
    name: &'static str,
    plain: Device,
    rows: Vec<Row>,
}

impl Bench {
    fn measure<const D: usize>(
        &mut self,
        layer: &Layer,
        layout: &'static str,
        rank: usize,
        shape: [usize; D],
    ) {
        let case = Case::new(layer, shape, &self.plain.clone().autodiff());
        case.verify();
        let times = case.times(&self.plain);
        let ms = |which: usize| median(times[which].iter().copied());
        let ratio = |which: usize| median_ratio(&times[which], &times[0]);
        let row = Row {
            device: self.name,
            input: shape.to_vec(),
            d_output: layer.frozen.weight.dims()[1],
            layout,
            rank,
            frozen_ms: ms(0),
            adapter_ms: ms(1),
            ratio_to_frozen: ratio(1),
            burn_frozen_ms: ms(2),
            ratio_of_burn_frozen: ratio(2),
            lora_ms: ms(3),
            ratio_of_lora: ratio(3),
            dense_lora_ms: ms(4),
            ratio_of_dense_lora: ratio(4),
        };
        println!(
            "{:>18} {:>6} {layout:>7} {rank:>3}  {:>6.2} ms  {:>6.2} ms {:>6.3}  {:>6.2} ms {:>6.3}  \
             {:>6.2} ms {:>6.3}  {:>6.2} ms {:>6.3}",
            format!("{shape:?}"),
            row.d_output,
            row.frozen_ms,
            row.adapter_ms,
            row.ratio_to_frozen,
            row.burn_frozen_ms,
            row.ratio_of_burn_frozen,
            row.lora_ms,
            row.ratio_of_lora,
            row.dense_lora_ms,
            row.ratio_of_dense_lora,
        );
        self.rows.push(row);
    }
}

fn main() {
    let (name, plain) = device();
    let mut bench = Bench {
        name,
        plain,
        rows: Vec::new(),
    };
    println!(
        "{:>18} {:>6} {:>7} {:>3}  {:>9}  {:>16}  {:>16}  {:>16}  {:>16}",
        "input",
        "output",
        "weight",
        "r",
        "frozen",
        "adapter",
        "Burn's Linear",
        "Burn's Lora",
        "dense"
    );
    let layouts = [("rows", LinearLayout::Row), ("columns", LinearLayout::Col)];
    for size in [[1024, 1024], [576, 1536], [1536, 576]] {
        for (layout_name, layout) in layouts {
            for rank in [16, 64] {
                let device = bench.plain.clone().autodiff();
                let layer = Layer::new(size, layout, rank, &device);
                let d = size[0];
                bench.measure(&layer, layout_name, rank, [TOKENS, d]);
                bench.measure(&layer, layout_name, rank, [1, TOKENS, d]);
                bench.measure(&layer, layout_name, rank, [8, TOKENS / 8, d]);
                bench.measure(&layer, layout_name, rank, [2, 4, TOKENS / 8, d]);
            }
        }
    }
    write_rows("adapter", &bench.rows, env!("CARGO_TARGET_TMPDIR"));
}
