//! The change of a weight: its first-order part, in closed form or truncated.

use burn::tensor::{DType, Tensor, TensorData};
use faer::{Mat, MatRef};
use sha2::{Digest, Sha256};

use super::{ExportError, RankLimit};
use crate::digits::hexadecimal;
use crate::parallel::on_one_thread;

/// The change `D = W_T − W_0` of a weight as a product `left · right` of two thin matrices, with the
/// relative error of that product.
///
/// Let `U` and `V` be orthonormal bases of the columns of the frames `A` and of the rows of the frames
/// `B`. Then
///
/// ```text
/// U·(UᵀD) + ((1 − UUᵀ)·D·V)·Vᵀ
/// ```
///
/// is the nearest matrix to `D` of the form `A·X + Y·B`, in the Frobenius norm. It misses
/// `(1 − UUᵀ)·D·(1 − VVᵀ)`, which is orthogonal to everything of that form. All first-order updates
/// (Wang et al., section 3) have the form, for all windows, scales and gradient modes. The second-order
/// parts `Δa·Δb` and the rounding of merges do not.
///
/// Values are `f32`, the arithmetic is `f64` on the host.
#[derive(Clone, Debug, PartialEq)]
pub struct WeightChange {
    pub(super) path: String,
    /// `[d_input, rank]`
    pub(super) left: Mat<f32>,
    /// `[rank, d_output]`
    pub(super) right: Mat<f32>,
    pub(super) relative_error: f64,
    pub(super) base: String,
}

impl WeightChange {
    /// The change from `base` to `trained`, both of shape `[d_input, d_output]`.
    ///
    /// `frames` are those of all shards, `a: [d_input, K·r]` and `b: [K·r, d_output]`, as
    /// [`HdPissaConfig::frames`](crate::HdPissaConfig::frames) computes them from `base`. Only the
    /// directions that they span matter, not their scale.
    ///
    /// # Errors
    ///
    /// [`ExportError::InvalidLimit`], [`ExportError::ShapeMismatch`], [`ExportError::NonFinite`] and
    /// [`ExportError::NoConvergence`].
    pub fn new(
        path: &str,
        base: &Tensor<2>,
        trained: &Tensor<2>,
        frames: &[Tensor<2>; 2],
        limit: &RankLimit,
    ) -> Result<Self, ExportError> {
        limit.check()?;
        let [a, b] = frames;
        let [d_input, d_output] = base.dims();
        let mismatch = |what, found| ExportError::ShapeMismatch {
            path: path.into(),
            what,
            found,
            expected: [d_input, d_output],
        };
        for (what, found, is_right) in [
            ("the trained value", trained, trained.dims() == base.dims()),
            ("the left frame", a, a.dims()[0] == d_input),
            ("the right frame", b, b.dims()[1] == d_output),
        ] {
            if !is_right {
                return Err(mismatch(what, found.dims()));
            }
        }
        let (base, trained) = (Host::read(base), Host::read(trained));
        let [a, b] = [a, b].map(Host::read);
        // In its last bits a factorization depends on the number of threads.
        on_one_thread(|| {
            let change = trained.mat() - base.mat();
            if !change.norm_l2().is_finite() {
                return Err(ExportError::NonFinite { path: path.into() });
            }
            let [left, right] = first_order(&change, &a.mat(), &b.mat());
            let [left, right] = match limit.keeps_all_of(left.ncols()) {
                true => balanced(left, right),
                false => truncated(path, &left, &right, limit)?,
            };
            let [left, right] = [left, right].map(|factor| single(factor.as_ref()));
            let missing = &change - double(&left) * double(&right);
            let relative_error = match change.norm_l2() {
                0.0 => 0.0,
                norm => missing.norm_l2() / norm,
            };
            Ok(Self {
                path: path.into(),
                left,
                right,
                relative_error,
                base: base.digest(),
            })
        })
    }

    /// The path of the weight in its model.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Number of columns of the left factor.
    pub fn rank(&self) -> usize {
        self.left.ncols()
    }

    /// `[d_input, d_output]`
    pub fn dims(&self) -> [usize; 2] {
        [self.left.nrows(), self.right.ncols()]
    }

    /// `‖D − left·right‖_F / ‖D‖_F`, measured with the `f32` factors as they are. 0 for a weight that has
    /// not changed.
    pub fn relative_error(&self) -> f64 {
        self.relative_error
    }

    /// SHA-256 of the weight before the training, in hexadecimal digits: of its two dimensions as `u64` and
    /// its values as `f32`, row by row, all little-endian.
    pub fn base_digest(&self) -> &str {
        &self.base
    }

    /// The factor of shape `[d_input, rank]`, row by row.
    pub fn left(&self) -> TensorData {
        data(&self.left)
    }

    /// The factor of shape `[rank, d_output]`, row by row.
    pub fn right(&self) -> TensorData {
        data(&self.right)
    }

    /// `base + left·right`, on the device and in the dtype of `base`: the trained weight, except for the
    /// [error](Self::relative_error) and the rounding of this sum.
    ///
    /// # Errors
    ///
    /// [`ExportError::ShapeMismatch`], and [`ExportError::WrongBase`] if `base` is another weight than the
    /// one that was trained.
    pub fn added_to(&self, base: &Tensor<2>) -> Result<Tensor<2>, ExportError> {
        if base.dims() != self.dims() {
            return Err(ExportError::ShapeMismatch {
                path: self.path.clone(),
                what: "the change",
                found: self.dims(),
                expected: base.dims(),
            });
        }
        let host = Host::read(base);
        let found = host.digest();
        if found != self.base {
            return Err(ExportError::WrongBase {
                path: self.path.clone(),
                expected: self.base.clone(),
                found,
            });
        }
        let sum = on_one_thread(|| host.mat() + double(&self.left) * double(&self.right));
        let sum = data(&single(sum.as_ref()));
        Ok(Tensor::from_data(sum, (&base.device(), base.dtype())))
    }
}

/// The nearest matrix to `change` of the form `A·X + Y·B`, as two factors of rank `2·K·r`.
fn first_order(change: &Mat<f64>, a: &Mat<f64>, b: &Mat<f64>) -> [Mat<f64>; 2] {
    let u = a.qr().compute_thin_Q();
    let v = b.transpose().qr().compute_thin_Q();
    let x = u.transpose() * change;
    let y = change * &v - &u * (&x * &v);
    let (of_u, of_v) = (u.ncols(), v.ncols());
    let left = Mat::from_fn(u.nrows(), of_u + of_v, |row, i| match i.checked_sub(of_u) {
        None => u[(row, i)],
        Some(i) => y[(row, i)],
    });
    let right = Mat::from_fn(of_u + of_v, v.nrows(), |i, col| match i.checked_sub(of_u) {
        None => x[(i, col)],
        Some(i) => v[(col, i)],
    });
    [left, right]
}

/// The same product, with factors of equal length in each component. A cast to 16 bits then loses as little
/// as possible.
fn balanced(left: Mat<f64>, right: Mat<f64>) -> [Mat<f64>; 2] {
    let ratio = |i: usize| {
        let ratio = (right.row(i).norm_l2() / left.col(i).norm_l2()).sqrt();
        // A component of length zero has no ratio.
        match ratio.is_normal() {
            true => ratio,
            false => 1.0,
        }
    };
    let ratios: Vec<f64> = (0..left.ncols()).map(ratio).collect();
    [
        Mat::from_fn(left.nrows(), left.ncols(), |row, i| {
            left[(row, i)] * ratios[i]
        }),
        Mat::from_fn(right.nrows(), right.ncols(), |i, col| {
            right[(i, col)] / ratios[i]
        }),
    ]
}

/// The leading singular triples of `left · right`, as two factors with the root of the singular values on
/// either side.
fn truncated(
    path: &str,
    left: &Mat<f64>,
    right: &Mat<f64>,
    limit: &RankLimit,
) -> Result<[Mat<f64>; 2], ExportError> {
    let (of_left, of_right) = (left.qr(), right.transpose().qr());
    let core = of_left.thin_R() * of_right.thin_R().transpose();
    let svd = core.thin_svd();
    let svd = svd.map_err(|_| ExportError::NoConvergence { path: path.into() })?;
    let values: Vec<f64> = svd.S().column_vector().iter().copied().collect();
    let count = limit.count(&values);
    let scaled = |vectors: MatRef<'_, f64>| {
        Mat::from_fn(vectors.nrows(), count, |row, i| {
            vectors[(row, i)] * values[i].sqrt()
        })
    };
    let left = of_left.compute_thin_Q() * scaled(svd.U());
    let right = of_right.compute_thin_Q() * scaled(svd.V());
    Ok([left, right.transpose().to_owned()])
}

fn single(matrix: MatRef<'_, f64>) -> Mat<f32> {
    Mat::from_fn(matrix.nrows(), matrix.ncols(), |i, j| matrix[(i, j)] as f32)
}

fn double(matrix: &Mat<f32>) -> Mat<f64> {
    Mat::from_fn(matrix.nrows(), matrix.ncols(), |i, j| {
        f64::from(matrix[(i, j)])
    })
}

/// A matrix row by row.
fn data(matrix: &Mat<f32>) -> TensorData {
    let (rows, cols) = (matrix.nrows(), matrix.ncols());
    let at = |i: usize| matrix[(i / cols, i % cols)];
    let values: Vec<f32> = (0..rows * cols).map(at).collect();
    TensorData::new(values, [rows, cols])
}

/// A matrix on the host, row by row.
struct Host {
    dims: [usize; 2],
    values: Vec<f32>,
}

impl Host {
    fn read(tensor: &Tensor<2>) -> Self {
        let data = tensor.clone().inner().into_data();
        let values = data.convert_dtype(DType::F32).try_into_vec();
        Self {
            dims: tensor.dims(),
            values: values.expect("data converted to f32 reads as f32"),
        }
    }

    fn mat(&self) -> Mat<f64> {
        let [rows, cols] = self.dims;
        Mat::from_fn(rows, cols, |i, j| f64::from(self.values[i * cols + j]))
    }

    fn digest(&self) -> String {
        let mut hash = Sha256::new();
        for dim in self.dims {
            hash.update((dim as u64).to_le_bytes());
        }
        for value in &self.values {
            hash.update(value.to_le_bytes());
        }
        hexadecimal(&hash.finalize())
    }
}
