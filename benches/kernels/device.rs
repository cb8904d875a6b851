//! The device, its data and its rates.

use burn::tensor::{DType, Device, Distribution, Tensor, TensorData};
use hd_pissa_benches::{alternate_within, device, median};

use crate::float::Float;
use crate::rows::{Roofline, Row};
use crate::sample::{Host, assert_close, assert_product, places};

pub struct Bench {
    /// Backend and hardware.
    pub name: String,
    pub device: Device,
    seconds: f64,
    /// For the kernels without Burn; `None` on Flex.
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
        #[cfg(feature = "cubecl-kernels")]
        let hardware = match &client {
            Some(client) => client.properties().identity.name.clone(),
            None => processor(),
        };
        #[cfg(not(feature = "cubecl-kernels"))]
        let hardware = processor();
        Self {
            name: format!("{backend} on {hardware}"),
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

    /// New values, uniform in `[-scale, scale)`, that `dtype` holds.
    pub fn random(&self, shape: [usize; 2], scale: f64, dtype: Float) -> Host {
        let uniform = Distribution::Uniform(-scale, scale);
        let values = self.values(Tensor::random(shape, uniform, &self.device));
        Host {
            values: values.values.into_iter().map(|v| dtype.round(v)).collect(),
            columns: shape[1],
        }
    }

    pub fn tensor(&self, host: &Host, dtype: Float) -> Tensor<2> {
        let shape = [host.values.len() / host.columns, host.columns];
        let data = TensorData::new(host.values.clone(), shape);
        Tensor::<2>::from_data(data, &self.device).cast(dtype.dtype())
    }

    pub fn values(&self, tensor: Tensor<2>) -> Host {
        let columns = tensor.dims()[1];
        let data = tensor.cast(DType::F32).into_data();
        Host {
            values: data.iter().collect(),
            columns,
        }
    }

    pub fn times(&self, works: &mut [&mut dyn FnMut()]) -> Vec<Vec<f64>> {
        alternate_within(self.seconds, works)
    }

    /// One read and one write of a weight, in place as a merge; its row, and the bytes per second.
    pub fn copy(&self, size: [usize; 2], dtype: Float) -> (Row, f64) {
        let host = self.random(size, 1.0, dtype);
        let mut weight = self.tensor(&host, dtype).neg();
        let negated = self.values(weight.clone());
        for place @ [i, j] in places(size) {
            assert_close("copy", place, negated.at(i, j), -host.at(i, j), 0.0);
        }
        let times = self.times(&mut [&mut || {
            // The tensor left in its place is a handle of a few bytes.
            let owned = std::mem::replace(&mut weight, Tensor::empty([1, 1], &self.device));
            weight = owned.neg();
            self.sync();
        }]);
        let bytes = 2.0 * dtype.bytes() * host.values.len() as f64;
        let roofline = Roofline {
            bytes_per_second: 1e3 * bytes / median(times[0].iter().copied()),
            flops_per_second: f64::INFINITY,
        };
        let names = ["copy", "Burn, negated in place", dtype.name()];
        let row = Row::new(names, size, [bytes, 0.0], &times[0], &roofline);
        (row, roofline.bytes_per_second)
    }

    /// A square product by Burn, as large as takes some time.
    pub fn large_product(&self, dtype: Float, quick: bool) -> Large {
        let most = if quick { 1024 } else { 8192 };
        let mut n = 512;
        let times = loop {
            let [left, right] = [(); 2].map(|()| self.random([n, n], 1.0, dtype));
            let operands = [&left, &right].map(|host| self.tensor(host, dtype));
            let product = || operands[0].clone().matmul(operands[1].clone());
            let found = self.values(product());
            assert_product("large product", &found, &left, &right, self.error(dtype, n));
            let times = self.times(&mut [&mut || {
                let _product = product();
                self.sync();
            }]);
            if median(times[0].iter().copied()) > 50.0 || 2 * n > most {
                break times;
            }
            n *= 2;
        };
        let flops = 2.0 * (n as f64).powi(3);
        let roofline = Roofline {
            bytes_per_second: f64::INFINITY,
            flops_per_second: 1e3 * flops / median(times[0].iter().copied()),
        };
        let names = ["large", "Burn", dtype.name()];
        let bytes = 3.0 * dtype.bytes() * (n * n) as f64;
        Large {
            row: Row::new(names, [n, n], [bytes, flops], &times[0], &roofline),
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

/// The name of the processor and its number of threads.
fn processor() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info
        .lines()
        .find(|line| line.starts_with("model name"))
        .and_then(|line| line.split_once(": "))
        .map_or(std::env::consts::ARCH, |(_, model)| model);
    let threads = std::thread::available_parallelism().map_or(1, |count| count.get());
    format!("{}, {threads} threads", model.trim())
}
