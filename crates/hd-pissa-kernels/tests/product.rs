//! The low-rank product on a device against its definition.

mod common;

use common::*;
use cubecl::client::Client;
use hd_pissa_kernels::{
    Buffer, FloatType, KernelError, LowRankProduct, Matrix, is_fusion_preferred, low_rank_product,
    reference,
};

/// (tokens, d_input, rank, d_output): tiny, prime, wide, deep, larger than every tile, empty.
const SHAPES: [[usize; 4]; 14] = [
    [1, 1, 1, 1],
    [3, 2, 1, 5],
    [7, 13, 3, 11],
    [33, 65, 8, 31],
    [64, 32, 16, 128],
    [20, 36, 256, 8],
    [5, 300, 4, 260],
    [131, 17, 5, 127],
    [260, 24, 8, 644],
    [1031, 9, 16, 521],
    [0, 8, 4, 8],
    [8, 0, 4, 12],
    [8, 12, 4, 0],
    [768, 40, 64, 776],
];

struct Case<'a> {
    sizes: [usize; 4],
    dtype: FloatType,
    layouts: [Layout; 3],
    x: &'a [f32],
    w: &'a [f32],
    a: &'a [f32],
    bias: Option<&'a [f32]>,
}

impl Case<'_> {
    /// The product on the device: `y` and `p`, row by row.
    fn run(&self, client: &Client) -> (Vec<f32>, Vec<f32>) {
        let [tokens, d_input, rank, d_output] = self.sizes;
        let [input, weight, factor] = self.layouts;
        let dtype = self.dtype;
        let poison = vec![f32::NAN; tokens * d_output.max(rank)];
        let product = LowRankProduct {
            input: matrix(client, self.x, [tokens, d_input], input, dtype),
            weight: matrix(client, self.w, [d_input, d_output], weight, dtype),
            factor: matrix(client, self.a, [d_input, rank], factor, FloatType::F32),
            bias: self.bias.map(|bias| Buffer {
                handle: upload(client, bias, dtype),
                len: bias.len(),
                dtype,
            }),
            output: matrix(client, &poison, [tokens, d_output], input, dtype),
            projection: matrix(client, &poison, [tokens, rank], input, FloatType::F32),
        };
        let (output, projection) = (product.output.clone(), product.projection.clone());
        low_rank_product(client, product).unwrap();
        (read(client, &output), read(client, &projection))
    }

    fn check(&self, client: &Client) {
        let [tokens, d_input, rank, d_output] = self.sizes;
        let (y, p) = self.run(client);
        let wide = f64::from(f32::EPSILON) / 2.0;
        let narrow = match self.dtype {
            FloatType::F32 => 0.0,
            FloatType::F16 => 2f64.powi(-11),
            FloatType::BF16 => 2f64.powi(-8),
        };
        for (name, result, right, columns, store, bias) in [
            ("y", y, self.w, d_output, narrow, self.bias),
            ("p", p, self.a, rank, 0.0, None),
        ] {
            let exact = reference::product(self.x, right, [tokens, d_input, columns]);
            assert_eq!(result.len(), exact.value.len());
            for (place, found) in result.iter().enumerate() {
                let shift = bias.map_or(0.0, |bias| f64::from(bias[place % columns]));
                let expected = exact.value[place] + shift;
                // A product and a sum per step, each rounded (with fma once), the bias, and the
                // store in a narrow type. Below its normal range f16 has steps of 2^-24.
                let sum = (2 * d_input + 1) as f64 * wide * (exact.magnitude[place] + shift.abs());
                let bound = sum + store * (expected.abs() + sum) + f64::from(store > 0.0) * 6e-8;
                assert!(
                    (f64::from(*found) - expected).abs() <= bound,
                    "{name}[{place}] of {:?} {:?} {:?} is {found}, not {expected} within {bound:e}",
                    self.sizes,
                    self.dtype,
                    self.layouts
                );
            }
        }
    }
}

#[test]
fn product_is_within_the_rounding_bound() {
    let Some(client) = client() else { return };
    for dtype in [FloatType::F32, FloatType::F16, FloatType::BF16] {
        if !dtype.is_supported(&client) {
            eprintln!("skipped: the device has no {dtype:?}");
            continue;
        }
        for (case, sizes) in SHAPES.into_iter().enumerate() {
            let [tokens, d_input, rank, d_output] = sizes;
            let random = &mut Random(case as u64);
            let x = rounded(&random.values(tokens * d_input, 1.0), dtype);
            let w = rounded(&random.values(d_input * d_output, 1.0), dtype);
            let a = random.values(d_input * rank, 1.0);
            let bias = rounded(&random.values(d_output, 1.0), dtype);
            for (which, weight) in Layout::ALL.into_iter().enumerate() {
                let layouts = [
                    Layout::ALL[(which + case) % 4],
                    weight,
                    Layout::ALL[3 - which],
                ];
                // Every layout meets the bias in every other shape.
                let bias = (which + case).is_multiple_of(2).then_some(&bias[..]);
                Case {
                    sizes,
                    dtype,
                    layouts,
                    x: &x,
                    w: &w,
                    a: &a,
                    bias,
                }
                .check(&client);
            }
            let layouts = [Layout::RowMajor, Layout::RowMajor, Layout::RowMajor];
            Case {
                sizes,
                dtype,
                layouts,
                x: &x,
                w: &w,
                a: &a,
                bias: None,
            }
            .check(&client);
        }
    }
}

/// The backward pass: `G·Wᵀ` and `G·bᵀ` through transposed operands, without a copy.
#[test]
fn transposed_operands_give_the_backward_products() {
    let Some(client) = client() else { return };
    let [tokens, d_input, rank, d_output] = [37, 52, 8, 44];
    let random = &mut Random(9);
    let g = random.values(tokens * d_output, 1.0);
    let w = random.values(d_input * d_output, 1.0);
    let b = random.values(rank * d_output, 1.0);
    let transposed = |values: &[f32], rows: usize, columns: usize| -> Vec<f32> {
        (0..rows * columns)
            .map(|k| values[k % rows * columns + k / rows])
            .collect()
    };
    for layout in Layout::ALL {
        let zeros = vec![0.0; tokens * d_input];
        let product = LowRankProduct {
            input: matrix(
                &client,
                &g,
                [tokens, d_output],
                Layout::RowMajor,
                FloatType::F32,
            ),
            weight: matrix(&client, &w, [d_input, d_output], layout, FloatType::F32).transposed(),
            factor: matrix(&client, &b, [rank, d_output], layout, FloatType::F32).transposed(),
            bias: None,
            output: matrix(
                &client,
                &zeros,
                [tokens, d_input],
                Layout::RowMajor,
                FloatType::F32,
            ),
            projection: matrix(
                &client,
                &zeros,
                [tokens, rank],
                Layout::RowMajor,
                FloatType::F32,
            ),
        };
        let (dx, q) = (product.output.clone(), product.projection.clone());
        low_rank_product(&client, product).unwrap();
        for (found, right, rows) in [(dx, &w, d_input), (q, &b, rank)] {
            let right = transposed(right, rows, d_output);
            let exact = reference::product(&g, &right, [tokens, d_output, rows]);
            for (place, found) in read(&client, &found).into_iter().enumerate() {
                let bound =
                    (2 * d_output) as f64 * f64::from(f32::EPSILON) / 2.0 * exact.magnitude[place];
                assert!(
                    (f64::from(found) - exact.value[place]).abs() <= bound,
                    "{layout:?}"
                );
            }
        }
    }
}

/// The projection does not see the weight, nor the output the factor.
#[test]
fn a_non_finite_operand_stays_on_its_side() {
    let Some(client) = client() else { return };
    let sizes @ [tokens, d_input, rank, d_output] = [9, 10, 3, 70];
    let random = &mut Random(1);
    let x = random.values(tokens * d_input, 1.0);
    let mut w = random.values(d_input * d_output, 1.0);
    let mut a = random.values(d_input * rank, 1.0);
    let layouts = [Layout::RowMajor; 3];
    let dtype = FloatType::F32;
    w[d_output - 1] = f32::INFINITY;
    let (y, p) = Case {
        sizes,
        dtype,
        layouts,
        x: &x,
        w: &w,
        a: &a,
        bias: None,
    }
    .run(&client);
    assert!(
        y.iter()
            .enumerate()
            .all(|(k, v)| v.is_finite() == (k % d_output != d_output - 1))
    );
    assert!(p.iter().all(|value| value.is_finite()));
    w[d_output - 1] = 0.0;
    a[0] = f32::NAN;
    let (y, p) = Case {
        sizes,
        dtype,
        layouts,
        x: &x,
        w: &w,
        a: &a,
        bias: None,
    }
    .run(&client);
    assert!(y.iter().all(|value| value.is_finite()));
    assert!(
        p.iter()
            .enumerate()
            .all(|(k, v)| v.is_finite() == (k % rank != 0))
    );
}

#[test]
fn fusion_is_preferred_without_matrix_units() {
    let Some(client) = client() else { return };
    let matmul = &client.features().matmul;
    if matmul.cmma.is_empty() && matmul.mma.is_empty() {
        for dtype in [FloatType::F32, FloatType::F16, FloatType::BF16] {
            assert!(is_fusion_preferred(&client, dtype));
        }
    }
}

#[test]
fn unfit_operands_are_refused() {
    let Some(client) = client() else { return };
    let zeros = |shape: [usize; 2], dtype| {
        matrix(
            &client,
            &vec![0.0; shape[0] * shape[1]],
            shape,
            Layout::RowMajor,
            dtype,
        )
    };
    let product = LowRankProduct {
        input: zeros([4, 6], FloatType::F32),
        weight: zeros([6, 8], FloatType::F32),
        factor: zeros([6, 2], FloatType::F32),
        bias: None,
        output: zeros([4, 8], FloatType::F32),
        projection: zeros([4, 2], FloatType::F32),
    };
    let run = |product| low_rank_product(&client, product);
    assert_eq!(run(product.clone()), Ok(()));
    let weight = zeros([5, 8], FloatType::F32);
    assert_eq!(
        run(LowRankProduct {
            weight,
            ..product.clone()
        }),
        Err(KernelError::Shape {
            operand: "weight",
            expected: [6, 8],
            found: [5, 8]
        })
    );
    let projection = zeros([4, 3], FloatType::F32);
    assert!(matches!(
        run(LowRankProduct {
            projection,
            ..product.clone()
        }),
        Err(KernelError::Shape {
            operand: "projection",
            ..
        })
    ));
    let factor = zeros([6, 2], FloatType::F16);
    assert_eq!(
        run(LowRankProduct {
            factor,
            ..product.clone()
        }),
        Err(KernelError::ElementType {
            operand: "factor",
            expected: FloatType::F32,
            found: FloatType::F16
        })
    );
    let output = Matrix {
        strides: [8, 0],
        ..product.output.clone()
    };
    assert!(matches!(
        run(LowRankProduct { output, ..product }),
        Err(KernelError::Overlap {
            operand: "output",
            ..
        })
    ));
}
