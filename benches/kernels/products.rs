//! The low-rank product: `y = x·W` and `p = x·a`.

use std::cell::RefCell;

use burn::tensor::module::linear;
use burn::tensor::{DType, Tensor};
use hd_pissa::ops::adapter_linear;

use crate::device::Bench;
use crate::float::Float;
use crate::operands::{Product, Products, Variant};
use crate::rows::{Roofline, Row, Rows};
use hd_pissa_check::measure::sample::assert_product;

/// The variant that leaves `p` out.
const ONLY_OUTPUT: &str = "y by Burn";

pub fn flops(tokens: usize, [d_input, d_output]: [usize; 2], rank: usize) -> f64 {
    2.0 * (tokens * d_input) as f64 * (d_output + rank) as f64
}

impl Product {
    fn verify(&self, variant: &Variant<Products>) {
        for (found, right) in (variant.result)().into_iter().zip([&self.w, &self.a]) {
            if let Some(found) = found {
                assert_product(variant.name, &found, &self.x, right, variant.error);
            }
        }
    }
}

pub fn measure(
    bench: &Bench,
    dtype: Float,
    tokens: usize,
    size @ [d_input, d_output]: [usize; 2],
    rank: usize,
    roofline: &Roofline,
    rows: &mut Rows,
) {
    let case = Product {
        x: bench.random([tokens, d_input], 1.0, dtype),
        w: bench.random(size, 1.0, dtype),
        a: bench.random([d_input, rank], 1.0, Float::F32),
    };
    let [x, w] = [&case.x, &case.w].map(|host| bench.tensor(host, dtype));
    let a = bench.tensor(&case.a, Float::F32);
    let [tracked_a, tracked_b] = [a.clone(), Tensor::zeros([rank, d_output], &bench.device)]
        .map(|factor| Tensor::from_inner(factor).require_grad());
    let [tracked_x, tracked_w] = [x.clone(), w.clone()].map(Tensor::from_inner);

    let results: [RefCell<[Option<Tensor<2>>; 2]>; 3] = Default::default();
    let keep = |which: usize, y: Tensor<2>, p: Option<Tensor<2>>| {
        bench.sync();
        *results[which].borrow_mut() = [Some(y), p];
    };
    let result = |which: usize| {
        let kept = results[which].borrow().clone();
        kept.map(|tensor| tensor.map(|tensor| bench.values(tensor)))
    };
    let error = bench.error(dtype, d_input);
    let mut variants = vec![
        Variant {
            name: ONLY_OUTPUT,
            work: Box::new(|| keep(0, linear(x.clone(), w.clone(), None), None)),
            result: Box::new(|| result(0)),
            error,
        },
        Variant {
            name: "y, then p by Burn",
            work: Box::new(|| {
                let y = linear(x.clone(), w.clone(), None);
                let p = x.clone().cast(DType::F32).matmul(a.clone());
                keep(1, y, Some(p));
            }),
            result: Box::new(|| result(1)),
            error,
        },
        Variant {
            name: "adapter",
            work: Box::new(|| {
                let [x, w] = [&tracked_x, &tracked_w].map(Tensor::clone);
                let y = adapter_linear(x, w, tracked_a.clone(), tracked_b.clone(), 1.0);
                keep(2, y.inner(), None);
            }),
            result: Box::new(|| result(2)),
            error,
        },
    ];
    #[cfg(feature = "cubecl-kernels")]
    if let Some(client) = &bench.client {
        variants.push(crate::direct::product(client, &case, dtype));
    }
    for variant in &mut variants {
        (variant.work)();
        case.verify(variant);
    }
    let mut works: Vec<&mut dyn FnMut()> = variants
        .iter_mut()
        .map(|variant| &mut variant.work as _)
        .collect();
    let times = bench.times(&mut works);
    for (variant, times) in variants.iter().zip(&times) {
        case.verify(variant);
        // Every operand is read once and every result written once.
        let extra = if variant.name == ONLY_OUTPUT { 0 } else { rank };
        let bytes = dtype.bytes() * (tokens * (d_input + d_output) + d_input * d_output) as f64
            + 4.0 * ((d_input + tokens) * extra) as f64;
        let work = [bytes, flops(tokens, size, extra)];
        let row = Row::new(
            ["product", variant.name, dtype.name()],
            size,
            work,
            times,
            roofline,
        );
        rows.push(Row {
            tokens: Some(tokens),
            rank: Some(rank),
            ..row
        });
    }
}
