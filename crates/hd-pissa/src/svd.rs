//! Singular triples of a weight.

use burn::tensor::{DType, Tensor};
use faer::traits::ComplexField;
use faer::{Mat, MatRef};

use crate::host::HostMatrix;
use crate::krylov::{self, NotConverged};
use crate::parallel::on_one_thread;
use crate::{HdPissaError, SvdMethod, SvdPrecision};

/// How the frames of a weight were found.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Decomposition {
    /// Without a decomposition: random directions.
    None,
    /// By [`SvdMethod::Exact`], or by [`SvdMethod::Krylov`] if the weight is too small for it.
    Exact,
    /// By the block Krylov method.
    Krylov {
        /// Dimension of the space on each side.
        dimension: usize,
    },
    /// Exactly, after the block Krylov method had not converged.
    Fallback(NotConverged),
}

/// What is asked for.
#[derive(Clone, Copy)]
pub(crate) struct Request<'a> {
    /// Path of the weight.
    pub(crate) path: &'a str,
    /// The weight: `[d_input, d_output]`.
    pub(crate) weight: &'a Tensor<2>,
    /// The same on the host.
    pub(crate) host: &'a HostMatrix,
    pub(crate) method: SvdMethod,
    /// The components that are wanted.
    pub(crate) components: &'a [usize],
}

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
    /// The leading singular values, descending; all of them unless the decomposition is
    /// [`Decomposition::Krylov`].
    pub(crate) values: Vec<f64>,
    pub(crate) decomposition: Decomposition,
}

impl Svd {
    /// Decomposes the weight and keeps the triples that `choose` names, given the singular values.
    pub(crate) fn compute(
        request: &Request<'_>,
        choose: impl FnOnce(&[f64]) -> Result<Vec<usize>, HdPissaError> + Send,
    ) -> Result<Self, HdPissaError> {
        let Request {
            path,
            weight,
            host,
            method,
            components,
        } = *request;
        let count = number_of_leading(components);
        let side = host.rows().min(host.cols());
        let decomposition = match method {
            SvdMethod::Krylov if krylov::is_worth_it(side, count) => {
                let weight = weight.clone().inner().cast(DType::F32);
                match krylov::leading(path, &weight, count) {
                    Ok(leading) => return Self::of_krylov(leading, choose),
                    Err(failure) => {
                        log::warn!("{path} is decomposed exactly: {failure}");
                        Decomposition::Fallback(failure)
                    }
                }
            }
            _ => Decomposition::Exact,
        };
        // Workers of any number of threads get the same bits. The decomposition itself is no faster
        // with two threads.
        on_one_thread(|| match method {
            SvdMethod::Exact(SvdPrecision::F64) => {
                exact(path, host.f64().as_ref(), decomposition, choose)
            }
            SvdMethod::Exact(SvdPrecision::F32) | SvdMethod::Krylov => {
                exact(path, host.f32(), decomposition, choose)
            }
        })
    }

    fn of_krylov(
        leading: krylov::Leading,
        choose: impl FnOnce(&[f64]) -> Result<Vec<usize>, HdPissaError>,
    ) -> Result<Self, HdPissaError> {
        let chosen = choose(&leading.values)?;
        let (u, v) = signed(leading.u.as_ref(), leading.v.as_ref(), &chosen);
        Ok(Self {
            u,
            v,
            values: leading.values,
            decomposition: Decomposition::Krylov {
                dimension: leading.dimension,
            },
        })
    }
}

/// Singular values of `weight`, descending.
pub(crate) fn singular_values(
    path: &str,
    weight: &HostMatrix,
    precision: SvdPrecision,
) -> Result<Vec<f64>, HdPissaError> {
    let values = on_one_thread(|| match precision {
        SvdPrecision::F32 => weight
            .f32()
            .singular_values()
            .map(|values| values.into_iter().map(f64::from).collect()),
        SvdPrecision::F64 => weight.f64().singular_values(),
    });
    values.map_err(|_| HdPissaError::NoConvergence { path: path.into() })
}

/// How many of the leading components hold all of `components`.
pub(crate) fn number_of_leading(components: &[usize]) -> usize {
    components.iter().max().map_or(0, |&last| last + 1)
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
    decomposition: Decomposition,
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
    let (u, v) = signed(svd.U(), svd.V(), &choose(&values)?);
    Ok(Svd {
        u,
        v,
        values,
        decomposition,
    })
}

/// The chosen columns of both sides, with the signs of [`Svd`].
fn signed<T: Copy + Into<f64>>(
    u: MatRef<'_, T>,
    v: MatRef<'_, T>,
    chosen: &[usize],
) -> (Mat<f64>, Mat<f64>) {
    let sign = |&component: &usize| sign(u.col(component).iter().copied());
    let signs: Vec<f64> = chosen.iter().map(sign).collect();
    let signed = |vectors: MatRef<'_, T>| {
        Mat::from_fn(vectors.nrows(), chosen.len(), |row, i| {
            signs[i] * vectors[(row, chosen[i])].into()
        })
    };
    (signed(u), signed(v))
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
        let host = HostMatrix::read("w", &weight).unwrap();
        for precision in [SvdPrecision::F32, SvdPrecision::F64] {
            let method = SvdMethod::Exact(precision);
            let all: Vec<usize> = (0..11).collect();
            let request = Request {
                path: "w",
                weight: &weight,
                host: &host,
                method,
                components: &all,
            };
            let svd = Svd::compute(&request, |_| Ok(all.clone())).unwrap();
            for i in 0..11 {
                let column: Vec<f64> = svd.u.col(i).iter().copied().collect();
                let largest = column.iter().fold(0.0, |m: f64, x| m.max(x.abs()));
                assert!(column.contains(&largest), "column {i}: {column:?}");
            }
        }
    }
}
