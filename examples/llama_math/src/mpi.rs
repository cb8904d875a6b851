//! One worker per process, under an MPI launcher.

use crate::Error;
use crate::finetune::FineTuning;

/// How long a worker waits before it ends because of another worker's failure: launchers end all
/// processes as soon as one has failed, and the other's message says more.
#[cfg(feature = "mpi")]
const COURTESY: std::time::Duration = std::time::Duration::from_millis(500);

/// Does this process's part of a run, on the named device.
///
/// # Errors
///
/// Those of [`FineTuning::run_as_worker`], with the index of the worker on all but the first.
#[cfg(feature = "mpi")]
pub fn run(fine_tuning: &FineTuning, device: Option<&str>) -> Result<(), Error> {
    use hd_pissa::comm::{Communicator, MpiCommunicator};

    // The same on every worker, so each finds its errors without the others.
    crate::device::parse(device)?;
    let communicator = MpiCommunicator::new(fine_tuning.timeout)?;
    let worker = communicator.worker_index();
    crate::device::of_process(device, communicator.local_index())
        .and_then(|device| fine_tuning.run_as_worker(&device, communicator))
        .map_err(|error| {
            if error.is_of_another_worker() {
                std::thread::sleep(COURTESY);
            }
            error.on_worker(worker)
        })
}

/// This build lacks the feature `mpi`.
///
/// # Errors
///
/// [`Error::Usage`], which says how to build it.
#[cfg(not(feature = "mpi"))]
pub fn run(_fine_tuning: &FineTuning, _device: Option<&str>) -> Result<(), Error> {
    Err(Error::Usage {
        option: "mpi",
        reason: "this build has no MPI; `cargo build --release --example llama_math --features \
                 mpi` makes one that has, with an MPI library and libclang (Debian: libopenmpi-dev \
                 openmpi-bin libclang-dev)"
            .into(),
    })
}
