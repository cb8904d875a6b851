//! The leading singular triples of a weight, from a block Krylov space that is built on the weight's
//! device.

use std::fmt::{self, Display, Formatter};

use burn::tensor::{DType, Device, Tensor, TensorData};
use faer::{Mat, MatRef, Side};

use crate::basis::random_columns;
use crate::parallel::on_one_thread;

/// Largest sine of the angle between a vector `[u; v]/√2` and the exact one. Its cosine is the mean of
/// those of `u` and `v`, so that each of these is at least `2·√(1 − 0.0316²) − 1 ≥ 0.999`.
const LARGEST_SINE: f64 = 0.0316;

/// No residual counts as less than this share of the largest singular value: the products round.
const ROUNDING: f64 = f32::EPSILON as f64;

/// Leading triples of a matrix. All of them meet the test of convergence.
pub(crate) struct Leading {
    /// `[d_input, count]`
    pub(crate) u: Mat<f64>,
    /// `[d_output, count]`
    pub(crate) v: Mat<f64>,
    /// Descending.
    pub(crate) values: Vec<f64>,
    /// Dimension of the space on each side.
    pub(crate) dimension: usize,
}

/// Why the block Krylov method gave up on a weight: the first component that fails its test of
/// convergence. Prints as a clause.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NotConverged {
    /// The component, counted from 0.
    pub component: usize,
    /// Its residual `√((‖W·v − σ·u‖² + ‖Wᵀ·u − σ·v‖²)/2)`, as a share of the largest singular value.
    pub residual: f64,
    /// Its distance to the nearest other singular value, less the residual of that one, as such a share.
    pub gap: f64,
    /// Dimension of the space on each side.
    pub dimension: usize,
}

impl Display for NotConverged {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Self {
            component,
            residual,
            gap,
            dimension,
        } = self;
        write!(
            f,
            "the block Krylov method has not converged in {dimension} dimensions: component \
             {component} has the residual {residual:.1e} and the gap {gap:.1e}, as shares of the \
             largest singular value"
        )
    }
}

/// Whether the leading `count` triples of a weight whose smaller side is `side` are few enough for a space
/// of their own: with more, a full decomposition costs less.
pub(crate) fn is_worth_it(side: usize, count: usize) -> bool {
    count <= side / 16 + 16 && count + block_size(count) <= side
}

/// Number of vectors that enter the space at a time. Fewer need a smaller space, and more passes over the
/// weight.
fn block_size(count: usize) -> usize {
    (count / 8).clamp(8, 32)
}

/// The largest space that is tried. All of a small matrix costs next to nothing.
fn largest_dimension(side: usize) -> usize {
    side.min(side / 2 + 64)
}

/// The leading `count` triples of `weight: [d_input, d_output]`. The weight is an `f32` tensor without autodiff,
/// and [`is_worth_it`] must hold.
///
/// A block Golub-Kahan process with full reorthogonalization on both sides. Its start depends on `name` and
/// the shape alone.
pub(crate) fn leading(
    name: &str,
    weight: &Tensor<2>,
    count: usize,
) -> Result<Leading, NotConverged> {
    let [d_input, d_output] = weight.dims();
    let limit = largest_dimension(d_input.min(d_output));
    let mut process = Process::start(name, weight, block_size(count));
    let (mut next_test, mut before) = (3 * count, None);
    loop {
        process.step();
        let dimension = process.dimension();
        let is_last = dimension + process.block > limit;
        if dimension < next_test && !is_last {
            continue;
        }
        let (vectors, test) = process.ritz();
        match test.first_failure(count) {
            None => return process.leading(vectors.as_ref(), test, count),
            Some(failure) if is_last || test.is_hopeless(count) => return Err(failure),
            Some(_) => {}
        }
        // Where the failures would end if they went on falling as they do.
        let failures = (0..count).filter(|&i| !test.is_met(i)).count();
        let further = match before {
            Some((earlier, more)) if more > failures => {
                failures * (dimension - earlier) / (more - failures)
            }
            _ => dimension,
        };
        before = Some((dimension, failures));
        next_test = dimension + further.clamp(dimension / 16, dimension / 3);
    }
}

/// Orthonormal bases `U` and `V` with `W·V = U·B` and `Wᵀ·U = V·Bᵀ` up to what the last block leaves over.
///
/// `W` is the weight, or its transpose where that has fewer columns: the start then lies in the smaller
/// space, which the other one cannot outgrow.
struct Process {
    weight: Tensor<2>,
    is_transposed: bool,
    block: usize,
    left: Basis,
    /// One block more than `left`.
    right: Basis,
    /// The last block of `right`.
    last: Tensor<2>,
    /// `B`
    projected: Mat<f64>,
    /// The coefficients of the last block of `Wᵀ·U` in `last`.
    coupling: Mat<f64>,
}

impl Process {
    fn start(name: &str, weight: &Tensor<2>, block: usize) -> Self {
        let [d_input, d_output] = weight.dims();
        let none = Mat::zeros(d_input.min(d_output), 0);
        let name = format!("krylov/{name}/{d_input}x{d_output}");
        let start = on_one_thread(|| random_columns(none.as_ref(), block, &name));
        let last = rows(start.as_ref(), &weight.device());
        Self {
            weight: weight.clone(),
            is_transposed: d_input < d_output,
            block,
            left: Basis(None),
            right: Basis(Some(last.clone())),
            last,
            projected: Mat::zeros(0, 0),
            coupling: Mat::zeros(0, 0),
        }
    }

    fn dimension(&self) -> usize {
        self.projected.nrows()
    }

    /// One block more on each side.
    fn step(&mut self) {
        let (before, block) = (self.dimension(), self.block);
        let dimension = before + block;
        let (block_of_left, columns) = self.left.extend(self.images_of_right(&self.last));
        let projected = std::mem::replace(&mut self.projected, Mat::zeros(dimension, dimension));
        let mut old = self.projected.submatrix_mut(0, 0, before, before);
        old.copy_from(&projected);
        let mut new = self.projected.subcols_mut(before, block);
        new.copy_from(&columns);
        let images = self.images_of_left(&block_of_left);
        let (last, coefficients) = self.right.extend(images);
        self.coupling = coefficients.subrows(dimension, block).to_owned();
        self.last = last;
    }

    /// `W·v` for each row `v`.
    fn images_of_right(&self, vectors: &Tensor<2>) -> Tensor<2> {
        self.images(vectors, self.is_transposed)
    }

    /// `Wᵀ·u` for each row `u`.
    fn images_of_left(&self, vectors: &Tensor<2>) -> Tensor<2> {
        self.images(vectors, !self.is_transposed)
    }

    /// Products with the weight, or with its transpose. Vectors are rows, so a CPU reads the weight in the
    /// order of its memory.
    fn images(&self, vectors: &Tensor<2>, by_transpose: bool) -> Tensor<2> {
        let (weight, vectors) = (self.weight.clone(), vectors.clone());
        match by_transpose {
            true => vectors.matmul(weight),
            false => weight.matmul(vectors.transpose()).transpose(),
        }
    }

    /// Left singular vectors of `B`, and what its triples leave over.
    fn ritz(&self) -> (Mat<f64>, Test) {
        let dimension = self.dimension();
        let eigen = on_one_thread(|| {
            let square = &self.projected * self.projected.transpose();
            square.self_adjoint_eigen(Side::Lower)
        });
        let Ok(eigen) = eigen else {
            // A test that nothing meets.
            let zeros = vec![0.0; dimension];
            return (Mat::zeros(dimension, 0), Test::new(zeros.clone(), zeros));
        };
        let squares = eigen.S().column_vector().iter().rev();
        let values = squares.map(|&square| square.max(0.0).sqrt());
        let vectors = eigen.U().reverse_cols().to_owned();
        // Of `Wᵀ·u` this lies outside of the space. `W·v` lies in it.
        let outside = &self.coupling * vectors.subrows(dimension - self.block, self.block);
        let residuals = outside.col_iter().map(|col| col.norm_l2() / 2f64.sqrt());
        let test = Test::new(values.collect(), residuals.collect());
        (vectors, test)
    }

    /// The leading triples, once `test` is met. The residuals are now those of the triples themselves, with
    /// all rounding errors.
    fn leading(
        &self,
        vectors: MatRef<'_, f64>,
        mut test: Test,
        count: usize,
    ) -> Result<Leading, NotConverged> {
        let of_left = vectors.subcols(0, count);
        let mut of_right = on_one_thread(|| self.projected.transpose() * of_left);
        for (mut col, value) in of_right.col_iter_mut().zip(&test.values) {
            col /= faer::Scale(*value);
        }
        let u = self.left.combine(of_left);
        let v = self.right.combine(of_right.as_ref());
        let images_of_v = columns(self.images_of_right(&v));
        let images_of_u = columns(self.images_of_left(&u));
        let (u, v) = (columns(u), columns(v));
        for i in 0..count {
            let left_over = |images: &Mat<f64>, vectors: &Mat<f64>| {
                let scaled = faer::Scale(test.values[i]) * vectors.col(i);
                (images.col(i) - scaled).squared_norm_l2()
            };
            let sum = left_over(&images_of_v, &u) + left_over(&images_of_u, &v);
            test.residuals[i] = test.residuals[i].max((sum / 2.0).sqrt());
        }
        if let Some(failure) = test.first_failure(count) {
            return Err(failure);
        }
        test.values.truncate(count);
        let (u, v) = match self.is_transposed {
            true => (v, u),
            false => (u, v),
        };
        Ok(Leading {
            u,
            v,
            values: test.values,
            dimension: self.dimension(),
        })
    }
}

/// Orthonormal vectors on a device: rows of a tensor, `None` for no vector.
struct Basis(Option<Tensor<2>>);

impl Basis {
    /// Takes in what `images: [block, size]` add to the space, as a block of as many vectors. Returns the
    /// block, and the coefficients of the images in the larger basis, column by column.
    fn extend(&mut self, mut images: Tensor<2>) -> (Tensor<2>, Mat<f64>) {
        let [block, size] = images.dims();
        let dimension = self.0.as_ref().map_or(0, |vectors| vectors.dims()[0]);
        let mut coefficients = Mat::<f64>::zeros(dimension + block, block);
        let mut triangle = Mat::<f64>::identity(block, block);
        // The second time removes what rounding has left of the others in small images.
        for _ in 0..2 {
            if let Some(vectors) = &self.0 {
                let inner = vectors.clone().matmul(images.clone().transpose());
                let inner = inner.transpose();
                images = images - inner.clone().matmul(vectors.clone());
                let mut along = coefficients.subrows_mut(0, dimension);
                along += columns(inner) * &triangle;
            }
            let device = images.device();
            let values = values(images);
            let (q, r) = on_one_thread(|| {
                let qr = MatRef::from_column_major_slice(&values, size, block).qr();
                (qr.compute_thin_Q(), qr.thin_R().to_owned())
            });
            triangle = Mat::from_fn(block, block, |i, j| f64::from(r[(i, j)])) * triangle;
            images = rows(q.as_ref(), &device);
        }
        coefficients
            .subrows_mut(dimension, block)
            .copy_from(&triangle);
        self.0 = Some(match self.0.take() {
            Some(vectors) => Tensor::cat(vec![vectors, images.clone()], 0),
            None => images.clone(),
        });
        (images, coefficients)
    }

    /// Sums of the first vectors, by the columns of `coefficients`.
    ///
    /// # Panics
    ///
    /// If there are fewer vectors than coefficients.
    fn combine(&self, coefficients: MatRef<'_, f64>) -> Tensor<2> {
        let vectors = self.0.as_ref().expect("a basis that was extended");
        let vectors = vectors.clone().narrow(0, 0, coefficients.nrows());
        rows(coefficients, &vectors.device()).matmul(vectors)
    }
}

/// The columns of a matrix as rows of a tensor.
fn rows<T: Copy + Into<f64>>(columns: MatRef<'_, T>, device: &Device) -> Tensor<2> {
    let values = columns.col_iter().flat_map(|col| col.iter().copied());
    let values: Vec<f32> = values.map(|value| value.into() as f32).collect();
    let data = TensorData::new(values, [columns.ncols(), columns.nrows()]);
    Tensor::from_data(data, (device, DType::F32))
}

/// The values of a tensor, row by row.
fn values(tensor: Tensor<2>) -> Vec<f32> {
    let values = tensor.into_data().try_into_vec();
    values.expect("a tensor of f32 reads as f32")
}

/// The rows of a tensor as columns.
fn columns(tensor: Tensor<2>) -> Mat<f64> {
    let [count, size] = tensor.dims();
    let values = values(tensor);
    Mat::from_fn(size, count, |row, col| f64::from(values[col * size + row]))
}

/// All singular values of a projected matrix, and what their triples leave over.
struct Test {
    /// Descending.
    values: Vec<f64>,
    /// As [`NotConverged::residual`], but absolute.
    residuals: Vec<f64>,
}

impl Test {
    fn new(values: Vec<f64>, mut residuals: Vec<f64>) -> Self {
        for residual in &mut residuals {
            *residual = residual.max(ROUNDING * values[0]);
        }
        Self { values, residuals }
    }

    /// How far value `i` is at least from all others of the weight, and from zero.
    ///
    /// A singular value of the weight lies within the residual of each of the projected matrix. (Of the
    /// symmetric matrix of `W` and `Wᵀ`, the singular values, their negatives and zeros are the
    /// eigenvalues, and `[u; v]/√2` the eigenvectors.)
    fn gap(&self, i: usize) -> f64 {
        let others = (0..self.values.len()).filter(|&j| j != i);
        let distances = others.map(|j| (self.values[i] - self.values[j]).abs() - self.residuals[j]);
        distances.fold(self.values[i], f64::min)
    }

    /// Whether the sine of the angle to the exact vector, at most residual by gap (Davis and Kahan), is
    /// small.
    fn is_met(&self, i: usize) -> bool {
        self.residuals[i] < LARGEST_SINE * self.gap(i)
    }

    /// The first of the leading `count` components that fails.
    fn first_failure(&self, count: usize) -> Option<NotConverged> {
        let component = (0..count).find(|&i| !self.is_met(i))?;
        let largest = self.values[0];
        Some(NotConverged {
            component,
            residual: self.residuals[component] / largest,
            gap: self.gap(component) / largest,
            dimension: self.values.len(),
        })
    }

    /// Whether one of them fails though nothing but rounding is left of its residual and those of its
    /// neighbours.
    fn is_hopeless(&self, count: usize) -> bool {
        let rounding = ROUNDING * self.values[0];
        let is_rounding = |i: usize| self.residuals[i] <= rounding;
        (0..count).any(|i| {
            let mut around = i.saturating_sub(1)..(i + 2).min(self.values.len());
            around.all(is_rounding) && !self.is_met(i)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `U·diag(values)·Vᵀ` of random `U` and `V`, and these.
    fn with_values(rows: usize, cols: usize, values: &[f64]) -> (Tensor<2>, Mat<f64>, Mat<f64>) {
        let none = |size| Mat::zeros(size, 0);
        let u = random_columns(none(rows).as_ref(), values.len(), "u");
        let v = random_columns(none(cols).as_ref(), values.len(), "v");
        let scaled = Mat::from_fn(rows, values.len(), |row, i| u[(row, i)] * values[i]);
        let matrix = scaled * v.transpose();
        let values = (0..rows).flat_map(|row| (0..cols).map(move |col| (row, col)));
        let values: Vec<f32> = values.map(|at| matrix[at] as f32).collect();
        let data = TensorData::new(values, [rows, cols]);
        (Tensor::from_data(data, &Device::flex()), u, v)
    }

    /// The smallest absolute cosine of the columns of `ours` and the leading ones of `exact`.
    fn cosine(ours: &Mat<f64>, exact: &Mat<f64>) -> f64 {
        let cosine = |i: usize| (ours.col(i).transpose() * exact.col(i)).abs();
        (0..ours.ncols()).map(cosine).fold(1.0, f64::min)
    }

    /// Relative gaps of 4e-4 for leading values, of 1e-2 after them, and both orientations.
    #[test]
    fn close_values_are_told_apart() {
        for (rows, cols) in [(410, 330), (330, 410)] {
            let mut values = vec![1.0];
            for i in 1..330 {
                let gap = if i < 40 { 4e-4 } else { 1e-2 };
                values.push(values[i - 1] * (1.0 - gap));
            }
            let (weight, u, v) = with_values(rows, cols, &values);
            let found = leading("w", &weight, 20).unwrap_or_else(|failure| panic!("{failure}"));
            println!("{} dimensions", found.dimension);
            assert!(found.dimension < 330);
            assert!(cosine(&found.u, &u) > 0.999 && cosine(&found.v, &v) > 0.999);
            for (ours, exact) in found.values.iter().zip(&values) {
                assert!((ours - exact).abs() < 1e-6, "{ours} {exact}");
            }
        }
    }

    /// The test of convergence is no test of the whole space: what it accepts is as close as it says.
    #[test]
    fn what_passes_the_test_is_close() {
        let values: Vec<f64> = (0..200).map(|i| 0.97f64.powi(i)).collect();
        let (weight, u, v) = with_values(200, 260, &values);
        let mut process = Process::start("w", &weight, 8);
        let mut passed = 0;
        while process.dimension() < 160 {
            process.step();
            let (vectors, test) = process.ritz();
            let met = (0..test.values.len()).take_while(|&i| test.is_met(i));
            let count = met.count();
            if count > passed {
                passed = count;
                let found = process.leading(vectors.as_ref(), test, count);
                let found = found.unwrap_or_else(|failure| panic!("{failure}"));
                assert!(cosine(&found.u, &u) > 0.999 && cosine(&found.v, &v) > 0.999);
            }
        }
        assert!(passed > 40, "{passed}");
    }

    #[test]
    fn clusters_and_low_ranks_do_not_converge() {
        let decay = |i: i32| 0.95f64.powi(i);
        let mut cluster: Vec<f64> = (0..150).map(decay).collect();
        cluster[5] = cluster[4];
        let rank_eight: Vec<f64> = (0..8).map(decay).collect();
        // More equal values than a block has vectors.
        let mut flat: Vec<f64> = (0..150).map(decay).collect();
        let value = flat[3];
        flat[3..13].fill(value);
        for (values, component) in [(&cluster, 4), (&rank_eight, 8), (&flat, 3)] {
            let (weight, ..) = with_values(150, 170, values);
            let failure = leading("w", &weight, 12).err().unwrap();
            println!("{failure}");
            assert_eq!(failure.component, component);
            assert!(failure.residual >= LARGEST_SINE * failure.gap);
        }
    }

    #[test]
    fn the_name_decides_the_bits() {
        let values: Vec<f64> = (0..90).map(|i| 0.9f64.powi(i)).collect();
        let (weight, ..) = with_values(90, 100, &values);
        let found = |name| leading(name, &weight, 6).ok().unwrap();
        let (first, again, other) = (found("w"), found("w"), found("x"));
        assert!(first.u == again.u && first.v == again.v && first.values == again.values);
        assert!(first.u != other.u);
    }
}
