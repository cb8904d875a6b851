//! The merge on a device against its definition.

mod common;

use common::*;
use cubecl::client::Client;
use cubecl::server::Handle;
use half::f16;
use hd_pissa_bits::{Half, Rounding, StochasticKey};
use hd_pissa_kernels::reference::{self, Shard};
use hd_pissa_kernels::{FloatType, KernelError, Matrix, Merge, merge, residual_shape};

struct Run {
    weight: Matrix,
    shards: Vec<Shard>,
    rank: usize,
}

impl Run {
    /// Queues a merge, which changes the weight only if `gate` is zero. Returns the buffer with its
    /// sum of squares.
    fn gated(
        &self,
        client: &Client,
        rounding: Rounding,
        residual: Option<Handle>,
        gate: u32,
    ) -> Result<Handle, KernelError> {
        merge(
            client,
            Merge {
                weight: self.weight.clone(),
                frames: frames(client, &self.shards),
                deltas: deltas(client, &self.shards),
                rank: self.rank,
                shards: self.shards.len(),
                rounding,
                residual,
                gate: upload_words(client, &[gate]),
            },
        )
    }

    /// The sum of squares.
    fn merge(&self, client: &Client, rounding: Rounding) -> f32 {
        let squares = self.gated(client, rounding, None, 0).unwrap();
        download(client, &squares, 1, FloatType::F32)[0]
    }
}

/// Shapes that reach every tile and both ways of reading: (d_input, rank, d_output, shards).
const SHAPES: [(usize, usize, usize, usize); 12] = [
    (1, 1, 1, 1),
    (2, 1, 3, 2),
    (5, 3, 7, 2),
    (31, 2, 33, 3),
    (64, 8, 48, 2),
    (13, 256, 9, 1),
    (97, 5, 101, 4),
    (36, 4, 20, 8),
    (367, 3, 389, 1),
    (384, 8, 400, 2),
    (1031, 1, 769, 2),
    (896, 4, 1024, 1),
];

#[test]
fn f32_merge_is_within_the_rounding_bound() {
    let Some(client) = client() else { return };
    for (case, (d_input, rank, d_output, count)) in SHAPES.into_iter().enumerate() {
        let random = &mut Random(case as u64);
        let shards = shards(random, count, [d_input, rank, d_output], 1e-2);
        let exact = reference::update(&shards, [d_input, rank, d_output]);
        let before = random.values(d_input * d_output, 1.0);
        for layout in Layout::ALL {
            {
                let weight = matrix(
                    &client,
                    &before,
                    [d_input, d_output],
                    layout,
                    FloatType::F32,
                );
                let run = Run {
                    weight,
                    shards: shards.clone(),
                    rank,
                };
                let squares = run.merge(&client, Rounding::Nearest);
                let after = read(&client, &run.weight);
                // Each of the n products and sums rounds once (with or without fma: twice), the
                // sum with W once more.
                let eps = f64::from(f32::EPSILON) / 2.0;
                let n = (2 * 2 * rank * count + 1) as f64;
                let (mut sum, mut slack) = (0.0f64, 0.0f64);
                for place in 0..after.len() {
                    let expected = f64::from(before[place]) + exact.value[place];
                    let update_error = n * eps * exact.magnitude[place];
                    let bound = update_error * (1.0 + eps) + eps * expected.abs();
                    let error = (f64::from(after[place]) - expected).abs();
                    assert!(
                        error <= bound,
                        "{d_input}x{d_output} r {rank} K {count} {layout:?}: \
                         element {place} is off by {error:e}, more than {bound:e}"
                    );
                    sum += exact.value[place].powi(2);
                    slack += 2.0 * exact.value[place].abs() * update_error + update_error.powi(2);
                }
                // The longest chain of sums is shorter than the number of elements, and each
                // rounds a sum of positive terms.
                let bound = slack + eps * (after.len() + 2) as f64 * (sum + slack);
                assert!((f64::from(squares) - sum).abs() <= bound, "{squares} {sum}");
            }
        }
    }
}

/// Half-precision weights see the same f32 sum, so all of their bits are known.
#[test]
fn f16_merges_round_the_f32_merge() {
    let Some(client) = client() else { return };
    if !FloatType::F16.is_supported(&client) {
        return eprintln!("skipped: the device has no f16");
    }
    let key = StochasticKey {
        seed: 42,
        step: 7,
        path: 0x1234_5678_9abc_def0,
    };
    for (case, (d_input, rank, d_output, count)) in SHAPES.into_iter().enumerate() {
        let random = &mut Random(100 + case as u64);
        let shape = [d_input, d_output];
        let shards = shards(random, count, [d_input, rank, d_output], 1e-3);
        let before = rounded(&random.values(d_input * d_output, 1.0), FloatType::F16);
        for layout in Layout::ALL {
            let run = |dtype| Run {
                weight: matrix(&client, &before, shape, layout, dtype),
                shards: shards.clone(),
                rank,
            };
            let wide = run(FloatType::F32);
            wide.merge(&client, Rounding::Nearest);
            let wide = read(&client, &wide.weight);

            let plain = run(FloatType::F16);
            plain.merge(&client, Rounding::Nearest);
            assert_eq!(read(&client, &plain.weight), rounded(&wide, FloatType::F16));

            let random = run(FloatType::F16);
            random.merge(&client, Rounding::Stochastic(key));
            let words = key.generator();
            let expected: Vec<f32> = wide
                .iter()
                .enumerate()
                .map(|(place, value)| {
                    let (row, column) = (place / d_output, place % d_output);
                    f16::stochastic(*value, words(row as u32, column as u32)).widen()
                })
                .collect();
            assert_eq!(
                read(&client, &random.weight),
                expected,
                "{shape:?} {layout:?}"
            );
        }
    }
}

/// The residual half of every element, row by row.
fn residual_of(weight: &Matrix, words: &[u32]) -> Vec<u16> {
    let [rows, columns] = weight.shape;
    let column_major = weight.strides[0] < weight.strides[1] && rows > 1 && columns > 1;
    let mut halves = Vec::new();
    for i in 0..rows {
        for j in 0..columns {
            let by_column = column_major || columns == 1 && rows > 1;
            let (major, minor, extent) = if by_column {
                (j, i, rows)
            } else {
                (i, j, columns)
            };
            let word = words[major * extent.div_ceil(2) + minor / 2];
            halves.push((word >> (16 * (minor % 2))) as u16);
        }
    }
    halves
}

#[test]
fn compensated_f16_follows_the_f32_trajectory_bit_for_bit() {
    let Some(client) = client() else { return };
    if !FloatType::F16.is_supported(&client) {
        return eprintln!("skipped: the device has no f16");
    }
    for ((d_input, rank, d_output, count), layout) in SHAPES[..8]
        .iter()
        .copied()
        .flat_map(|s| Layout::ALL.map(|layout| (s, layout)))
    {
        let random = &mut Random(7);
        let shape = [d_input, d_output];
        // Away from zero, where an f16 pair holds every f32.
        let before: Vec<f32> = random
            .values(d_input * d_output, 0.5)
            .iter()
            .map(|v| v + v.signum() * 0.25)
            .collect();
        let before = rounded(&before, FloatType::F16);
        let wide = matrix(&client, &before, shape, layout, FloatType::F32);
        let high = matrix(&client, &before, shape, layout, FloatType::F16);
        let words = residual_shape(&high).iter().product();
        let residual = upload_words(&client, &vec![0; words]);
        let mut changed = false;
        for _ in 0..6 {
            let shards = shards(random, count, [d_input, rank, d_output], 2e-5);
            for (weight, residual) in [(&wide, None), (&high, Some(residual.clone()))] {
                let run = Run {
                    weight: weight.clone(),
                    shards: shards.clone(),
                    rank,
                };
                run.gated(&client, Rounding::Nearest, residual, 0).unwrap();
            }
            let expected = read(&client, &wide);
            let halves = residual_of(&high, &download_words(&client, &residual));
            let pairs: Vec<f32> = read(&client, &high)
                .iter()
                .zip(&halves)
                .map(|(high, low)| f16::from_f32(*high).join(*low))
                .collect();
            assert_eq!(pairs, expected, "{shape:?} {layout:?}");
            changed |= expected != before;
        }
        assert!(changed);
    }
}

#[test]
fn a_closed_gate_leaves_the_weight_and_gives_zero() {
    let Some(client) = client() else { return };
    for poison in [1.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let random = &mut Random(3);
        let mut shards = shards(random, 2, [40, 4, 36], 1e-2);
        shards[1].delta_b[17] = poison;
        let before = random.values(40 * 36, 1.0);
        let weight = matrix(&client, &before, [40, 36], Layout::RowMajor, FloatType::F32);
        let run = Run {
            weight,
            shards,
            rank: 4,
        };
        let squares = run.gated(&client, Rounding::Nearest, None, 3).unwrap();
        assert_eq!(read(&client, &run.weight), before);
        assert_eq!(download(&client, &squares, 1, FloatType::F32), [0.0]);
    }
}

#[test]
fn equal_inputs_give_equal_bits() {
    let Some(client) = client() else { return };
    let random = &mut Random(11);
    let shards = shards(random, 3, [389, 6, 401], 1e-2);
    let before = random.values(389 * 401, 1.0);
    let [first, second] = [(), ()].map(|()| {
        let weight = matrix(
            &client,
            &before,
            [389, 401],
            Layout::RowMajor,
            FloatType::F32,
        );
        let run = Run {
            weight,
            shards: shards.clone(),
            rank: 6,
        };
        let squares = run.merge(&client, Rounding::Nearest);
        let mut values = read(&client, &run.weight);
        values.push(squares);
        values
    });
    assert_eq!(first, second);
}

#[test]
fn nothing_to_merge_leaves_the_weight_and_gives_zero() {
    let Some(client) = client() else { return };
    for (shape, count) in [([0, 5], 1), ([5, 0], 1), ([3, 4], 0)] {
        let random = &mut Random(5);
        let before = random.values(shape[0] * shape[1], 1.0);
        let weight = matrix(&client, &before, shape, Layout::RowMajor, FloatType::F32);
        let shards = shards(random, count, [shape[0], 2, shape[1]], 1.0);
        let run = Run {
            weight,
            shards,
            rank: 2,
        };
        assert_eq!(run.merge(&client, Rounding::Nearest), 0.0);
        assert_eq!(read(&client, &run.weight), before);
    }
}

#[test]
fn unfit_operands_are_refused() {
    let Some(client) = client() else { return };
    let random = &mut Random(5);
    let shards = shards(random, 2, [6, 2, 8], 1.0);
    let weight = matrix(
        &client,
        &[0.0; 48],
        [6, 8],
        Layout::RowMajor,
        FloatType::F32,
    );
    let run = |weight: Matrix, rank, residual| {
        let run = Run {
            weight,
            shards: shards.clone(),
            rank,
        };
        run.gated(&client, Rounding::Nearest, residual, 0)
            .map(|_| ())
    };
    assert_eq!(run(weight.clone(), 2, None), Ok(()));
    assert!(matches!(
        run(weight.clone(), 3, None),
        Err(KernelError::OutOfBounds {
            operand: "frames",
            ..
        })
    ));
    let overlapping = Matrix {
        strides: [4, 1],
        ..weight.clone()
    };
    assert!(matches!(
        run(overlapping, 2, None),
        Err(KernelError::Overlap {
            operand: "weight",
            strides: [4, 1]
        })
    ));
    let long = Matrix {
        shape: [7, 8],
        ..weight.clone()
    };
    assert!(matches!(
        run(long, 2, None),
        Err(KernelError::OutOfBounds {
            operand: "weight",
            needed: 56,
            available: 48
        })
    ));
    if FloatType::F16.is_supported(&client) {
        let half = matrix(
            &client,
            &[0.0; 48],
            [6, 8],
            Layout::RowMajor,
            FloatType::F16,
        );
        let short = upload_words(&client, &[0; 23]);
        assert_eq!(
            run(half, 2, Some(short)),
            Err(KernelError::OutOfBounds {
                operand: "residual",
                needed: 24,
                available: 23
            })
        );
    }
    if !FloatType::BF16.is_supported(&client) {
        let weight = matrix(
            &client,
            &[0.0; 48],
            [6, 8],
            Layout::RowMajor,
            FloatType::BF16,
        );
        assert_eq!(
            run(weight, 2, None),
            Err(KernelError::Unsupported(FloatType::BF16))
        );
    }
}
