//! The product with a factor on a device against its definition.

mod common;

use common::*;
use cubecl::client::Client;
use hd_pissa_kernels::{FactorProduct, FloatType, KernelError, Matrix, factor_product, reference};

/// (rows, depth, rank): tiny, prime, wide, deep enough for many chunks and for a last one that is
/// short, more rows than a tile, empty.
const SHAPES: [[usize; 3]; 12] = [
    [1, 1, 1],
    [7, 13, 3],
    [33, 64, 16],
    [20, 36, 256],
    [5, 300, 4],
    [12, 2084, 8],
    [129, 1031, 17],
    [260, 516, 33],
    [300, 24, 65],
    [0, 8, 4],
    [8, 0, 4],
    [8, 12, 0],
];

struct Case {
    shape: [usize; 3],
    dtype: FloatType,
    /// Of input, factor and output.
    layouts: [Layout; 3],
    input: Vec<f32>,
    factor: Vec<f32>,
}

impl Case {
    fn random(
        shape @ [rows, depth, rank]: [usize; 3],
        dtype: FloatType,
        layouts: [Layout; 3],
    ) -> Self {
        let random = &mut Random(rows as u64 + 31 * depth as u64);
        Self {
            shape,
            dtype,
            layouts,
            input: rounded(&random.values(rows * depth, 1.0), dtype),
            factor: random.values(depth * rank, 1.0),
        }
    }

    fn run(&self, client: &Client) -> Vec<f32> {
        let [rows, depth, rank] = self.shape;
        let [input, factor, output] = self.layouts;
        let poison = vec![f32::NAN; rows * rank];
        let product = FactorProduct {
            input: matrix(client, &self.input, [rows, depth], input, self.dtype),
            factor: matrix(client, &self.factor, [depth, rank], factor, FloatType::F32),
            output: matrix(client, &poison, [rows, rank], output, FloatType::F32),
        };
        let output = product.output.clone();
        factor_product(client, product).unwrap();
        read(client, &output)
    }

    /// The inner dimension is added up in some order, each product and sum rounded (with fma once).
    fn check(&self, client: &Client) {
        let [_, depth, _] = self.shape;
        let found = self.run(client);
        let exact = reference::product(&self.input, &self.factor, self.shape);
        assert_eq!(found.len(), exact.value.len());
        let rounding = (2 * depth + 1) as f64 * f64::from(f32::EPSILON) / 2.0;
        for (place, found) in found.iter().enumerate() {
            let (expected, bound) = (exact.value[place], rounding * exact.magnitude[place]);
            assert!(
                (f64::from(*found) - expected).abs() <= bound,
                "element {place} of {:?} {:?} {:?} is {found}, not {expected} within {bound:e}",
                self.shape,
                self.dtype,
                self.layouts
            );
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
        for (seed, shape) in SHAPES.into_iter().enumerate() {
            for which in [0, seed % 4] {
                let layouts = [
                    Layout::ALL[which],
                    Layout::ALL[(which + seed) % 4],
                    Layout::ALL[(which + 2 * seed) % 4],
                ];
                Case::random(shape, dtype, layouts).check(&client);
            }
            // The input of a gradient: its rows are the columns of what is in memory.
            let layouts = [Layout::ColumnMajor, Layout::RowMajor, Layout::ColumnMajor];
            Case::random(shape, dtype, layouts).check(&client);
        }
    }
}

#[test]
fn equal_inputs_give_equal_bits() {
    let Some(client) = client() else { return };
    let case = Case::random([140, 1500, 9], FloatType::F32, [Layout::RowMajor; 3]);
    let bits = || case.run(&client).into_iter().map(f32::to_bits);
    assert!(bits().eq(bits()));
}

#[test]
fn unfit_operands_are_refused() {
    let Some(client) = client() else { return };
    let zeros = |shape: [usize; 2], dtype| {
        let values = vec![0.0; shape[0] * shape[1]];
        matrix(&client, &values, shape, Layout::RowMajor, dtype)
    };
    let product = FactorProduct {
        input: zeros([4, 6], FloatType::F32),
        factor: zeros([6, 2], FloatType::F32),
        output: zeros([4, 2], FloatType::F32),
    };
    let run = |product| factor_product(&client, product);
    assert_eq!(run(product.clone()), Ok(()));
    let refused = run(FactorProduct {
        factor: zeros([5, 2], FloatType::F32),
        ..product.clone()
    });
    let (operand, expected, found) = ("factor", [6, 2], [5, 2]);
    assert_eq!(
        refused,
        Err(KernelError::Shape {
            operand,
            expected,
            found
        })
    );
    let refused = run(FactorProduct {
        output: zeros([4, 2], FloatType::F16),
        ..product.clone()
    });
    let (operand, expected, found) = ("output", FloatType::F32, FloatType::F16);
    assert_eq!(
        refused,
        Err(KernelError::ElementType {
            operand,
            expected,
            found
        })
    );
    let input = Matrix {
        strides: [600, 1],
        ..product.input.clone()
    };
    assert!(matches!(
        run(FactorProduct {
            input,
            ..product.clone()
        }),
        Err(KernelError::OutOfBounds {
            operand: "input",
            ..
        })
    ));
    let output = Matrix {
        strides: [0, 1],
        ..product.output.clone()
    };
    assert!(matches!(
        run(FactorProduct { output, ..product }),
        Err(KernelError::Overlap {
            operand: "output",
            ..
        })
    ));
}
