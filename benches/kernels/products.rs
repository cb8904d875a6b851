//! The low-rank product: `y = x·W` and `p = x·a`.

use std::cell::RefCell;

use burn::tensor::module::linear;
use burn::tensor::{DType, Tensor};
use hd_pissa::ops::adapter_linear;

use crate::device::{Bench, Float};
use crate::rows::{Floor, Row, Rows};
use hd_pissa_benches::sample::{Host, assert_product};

/// The operands on the host. The factor is `f32` whatever the others are.
pub struct Case {
    pub x: Host,
    pub w: Host,
    pub a: Host,
}

/// One way of computing `y` and, most of them, `p`.
pub struct Way<'a> {
    pub name: &'static str,
    pub work: Box<dyn FnMut() + 'a>,
    /// What the last run gave.
    pub result: Box<dyn Fn() -> [Option<Host>; 2] + 'a>,
    pub has_projection: bool,
    /// Bound on the error of an element, as a share of the sum of the absolute values of its terms.
    pub error: f64,
}

pub fn flops(tokens: usize, [d_input, d_output]: [usize; 2], rank: usize) -> f64 {
    2.0 * (tokens * d_input) as f64 * (d_output + rank) as f64
}

impl Case {
    fn verify(&self, way: &Way) {
        for (found, right) in (way.result)().into_iter().zip([&self.w, &self.a]) {
            if let Some(found) = found {
                assert_product(way.name, &found, &self.x, right, way.error);
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
    floor: &Floor,
    rows: &mut Rows,
) {
    let case = Case {
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
    let mut ways = vec![
        Way {
            name: "y by Burn",
            work: Box::new(|| keep(0, linear(x.clone(), w.clone(), None), None)),
            result: Box::new(|| result(0)),
            has_projection: false,
            error,
        },
        Way {
            name: "y, then p by Burn",
            work: Box::new(|| {
                let y = linear(x.clone(), w.clone(), None);
                let p = x.clone().cast(DType::F32).matmul(a.clone());
                keep(1, y, Some(p));
            }),
            result: Box::new(|| result(1)),
            has_projection: true,
            error,
        },
        Way {
            name: "adapter",
            work: Box::new(|| {
                let [x, w] = [&tracked_x, &tracked_w].map(Tensor::clone);
                let y = adapter_linear(x, w, tracked_a.clone(), tracked_b.clone(), 1.0);
                keep(2, y.inner(), None);
            }),
            result: Box::new(|| result(2)),
            has_projection: true,
            error,
        },
    ];
    #[cfg(feature = "cubecl-kernels")]
    if let Some(client) = &bench.client {
        ways.extend(crate::direct::products(client, &case, dtype));
    }
    for way in &mut ways {
        (way.work)();
        case.verify(way);
    }
    let mut works: Vec<&mut dyn FnMut()> = ways.iter_mut().map(|way| &mut way.work as _).collect();
    let times = bench.times(&mut works);
    for (way, times) in ways.iter().zip(&times) {
        case.verify(way);
        // Every operand is read once and every result written once.
        let extra = if way.has_projection { rank } else { 0 };
        let bytes = dtype.bytes() * (tokens * (d_input + d_output) + d_input * d_output) as f64
            + 4.0 * ((d_input + tokens) * extra) as f64;
        let work = [bytes, flops(tokens, size, extra)];
        let row = Row::new(
            ["product", way.name, dtype.name()],
            size,
            work,
            times,
            floor,
        );
        rows.push(Row {
            tokens: Some(tokens),
            rank: Some(rank),
            ..row
        });
    }
}
