//! Threads of one process as workers, which exchange buffers in shared memory.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use burn::tensor::{Device, Tensor};

use crate::call::{Call, check_root, compare};
use crate::sum::{chunk, chunk_len, tree_sum};
use crate::{CommError, Communicator, PendingGather, Traffic};

/// One communicator for each of `workers` threads of this process.
///
/// If not every worker joins a call within `timeout`, the call and every later call fail on the
/// others. A `timeout` beyond the range of the clock, such as [`Duration::MAX`], means no limit.
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
/// If it is dropped while others wait, for example by a panic, their wait ends with
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
    /// The open calls, in order: some worker has made them, and some worker has not collected them
    /// yet.
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
    /// Workers that have not collected the values yet.
    to_collect: usize,
}

/// The part of one worker in a call.
#[derive(Clone, Debug)]
struct HandedIn {
    call: Call,
    /// Number of values that it sends to each other worker.
    len: usize,
    payload: Payload,
}

#[derive(Clone, Debug)]
enum Payload {
    Nothing,
    Values(Box<Tensor<1>>),
    Bytes(Arc<[u8]>),
}

impl HandedIn {
    fn nothing(call: Call) -> Self {
        let (len, payload) = (0, Payload::Nothing);
        Self { call, len, payload }
    }

    fn values(call: Call, values: Tensor<1>) -> Self {
        let (len, payload) = (values.dims()[0], Payload::Values(values.into()));
        Self { call, len, payload }
    }

    fn bytes(call: Call, bytes: &[u8]) -> Self {
        let (len, payload) = (bytes.len(), Payload::Bytes(bytes.into()));
        Self { call, len, payload }
    }

    /// Number of bytes that it sends to each other worker.
    fn size(&self) -> usize {
        match self.payload {
            Payload::Nothing => 0,
            _ => self.len * self.call.value_size(),
        }
    }

    fn into_values(self) -> Tensor<1> {
        match self.payload {
            Payload::Values(values) => *values,
            _ => unreachable!("{} carries values", self.call),
        }
    }

    fn into_bytes(self) -> Vec<u8> {
        match self.payload {
            Payload::Bytes(bytes) => bytes.to_vec(),
            _ => unreachable!("{} carries bytes", self.call),
        }
    }
}

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
        // A worker that panicked inside a call leaves no half-made change: every change of the
        // state below is a single assignment.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until every worker has handed in, for a failure, or for the time limit.
    fn wait(&self, number: usize) -> Result<MutexGuard<'_, State>, CommError> {
        let deadline = Instant::now().checked_add(self.timeout);
        let mut state = self.lock();
        loop {
            let missing = state.missing(number);
            // A call that all workers have made succeeds, even after a later failure.
            if missing.is_empty() {
                return Ok(state);
            }
            if let Some(error) = &state.failure {
                return Err(error.clone());
            }
            let left = deadline.map(|end| end.saturating_duration_since(Instant::now()));
            let gone = missing.iter().find(|&&worker| state.gone[worker]);
            let error = match gone {
                Some(&worker) => CommError::WorkerGone { worker },
                None if left.is_some_and(|left| left.is_zero()) => CommError::TimedOut {
                    missing,
                    after: self.timeout,
                },
                None => {
                    state = match left {
                        Some(left) => self
                            .changed
                            .wait_timeout(state, left)
                            .map(|(state, _)| state)
                            .unwrap_or_else(|poisoned| poisoned.into_inner().0),
                        None => (self.changed.wait(state)).unwrap_or_else(PoisonError::into_inner),
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
    /// The parts of all workers, once all have made the same call.
    fn exchange(&self, own: HandedIn) -> Result<Vec<HandedIn>, CommError> {
        let round = self.hand_in(own)?;
        self.collect(round)
    }

    /// Hands in this worker's part. Returns the number of its round.
    fn hand_in(&self, own: HandedIn) -> Result<usize, CommError> {
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
        state.round(number).handed_in[self.worker] = Some(own);
        self.group.changed.notify_all();
        Ok(number)
    }

    fn collect(&self, round: usize) -> Result<Vec<HandedIn>, CommError> {
        let mut state = self.group.wait(round)?;
        let handed_in = state.round(round).handed_in.iter().flatten();
        let all: Vec<HandedIn> = handed_in.cloned().collect();
        state.collect(round);
        let calls: Vec<_> = all.iter().map(|own| (own.call, own.len)).collect();
        if let Err(error) = compare(&calls) {
            self.group.changed.notify_all();
            return Err(state.fail(error));
        }
        let sent: Vec<_> = all.iter().map(HandedIn::size).collect();
        state.traffic[self.worker].count(self.worker, &sent);
        Ok(all)
    }

    /// Compares the workers' calls before a transfer by other means. Returns the number of values
    /// that each sends.
    #[cfg(feature = "collectives")]
    pub(crate) fn agree_on(&self, call: Call, len: usize) -> Result<Vec<usize>, CommError> {
        let nothing = HandedIn::nothing(call);
        let all = self.exchange(HandedIn { len, ..nothing })?;
        Ok(all.into_iter().map(|own| own.len).collect())
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
        let device = buffer.device();
        let own = HandedIn::values(Call::AllGather(buffer.dtype()), buffer);
        Ok(Box::new(Pending {
            communicator: self,
            round: Some(self.hand_in(own)?),
            device,
        }))
    }

    fn broadcast(&self, buffer: Tensor<1>, root: usize) -> Result<Tensor<1>, CommError> {
        check_root(root, self.workers);
        let device = buffer.device();
        let call = Call::Broadcast(buffer.dtype(), root);
        let own = match root == self.worker {
            true => HandedIn::values(call, buffer),
            false => HandedIn::nothing(call),
        };
        let received = self.exchange(own)?.swap_remove(root).into_values();
        Ok(received.to_device(&device))
    }

    fn reduce_scatter(&self, buffer: Tensor<1>) -> Result<Tensor<1>, CommError> {
        let (device, len) = (buffer.device(), chunk_len(&buffer, self.workers));
        let own = HandedIn::values(Call::ReduceScatter, buffer);
        let all = self.exchange(HandedIn { len, ..own })?.into_iter();
        let chunks = all.map(|own| chunk(own.into_values(), self.worker, len).to_device(&device));
        Ok(tree_sum(chunks.collect()))
    }

    fn all_gather_bytes(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, CommError> {
        let all = self.exchange(HandedIn::bytes(Call::AllGatherBytes, bytes))?;
        Ok(all.into_iter().map(HandedIn::into_bytes).collect())
    }

    fn broadcast_bytes(&self, bytes: &[u8], root: usize) -> Result<Vec<u8>, CommError> {
        check_root(root, self.workers);
        let call = Call::BroadcastBytes(root);
        let own = match root == self.worker {
            true => HandedIn::bytes(call, bytes),
            false => HandedIn::nothing(call),
        };
        Ok(self.exchange(own)?.swap_remove(root).into_bytes())
    }

    fn barrier(&self) -> Result<(), CommError> {
        self.exchange(HandedIn::nothing(Call::Barrier)).map(|_| ())
    }

    fn traffic(&self) -> Traffic {
        self.group.lock().traffic[self.worker]
    }
}

/// A gather with a buffer that is handed in.
struct Pending<'a> {
    communicator: &'a ThreadCommunicator,
    /// `None` once collected.
    round: Option<usize>,
    device: Device,
}

impl PendingGather for Pending<'_> {
    fn wait(mut self: Box<Self>) -> Result<Tensor<1>, CommError> {
        let round = self.round.take().expect("waited for once");
        let buffers = self.communicator.collect(round)?;
        let buffers = buffers
            .into_iter()
            .map(|own| own.into_values().to_device(&self.device))
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

impl Drop for ThreadCommunicator {
    fn drop(&mut self) {
        self.group.lock().gone[self.worker] = true;
        self.group.changed.notify_all();
    }
}
