//! Leading singular triples of a weight, on the host.

use burn::tensor::{DType, Tensor};
use faer::traits::ComplexField;
use faer::{Mat, MatRef};

use crate::parallel::on_one_thread;
use crate::{HdPissaError, SvdMethod, SvdPrecision};

/// The leading triples of `W = U Σ Vᵀ`, by descending singular value.
///
/// Signs are fixed: the entry of largest magnitude in each column of `U` (the first of equals) is
/// positive. Decompositions of one matrix by different libraries then agree where the singular
/// values differ.
#[derive(Debug)]
pub(crate) struct TruncatedSvd {
    /// `[d_input, count]`
    u: Mat<f64>,
    /// `[d_output, count]`
    v: Mat<f64>,
    /// All singular values, not only the leading ones.
    pub(crate) values: Vec<f64>,
}

impl TruncatedSvd {
    /// Decomposes `weight: [d_input, d_output]` and keeps `count` triples.
    pub(crate) fn compute(
        path: &str,
        weight: &Tensor<2>,
        method: SvdMethod,
        count: usize,
    ) -> Result<Self, HdPissaError> {
        let host = HostMatrix::read(path, weight)?;
        let SvdMethod::Exact(precision) = method;
        // Workers of any number of threads get the same bits. The decomposition itself is no faster
        // with two threads.
        let svd = on_one_thread(|| match precision {
            SvdPrecision::F32 => exact(host.f32(), count),
            SvdPrecision::F64 => exact(host.f64().as_ref(), count),
        });
        let svd = svd.ok_or_else(|| HdPissaError::NoConvergence { path: path.into() })?;
        host.check_rank(path, &svd.values, count)?;
        Ok(svd)
    }

    /// The factors of the window that starts at component `start`, row by row:
    /// `a = U √Σ / √divisor` of shape `[d_input, rank]` and `b = √Σ Vᵀ / √divisor` of shape
    /// `[rank, d_output]`.
    pub(crate) fn window(&self, start: usize, rank: usize, divisor: f64) -> (Vec<f32>, Vec<f32>) {
        let root = |i: usize| (self.values[start + i] / divisor).sqrt();
        let a = (0..self.u.nrows())
            .flat_map(|row| (0..rank).map(move |i| (row, i)))
            .map(|(row, i)| (self.u[(row, start + i)] * root(i)) as f32)
            .collect();
        let b = (0..rank)
            .flat_map(|i| (0..self.v.nrows()).map(move |col| (i, col)))
            .map(|(i, col)| (self.v[(col, start + i)] * root(i)) as f32)
            .collect();
        (a, b)
    }

    /// Largest absolute inner product of two singular vectors of different windows, over `U` and
    /// `V`: 0 for exactly orthogonal shards.
    pub(crate) fn overlap_of_windows(&self, rank: usize) -> f64 {
        let largest = |vectors: &Mat<f64>| {
            let gram = vectors.transpose() * vectors;
            let count = gram.ncols();
            (0..count)
                .flat_map(|i| (0..i).map(move |j| (i, j)))
                .filter(|(i, j)| i / rank != j / rank)
                .map(|(i, j)| gram[(i, j)].abs())
                .fold(0.0, f64::max)
        };
        largest(&self.u).max(largest(&self.v))
    }
}

/// Singular values of `weight`, descending. An adapter is to use the first `count`.
pub(crate) fn singular_values(
    path: &str,
    weight: &Tensor<2>,
    method: SvdMethod,
    count: usize,
) -> Result<Vec<f64>, HdPissaError> {
    let host = HostMatrix::read(path, weight)?;
    let SvdMethod::Exact(precision) = method;
    let values = on_one_thread(|| match precision {
        SvdPrecision::F32 => host
            .f32()
            .singular_values()
            .map(|values| values.into_iter().map(f64::from).collect()),
        SvdPrecision::F64 => host.f64().singular_values(),
    });
    let values = values.map_err(|_| HdPissaError::NoConvergence { path: path.into() })?;
    host.check_rank(path, &values, count)?;
    Ok(values)
}

/// Share of the squared Frobenius norm in each window of `rank` components, for `shards` windows.
pub(crate) fn window_energy(values: &[f64], rank: usize, shards: usize) -> Vec<f64> {
    let energy = |values: &[f64]| values.iter().map(|value| value * value).sum::<f64>();
    let total = energy(values);
    values
        .chunks(rank)
        .take(shards)
        .map(|window| energy(window) / total)
        .collect()
}

/// A weight on the host, in `f32`, row by row.
struct HostMatrix {
    rows: usize,
    cols: usize,
    values: Vec<f32>,
}

impl HostMatrix {
    fn read(path: &str, weight: &Tensor<2>) -> Result<Self, HdPissaError> {
        let [rows, cols] = weight.dims();
        let values = weight
            .clone()
            .inner()
            .into_data()
            .convert_dtype(DType::F32)
            .try_into_vec::<f32>()
            .expect("data converted to f32 reads as f32");
        let mut bad = values.iter().enumerate().filter(|(_, v)| !v.is_finite());
        if let Some((first, _)) = bad.next() {
            return Err(HdPissaError::NonFiniteWeight {
                path: path.into(),
                count: 1 + bad.count(),
                row: first / cols,
                col: first % cols,
            });
        }
        if values.iter().all(|&value| value == 0.0) {
            return Err(HdPissaError::ZeroWeight { path: path.into() });
        }
        Ok(Self { rows, cols, values })
    }

    /// Refuses fewer than `count` singular values above what rounding to `f32` makes of zeros.
    fn check_rank(&self, path: &str, values: &[f64], count: usize) -> Result<(), HdPissaError> {
        let largest = values.first().copied().unwrap_or(0.0);
        let rounding = largest * self.rows.max(self.cols) as f64 * f64::from(f32::EPSILON);
        let numeric_rank = values.iter().filter(|&&value| value > rounding).count();
        match numeric_rank < count {
            true => Err(HdPissaError::RankDeficient {
                path: path.into(),
                numeric_rank,
                needed: count,
            }),
            false => Ok(()),
        }
    }

    fn f32(&self) -> MatRef<'_, f32> {
        MatRef::from_row_major_slice(&self.values, self.rows, self.cols)
    }

    fn f64(&self) -> Mat<f64> {
        let f32 = self.f32();
        Mat::from_fn(self.rows, self.cols, |i, j| f64::from(f32[(i, j)]))
    }
}

fn exact<T>(matrix: MatRef<'_, T>, count: usize) -> Option<TruncatedSvd>
where
    T: ComplexField<Real = T, Conj = T, Canonical = T> + Copy + Into<f64>,
{
    let svd = matrix.thin_svd().ok()?;
    let values = svd
        .S()
        .column_vector()
        .iter()
        .map(|&value| value.into())
        .collect();
    let (u, v) = (svd.U(), svd.V());
    let signs: Vec<f64> = (0..count).map(|i| sign(u.col(i).iter().copied())).collect();
    let signed = |vectors: MatRef<'_, T>| {
        Mat::from_fn(vectors.nrows(), count, |row, i| {
            signs[i] * vectors[(row, i)].into()
        })
    };
    Some(TruncatedSvd {
        u: signed(u),
        v: signed(v),
        values,
    })
}

/// Sign of the entry of largest magnitude, the first of equals.
fn sign<T: Into<f64>>(vector: impl Iterator<Item = T>) -> f64 {
    let largest = vector.map(Into::into).fold(
        0.0f64,
        |best, x| if x.abs() > best.abs() { x } else { best },
    );
    if largest < 0.0 { -1.0 } else { 1.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{Device, Distribution, TensorData};
    use proptest::prelude::*;

    fn decompose(weight: &Tensor<2>, precision: SvdPrecision, count: usize) -> TruncatedSvd {
        TruncatedSvd::compute("w", weight, SvdMethod::Exact(precision), count).unwrap()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        /// The windows of all components add up to the matrix, whatever its shape.
        #[test]
        fn windows_restore_the_matrix(rows in 1usize..24, cols in 1usize..24, seed: u64) {
            let device = Device::flex();
            device.seed(seed);
            let weight = Tensor::<2>::random([rows, cols], Distribution::Default, &device);
            let count = rows.min(cols);
            let method = SvdMethod::Exact(SvdPrecision::F64);
            let svd = TruncatedSvd::compute("w", &weight, method, count);
            // A random matrix is seldom, but not never, close to one of a lower rank.
            prop_assume!(svd.is_ok());
            let svd = svd.unwrap();
            let mut sum = Tensor::<2>::zeros([rows, cols], &device);
            for i in 0..count {
                let (a, b) = svd.window(i, 1, 4.0);
                let a = Tensor::<2>::from_data(TensorData::new(a, [rows, 1]), &device);
                let b = Tensor::<2>::from_data(TensorData::new(b, [1, cols]), &device);
                sum = sum + a.matmul(b) * 4.0;
            }
            let error = (sum - weight).abs().max().into_scalar::<f32>();
            prop_assert!(error < 1e-5, "{error}");
        }
    }

    #[test]
    fn the_largest_entry_of_each_left_vector_is_positive() {
        let device = Device::flex();
        device.seed(3);
        let weight = Tensor::<2>::random([17, 11], Distribution::Normal(0.0, 1.0), &device);
        for precision in [SvdPrecision::F32, SvdPrecision::F64] {
            let svd = decompose(&weight, precision, 11);
            for i in 0..11 {
                let column: Vec<f64> = svd.u.col(i).iter().copied().collect();
                let largest = column.iter().fold(0.0, |m: f64, x| m.max(x.abs()));
                assert!(column.contains(&largest), "column {i}: {column:?}");
            }
            assert!(svd.overlap_of_windows(2) < 1e-5);
        }
    }

    #[test]
    fn energy_of_a_known_spectrum() {
        assert_eq!(
            window_energy(&[3.0, 4.0, 0.0, 0.0], 1, 2),
            [9.0 / 25.0, 16.0 / 25.0]
        );
    }

    #[test]
    fn non_finite_weights_are_named() {
        let device = Device::flex();
        let weight = Tensor::<2>::from_floats([[1.0, f32::NAN], [f32::INFINITY, 0.0]], &device);
        let method = SvdMethod::Exact(SvdPrecision::F32);
        let error = TruncatedSvd::compute("fc.weight", &weight, method, 1).unwrap_err();
        assert_eq!(
            error.to_string(),
            "`fc.weight` holds 2 NaN or infinite values, the first at row 0, column 1"
        );
    }
}
