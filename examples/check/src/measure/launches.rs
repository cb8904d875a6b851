//! The number of kernels that a piece of work launches.

/// The number of kernels that `work` launches, with what it gives. `None` without a backend on CubeCL.
///
/// Counts the launches of the whole process. `work` must wait for the device, so that operations
/// that fusion delays are counted.
#[cfg(feature = "cubecl-kernels")]
pub fn count_launches<T>(work: impl FnOnce() -> T) -> (Option<usize>, T) {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use cubecl_runtime::logging::{LaunchObservation, LaunchObserver};

    #[derive(Default)]
    struct Count(AtomicUsize);

    impl LaunchObserver for Count {
        fn launched(&self, _kernel: &'static str) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    let count = Arc::new(Count::default());
    let observation = LaunchObservation::new(count.clone());
    let value = work();
    drop(observation);
    (Some(count.0.load(Ordering::Relaxed)), value)
}

/// The number of kernels that `work` launches, with what it gives. `None` without a backend on CubeCL.
#[cfg(not(feature = "cubecl-kernels"))]
pub fn count_launches<T>(work: impl FnOnce() -> T) -> (Option<usize>, T) {
    (None, work())
}

#[cfg(test)]
mod tests {
    use burn::tensor::Tensor;

    use super::*;

    #[test]
    fn a_negation_is_one_launch_on_a_gpu_and_none_on_flex() {
        let negated = |name: &str| {
            let device = crate::measure::open(name).unwrap();
            let x = Tensor::<1>::ones([3], &device);
            device.sync().unwrap();
            count_launches(|| x.neg().into_data().iter::<f32>().collect::<Vec<_>>())
        };
        let expected = vec![-1.0f32; 3];
        let flex = if cfg!(feature = "cubecl-kernels") {
            Some(0)
        } else {
            None
        };
        assert_eq!(negated("flex"), (flex, expected.clone()));
        let required = std::env::var_os("HD_PISSA_REQUIRE_WGPU").is_some_and(|value| value == "1");
        if cfg!(feature = "wgpu") && required {
            assert_eq!(negated("wgpu"), (Some(1), expected));
        }
    }
}
