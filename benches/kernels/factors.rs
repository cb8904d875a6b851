//! The products with a factor of few columns: `p = x·a`, and the gradient `xᵀ·q` of `a`.

use std::cell::RefCell;

use burn::tensor::{DType, Tensor};

use crate::device::{Bench, Float};
use crate::direct;
use crate::rows::{Floor, Row, Rows};
use hd_pissa_benches::sample::{Host, assert_product};

/// `x · f`, or `xᵀ · f`, on the host. The factor is `f32` whatever the other is.
pub struct Case {
    pub x: Host,
    pub f: Host,
    pub is_gradient: bool,
}

pub struct Way<'a> {
    pub name: &'static str,
    pub work: Box<dyn FnMut() + 'a>,
    /// What the last run gave.
    pub result: Box<dyn Fn() -> Host + 'a>,
    /// Bound on the error of an element, as a share of the sum of the absolute values of its terms.
    pub error: f64,
}

impl Case {
    fn verify(&self, way: &Way) {
        let left = match self.is_gradient {
            true => &self.x.transposed(),
            false => &self.x,
        };
        assert_product(way.name, &(way.result)(), left, &self.f, way.error);
    }
}

pub fn measure(
    bench: &Bench,
    dtype: Float,
    tokens: usize,
    size @ [d_input, _]: [usize; 2],
    rank: usize,
    floor: &Floor,
    rows: &mut Rows,
) {
    let Some(client) = &bench.client else { return };
    for is_gradient in [false, true] {
        let inner = if is_gradient { tokens } else { d_input };
        let case = Case {
            x: bench.random([tokens, d_input], 1.0, dtype),
            f: bench.random([inner, rank], 1.0, Float::F32),
            is_gradient,
        };
        let (x, f) = (
            bench.tensor(&case.x, dtype),
            bench.tensor(&case.f, Float::F32),
        );
        let result: RefCell<Option<Tensor<2>>> = RefCell::default();
        let burn = Way {
            name: "Burn, in f32",
            work: Box::new(|| {
                let wide = x.clone().cast(DType::F32);
                let left = if is_gradient { wide.transpose() } else { wide };
                let product = left.matmul(f.clone());
                bench.sync();
                *result.borrow_mut() = Some(product);
            }),
            result: Box::new(|| bench.values(result.borrow().clone().expect("it ran"))),
            error: bench.error(Float::F32, inner),
        };
        let mut ways = [burn, direct::factor_product(client, &case, dtype)];
        for way in &mut ways {
            (way.work)();
            case.verify(way);
        }
        let mut works: Vec<&mut dyn FnMut()> =
            ways.iter_mut().map(|way| &mut way.work as _).collect();
        let times = bench.times(&mut works);
        for (way, times) in ways.iter().zip(&times) {
            case.verify(way);
            let bytes = dtype.bytes() * (tokens * d_input) as f64
                + 4.0 * (rank * (tokens + d_input)) as f64;
            let work = [bytes, 2.0 * (tokens * d_input * rank) as f64];
            let operation = if is_gradient { "xT·q" } else { "x·a" };
            let names = [operation, way.name, dtype.name()];
            rows.push(Row {
                tokens: Some(tokens),
                rank: Some(rank),
                ..Row::new(names, size, work, times, floor)
            });
        }
    }
}
