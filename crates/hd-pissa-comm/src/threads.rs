use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use burn::tensor::Tensor;

use crate::communicator::{Call, agree, check_root};
use crate::{CommError, Communicator, Traffic};

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
            handed_in: vec![None; workers],
            gone: vec![false; workers],
            traffic: vec![Traffic::default(); workers],
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
    handed_in: Vec<Option<HandedIn>>,
    gone: Vec<bool>,
    traffic: Vec<Traffic>,
    result: Option<Arc<Vec<HandedIn>>>,
    /// Workers that have yet to collect `result`.
    to_collect: usize,
    failure: Option<CommError>,
}

/// What a worker hands in: its call, and the buffer that goes with it.
type HandedIn = (Call, Tensor<1>);

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
                    .find(|&worker| state.gone[worker] && state.handed_in[worker].is_none())
            {
                let error = state.fail(CommError::WorkerGone { worker });
                self.changed.notify_all();
                return Err(error);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let missing = (0..state.handed_in.len())
                    .filter(|&worker| state.handed_in[worker].is_none())
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
    /// Hands in this worker's call and buffer; the buffers of all workers, once all made the same
    /// call with buffers of equal length.
    fn exchange(&self, call: Call, buffer: Tensor<1>) -> Result<Vec<Tensor<1>>, CommError> {
        let all = self.collect(call, buffer)?;
        let calls: Vec<_> = all
            .iter()
            .map(|(c, buffer)| (*c, buffer.dims()[0]))
            .collect();
        agree(&calls).map_err(|error| self.group.lock().fail(error))?;
        Ok(all.iter().map(|(_, buffer)| buffer.clone()).collect())
    }

    fn collect(&self, call: Call, buffer: Tensor<1>) -> Result<Arc<Vec<HandedIn>>, CommError> {
        let deadline = Instant::now() + self.group.timeout;
        // The round before must be over for everyone.
        let mut state = self
            .group
            .wait(self.group.lock(), deadline, |state| state.result.is_none())?;
        state.handed_in[self.worker] = Some((call, buffer));
        if state.handed_in.iter().all(Option::is_some) {
            let all = state.handed_in.iter_mut().filter_map(Option::take);
            state.result = Some(Arc::new(all.collect()));
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

    /// The part of a gather before the transfer: all workers call it with buffers alike.
    #[cfg(feature = "collectives")]
    pub(crate) fn agree_on_gather(&self, buffer: &Tensor<1>) -> Result<(), CommError> {
        self.exchange(Call::AllGather(buffer.dtype()), buffer.clone())
            .map(|_| ())
    }

    /// The part of a broadcast before the transfer: the length of what worker `root` sends.
    #[cfg(feature = "collectives")]
    pub(crate) fn agree_on_broadcast(
        &self,
        buffer: &Tensor<1>,
        root: usize,
    ) -> Result<usize, CommError> {
        let call = Call::Broadcast(buffer.dtype(), root);
        Ok(self.exchange(call, buffer.clone())?[root].dims()[0])
    }

    fn count(&self, own: usize, theirs: usize, others: usize) {
        self.group.lock().traffic[self.worker].count(own, theirs, others);
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
        let (device, bytes) = (buffer.device(), byte_len(&buffer));
        let buffers = self.exchange(Call::AllGather(buffer.dtype()), buffer)?;
        self.count(bytes, bytes, self.workers - 1);
        let buffers = buffers
            .into_iter()
            .map(|buffer| buffer.to_device(&device))
            .collect();
        Ok(Tensor::cat(buffers, 0))
    }

    fn broadcast(&self, buffer: Tensor<1>, root: usize) -> Result<Tensor<1>, CommError> {
        check_root(root, self.workers);
        let device = buffer.device();
        let call = Call::Broadcast(buffer.dtype(), root);
        let received = self.exchange(call, buffer)?.swap_remove(root);
        let bytes = byte_len(&received);
        if root == self.worker {
            self.count(bytes, 0, self.workers - 1);
        } else {
            self.count(0, bytes, 1);
        }
        Ok(received.to_device(&device))
    }

    fn barrier(&self) -> Result<(), CommError> {
        let nothing = Tensor::empty([0], &Default::default());
        self.exchange(Call::Barrier, nothing).map(|_| ())
    }

    fn traffic(&self) -> Traffic {
        self.group.lock().traffic[self.worker]
    }
}

fn byte_len(buffer: &Tensor<1>) -> usize {
    buffer.dims()[0] * buffer.dtype().size()
}

impl Drop for ThreadCommunicator {
    fn drop(&mut self) {
        self.group.lock().gone[self.worker] = true;
        self.group.changed.notify_all();
    }
}
