//! The highest rates of a device: a copy gives the bandwidth, a large product the arithmetic.

use burn::tensor::{DType, Device, Distribution, Tensor};

use super::sample::{Host, assert_close, assert_product, places};
use super::timing::{alternate_within, median};

/// Times of a piece of work, in milliseconds, and its size.
#[derive(Clone, Debug)]
pub struct Timed {
    pub times: Vec<f64>,
    pub bytes: f64,
    pub flops: f64,
}

impl Timed {
    pub fn bytes_per_second(&self) -> f64 {
        1e3 * self.bytes / median(self.times.iter().copied())
    }

    pub fn flops_per_second(&self) -> f64 {
        1e3 * self.flops / median(self.times.iter().copied())
    }
}

/// One read and one write of a matrix of `size`, negated in place, like a merge of a weight.
///
/// # Panics
///
/// If the device fails, or gives something else.
pub fn copy(device: &Device, size: [usize; 2], dtype: DType, seconds: f64) -> Timed {
    let host = Host::random(device, size, dtype);
    let mut weight = host.tensor(device, dtype).neg();
    let negated = Host::read(weight.clone());
    for place @ [i, j] in places(size) {
        assert_close("copy", place, negated.at(i, j), -host.at(i, j), 0.0);
    }
    let times = alternate_within(
        seconds,
        &mut [&mut || {
            // The tensor left in its place is a handle of a few bytes.
            let owned = std::mem::replace(&mut weight, Tensor::empty([1, 1], device));
            weight = owned.neg();
            device.sync().expect("the device works");
        }],
    );
    Timed {
        times: times.into_iter().next().expect("one work"),
        bytes: 2.0 * (dtype.size() * host.values.len()) as f64,
        flops: 0.0,
    }
}

/// A square product by Burn, large enough to take some time, with a side of at most `most`. Returns
/// the side too.
///
/// `error` bounds the error of an element for an inner dimension, as a share of the sum of the
/// absolute values of its terms.
///
/// # Panics
///
/// If the device fails, or a result is further off.
pub fn large_product(
    device: &Device,
    dtype: DType,
    most: usize,
    seconds: f64,
    error: impl Fn(usize) -> f64,
) -> (usize, Timed) {
    let mut n = most.min(512);
    loop {
        let [left, right] = [(); 2].map(|()| Host::random(device, [n, n], dtype));
        let operands = [&left, &right].map(|host| host.tensor(device, dtype));
        let product = || operands[0].clone().matmul(operands[1].clone());
        let found = Host::read(product());
        assert_product("large product", &found, &left, &right, error(n));
        let times = alternate_within(
            seconds,
            &mut [&mut || {
                let _product = product();
                device.sync().expect("the device works");
            }],
        );
        let times = times.into_iter().next().expect("one work");
        if median(times.iter().copied()) > 50.0 || 2 * n > most {
            let timed = Timed {
                times,
                bytes: 3.0 * (dtype.size() * n * n) as f64,
                flops: 2.0 * (n as f64).powi(3),
            };
            return (n, timed);
        }
        n *= 2;
    }
}

impl Host {
    /// Values uniform in `[-1, 1)`, rounded to `dtype`.
    fn random(device: &Device, shape: [usize; 2], dtype: DType) -> Self {
        let uniform = Distribution::Uniform(-1.0, 1.0);
        // Rounded on the device and read back, so the host has the device's values.
        Self::read(Tensor::<2>::random(shape, uniform, (device, DType::F32)).cast(dtype))
    }
}
