use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use burn::tensor::Tensor;

use crate::{CommError, Communicator};

/// One communicator for each of `workers` threads of this process.
///
/// A call that not every worker joins within `timeout` fails on those that did, and so does every
/// later call.
///
/// # Panics
///
/// If `workers` is 0.
pub fn thread_group(workers: usize, timeout: Duration) -> Vec<ThreadCommunicator> {
    assert!(workers > 0, "a group needs at least one worker");
    let group = Arc::new(Group {
        state: Mutex::new(State {
            buffers: vec![None; workers],
            gone: vec![false; workers],
            result: None,
            to_collect: 0,
            failure: None,
        }),
        changed: Condvar::new(),
        timeout,
    });
    (0..workers)
        .map(|worker| ThreadCommunicator {
            group: group.clone(),
            worker,
            workers,
        })
        .collect()
}

/// A worker's end of a [`thread_group`].
///
/// Dropping it while others wait, as a panicking thread does, ends their wait with
/// [`CommError::WorkerGone`].
#[derive(Debug)]
pub struct ThreadCommunicator {
    group: Arc<Group>,
    worker: usize,
    workers: usize,
}

#[derive(Debug)]
struct Group {
    state: Mutex<State>,
    changed: Condvar,
    timeout: Duration,
}

/// A round has two phases: workers hand in their buffers until all are there, then collect the
/// result until all have it.
#[derive(Debug)]
struct State {
    buffers: Vec<Option<Tensor<1>>>,
    gone: Vec<bool>,
    result: Option<Arc<Vec<Tensor<1>>>>,
    /// Workers that have yet to collect `result`.
    to_collect: usize,
    failure: Option<CommError>,
}

impl State {
    fn fail(&mut self, error: CommError) -> CommError {
        self.failure.get_or_insert(error).clone()
    }
}

impl Group {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A worker that panicked inside a call has marked nothing half-way: every change of the
        // state below is a single assignment.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `done`, for a failure, or for the deadline.
    fn wait<'a>(
        &self,
        mut state: MutexGuard<'a, State>,
        deadline: Instant,
        done: impl Fn(&State) -> bool,
    ) -> Result<MutexGuard<'a, State>, CommError> {
        loop {
            if let Some(error) = &state.failure {
                return Err(error.clone());
            }
            if done(&state) {
                return Ok(state);
            }
            if state.result.is_none()
                && let Some(worker) = (0..state.gone.len())
                    .find(|&worker| state.gone[worker] && state.buffers[worker].is_none())
            {
                let error = state.fail(CommError::WorkerGone { worker });
                self.changed.notify_all();
                return Err(error);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let missing = (0..state.buffers.len())
                    .filter(|&worker| state.buffers[worker].is_none())
                    .collect();
                let error = state.fail(CommError::TimedOut {
                    missing,
                    after: self.timeout,
                });
                self.changed.notify_all();
                return Err(error);
            }
            state = self
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

impl ThreadCommunicator {
    fn exchange(&self, buffer: Tensor<1>) -> Result<Arc<Vec<Tensor<1>>>, CommError> {
        let deadline = Instant::now() + self.group.timeout;
        // The round before must be over for everyone.
        let mut state = self
            .group
            .wait(self.group.lock(), deadline, |state| state.result.is_none())?;
        state.buffers[self.worker] = Some(buffer);
        if state.buffers.iter().all(Option::is_some) {
            let buffers = state.buffers.iter_mut().filter_map(Option::take).collect();
            state.result = Some(Arc::new(buffers));
            state.to_collect = self.workers;
            self.group.changed.notify_all();
        }
        let mut state = self
            .group
            .wait(state, deadline, |state| state.result.is_some())?;
        let result = state.result.clone().expect("waited for it");
        state.to_collect -= 1;
        if state.to_collect == 0 {
            state.result = None;
            self.group.changed.notify_all();
        }
        Ok(result)
    }
}

impl Communicator for ThreadCommunicator {
    fn worker_index(&self) -> usize {
        self.worker
    }

    fn num_workers(&self) -> usize {
        self.workers
    }

    fn all_gather(&self, buffer: Tensor<1>) -> Result<Tensor<1>, CommError> {
        let device = buffer.device();
        let buffers = self.exchange(buffer)?;
        let expected = buffers[0].dims()[0];
        for (worker, buffer) in buffers.iter().enumerate() {
            let len = buffer.dims()[0];
            if len != expected {
                return Err(CommError::LengthMismatch {
                    worker,
                    len,
                    expected,
                });
            }
        }
        let buffers = buffers
            .iter()
            .map(|buffer| buffer.clone().to_device(&device))
            .collect();
        Ok(Tensor::cat(buffers, 0))
    }

    fn broadcast(&self, buffer: Tensor<1>, root: usize) -> Result<Tensor<1>, CommError> {
        assert!(
            root < self.workers,
            "broadcast from worker {root} of {}",
            self.workers
        );
        let device = buffer.device();
        Ok(self.exchange(buffer)?[root].clone().to_device(&device))
    }

    fn barrier(&self) -> Result<(), CommError> {
        self.exchange(Tensor::empty([0], &Default::default()))
            .map(|_| ())
    }
}

impl Drop for ThreadCommunicator {
    fn drop(&mut self) {
        self.group.lock().gone[self.worker] = true;
        self.group.changed.notify_all();
    }
}
