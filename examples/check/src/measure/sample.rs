//! Matrices on the host, and their products, element by element, in `f64`.

use burn::tensor::{DType, Device, Tensor, TensorData};

/// A row-major matrix on the host.
#[derive(Clone, Debug)]
pub struct Host {
    pub values: Vec<f32>,
    pub columns: usize,
}

impl Host {
    /// The values of a tensor of any float dtype.
    pub fn read(tensor: Tensor<2>) -> Self {
        let columns = tensor.dims()[1];
        let data = tensor.cast(DType::F32).into_data();
        Self {
            values: data.iter().collect(),
            columns,
        }
    }

    pub fn rows(&self) -> usize {
        self.values.len() / self.columns
    }

    /// A tensor of `dtype` on `device`, which rounds the values to the dtype.
    pub fn tensor(&self, device: &Device, dtype: DType) -> Tensor<2> {
        let data = TensorData::new(self.values.clone(), [self.rows(), self.columns]);
        Tensor::<2>::from_data(data, (device, DType::F32)).cast(dtype)
    }

    pub fn at(&self, row: usize, column: usize) -> f64 {
        f64::from(self.values[row * self.columns + column])
    }

    pub fn transposed(&self) -> Self {
        let rows = self.rows();
        let places = (0..self.values.len()).map(|k| k % rows * self.columns + k / rows);
        Self {
            values: places.map(|place| self.values[place]).collect(),
            columns: rows,
        }
    }
}

/// Elements of a matrix spread over rows and columns, the last one among them.
pub fn places([rows, columns]: [usize; 2]) -> impl Iterator<Item = [usize; 2]> {
    (0..200)
        .map(move |k| [k * 7919 % rows, k * 104_729 % columns])
        .chain([[rows - 1, columns - 1]])
}

/// A sum of products, and the same of absolute values, which bounds its rounding error.
#[derive(Clone, Copy, Debug, Default)]
pub struct Exact {
    pub value: f64,
    pub magnitude: f64,
}

impl Exact {
    pub fn add(&mut self, left: f64, right: f64) {
        self.value += left * right;
        self.magnitude += (left * right).abs();
    }
}

/// Element `[i, j]` of `left · right`.
pub fn product(left: &Host, right: &Host, [i, j]: [usize; 2]) -> Exact {
    let mut exact = Exact::default();
    for k in 0..left.columns {
        exact.add(left.at(i, k), right.at(k, j));
    }
    exact
}

/// Some elements of `found` against those of `left · right`, to within `error` of the sum of the absolute
/// values of their terms.
///
/// # Panics
///
/// If an element is outside, or NaN.
pub fn assert_product(what: &str, found: &Host, left: &Host, right: &Host, error: f64) {
    for place @ [i, j] in places([found.values.len() / found.columns, found.columns]) {
        let exact = product(left, right, place);
        let bound = error * exact.magnitude;
        assert_close(what, place, found.at(i, j), exact.value, bound);
    }
}

/// # Panics
///
/// If `found` is further than `bound` from `expected`, or NaN.
pub fn assert_close(what: &str, place: [usize; 2], found: f64, expected: f64, bound: f64) {
    let error = (found - expected).abs();
    assert!(
        error <= bound,
        "{what}: element {place:?} is {found:e}, not {expected:e} within {bound:e}"
    );
}
