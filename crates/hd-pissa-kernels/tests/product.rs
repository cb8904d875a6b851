//! The low-rank product on a device against its definition.

mod common;

use common::*;
use cubecl::client::Client;
use hd_pissa_kernels::{
    Buffer, FloatType, KernelError, LowRankProduct, Matrix, low_rank_product, reference,
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

const ROWS: [Layout; 3] = [Layout::RowMajor; 3];

/// The kernel of ours, and the pipeline in a build that has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Kernel,
    #[cfg(feature = "pipeline")]
    Pipeline,
}

impl Way {
    const ALL: &[Self] = &[
        Self::Kernel,
        #[cfg(feature = "pipeline")]
        Self::Pipeline,
    ];

    fn run(self, client: &Client, product: LowRankProduct) -> Result<(), KernelError> {
        match self {
            Self::Kernel => low_rank_product(client, product),
            #[cfg(feature = "pipeline")]
            Self::Pipeline => hd_pissa_kernels::low_rank_product_by_pipeline(client, product),
        }
    }
}

/// Operands in row-major order on the host.
#[derive(Clone)]
struct Case {
    way: Way,
    sizes: [usize; 4],
    dtype: FloatType,
    /// Of input, weight and factor; output and projection lie as the input.
    layouts: [Layout; 3],
    /// Whether weight and factor are views of transposed matrices.
    transposed: bool,
    x: Vec<f32>,
    w: Vec<f32>,
    a: Vec<f32>,
    bias: Option<Vec<f32>>,
}

impl Case {
    fn random(way: Way, sizes: [usize; 4], dtype: FloatType, seed: u64) -> Self {
        let [tokens, d_input, rank, d_output] = sizes;
        let random = &mut Random(seed);
        Self {
            way,
            sizes,
            dtype,
            layouts: ROWS,
            transposed: false,
            x: rounded(&random.values(tokens * d_input, 1.0), dtype),
            w: rounded(&random.values(d_input * d_output, 1.0), dtype),
            a: random.values(d_input * rank, 1.0),
            bias: Some(rounded(&random.values(d_output, 1.0), dtype)),
        }
    }

    /// A right operand, its transpose transposed again if the case says so.
    fn right(
        &self,
        client: &Client,
        values: &[f32],
        [rows, columns]: [usize; 2],
        layout: Layout,
        dtype: FloatType,
    ) -> Matrix {
        if !self.transposed {
            return matrix(client, values, [rows, columns], layout, dtype);
        }
        let flipped: Vec<f32> = (0..columns * rows)
            .map(|k| values[k % rows * columns + k / rows])
            .collect();
        matrix(client, &flipped, [columns, rows], layout, dtype).transposed()
    }

    /// The product on the device: `y` and `p`, row by row.
    fn run(&self, client: &Client) -> (Vec<f32>, Vec<f32>) {
        let [tokens, d_input, rank, d_output] = self.sizes;
        let [input, weight, factor] = self.layouts;
        let dtype = self.dtype;
        let poison = vec![f32::NAN; tokens * d_output.max(rank)];
        let product = LowRankProduct {
            input: matrix(client, &self.x, [tokens, d_input], input, dtype),
            weight: self.right(client, &self.w, [d_input, d_output], weight, dtype),
            factor: self.right(client, &self.a, [d_input, rank], factor, FloatType::F32),
            bias: self.bias.as_ref().map(|bias| Buffer {
                handle: upload(client, bias, dtype),
                len: bias.len(),
                dtype,
            }),
            output: matrix(client, &poison, [tokens, d_output], input, dtype),
            projection: matrix(client, &poison, [tokens, rank], input, FloatType::F32),
        };
        let (output, projection) = (product.output.clone(), product.projection.clone());
        self.way.run(client, product).unwrap();
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
        let (operand, factor) = match self.way {
            Way::Kernel => (0.0, 0.0),
            // The factor rounded to the type of the others; on matrix units `f32` to `tf32`.
            #[cfg(feature = "pipeline")]
            Way::Pipeline if !hd_pissa_kernels::has_matrix_units(client, self.dtype) => {
                (0.0, narrow)
            }
            #[cfg(feature = "pipeline")]
            Way::Pipeline => match self.dtype {
                FloatType::F32 => (2f64.powi(-9), 2f64.powi(-9)),
                _ => (0.0, narrow),
            },
        };
        for (name, result, right, columns, read, store, bias) in [
            (
                "y",
                y,
                &self.w,
                d_output,
                operand,
                narrow,
                self.bias.as_ref(),
            ),
            ("p", p, &self.a, rank, factor, 0.0, None),
        ] {
            let exact = reference::product(&self.x, right, [tokens, d_input, columns]);
            assert_eq!(result.len(), exact.value.len());
            for (place, found) in result.iter().enumerate() {
                let shift = bias.map_or(0.0, |bias| f64::from(bias[place % columns]));
                let expected = exact.value[place] + shift;
                // A product and a sum per step, each rounded (with fma once), the bias, and the
                // store in a narrow type. Below its normal range f16 has steps of 2^-24.
                let sum = (2 * d_input + 1) as f64 * wide * (exact.magnitude[place] + shift.abs())
                    + read * exact.magnitude[place];
                let bound = sum + store * (expected.abs() + sum) + f64::from(store > 0.0) * 6e-8;
                assert!(
                    (f64::from(*found) - expected).abs() <= bound,
                    "{:?}: {name}[{place}] of {:?} {:?} {:?} is {found}, not {expected} within {bound:e}",
                    self.way,
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
    check_all(Way::Kernel);
}

#[cfg(feature = "pipeline")]
#[test]
fn product_by_pipeline_is_within_the_rounding_bound() {
    check_all(Way::Pipeline);
}

fn check_all(way: Way) {
    let Some(client) = client() else { return };
    for dtype in [FloatType::F32, FloatType::F16, FloatType::BF16] {
        if !dtype.is_supported(&client) {
            eprintln!("skipped: the device has no {dtype:?}");
            continue;
        }
        for (seed, sizes) in SHAPES.into_iter().enumerate() {
            let case = Case::random(way, sizes, dtype, seed as u64);
            // Each shape in two of the layouts, and rows without gaps; a software driver takes
            // seconds to compile each combination, and a pipeline longer: one layout there.
            let layouts = [seed % 4, (seed + 1) % 4].into_iter();
            for which in layouts.take(if way == Way::Kernel { 2 } else { 1 }) {
                // Every layout meets the bias in every other shape.
                let with_bias = (which + seed).is_multiple_of(2);
                let layouts = [
                    Layout::ALL[(which + seed) % 4],
                    Layout::ALL[which],
                    Layout::ALL[3 - which],
                ];
                Case {
                    layouts,
                    bias: case.bias.clone().filter(|_| with_bias),
                    ..case.clone()
                }
                .check(&client);
            }
            Case { bias: None, ..case }.check(&client);
        }
    }
}

/// The backward pass, `G·Wᵀ` and `G·bᵀ`, takes `W` and `b` as they lie.
#[test]
fn transposed_operands_give_the_backward_products() {
    let Some(client) = client() else { return };
    for &way in Way::ALL {
        let case = Case::random(way, [37, 44, 8, 52], FloatType::F32, 9);
        for layout in Layout::ALL {
            Case {
                layouts: [Layout::RowMajor, layout, layout],
                transposed: true,
                bias: None,
                ..case.clone()
            }
            .check(&client);
        }
    }
}

/// The projection does not see the weight, nor the output the factor.
#[test]
fn a_non_finite_operand_stays_on_its_side() {
    let Some(client) = client() else { return };
    let sizes @ [_, _, rank, d_output] = [9, 10, 3, 70];
    let finite = |values: &[f32], columns: usize, except: usize| {
        let mut places = values.iter().enumerate();
        places.all(|(place, value)| value.is_finite() == (place % columns != except))
    };
    for &way in Way::ALL {
        let case = Case::random(way, sizes, FloatType::F32, 1);
        let mut poisoned = case.clone();
        poisoned.w[d_output - 1] = f32::INFINITY;
        let (y, p) = poisoned.run(&client);
        assert!(finite(&y, d_output, d_output - 1) && finite(&p, rank, rank));
        let mut poisoned = case;
        poisoned.a[0] = f32::NAN;
        let (y, p) = poisoned.run(&client);
        assert!(finite(&y, d_output, d_output) && finite(&p, rank, 0));
    }
}

#[test]
fn unfit_operands_are_refused() {
    let Some(client) = client() else { return };
    for &way in Way::ALL {
        refuse_unfit(&client, way);
    }
}

fn refuse_unfit(client: &Client, way: Way) {
    let zeros = |shape: [usize; 2], dtype| {
        matrix(
            client,
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
    let run = |product| way.run(client, product);
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
