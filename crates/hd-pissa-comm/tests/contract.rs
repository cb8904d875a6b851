//! The contract of a transport, run against each implementation.

use std::time::{Duration, Instant};

use burn::tensor::{Device, Tensor};
use hd_pissa_comm::{CommError, Communicator, Solo, thread_group};

fn values(tensor: Tensor<1>) -> Vec<f32> {
    tensor.into_data().try_into_vec().unwrap()
}

/// What one worker does; every worker of the group runs it.
fn contract(communicator: &impl Communicator) {
    let (worker, workers) = (communicator.worker_index(), communicator.num_workers());
    assert!(worker < workers);
    let device = Device::flex();
    // More rounds than one, so that a fast worker meets a slow one in the round before.
    for round in 0..50 {
        let own = [worker as f32, round as f32];
        let gathered = communicator
            .all_gather(Tensor::from_floats(own, &device))
            .unwrap();
        let expected: Vec<f32> = (0..workers)
            .flat_map(|worker| [worker as f32, round as f32])
            .collect();
        assert_eq!(values(gathered), expected);

        let root = round % workers;
        let received = communicator
            .broadcast(Tensor::from_floats(own, &device), root)
            .unwrap();
        assert_eq!(values(received), [root as f32, round as f32]);
        communicator.barrier().unwrap();
    }
}

#[test]
fn solo() {
    contract(&Solo);
}

#[test]
fn threads() {
    for workers in [1, 2, 3, 8] {
        std::thread::scope(|scope| {
            for communicator in thread_group(workers, Duration::from_secs(30)) {
                scope.spawn(move || contract(&communicator));
            }
        });
    }
}

#[test]
fn a_worker_that_panics_is_named() {
    let mut group = thread_group(3, Duration::from_secs(30));
    let dying = group.remove(1);
    let died = std::thread::spawn(move || {
        let _held = dying;
        panic!("this worker dies on purpose");
    });
    assert!(died.join().is_err());
    let start = Instant::now();
    let errors: Vec<_> = std::thread::scope(|scope| {
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
fn a_worker_that_stalls_is_named_and_later_calls_fail_at_once() {
    let timeout = Duration::from_millis(200);
    let group = thread_group(2, timeout);
    let error = CommError::TimedOut {
        missing: vec![1],
        after: timeout,
    };
    assert_eq!(group[0].barrier(), Err(error.clone()));
    let start = Instant::now();
    assert_eq!(group[1].barrier(), Err(error));
    assert!(start.elapsed() < timeout);
}

#[test]
fn buffers_of_different_lengths_are_refused() {
    let group = thread_group(2, Duration::from_secs(30));
    let device = Device::flex();
    let results: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = group
            .iter()
            .map(|communicator| {
                let buffer = Tensor::<1>::zeros([3 + communicator.worker_index()], &device);
                scope.spawn(move || communicator.all_gather(buffer).map(values))
            })
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    let error = CommError::LengthMismatch {
        worker: 1,
        len: 4,
        expected: 3,
    };
    assert_eq!(results, vec![Err(error); 2]);
}
