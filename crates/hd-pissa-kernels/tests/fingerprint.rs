//! Fingerprints on a device against their definition.

mod common;

use common::*;
use cubecl::client::Client;
use hd_pissa_kernels::{FloatType, KernelError, Matrix, fingerprint};

fn on_device(client: &Client, values: &Matrix) -> [u32; 2] {
    let words = fingerprint(client, values.clone()).unwrap();
    let words = download_words(client, &words);
    words.try_into().expect("two words")
}

fn expected(bits: impl Iterator<Item = u32>) -> [u32; 2] {
    hd_pissa_bits::fingerprint((0..).zip(bits))
}

const SHAPES: [[usize; 2]; 10] = [
    [1, 1],
    [1, 7],
    [7, 1],
    [13, 11],
    [256, 1],
    [31, 257],
    [300, 64],
    [1031, 769],
    [0, 4],
    [4, 0],
];

#[test]
fn fingerprints_are_those_of_the_definition_in_every_layout() {
    let Some(client) = client() else { return };
    for dtype in [FloatType::F32, FloatType::F16, FloatType::BF16] {
        if !dtype.is_supported(&client) {
            eprintln!("skipped: the device has no {dtype:?}");
            continue;
        }
        for (seed, shape @ [rows, columns]) in SHAPES.into_iter().enumerate() {
            let values = Random(seed as u64).values(rows * columns, 2.0);
            let values = rounded(&values, dtype);
            for layout in Layout::ALL {
                let on_it = matrix(&client, &values, shape, layout, dtype);
                let found = on_device(&client, &on_it);
                assert_eq!(
                    found,
                    expected(values.iter().map(|value| value.to_bits())),
                    "{dtype:?} {shape:?} {layout:?}"
                );
            }
        }
    }
}

/// Every pattern of 32 bits counts unchanged: integers, NaN with their payloads, subnormal numbers.
#[test]
fn words_of_32_bits_count_by_their_bits() {
    let Some(client) = client() else { return };
    let mut random = Random(5);
    let mut words: Vec<u32> = (0..63 * 65).map(|_| random.word() as u32).collect();
    words[..6].copy_from_slice(&[0, 1, 0x8000_0000, 0x7fc0_0001, 0xff80_0001, 0x7f80_0000]);
    let handle = upload_words(&client, &words);
    let on_it = Matrix::row_major(handle, [63, 65], FloatType::F32);
    assert_eq!(on_device(&client, &on_it), expected(words.into_iter()));
}

#[test]
fn every_small_change_shows() {
    let Some(client) = client() else { return };
    let shape = [37, 41];
    let values = Random(9).values(37 * 41, 1.0);
    let found = |values: &[f32]| {
        let on_it = matrix(&client, values, shape, Layout::RowMajor, FloatType::F32);
        on_device(&client, &on_it)
    };
    let before = found(&values);
    let changed = |change: &dyn Fn(&mut [f32])| {
        let mut values = values.clone();
        change(&mut values);
        let after = found(&values);
        // Checks each word separately.
        after[0] != before[0] && after[1] != before[1]
    };
    for (first, second) in [(0, 1), (0, 1516), (40, 41), (700, 741), (3, 1024)] {
        assert!(changed(&|v| {
            v[first] = -v[first];
            v[second] = -v[second];
        }));
        assert!(changed(&|v| v.swap(first, second)));
        assert!(changed(
            &|v| v[first] = f32::from_bits(v[first].to_bits() ^ 1)
        ));
    }
    let zeros = [0.0; 37 * 41];
    let mut signed = zeros;
    signed[5] = -0.0;
    assert_ne!(found(&zeros), found(&signed));
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
    let run = |values: Matrix| fingerprint(&client, values).map(|_| ());
    assert_eq!(run(values.clone()), Ok(()));
    let padded = Matrix {
        strides: [5, 1],
        ..values.clone()
    };
    assert_eq!(
        run(padded),
        Err(KernelError::OutOfBounds {
            operand: "values",
            needed: 14,
            available: 12
        })
    );
    let huge = Matrix {
        shape: [1 << 20, 1 << 20],
        strides: [0, 0],
        ..values.clone()
    };
    assert_eq!(
        run(huge),
        Err(KernelError::TooLarge {
            operand: "values",
            elements: 1 << 40
        })
    );
    if !FloatType::BF16.is_supported(&client) {
        let dtype = FloatType::BF16;
        assert_eq!(
            run(Matrix { dtype, ..values }),
            Err(KernelError::Unsupported(dtype))
        );
    }
}
