//! The device, its data and its rates.

use burn::tensor::{Device, Distribution, Tensor};
use hd_pissa_check::measure::sample::Host;
use hd_pissa_check::measure::{alternate_within, copy, device, hardware, large_product};

use crate::float::Float;
use crate::rows::{Roofline, Row};

pub struct Bench {
    /// Backend and hardware.
    pub name: String,
    pub device: Device,
    seconds: f64,
    /// The client of the kernels without Burn; `None` on Flex.
    #[cfg(feature = "cubecl-kernels")]
    pub client: Option<cubecl::client::Client>,
}

/// The rate of a large product.
pub struct Large {
    pub row: Row,
    pub flops_per_second: f64,
}

impl Bench {
    pub fn new(seconds: f64) -> Self {
        let (backend, device) = device();
        #[cfg(feature = "cubecl-kernels")]
        let client = match backend {
            "wgpu" => cubecl::Device::wgpu(Default::default()).ok(),
            "cuda" => cubecl::Device::cuda(0).ok(),
            _ => None,
        }
        .map(|device| device.client());
        Self {
            name: format!("{backend} on {}", hardware(&device)),
            device,
            seconds,
            #[cfg(feature = "cubecl-kernels")]
            client,
        }
    }

    /// The element types of inputs and weights to measure: `f32`, and on a GPU the halves that it
    /// has.
    pub fn dtypes(&self) -> Vec<Float> {
        let mut dtypes = vec![Float::F32, Float::F16, Float::BF16];
        dtypes.retain(|dtype| *dtype == Float::F32 || self.has(*dtype));
        dtypes
    }

    #[cfg(feature = "cubecl-kernels")]
    fn has(&self, dtype: Float) -> bool {
        let has = |client| dtype.kernel_type().is_supported(client);
        self.client.as_ref().is_some_and(has)
    }

    #[cfg(not(feature = "cubecl-kernels"))]
    fn has(&self, _: Float) -> bool {
        false
    }

    pub fn sync(&self) {
        self.device.sync().expect("the device works");
    }

    /// Whether Burn's products on this device may be less exact than `f32`, as on matrix units.
    pub fn rounds_operands(&self) -> bool {
        !self.name.starts_with("flex")
    }

    /// New values, uniform in `[-scale, scale)`, which `dtype` holds exactly.
    pub fn random(&self, shape: [usize; 2], scale: f64, dtype: Float) -> Host {
        let uniform = Distribution::Uniform(-scale, scale);
        let values = self.values(Tensor::random(shape, uniform, &self.device));
        Host {
            values: values.values.into_iter().map(|v| dtype.round(v)).collect(),
            columns: shape[1],
        }
    }

    pub fn tensor(&self, host: &Host, dtype: Float) -> Tensor<2> {
        host.tensor(&self.device, dtype.dtype())
    }

    pub fn values(&self, tensor: Tensor<2>) -> Host {
        Host::read(tensor)
    }

    pub fn times(&self, works: &mut [&mut dyn FnMut()]) -> Vec<Vec<f64>> {
        alternate_within(self.seconds, works)
    }

    /// One read and one write of a weight, in place like a merge. Returns its row, and the bytes
    /// per second.
    pub fn copy(&self, size: [usize; 2], dtype: Float) -> (Row, f64) {
        let timed = copy(&self.device, size, dtype.dtype(), self.seconds);
        let roofline = Roofline {
            bytes_per_second: timed.bytes_per_second(),
            flops_per_second: f64::INFINITY,
        };
        let names = ["copy", "Burn, negated in place", dtype.name()];
        let row = Row::new(names, size, [timed.bytes, 0.0], &timed.times, &roofline);
        (row, roofline.bytes_per_second)
    }

    /// A square product by Burn, large enough to take some time.
    pub fn large_product(&self, dtype: Float, quick: bool) -> Large {
        let most = if quick { 1024 } else { 8192 };
        let error = |inner| self.error(dtype, inner);
        let (n, timed) = large_product(&self.device, dtype.dtype(), most, self.seconds, error);
        let roofline = Roofline {
            bytes_per_second: f64::INFINITY,
            flops_per_second: timed.flops_per_second(),
        };
        let names = ["large", "Burn", dtype.name()];
        Large {
            row: Row::new(
                names,
                [n, n],
                [timed.bytes, timed.flops],
                &timed.times,
                &roofline,
            ),
            flops_per_second: roofline.flops_per_second,
        }
    }

    /// A bound on the error of a product by Burn, as a share of the sum of the absolute values of
    /// its `inner` terms.
    pub fn error(&self, dtype: Float, inner: usize) -> f64 {
        let sums = inner as f64 * f64::from(f32::EPSILON);
        match dtype {
            Float::F32 if self.rounds_operands() => sums + 2f64.powi(-10),
            Float::F32 => sums,
            Float::F16 => sums + 2f64.powi(-10),
            Float::BF16 => sums + 2f64.powi(-7),
        }
    }
}
