//! The low-rank product on a device against its definition, with a weight and without.

mod common;

use common::*;
use cubecl::client::Client;
use hd_pissa_kernels::{
    DenseProduct, FloatType, KernelError, LowRankProduct, Matrix, low_rank_product, reference,
};

/// (rows, depth, rank, columns of the weight): tiny, prime, wide, deep, larger than every tile, empty.
const WITH_WEIGHT: [[usize; 4]; 14] = [
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

/// (rows, depth, rank): as above, and deep enough for many chunks and for a last one that is short.
const WITHOUT: [[usize; 3]; 12] = [
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

const TYPES: [FloatType; 3] = [FloatType::F32, FloatType::F16, FloatType::BF16];

/// Operands in row-major order on the host.
#[derive(Clone)]
struct Case {
    rows: usize,
    depth: usize,
    rank: usize,
    /// Of the weight; `None` for a product with the factor alone.
    columns: Option<usize>,
    dtype: FloatType,
    /// Of the input, the right operands and the results.
    layouts: [Layout; 3],
    /// Whether the right operands are views of transposed matrices.
    transposed: bool,
    input: Vec<f32>,
    weight: Vec<f32>,
    factor: Vec<f32>,
}

impl Case {
    fn random(
        [rows, depth, rank]: [usize; 3],
        columns: Option<usize>,
        dtype: FloatType,
        layouts: [Layout; 3],
    ) -> Self {
        let random = &mut Random(rows as u64 + 31 * depth as u64);
        let weight = depth * columns.unwrap_or(0);
        Self {
            rows,
            depth,
            rank,
            columns,
            dtype,
            layouts,
            transposed: false,
            input: rounded(&random.values(rows * depth, 1.0), dtype),
            weight: rounded(&random.values(weight, 1.0), dtype),
            factor: random.values(depth * rank, 1.0),
        }
    }

    /// A right operand, its transpose transposed again if the case says so.
    fn right(&self, client: &Client, values: &[f32], columns: usize, dtype: FloatType) -> Matrix {
        let (depth, layout) = (self.depth, self.layouts[1]);
        if !self.transposed {
            return matrix(client, values, [depth, columns], layout, dtype);
        }
        let flipped: Vec<f32> = (0..columns * depth)
            .map(|k| values[k % depth * columns + k / depth])
            .collect();
        matrix(client, &flipped, [columns, depth], layout, dtype).transposed()
    }

    /// The products on the device, row by row: with the factor, and with the weight.
    fn run(&self, client: &Client) -> (Vec<f32>, Option<Vec<f32>>) {
        let [input, _, result] = self.layouts;
        let poison = |columns: usize, dtype| {
            let values = vec![f32::NAN; self.rows * columns];
            matrix(client, &values, [self.rows, columns], result, dtype)
        };
        let shape = [self.rows, self.depth];
        let product = LowRankProduct {
            input: matrix(client, &self.input, shape, input, self.dtype),
            factor: self.right(client, &self.factor, self.rank, FloatType::F32),
            projection: poison(self.rank, FloatType::F32),
            dense: self.columns.map(|columns| DenseProduct {
                weight: self.right(client, &self.weight, columns, self.dtype),
                output: poison(columns, self.dtype),
            }),
        };
        let projection = product.projection.clone();
        let output = product.dense.as_ref().map(|dense| dense.output.clone());
        low_rank_product(client, product).unwrap();
        (
            read(client, &projection),
            output.map(|output| read(client, &output)),
        )
    }

    fn check(&self, client: &Client) {
        let (projection, output) = self.run(client);
        self.compare("projection", &projection, &self.factor, self.rank, 0.0);
        if let (Some(output), Some(columns)) = (output, self.columns) {
            let store = match self.dtype {
                FloatType::F32 => 0.0,
                FloatType::F16 => 2f64.powi(-11),
                FloatType::BF16 => 2f64.powi(-8),
            };
            self.compare("output", &output, &self.weight, columns, store);
        }
    }

    fn compare(&self, name: &str, found: &[f32], right: &[f32], columns: usize, store: f64) {
        let exact = reference::product(&self.input, right, [self.rows, self.depth, columns]);
        assert_eq!(found.len(), exact.value.len());
        for (place, found) in found.iter().enumerate() {
            let expected = exact.value[place];
            // Each step rounds a product and a sum (with fma once), in some order; then the store
            // rounds to a narrow type. Below its normal range f16 has steps of 2^-24.
            let rounding = (2 * self.depth + 1) as f64 * f64::from(f32::EPSILON) / 2.0;
            let sum = rounding * exact.magnitude[place];
            let bound = sum + store * (expected.abs() + sum) + f64::from(store > 0.0) * 6e-8;
            assert!(
                (f64::from(*found) - expected).abs() <= bound,
                "{name}[{place}] of {}x{} r {} columns {:?} {:?} {:?} is {found}, not {expected} \
                 within {bound:e}",
                self.rows,
                self.depth,
                self.rank,
                self.columns,
                self.dtype,
                self.layouts
            );
        }
    }
}

fn types(client: &Client) -> impl Iterator<Item = FloatType> {
    TYPES.into_iter().filter(|dtype| {
        let supported = dtype.is_supported(client);
        if !supported {
            eprintln!("skipped: the device has no {dtype:?}");
        }
        supported
    })
}

#[test]
fn with_a_weight_both_products_are_within_the_rounding_bound() {
    let Some(client) = client() else { return };
    for dtype in types(&client) {
        for (seed, [rows, depth, rank, columns]) in WITH_WEIGHT.into_iter().enumerate() {
            let check = |layouts| {
                Case::random([rows, depth, rank], Some(columns), dtype, layouts).check(&client);
            };
            // Each shape in two of the layouts, and rows without gaps; a software driver takes
            // seconds to compile each combination.
            for which in [seed % 4, (seed + 1) % 4] {
                let all = Layout::ALL;
                check([all[(which + seed) % 4], all[which], all[3 - which]]);
            }
            check([Layout::RowMajor; 3]);
        }
    }
}

#[test]
fn without_one_the_projection_is_within_the_rounding_bound() {
    let Some(client) = client() else { return };
    for dtype in types(&client) {
        for (seed, shape) in WITHOUT.into_iter().enumerate() {
            let all = Layout::ALL;
            let layouts = |which: usize| {
                let [factor, result] = [seed, 2 * seed].map(|turn| all[(which + turn) % 4]);
                [all[which], factor, result]
            };
            // The input of a gradient: its rows are the columns of what is in memory.
            let gradient = [Layout::ColumnMajor, Layout::RowMajor, Layout::ColumnMajor];
            for layouts in [layouts(0), layouts(seed % 4), gradient] {
                Case::random(shape, None, dtype, layouts).check(&client);
            }
        }
    }
}

/// The backward pass, `G·Wᵀ` and `G·bᵀ`, takes `W` and `b` without copies.
#[test]
fn transposed_operands_give_the_backward_products() {
    let Some(client) = client() else { return };
    for layout in Layout::ALL {
        let layouts = [Layout::RowMajor, layout, Layout::RowMajor];
        let mut case = Case::random([37, 44, 8], Some(52), FloatType::F32, layouts);
        case.transposed = true;
        case.check(&client);
    }
}

/// The projection does not depend on the weight, and the output not on the factor.
#[test]
fn a_non_finite_operand_stays_on_its_side() {
    let Some(client) = client() else { return };
    let (rank, columns) = (3, 70);
    let finite = |values: &[f32], columns: usize, except: usize| {
        let mut places = values.iter().enumerate();
        places.all(|(place, value)| value.is_finite() == (place % columns != except))
    };
    let case = Case::random(
        [9, 10, rank],
        Some(columns),
        FloatType::F32,
        [Layout::RowMajor; 3],
    );
    let mut poisoned = case.clone();
    poisoned.weight[columns - 1] = f32::INFINITY;
    let (projection, output) = poisoned.run(&client);
    assert!(finite(&output.unwrap(), columns, columns - 1) && finite(&projection, rank, rank));
    let mut poisoned = case;
    poisoned.factor[0] = f32::NAN;
    let (projection, output) = poisoned.run(&client);
    assert!(finite(&output.unwrap(), columns, columns) && finite(&projection, rank, 0));
}

#[test]
fn equal_inputs_give_equal_bits() {
    let Some(client) = client() else { return };
    let rows = [Layout::RowMajor; 3];
    for columns in [None, Some(130)] {
        let case = Case::random([140, 1500, 9], columns, FloatType::F32, rows);
        let bits = || {
            let (projection, output) = case.run(&client);
            let values = projection.into_iter().chain(output.unwrap_or_default());
            values.map(f32::to_bits).collect::<Vec<_>>()
        };
        assert_eq!(bits(), bits());
    }
}

#[test]
fn unfit_operands_are_refused() {
    let Some(client) = client() else { return };
    let zeros = |shape: [usize; 2], dtype| {
        let values = vec![0.0; shape[0] * shape[1]];
        matrix(&client, &values, shape, Layout::RowMajor, dtype)
    };
    let dense = DenseProduct {
        weight: zeros([6, 8], FloatType::F32),
        output: zeros([4, 8], FloatType::F32),
    };
    let product = LowRankProduct {
        input: zeros([4, 6], FloatType::F32),
        factor: zeros([6, 2], FloatType::F32),
        projection: zeros([4, 2], FloatType::F32),
        dense: Some(dense.clone()),
    };
    let run = |change: &dyn Fn(&mut LowRankProduct, &mut DenseProduct)| {
        let (mut product, mut dense) = (product.clone(), dense.clone());
        change(&mut product, &mut dense);
        product.dense = Some(dense);
        low_rank_product(&client, product)
    };
    let shape = |operand, expected, found| {
        Err(KernelError::Shape {
            operand,
            expected,
            found,
        })
    };
    let element = |operand, expected, found| {
        Err(KernelError::ElementType {
            operand,
            expected,
            found,
        })
    };
    assert_eq!(run(&|_, _| ()), Ok(()));
    let half = FloatType::F16;
    assert_eq!(
        run(&|_, dense| dense.weight = zeros([5, 8], FloatType::F32)),
        shape("weight", [6, 8], [5, 8])
    );
    assert_eq!(
        run(&|product, _| product.factor = zeros([5, 2], FloatType::F32)),
        shape("factor", [6, 2], [5, 2])
    );
    assert_eq!(
        run(&|product, _| product.projection = zeros([4, 3], FloatType::F32)),
        shape("projection", [4, 2], [4, 3])
    );
    assert_eq!(
        run(&|product, _| product.factor = zeros([6, 2], half)),
        element("factor", FloatType::F32, half)
    );
    assert_eq!(
        run(&|_, dense| dense.output = zeros([4, 8], half)),
        element("output", FloatType::F32, half)
    );
    assert!(matches!(
        run(&|product, _| product.input.strides = [600, 1]),
        Err(KernelError::OutOfBounds {
            operand: "input",
            ..
        })
    ));
    assert!(matches!(
        run(&|_, dense| dense.output.strides = [8, 0]),
        Err(KernelError::Overlap {
            operand: "output",
            ..
        })
    ));
    assert!(matches!(
        run(&|product, _| product.projection.strides = [0, 1]),
        Err(KernelError::Overlap {
            operand: "projection",
            ..
        })
    ));
}
