//! Workers that are threads of one process.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use burn::tensor::{Device, Tensor};

use crate::communicator::{Call, agree, check_root};
use crate::{CommError, Communicator, PendingGather, Traffic};

/// One communicator for each of `workers` threads of this process.
///
/// A call that not every worker joins within `timeout` fails on those that did, and so does every
/// later call. A `timeout` beyond what the system's clock can count, such as [`Duration::MAX`], is
/// none: then only a worker that ends fails the calls of the others.
///
/// # Panics
///
/// If `workers` is 0.
pub fn thread_group(workers: usize, timeout: Duration) -> Vec<ThreadCommunicator> {
    assert!(workers > 0, "a group needs at least one worker");
    let group = Arc::new(Group {
        state: Mutex::new(State {
            rounds: VecDeque::new(),
            first: 0,
            next: vec![0; workers],
            gone: vec![false; workers],
            traffic: vec![Traffic::default(); workers],
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

#[derive(Debug)]
struct State {
    /// The calls that some worker has made and some worker has not collected yet, in order.
    rounds: VecDeque<Round>,
    /// Number of the first of them.
    first: usize,
    /// Number of each worker's next call.
    next: Vec<usize>,
    gone: Vec<bool>,
    traffic: Vec<Traffic>,
    failure: Option<CommError>,
}

#[derive(Debug)]
struct Round {
    handed_in: Vec<Option<HandedIn>>,
    /// Workers that have yet to collect what all handed in.
    to_collect: usize,
}

/// What a worker hands in: its call, and the buffer that goes with it, if one does.
type HandedIn = (Call, Option<Tensor<1>>);

impl State {
    fn round(&mut self, number: usize) -> &mut Round {
        &mut self.rounds[number - self.first]
    }

    /// One worker is done with a round.
    fn collect(&mut self, number: usize) {
        self.round(number).to_collect -= 1;
        while self.rounds.front().is_some_and(|r| r.to_collect == 0) {
            self.rounds.pop_front();
            self.first += 1;
        }
    }

    /// Workers that have not handed in.
    fn missing(&mut self, number: usize) -> Vec<usize> {
        let handed_in = &self.round(number).handed_in;
        let missing = handed_in.iter().enumerate();
        let missing = missing.filter(|(_, handed_in)| handed_in.is_none());
        missing.map(|(worker, _)| worker).collect()
    }

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

    /// Waits until every worker has handed in, for a failure, or for the time limit.
    fn wait(&self, number: usize) -> Result<MutexGuard<'_, State>, CommError> {
        // `None` for a limit beyond what the clock can count: no limit.
        let deadline = Instant::now().checked_add(self.timeout);
        let mut state = self.lock();
        loop {
            let missing = state.missing(number);
            // A call that all have made succeeds, whatever has failed since.
            if missing.is_empty() {
                return Ok(state);
            }
            if let Some(error) = &state.failure {
                return Err(error.clone());
            }
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            let gone = missing.iter().find(|&&worker| state.gone[worker]);
            let error = match gone {
                Some(&worker) => CommError::WorkerGone { worker },
                None if left == Some(Duration::ZERO) => CommError::TimedOut {
                    missing,
                    after: self.timeout,
                },
                None => {
                    state = match left {
                        Some(left) => {
                            let waited = self.changed.wait_timeout(state, left);
                            waited.unwrap_or_else(PoisonError::into_inner).0
                        }
                        None => {
                            let waited = self.changed.wait(state);
                            waited.unwrap_or_else(PoisonError::into_inner)
                        }
                    };
                    continue;
                }
            };
            let error = state.fail(error);
            self.changed.notify_all();
            return Err(error);
        }
    }
}

impl ThreadCommunicator {
    /// The buffers of all workers, once all made the same call.
    fn exchange(&self, call: Call, buffer: Tensor<1>) -> Result<Vec<Tensor<1>>, CommError> {
        let round = self.hand_in(call, Some(buffer))?;
        self.collect(round)
    }

    /// Hands in this worker's call and buffer; the number of the round.
    fn hand_in(&self, call: Call, buffer: Option<Tensor<1>>) -> Result<usize, CommError> {
        let mut state = self.group.lock();
        if let Some(error) = &state.failure {
            return Err(error.clone());
        }
        let number = state.next[self.worker];
        state.next[self.worker] += 1;
        if number == state.first + state.rounds.len() {
            state.rounds.push_back(Round {
                handed_in: vec![None; self.workers],
                to_collect: self.workers,
            });
        }
        state.round(number).handed_in[self.worker] = Some((call, buffer));
        self.group.changed.notify_all();
        Ok(number)
    }

    /// The buffers of a round, once every worker has handed in.
    fn collect(&self, round: usize) -> Result<Vec<Tensor<1>>, CommError> {
        let mut state = self.group.wait(round)?;
        let all: Vec<HandedIn> = state
            .round(round)
            .handed_in
            .iter()
            .flatten()
            .cloned()
            .collect();
        state.collect(round);
        let calls: Vec<_> = all
            .iter()
            .map(|(call, buffer)| (*call, buffer.as_ref().map_or(0, |buffer| buffer.dims()[0])))
            .collect();
        if let Err(error) = agree(&calls) {
            self.group.changed.notify_all();
            return Err(state.fail(error));
        }
        Ok(all.into_iter().filter_map(|(_, buffer)| buffer).collect())
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
        self.start_all_gather(buffer)?.wait()
    }

    fn start_all_gather(
        &self,
        buffer: Tensor<1>,
    ) -> Result<Box<dyn PendingGather + '_>, CommError> {
        let (device, bytes) = (buffer.device(), byte_len(&buffer));
        let round = self.hand_in(Call::AllGather(buffer.dtype()), Some(buffer))?;
        Ok(Box::new(Pending {
            communicator: self,
            round: Some(round),
            device,
            bytes,
        }))
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
        let round = self.hand_in(Call::Barrier, None)?;
        self.collect(round).map(|_| ())
    }

    fn traffic(&self) -> Traffic {
        self.group.lock().traffic[self.worker]
    }
}

/// A gather whose buffer is handed in.
struct Pending<'a> {
    communicator: &'a ThreadCommunicator,
    /// `None` once collected.
    round: Option<usize>,
    device: Device,
    bytes: usize,
}

impl PendingGather for Pending<'_> {
    fn wait(mut self: Box<Self>) -> Result<Tensor<1>, CommError> {
        let round = self.round.take().expect("waited for once");
        let buffers = self.communicator.collect(round)?;
        let others = self.communicator.workers - 1;
        self.communicator.count(self.bytes, self.bytes, others);
        let buffers = buffers
            .into_iter()
            .map(|buffer| buffer.to_device(&self.device))
            .collect();
        Ok(Tensor::cat(buffers, 0))
    }
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        if let Some(round) = self.round {
            self.communicator.group.lock().collect(round);
        }
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
