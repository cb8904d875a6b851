//! Devices by name.

use std::panic::{AssertUnwindSafe, catch_unwind};

use burn::tensor::{Device, Tensor};

/// The backends that a build can have, with the names of their features.
pub const BACKENDS: [&str; 7] = ["flex", "cuda", "wgpu", "vulkan", "metal", "rocm", "cpu"];

/// Why a device cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    #[error(
        "device `{name}`: no such backend; there are {}, and `:1` after cuda or rocm chooses the \
         second device",
        BACKENDS.join(", ")
    )]
    Unknown { name: String },
    #[error("device `{name}`: this build lacks its backend; build with `--features {backend}`")]
    NotBuilt { name: String, backend: String },
    #[error(
        "device `{name}`: it does not answer; look whether the device and its driver are there: \
         {reason}"
    )]
    Missing { name: String, reason: String },
}

/// The device of a backend, with `:INDEX` for CUDA and ROCm, after a first answer from it.
///
/// # Errors
///
/// [`DeviceError`] if the name is unknown, the build lacks the backend, or the device does not
/// exist.
pub fn open(name: &str) -> Result<Device, DeviceError> {
    let unknown = || DeviceError::Unknown { name: name.into() };
    let (backend, index) = match name.split_once(':') {
        Some((backend @ ("cuda" | "rocm"), index)) => {
            (backend, index.parse().map_err(|_| unknown())?)
        }
        Some(_) => return Err(unknown()),
        None => (name, 0),
    };
    if !BACKENDS.contains(&backend) {
        return Err(unknown());
    }
    if !backends().contains(&backend) {
        return Err(DeviceError::NotBuilt {
            name: name.into(),
            backend: backend.into(),
        });
    }
    // Burn panics without a driver.
    let answer = || {
        let device = built(backend, index);
        Tensor::<1>::zeros([1], &device).into_data();
        device
    };
    catch_unwind(AssertUnwindSafe(answer)).map_err(|panic| DeviceError::Missing {
        name: name.into(),
        reason: panic_message(&*panic),
    })
}

/// The backends of this build.
pub fn backends() -> Vec<&'static str> {
    let built = [
        true,
        cfg!(feature = "cuda"),
        cfg!(feature = "wgpu"),
        cfg!(feature = "vulkan"),
        cfg!(feature = "metal"),
        cfg!(feature = "rocm"),
        cfg!(feature = "cpu"),
    ];
    let with = BACKENDS.into_iter().zip(built);
    with.filter_map(|(name, built)| built.then_some(name))
        .collect()
}

/// The device to measure on: `HD_PISSA_DEVICE`, or the most capable one of the build, which is Flex
/// with the default features.
///
/// # Panics
///
/// If [`open`] refuses it.
pub fn device() -> (&'static str, Device) {
    let most_capable = match () {
        () if cfg!(feature = "cuda") => "cuda",
        () if cfg!(feature = "wgpu") => "wgpu",
        () => "flex",
    };
    let name = std::env::var("HD_PISSA_DEVICE").unwrap_or_else(|_| most_capable.into());
    let device = open(&name).unwrap_or_else(|error| panic!("HD_PISSA_DEVICE: {error}"));
    let is_named = |backend: &&str| name.starts_with(backend);
    (
        BACKENDS.into_iter().find(is_named).expect("it was opened"),
        device,
    )
}

/// The device's own name, or the processor and its number of threads.
pub fn hardware(device: &Device) -> String {
    #[cfg(feature = "cubecl-kernels")]
    if let Some(identity) = device.identity() {
        return identity.name;
    }
    let _ = device;
    processor()
}

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

#[allow(unused_variables, reason = "which are used depends on the features")]
fn built(backend: &str, index: usize) -> Device {
    match backend {
        "flex" => Device::flex(),
        #[cfg(feature = "cuda")]
        "cuda" => Device::cuda(index),
        #[cfg(feature = "wgpu")]
        "wgpu" => Device::wgpu(Default::default()),
        #[cfg(feature = "vulkan")]
        "vulkan" => Device::vulkan(Default::default()),
        #[cfg(feature = "metal")]
        "metal" => Device::metal(Default::default()),
        #[cfg(feature = "rocm")]
        "rocm" => Device::rocm(index),
        #[cfg(feature = "cpu")]
        "cpu" => Device::cpu(),
        other => unreachable!("{other} is none of this build's backends"),
    }
}

/// The message of a panic.
pub fn panic_message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(ToString::to_string);
    text.or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "a panic without a message".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_do_not_open_say_why() {
        for name in ["tpu", "flex:1", "cuda:x", ""] {
            assert!(
                matches!(open(name), Err(DeviceError::Unknown { .. })),
                "{name}"
            );
        }
        let lacking = BACKENDS.into_iter().find(|name| !backends().contains(name));
        let lacking = lacking.expect("no build has all backends");
        let error = open(lacking).unwrap_err();
        let advice = format!("--features {lacking}");
        assert!(error.to_string().contains(&advice), "{error}");
        assert!(open("flex").is_ok());
    }
}
