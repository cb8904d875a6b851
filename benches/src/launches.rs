//! How many kernels a piece of work launches.

/// The number of kernels that `work` launches, with what it gives. `None` without a backend on CubeCL.
///
/// Counts the launches of the whole process; `work` waits for the device itself, so that operations
/// that fusion holds back are among them.
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
