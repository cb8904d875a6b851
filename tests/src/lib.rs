//! Helpers shared by the integration tests.

pub mod training;

use std::path::{Path, PathBuf};
use std::time::Duration;

use burn::module::{Module, ModuleMapper, Param};
use burn::nn::{Linear, LinearConfig};
use burn::tensor::{Bytes, DType, Device, Distribution, Tensor, TensorData};
use hd_pissa::comm::{ThreadCommunicator, thread_group};
use hd_pissa::{
    FrameScale, HdPissaLinear, HdPissaLinearConfig, HdPissaOptimizer, HdPissaOptimizerRecord,
    OptimizerError, Windows,
};

/// Two layers of Burn's `Linear`, of prime sizes, with an activation between them.
#[derive(Module, Debug)]
pub struct Dense {
    pub first: Linear,
    pub second: Linear,
}

impl Dense {
    pub fn new(device: &Device) -> Self {
        Self {
            first: LinearConfig::new(13, 17).init(device),
            second: LinearConfig::new(17, 11).with_bias(false).init(device),
        }
    }

    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        self.second.forward(self.first.forward(x).tanh())
    }
}

/// [`Dense`] with `HdPissaLinear` layers and the same parameter paths.
#[derive(Module, Debug)]
pub struct Lean {
    pub first: HdPissaLinear,
    pub second: HdPissaLinear,
}

impl Lean {
    pub fn new(device: &Device) -> Self {
        Self {
            first: HdPissaLinearConfig::new(13, 17).init(device),
            second: HdPissaLinearConfig::new(17, 11)
                .with_bias(false)
                .init(device),
        }
    }

    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        self.second.forward(self.first.forward(x).tanh())
    }
}

impl Lean {
    /// The model with all parameters in `dtype`.
    pub fn cast(self, dtype: DType) -> Self {
        struct Cast(DType);

        impl ModuleMapper for Cast {
            fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
                param.map(|value| Tensor::from_inner(value.inner().cast(self.0)))
            }
        }

        self.map(&mut Cast(dtype))
    }
}

impl From<Dense> for Lean {
    fn from(model: Dense) -> Self {
        Self {
            first: model.first.into(),
            second: model.second.into(),
        }
    }
}

/// Every choice of frames there is.
pub fn frame_choices() -> Vec<(Windows, FrameScale)> {
    let scales = [FrameScale::Balanced, FrameScale::Unit];
    let components = [Windows::Leading, Windows::Spread, Windows::Trailing];
    let components = components.into_iter().flat_map(|w| scales.map(|s| (w, s)));
    let random = Windows::Random { seed: 7 };
    components.chain([(random, FrameScale::Unit)]).collect()
}

/// The result of each thread of a group, by the index of its worker.
pub fn on_threads<T: Send>(
    workers: usize,
    work: impl Fn(ThreadCommunicator) -> T + Sync,
) -> Vec<T> {
    let group = thread_group(workers, Duration::from_secs(60));
    let work = &work;
    std::thread::scope(|scope| {
        let threads: Vec<_> = group
            .into_iter()
            .map(|communicator| scope.spawn(move || work(communicator)))
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    })
}

/// Standard normal values.
pub fn normal<const D: usize>(shape: [usize; D], device: &Device) -> Tensor<D> {
    Tensor::random(shape, Distribution::Normal(0.0, 1.0), device)
}

/// The values of a tensor as `f32`, row by row.
pub fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.inner().into_data().iter::<f32>().collect()
}

/// The bits of a tensor's values, to compare without tolerance.
///
/// A copy: with cubecl 0.11.3, data read from a WGPU tensor can show the values of a later read.
pub fn bits<const D: usize>(tensor: &Tensor<D>) -> TensorData {
    let data = tensor.clone().inner().into_data();
    TensorData::from_bytes_vec(data.as_bytes().to_vec(), data.shape().clone(), data.dtype())
}

/// The stored value of a parameter, without its adapter.
pub fn base(param: &Param<Tensor<2>>) -> Tensor<2> {
    param.base().inner()
}

/// Largest absolute difference of two tensors, relative to the largest entry of `expected`.
pub fn relative_error<const D: usize>(actual: Tensor<D>, expected: Tensor<D>) -> f32 {
    let (actual, expected) = (values(actual), values(expected));
    assert_eq!(actual.len(), expected.len());
    // `max` would pass over NaN.
    let finite = |values: &[f32]| values.iter().all(|x| x.is_finite());
    assert!(
        finite(&actual) && finite(&expected),
        "values that are not finite"
    );
    let largest = expected.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    let error = actual
        .iter()
        .zip(&expected)
        .fold(0.0f32, |m, (x, y)| m.max((x - y).abs()));
    if error == 0.0 { 0.0 } else { error / largest }
}

/// Asserts that two tensors agree within `tolerance` of the largest entry of `expected`.
#[track_caller]
pub fn assert_close<const D: usize>(actual: Tensor<D>, expected: Tensor<D>, tolerance: f32) {
    let error = relative_error(actual, expected);
    assert!(error <= tolerance, "relative error {error} > {tolerance}");
}

/// The state of an optimizer, as bytes.
pub fn state(optim: &HdPissaOptimizer) -> Bytes {
    optim.to_record().unwrap().into_bytes().unwrap()
}

/// The optimizer with a state that was saved.
pub fn resumed(
    mut optim: HdPissaOptimizer,
    state: Bytes,
) -> Result<HdPissaOptimizer, OptimizerError> {
    optim.load_record(HdPissaOptimizerRecord::from_bytes(state)?)?;
    Ok(optim)
}

/// The folder with larger recorded runs and data, which the repository does not hold:
/// `HD_PISSA_SHARED`, which must exist if the variable is set, or `shared` next to the checkout.
pub fn shared() -> Option<PathBuf> {
    if let Some(folder) = std::env::var_os("HD_PISSA_SHARED").map(PathBuf::from) {
        assert!(
            folder.is_dir(),
            "HD_PISSA_SHARED: no folder {}",
            folder.display()
        );
        return Some(folder);
    }
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared");
    beside.is_dir().then_some(beside)
}

#[cfg(any(feature = "wgpu", feature = "cuda"))]
const REQUIRE_GPU: [&str; 2] = ["HD_PISSA_REQUIRE_CUDA", "HD_PISSA_REQUIRE_WGPU"];

#[cfg(any(feature = "wgpu", feature = "cuda"))]
fn is_required(variable: &str) -> bool {
    std::env::var_os(variable).is_some_and(|value| value == "1")
}

/// The CUDA device in a build with that feature, else the WGPU one. `None` if there is no device,
/// which is a failure if `HD_PISSA_REQUIRE_CUDA` or `HD_PISSA_REQUIRE_WGPU` is 1.
#[cfg(any(feature = "wgpu", feature = "cuda"))]
pub fn gpu() -> Option<Device> {
    let found = std::panic::catch_unwind(|| {
        #[cfg(feature = "cuda")]
        let device = Device::cuda(0);
        #[cfg(not(feature = "cuda"))]
        let device = Device::wgpu(Default::default());
        Tensor::<1>::zeros([1], &device).into_data();
        device
    });
    let device = found.ok();
    if device.is_none() {
        for variable in REQUIRE_GPU {
            assert!(
                !is_required(variable),
                "{variable}=1, but no device was found"
            );
        }
        println!("skipped: no GPU and no software driver of one");
    }
    device
}

/// Whether the GPU has a dtype. Every device that a test run requires must have `f16`.
#[cfg(any(feature = "wgpu", feature = "cuda"))]
pub fn gpu_supports(device: &Device, dtype: DType) -> bool {
    let supported = device.supports_dtype(dtype);
    if !supported {
        let required = REQUIRE_GPU.iter().any(|variable| is_required(variable));
        assert!(
            !required || dtype == DType::BF16,
            "no {dtype:?} on {device:?}"
        );
        println!("skipped: no {dtype:?} on this device");
    }
    supported
}

/// How far `f32` products of the GPU backend may be from exact ones, relative to the largest: Burn's
/// products on matrix units round their operands to the 11 bits of `tf32`.
#[cfg(any(feature = "wgpu", feature = "cuda"))]
pub fn gpu_product_tolerance() -> f32 {
    if cfg!(feature = "cuda") { 4e-3 } else { 1e-5 }
}
