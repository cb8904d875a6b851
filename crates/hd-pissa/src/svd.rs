//! Singular triples of a weight, on the host.

use faer::traits::ComplexField;
use faer::{Mat, MatRef};

use crate::host::HostMatrix;
use crate::parallel::on_one_thread;
use crate::{HdPissaError, SvdMethod, SvdPrecision};

/// Some triples of `W = U Σ Vᵀ`.
///
/// Signs are fixed: the entry of largest magnitude in each column of `U` (the first of equals) is
/// positive. Decompositions of one matrix by different libraries then agree where the singular
/// values differ.
#[derive(Debug)]
pub(crate) struct Svd {
    /// `[d_input, triples]`
    pub(crate) u: Mat<f64>,
    /// `[d_output, triples]`
    pub(crate) v: Mat<f64>,
    /// All singular values, descending.
    pub(crate) values: Vec<f64>,
}

impl Svd {
    /// Decomposes `weight: [d_input, d_output]` and keeps the triples that `choose` names, given all
    /// singular values.
    pub(crate) fn compute(
        path: &str,
        weight: &HostMatrix,
        method: SvdMethod,
        choose: impl FnOnce(&[f64]) -> Result<Vec<usize>, HdPissaError> + Send,
    ) -> Result<Self, HdPissaError> {
        let SvdMethod::Exact(precision) = method;
        // Workers of any number of threads get the same bits. The decomposition itself is no faster
        // with two threads.
        on_one_thread(|| match precision {
            SvdPrecision::F32 => exact(path, weight.f32(), choose),
            SvdPrecision::F64 => exact(path, weight.f64().as_ref(), choose),
        })
    }
}

/// Singular values of `weight`, descending.
pub(crate) fn singular_values(
    path: &str,
    weight: &HostMatrix,
    method: SvdMethod,
) -> Result<Vec<f64>, HdPissaError> {
    let SvdMethod::Exact(precision) = method;
    let values = on_one_thread(|| match precision {
        SvdPrecision::F32 => weight
            .f32()
            .singular_values()
            .map(|values| values.into_iter().map(f64::from).collect()),
        SvdPrecision::F64 => weight.f64().singular_values(),
    });
    values.map_err(|_| HdPissaError::NoConvergence { path: path.into() })
}

/// Number of singular values of `weight` above what rounding to `f32` makes of zeros.
pub(crate) fn numeric_rank(weight: &HostMatrix, values: &[f64]) -> usize {
    let largest = values.first().copied().unwrap_or(0.0);
    let rounding = largest * weight.rows().max(weight.cols()) as f64 * f64::from(f32::EPSILON);
    values.iter().filter(|&&value| value > rounding).count()
}

fn exact<T>(
    path: &str,
    matrix: MatRef<'_, T>,
    choose: impl FnOnce(&[f64]) -> Result<Vec<usize>, HdPissaError>,
) -> Result<Svd, HdPissaError>
where
    T: ComplexField<Real = T, Conj = T, Canonical = T> + Copy + Into<f64>,
{
    let svd = matrix.thin_svd();
    let svd = svd.map_err(|_| HdPissaError::NoConvergence { path: path.into() })?;
    let values: Vec<f64> = svd
        .S()
        .column_vector()
        .iter()
        .map(|&value| value.into())
        .collect();
    let chosen = choose(&values)?;
    let (u, v) = (svd.U(), svd.V());
    let sign = |&component: &usize| sign(u.col(component).iter().copied());
    let signs: Vec<f64> = chosen.iter().map(sign).collect();
    let signed = |vectors: MatRef<'_, T>| {
        Mat::from_fn(vectors.nrows(), chosen.len(), |row, i| {
            signs[i] * vectors[(row, chosen[i])].into()
        })
    };
    Ok(Svd {
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
    use burn::tensor::{Device, Distribution, Tensor};

    #[test]
    fn the_largest_entry_of_each_left_vector_is_positive() {
        let device = Device::flex();
        device.seed(3);
        let weight = Tensor::<2>::random([17, 11], Distribution::Normal(0.0, 1.0), &device);
        let weight = HostMatrix::read("w", &weight).unwrap();
        for precision in [SvdPrecision::F32, SvdPrecision::F64] {
            let method = SvdMethod::Exact(precision);
            let svd = Svd::compute("w", &weight, method, |_| Ok((0..11).collect())).unwrap();
            for i in 0..11 {
                let column: Vec<f64> = svd.u.col(i).iter().copied().collect();
                let largest = column.iter().fold(0.0, |m: f64, x| m.max(x.abs()));
                assert!(column.contains(&largest), "column {i}: {column:?}");
            }
        }
    }
}
