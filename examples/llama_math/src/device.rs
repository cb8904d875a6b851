//! Devices by name.

use burn::tensor::Device;

use crate::Error;

/// The device of `--device`: a backend that this build has, with `:INDEX` for CUDA and ROCm;
/// Burn's default where none is named.
///
/// # Errors
///
/// [`Error::Option`] for a backend that this build does not have.
pub fn parse(name: Option<&str>) -> Result<Device, Error> {
    let Some(name) = name else {
        return Ok(Device::default());
    };
    let (backend, index) = match name.split_once(':') {
        Some((backend, index)) => (backend, index.parse::<usize>().ok()),
        None => (name, Some(0)),
    };
    let device = index.and_then(|index| open(backend, index));
    device.ok_or_else(|| Error::Option {
        option: "device",
        reason: format!("`{name}` is not one of {}", available().join(", ")),
    })
}

/// The device of each of `workers` threads: with CUDA and ROCm one each, unless `name` has an
/// index, with other backends the same.
///
/// # Errors
///
/// Those of [`parse`].
pub fn of_workers(name: Option<&str>, workers: usize) -> Result<Vec<Device>, Error> {
    let own = |backend: &str, worker: usize| parse(Some(&format!("{backend}:{worker}")));
    (0..workers)
        .map(|worker| match name {
            Some(backend @ ("cuda" | "rocm")) => own(backend, worker),
            name => parse(name),
        })
        .collect()
}

#[allow(unused_variables, reason = "which are used depends on the features")]
fn open(backend: &str, index: usize) -> Option<Device> {
    match (backend, index) {
        #[cfg(feature = "flex")]
        ("flex", 0) => Some(Device::flex()),
        #[cfg(feature = "cpu")]
        ("cpu", 0) => Some(Device::cpu()),
        #[cfg(feature = "cuda")]
        ("cuda", index) => Some(Device::cuda(index)),
        #[cfg(feature = "rocm")]
        ("rocm", index) => Some(Device::rocm(index)),
        #[cfg(feature = "wgpu")]
        ("wgpu", 0) => Some(Device::wgpu(Default::default())),
        #[cfg(feature = "vulkan")]
        ("vulkan", 0) => Some(Device::vulkan(Default::default())),
        #[cfg(feature = "metal")]
        ("metal", 0) => Some(Device::metal(Default::default())),
        _ => None,
    }
}

fn available() -> Vec<&'static str> {
    let all = [
        ("flex", cfg!(feature = "flex")),
        ("cpu", cfg!(feature = "cpu")),
        ("cuda[:INDEX]", cfg!(feature = "cuda")),
        ("rocm[:INDEX]", cfg!(feature = "rocm")),
        ("wgpu", cfg!(feature = "wgpu")),
        ("vulkan", cfg!(feature = "vulkan")),
        ("metal", cfg!(feature = "metal")),
    ];
    all.into_iter()
        .filter(|(_, built)| *built)
        .map(|(name, _)| name)
        .collect()
}
