//! The contract of a transport, run against each implementation: the bits that arrive, the counted
//! traffic, and the errors of the other workers when one fails.
//!
//! `HD_PISSA_REQUIRE_MPI=1` makes a missing `mpirun` an error.

mod common;

use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use burn::tensor::{DType, Device, Tensor};
use common::{
    CONTRACT_TIMEOUT, FAULTY_CALLS, Fault, NO_DEFAULT_DEVICE, SHORT_TIMEOUT, contract, control,
    mixed, tree_sum,
};
#[cfg(feature = "collectives")]
use hd_pissa_comm::collective_group;
use hd_pissa_comm::{CommError, Communicator, Solo, Traffic, thread_group};

#[test]
fn solo() {
    contract(&Solo);
    control(&Solo);
    assert_eq!(Solo.traffic(), Traffic::default());
}

#[test]
fn threads() {
    for workers in [1, 2, 3, 4, 8] {
        thread::scope(|scope| {
            for communicator in thread_group(workers, CONTRACT_TIMEOUT) {
                scope.spawn(move || {
                    contract(&communicator);
                    control(&communicator);
                });
            }
        });
    }
}

/// Flex has no collectives. One worker and byte strings do not need them.
#[cfg(feature = "collectives")]
#[test]
fn collectives() {
    for workers in [1, 2, 3] {
        let devices = vec![Device::flex(); workers];
        thread::scope(|scope| {
            for communicator in collective_group(&devices, CONTRACT_TIMEOUT) {
                scope.spawn(move || {
                    if workers == 1 {
                        contract(&communicator);
                    }
                    control(&communicator);
                    communicator.barrier().unwrap();
                });
            }
        });
    }
}

/// 8 buffers. Each worker sums its share of them before the reduce_scatter.
#[test]
fn the_number_of_workers_changes_no_bit_of_a_sum() {
    const LEN: usize = 8 * 1021;
    let buffers: Vec<_> = (0..8).map(|buffer| mixed(LEN, buffer, 0)).collect();
    let in_order = buffers
        .iter()
        .skip(1)
        .fold(buffers[0].clone(), |sum, next| {
            sum.iter().zip(next).map(|(x, y)| x + y).collect()
        });
    let sums = [1, 2, 4, 8].map(|workers| {
        let buffers = &buffers;
        let group = thread_group(workers, CONTRACT_TIMEOUT);
        thread::scope(|scope| {
            let threads: Vec<_> = group
                .into_iter()
                .zip(buffers.chunks(8 / workers))
                .map(|(communicator, share)| {
                    let own = Tensor::from_floats(&tree_sum(share)[..], &Device::flex());
                    scope.spawn(move || communicator.reduce_scatter(own).unwrap())
                })
                .collect();
            let parts = threads.into_iter().map(|thread| thread.join().unwrap());
            let parts = parts.flat_map(|part| part.into_data().iter::<f32>().collect::<Vec<_>>());
            parts.map(f32::to_bits).collect::<Vec<_>>()
        })
    });
    assert!(sums.iter().all(|sum| *sum == sums[0]));
    let in_order: Vec<_> = in_order.into_iter().map(f32::to_bits).collect();
    assert!(sums[0] != in_order, "the order shows");
}

#[test]
#[should_panic(expected = "reduce_scatter of 3 values, which is not a multiple of 2 workers")]
fn a_buffer_without_a_chunk_for_each_worker_is_refused() {
    let group = thread_group(2, SHORT_TIMEOUT);
    let _ = group[0].reduce_scatter(Tensor::zeros([3], &Device::flex()));
}

#[test]
#[should_panic(expected = "reduce_scatter sums F32 values, not F16")]
fn a_sum_of_half_precision_is_refused() {
    let options = (&Device::flex(), DType::F16);
    let _ = Solo.reduce_scatter(Tensor::zeros([2], options));
}

/// If there is a GPU, it is the default device. A worker on another device must not touch it.
#[test]
fn no_call_takes_the_default_device() {
    let (variable, none) = NO_DEFAULT_DEVICE;
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "solo", "threads"])
        .env(variable, none)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success(), "{text}");
    assert!(text.contains("2 passed"), "{text}");
}

#[test]
fn a_time_limit_beyond_the_clock_is_none() {
    let longest = Duration::from_secs(i64::MAX as u64);
    for timeout in [Duration::MAX, longest, longest / 2] {
        thread::scope(|scope| {
            for communicator in thread_group(2, timeout) {
                scope.spawn(move || {
                    contract(&communicator);
                    if communicator.worker_index() == 0 {
                        // The other worker leaves while this one waits, or before.
                        let gone = CommError::WorkerGone { worker: 1 };
                        assert_eq!(communicator.barrier(), Err(gone));
                    }
                });
            }
        });
    }
}

/// Runs a fault in the last worker of a group of threads and checks what the others report.
#[test]
fn every_thread_learns_of_a_fault_in_one() {
    for (workers, verb) in FAULTY_CALLS {
        for fault in verb.faults().filter(|fault| !fault.ends_process()) {
            let results: Vec<_> = thread::scope(|scope| {
                let threads: Vec<_> = thread_group(workers, SHORT_TIMEOUT)
                    .into_iter()
                    .map(|communicator| {
                        scope.spawn(move || common::fault(&communicator, fault, verb))
                    })
                    .collect();
                threads
                    .into_iter()
                    .map(thread::ScopedJoinHandle::join)
                    .collect()
            });
            for (worker, result) in results.into_iter().enumerate() {
                // The thread that panics on purpose does not report.
                let Ok((error, elapsed)) = result else {
                    assert!(fault == Fault::Panic && worker == workers - 1);
                    continue;
                };
                println!(
                    "{workers} threads, {verb:?}, {fault:?}: worker {worker}: {error}, after {elapsed:.2?}"
                );
                fault.check(&error, elapsed, workers, verb);
            }
        }
    }
}

#[test]
fn after_a_failure_calls_fail_at_once() {
    let group = thread_group(2, SHORT_TIMEOUT);
    let error = CommError::TimedOut {
        missing: vec![1],
        after: SHORT_TIMEOUT,
    };
    assert_eq!(group[0].barrier(), Err(error.clone()));
    let start = Instant::now();
    assert_eq!(group[1].barrier(), Err(error));
    assert!(start.elapsed() < SHORT_TIMEOUT);
}

#[test]
fn a_worker_that_left_before_the_call_is_named() {
    let mut group = thread_group(3, Duration::from_secs(30));
    drop(group.remove(1));
    let start = Instant::now();
    let errors: Vec<_> = thread::scope(|scope| {
        let threads: Vec<_> = group
            .iter()
            .map(|communicator| scope.spawn(|| communicator.barrier()))
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert_eq!(errors, vec![Err(CommError::WorkerGone { worker: 1 }); 2]);
    assert!(start.elapsed() < Duration::from_secs(10));
}

#[test]
#[should_panic(expected = "broadcast from worker 1 of 1")]
fn a_root_that_does_not_exist_is_refused() {
    let _ = Solo.broadcast(Tensor::zeros([1], &Device::flex()), 1);
}

#[cfg(not(feature = "mpi"))]
#[test]
fn mpi() {
    eprintln!("skipped: MPI processes; they need the feature `mpi`");
    assert!(
        std::env::var_os("HD_PISSA_REQUIRE_MPI").is_none(),
        "HD_PISSA_REQUIRE_MPI is set, but the feature `mpi` is off"
    );
}

#[cfg(feature = "mpi")]
mod mpi {
    use super::*;
    use common::{Verb, mpirun};
    use hd_pissa_comm::MpiCommunicator;

    /// The job without a fault.
    const CONTRACT: &str = "contract";
    /// The job that makes, uses and drops the communicator on different threads.
    const THREADS: &str = "threads";

    /// The job with a fault in a call.
    fn faulty(fault: Fault, verb: Verb) -> String {
        format!("{fault:?} in {verb:?}")
    }

    /// The work of each process that [`mpirun`] starts: the job that the environment names.
    #[test]
    #[ignore = "started by the other tests under mpirun"]
    fn process() {
        let Ok(job) = std::env::var(mpirun::JOB) else {
            return println!("skipped: not started under mpirun by a test");
        };
        if job == THREADS {
            return changing_threads();
        }
        let timeout = if job == CONTRACT {
            CONTRACT_TIMEOUT
        } else {
            SHORT_TIMEOUT
        };
        let communicator = MpiCommunicator::new(timeout).unwrap();
        let worker = communicator.worker_index();
        if job == CONTRACT {
            assert_eq!(communicator.local_index(), worker, "all on one machine");
            contract(&communicator);
            control(&communicator);
            return println!("worker {worker}: passed");
        }
        let (fault, verb) = FAULTY_CALLS
            .iter()
            .flat_map(|&(_, verb)| verb.faults().map(move |fault| (fault, verb)))
            .find(|&(fault, verb)| faulty(fault, verb) == job)
            .unwrap();
        let (error, elapsed) = common::fault(&communicator, fault, verb);
        fault.check(&error, elapsed, communicator.num_workers(), verb);
        let start = Instant::now();
        drop(communicator);
        let dropped = start.elapsed();
        println!("worker {worker}: {error}, after {elapsed:.2?}");
        assert!(
            dropped < Duration::from_secs(2),
            "dropping took {dropped:?}"
        );
        // A program that returns its error from `main` does the same.
        std::process::exit(1);
    }

    /// The thread that initialized MPI must also shut it down. These two functions replace MPI's
    /// own, as its profiling interface allows, and record the thread of their call.
    mod noted {
        use std::ffi::c_int;
        use std::sync::Mutex;
        use std::thread::{self, ThreadId};

        pub static CALLS: Mutex<Vec<(&str, ThreadId)>> = Mutex::new(Vec::new());

        fn note(call: &'static str) {
            CALLS.lock().unwrap().push((call, thread::current().id()));
        }

        unsafe extern "C" {
            fn PMPI_Init_thread(
                argc: *mut c_int,
                argv: *mut *mut *mut std::ffi::c_char,
                required: c_int,
                provided: *mut c_int,
            ) -> c_int;
            fn PMPI_Finalize() -> c_int;
        }

        #[unsafe(no_mangle)]
        extern "C" fn MPI_Init_thread(
            argc: *mut c_int,
            argv: *mut *mut *mut std::ffi::c_char,
            required: c_int,
            provided: *mut c_int,
        ) -> c_int {
            note("init");
            // SAFETY: passes the caller's arguments on.
            unsafe { PMPI_Init_thread(argc, argv, required, provided) }
        }

        #[unsafe(no_mangle)]
        extern "C" fn MPI_Finalize() -> c_int {
            note("finalize");
            // SAFETY: as above.
            unsafe { PMPI_Finalize() }
        }
    }

    fn changing_threads() {
        fn on_a_thread<T: Send>(work: impl FnOnce() -> T + Send) -> T {
            thread::scope(|scope| scope.spawn(work).join().unwrap())
        }
        let communicator = on_a_thread(|| MpiCommunicator::new(CONTRACT_TIMEOUT).unwrap());
        let communicator = on_a_thread(move || {
            contract(&communicator);
            communicator
        });
        let worker = communicator.worker_index();
        on_a_thread(move || drop(communicator));
        match &noted::CALLS.lock().unwrap()[..] {
            [("init", init), ("finalize", finalize)] => assert_eq!(init, finalize),
            calls => panic!("{calls:?}"),
        }
        println!("worker {worker}: passed");
    }

    /// Runs a job in which no worker fails.
    fn all_pass(workers: usize, job: &str) {
        let Some(run) = mpirun::run(workers, job, &[]) else {
            return;
        };
        assert!(run.success, "{}", run.output);
        let passed = run.output.matches(": passed").count();
        assert_eq!(passed, workers, "{}", run.output);
    }

    #[test]
    fn processes() {
        for workers in [1, 2, 4] {
            all_pass(workers, CONTRACT);
        }
    }

    #[test]
    fn a_communicator_may_change_its_thread() {
        for workers in [1, 2] {
            all_pass(workers, THREADS);
        }
    }

    /// If mpirun leaves the other processes running, each reports the fault itself and ends with
    /// its own exit code. mpirun's exit code is then 0 in every case.
    #[test]
    fn every_process_learns_of_a_fault_in_one() {
        for (workers, verb) in FAULTY_CALLS {
            for fault in verb.faults() {
                let job = faulty(fault, verb);
                let Some(run) = mpirun::run(workers, &job, mpirun::RECOVERY) else {
                    return;
                };
                let reports: Vec<&str> = run
                    .output
                    .lines()
                    .filter(|line| line.contains(", after "))
                    .collect();
                println!("{workers} processes, {job}, {:.2?} in all:", run.elapsed);
                for report in &reports {
                    println!("  {report}");
                }
                assert_eq!(reports.len(), fault.reporters(workers), "{}", run.output);
            }
        }
    }

    /// By default mpirun ends every process when one fails.
    #[test]
    fn mpirun_ends_a_run_with_a_fault() {
        for fault in [Fault::Panic, Fault::Exit, Fault::Kill] {
            let Some(run) = mpirun::run(4, &faulty(fault, Verb::Gather), &[]) else {
                return;
            };
            println!(
                "4 processes, {fault:?}, mpirun as it is: {:.2?} in all",
                run.elapsed
            );
            assert!(!run.success, "{}", run.output);
            assert!(run.elapsed < SHORT_TIMEOUT + Duration::from_secs(10));
        }
    }
}
