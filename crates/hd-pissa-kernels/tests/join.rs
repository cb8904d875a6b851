//! Copies of matrices end to end, against the definition.

mod common;

use common::*;
use hd_pissa_kernels::{FloatType, KernelError, Matrix, join};

/// More parts than one launch takes, in every layout and of very different sizes, some empty.
#[test]
fn parts_lie_end_to_end() {
    let Some(client) = client() else { return };
    let shapes = [[3, 5], [0, 4], [1, 1], [61, 17], [7, 0], [1, 9001]];
    for (count, start) in [(1, 0), (4, 3), (16, 1), (37, 0)] {
        let random = &mut Random(count as u64);
        let mut expected = random.values(start, 1.0);
        let before = expected.clone();
        let parts: Vec<Matrix> = (0..count)
            .map(|i| {
                let shape @ [rows, columns] = shapes[i % shapes.len()];
                let values = random.values(rows * columns, 1.0);
                expected.extend(&values);
                let layout = Layout::ALL[i % Layout::ALL.len()];
                matrix(&client, &values, shape, layout, FloatType::F32)
            })
            .collect();
        // Elements before and after stay.
        let end = expected.len();
        expected.extend([7.0; 5]);
        let mut initial = vec![0.0; end];
        initial[..start].copy_from_slice(&before);
        initial.extend([7.0; 5]);
        let handle = upload(&client, &initial, FloatType::F32);
        let target = Matrix::row_major(handle, [1, expected.len()], FloatType::F32);
        join(&client, parts, target.clone(), start).unwrap();
        let found = download(&client, &target.handle, expected.len(), FloatType::F32);
        assert_eq!(found, expected, "{count} parts from {start} on");
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let Some(client) = client() else { return };
    let part = |dtype| {
        let shape = [2, 3];
        Matrix::row_major(upload(&client, &[1.0; 6], dtype), shape, dtype)
    };
    let target = |len, dtype| {
        let handle = upload(&client, &vec![0.0; len], dtype);
        Matrix::row_major(handle, [1, len], dtype)
    };
    let refused = |part, target, start| join(&client, vec![part], target, start).unwrap_err();
    assert!(matches!(
        refused(part(FloatType::F32), target(7, FloatType::F32), 2),
        KernelError::OutOfBounds {
            needed: 8,
            available: 7,
            ..
        }
    ));
    for (of_part, of_target) in [
        (FloatType::F16, FloatType::F32),
        (FloatType::F32, FloatType::F16),
    ] {
        assert!(matches!(
            refused(part(of_part), target(12, of_target), 0),
            KernelError::ElementType { .. }
        ));
    }
    let short = Matrix {
        shape: [3, 3],
        ..part(FloatType::F32)
    };
    assert!(matches!(
        refused(short, target(12, FloatType::F32), 0),
        KernelError::OutOfBounds { .. }
    ));
}
