//! The statistics of rows on a device against their definition.

mod common;

use common::*;
use cubecl::client::Client;
use hd_pissa_kernels::{FloatType, KernelError, Matrix, reference, row_statistics};

fn on_device(client: &Client, values: &Matrix, split: usize) -> Vec<[f32; 4]> {
    let statistics = row_statistics(client, values.clone(), split).unwrap();
    let numbers = download(client, &statistics, 4 * values.shape[0], FloatType::F32);
    let rows = numbers.chunks_exact(4);
    rows.map(|row| row.try_into().expect("four numbers"))
        .collect()
}

/// The sums may have any order: each of `len` terms and each sum rounds once, and terms below the
/// normal range may become zero.
fn assert_statistics(found: [f32; 4], row: &[f32], split: usize, case: &str) {
    let expected = reference::row_statistics(row, split);
    assert_eq!(f64::from(found[0]), expected[0], "{case}: not finite");
    for which in 1..4 {
        let (found, expected) = (f64::from(found[which]), expected[which]);
        let bound = (row.len() + 1) as f64
            * (f64::from(f32::EPSILON) * expected + f64::from(f32::MIN_POSITIVE));
        let largest = f64::from(f32::MAX);
        let fits = (found - expected).abs() <= bound;
        let overflows = found == f64::INFINITY && expected + bound > largest;
        assert!(
            fits || overflows,
            "{case}: statistic {which} is {found:e}, not {expected:e} within {bound:e}"
        );
    }
}

/// Values of all exponents, which overflow when squared, with some that are not finite.
fn wild(random: &mut Random, len: usize) -> Vec<f32> {
    let odd = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -f32::NAN];
    (0..len)
        .map(|_| match random.word() % 11 {
            0 => odd[(random.word() % 4) as usize],
            1 => f32::from_bits(0x7f80_0001),
            2 => f32::MAX,
            3 => -0.0,
            // Below the normal range, and near the end of what still counts when scaled.
            4 => f32::from_bits(random.word() as u32 & 0x807f_ffff),
            5 => f32::from_bits(0x2000_0000 + (random.word() as u32 & 0x1fff_ffff)),
            _ => f32::from_bits(random.word() as u32),
        })
        .collect()
}

/// Rows and columns: tiny, prime, about the size of a cube and of a chunk, of many chunks, empty.
const SHAPES: [[usize; 2]; 12] = [
    [1, 1],
    [3, 2],
    [64, 13],
    [2, 255],
    [5, 257],
    [3, 4096],
    [2, 4097],
    [1, 99_991],
    [7, 20_011],
    [2, 4_194_301],
    [3, 0],
    [0, 5],
];

#[test]
fn statistics_are_those_of_the_definition() {
    let Some(client) = client() else { return };
    for (seed, shape @ [rows, columns]) in SHAPES.into_iter().enumerate() {
        let random = &mut Random(seed as u64);
        let tame = random.values(rows * columns, 3.0);
        for values in [tame, wild(random, rows * columns)] {
            for layout in Layout::ALL {
                let on_it = matrix(&client, &values, shape, layout, FloatType::F32);
                for split in [0, columns / 3, columns] {
                    let found = on_device(&client, &on_it, split);
                    assert_eq!(found.len(), rows);
                    for (row, found) in found.into_iter().enumerate() {
                        let values = &values[row * columns..][..columns];
                        let case = format!("row {row} of {shape:?} {layout:?} split at {split}");
                        assert_statistics(found, values, split, &case);
                    }
                }
            }
        }
    }
}

/// A row of the largest values: its squares overflow, their scaled sum does not.
#[test]
fn the_scaled_sum_outlives_an_overflow() {
    let Some(client) = client() else { return };
    let values = vec![f32::MAX; 30_000];
    let on_it = matrix(
        &client,
        &values,
        [1, 30_000],
        Layout::RowMajor,
        FloatType::F32,
    );
    let found = on_device(&client, &on_it, 29_999)[0];
    assert_eq!(found[..3], [0.0, f32::INFINITY, f32::INFINITY]);
    let expected = 30_000.0 * 2f64.powi(96);
    assert!((f64::from(found[3]) / expected - 1.0).abs() < 1e-4);
}

/// A row of one value, 2^24 times, none of them finite: the stride is zero.
#[test]
fn the_count_is_exact_up_to_its_limit() {
    let Some(client) = client() else { return };
    for columns in [(1 << 24) - 1, 1 << 24] {
        let values = Matrix {
            handle: upload(&client, &[f32::NAN], FloatType::F32),
            shape: [1, columns],
            strides: [0, 0],
            dtype: FloatType::F32,
        };
        let found = on_device(&client, &values, 5)[0];
        assert_eq!(found, [columns as f32, 0.0, 0.0, 0.0]);
    }
}

#[test]
fn equal_rows_give_equal_bits() {
    let Some(client) = client() else { return };
    let columns = 70_001;
    let row = Random(3).values(columns, 2.0);
    let rows = [&row[..]; 5].concat();
    let on_it = matrix(&client, &rows, [5, columns], Layout::Padded, FloatType::F32);
    let alone = matrix(
        &client,
        &row,
        [1, columns],
        Layout::RowMajor,
        FloatType::F32,
    );
    let expected = on_device(&client, &alone, 40_000)[0].map(f32::to_bits);
    for _ in 0..3 {
        for found in on_device(&client, &on_it, 40_000) {
            assert_eq!(found.map(f32::to_bits), expected);
        }
    }
}

#[test]
fn unfit_operands_are_refused() {
    let Some(client) = client() else { return };
    let values = matrix(
        &client,
        &[1.0; 12],
        [3, 4],
        Layout::RowMajor,
        FloatType::F32,
    );
    let run = |values: Matrix, split| row_statistics(&client, values, split).map(|_| ());
    assert_eq!(run(values.clone(), 4), Ok(()));
    let (split, columns) = (5, 4);
    assert_eq!(
        run(values.clone(), split),
        Err(KernelError::Split { split, columns })
    );
    let long = Matrix {
        shape: [4, 4],
        ..values.clone()
    };
    assert!(matches!(
        run(long, 0),
        Err(KernelError::OutOfBounds {
            operand: "values",
            needed: 16,
            available: 12
        })
    ));
    let half = Matrix {
        dtype: FloatType::F16,
        ..values.clone()
    };
    assert!(matches!(
        run(half, 0),
        Err(KernelError::ElementType {
            operand: "values",
            ..
        })
    ));
    // One element in memory, more than an index can count.
    let huge = Matrix {
        shape: [1, usize::MAX],
        strides: [0, 0],
        ..values.clone()
    };
    assert!(matches!(
        run(huge, 0),
        Err(KernelError::TooLarge {
            operand: "values",
            ..
        })
    ));
    let far = Matrix {
        strides: [usize::MAX, usize::MAX],
        ..values
    };
    assert!(matches!(
        run(far, 0),
        Err(KernelError::OutOfBounds {
            operand: "values",
            ..
        })
    ));
}
