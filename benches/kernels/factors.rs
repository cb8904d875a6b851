//! The products with a factor of few columns: `p = x·a`, and the gradient `xᵀ·q` of `a`.

use std::cell::RefCell;

use burn::tensor::{DType, Tensor};

use crate::device::Bench;
use crate::direct;
use crate::float::Float;
use crate::operands::{Factor, Variant};
use crate::rows::{Roofline, Row, Rows};
use hd_pissa_check::measure::sample::{Host, assert_product};

impl Factor {
    fn verify(&self, variant: &Variant<Host>) {
        let left = match self.is_gradient {
            true => &self.x.transposed(),
            false => &self.x,
        };
        assert_product(
            variant.name,
            &(variant.result)(),
            left,
            &self.f,
            variant.error,
        );
    }
}

pub fn measure(
    bench: &Bench,
    dtype: Float,
    tokens: usize,
    size @ [d_input, _]: [usize; 2],
    rank: usize,
    roofline: &Roofline,
    rows: &mut Rows,
) {
    let Some(client) = &bench.client else { return };
    for is_gradient in [false, true] {
        let inner = if is_gradient { tokens } else { d_input };
        let case = Factor {
            x: bench.random([tokens, d_input], 1.0, dtype),
            f: bench.random([inner, rank], 1.0, Float::F32),
            is_gradient,
        };
        let (x, f) = (
            bench.tensor(&case.x, dtype),
            bench.tensor(&case.f, Float::F32),
        );
        let result: RefCell<Option<Tensor<2>>> = RefCell::default();
        let burn = Variant {
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
        let mut variants = [burn, direct::factor_product(client, &case, dtype)];
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
            let bytes = dtype.bytes() * (tokens * d_input) as f64
                + 4.0 * (rank * (tokens + d_input)) as f64;
            let work = [bytes, 2.0 * (tokens * d_input * rank) as f64];
            let operation = if is_gradient { "xT·q" } else { "x·a" };
            let names = [operation, variant.name, dtype.name()];
            rows.push(Row {
                tokens: Some(tokens),
                rank: Some(rank),
                ..Row::new(names, size, work, times, roofline)
            });
        }
    }
}
