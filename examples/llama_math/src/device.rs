//! Devices by name.

use burn::tensor::Device;

use crate::{Error, panics};

/// The device of `--device`: a backend that this build has, with `:INDEX` for CUDA and ROCm; Burn's
/// default if none is named.
///
/// # Errors
///
/// [`Error::Option`] for a backend that this build does not have.
///
/// # Panics
///
/// If `BURN_DEVICE` names one; see [`check_variable`].
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

/// Refuses a `BURN_DEVICE` from which Burn cannot make a device. Burn reads its default in some
/// places even with `--device`.
///
/// # Errors
///
/// [`Error::Environment`].
pub fn check_variable() -> Result<(), Error> {
    const VARIABLE: &str = "BURN_DEVICE";
    if std::env::var_os(VARIABLE).is_none() {
        return Ok(());
    }
    let default = panics::caught(Device::default).map(drop);
    default.map_err(|reason| Error::Environment {
        variable: VARIABLE,
        reason: format!("{reason} This build has {}", available().join(", ")),
    })
}

/// Whether the device uses the memory of this process.
pub(crate) fn is_host(device: &Device) -> bool {
    ["Flex", "Cpu"]
        .iter()
        .any(|name| format!("{device:?}").contains(name))
}

/// The device on which a model trains: with Burn's gradient checkpointing, which computes cheap results again in
/// the backward pass instead of keeping them.
pub fn training(device: &Device) -> Device {
    device.clone().autodiff().gradient_checkpointing()
}

/// The device of each of `workers` threads: with CUDA and ROCm one each, unless `name` has an
/// index, with other backends the same.
///
/// # Errors
///
/// Those of [`parse`].
pub fn of_workers(name: Option<&str>, workers: usize) -> Result<Vec<Device>, Error> {
    (0..workers)
        .map(|worker| numbered(name, |_| worker))
        .collect()
}

/// The device of the process with number `local_index` on its machine, in the order of
/// [`of_workers`]. If a launcher shows a process only one GPU, the process takes that one.
///
/// # Errors
///
/// Those of [`parse`].
pub fn of_process(name: Option<&str>, local_index: usize) -> Result<Device, Error> {
    numbered(name, |variables| {
        let shown = variables.iter().find_map(|name| std::env::var(name).ok());
        index_among(shown.as_deref(), local_index)
    })
}

/// Gives a CUDA or ROCm device an index if `name` has none. `index` gets the environment variables
/// that hide devices of that kind.
fn numbered(name: Option<&str>, index: impl Fn(&[&str]) -> usize) -> Result<Device, Error> {
    let index = match name.or(default_of_many()) {
        Some("cuda") => index(&["CUDA_VISIBLE_DEVICES"]),
        Some("rocm") => index(&["ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"]),
        _ => return parse(name),
    };
    let backend = name.or(default_of_many()).unwrap_or_default();
    parse(Some(&format!("{backend}:{index}")))
}

/// Burn's default backend in this build, if it numbers its devices.
fn default_of_many() -> Option<&'static str> {
    if std::env::var_os("BURN_DEVICE").is_some() {
        None
    } else if cfg!(feature = "cuda") {
        Some("cuda")
    } else if cfg!(feature = "rocm") && !cfg!(feature = "metal") {
        Some("rocm")
    } else {
        None
    }
}

/// `shown` lists devices as `CUDA_VISIBLE_DEVICES` does: a single one has index 0.
fn index_among(shown: Option<&str>, local_index: usize) -> usize {
    match shown {
        Some(list) if !list.is_empty() && !list.contains(',') => 0,
        _ => local_index,
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_takes_its_own_device_or_the_only_one_it_sees() {
        assert_eq!(index_among(None, 3), 3);
        assert_eq!(index_among(Some("0,1,2,3"), 3), 3);
        assert_eq!(index_among(Some("5"), 3), 0);
        assert_eq!(index_among(Some("GPU-8932f937"), 1), 0);
    }
}
