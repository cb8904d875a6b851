//! Tasks that the workers of a run do together outside of steps.

use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use hd_pissa::comm::Communicator;

use crate::Error;
use crate::panics::message;

/// The interval at which a busy worker tells the others that it is alive, much shorter than any
/// sensible time limit of the communicator.
const BEAT: Duration = Duration::from_millis(50);

/// The message of a worker with every beat.
const BUSY: u8 = 0;
const DONE: u8 = 1;
const FAILED: u8 = 2;

/// The workers that a communicator connects.
pub struct Team<'a> {
    communicator: &'a dyn Communicator,
}

impl<'a> Team<'a> {
    /// The workers of `communicator`.
    pub fn new(communicator: &'a dyn Communicator) -> Self {
        Self { communicator }
    }

    /// Whether this is the worker that prints and writes.
    pub fn is_first(&self) -> bool {
        self.communicator.worker_index() == 0
    }

    /// Runs a task of any length on every worker, and returns when all have finished theirs. Every
    /// worker calls it. The time limit of the communicator applies to signs of life, not to the
    /// task.
    ///
    /// # Errors
    ///
    /// If any task fails, every worker gets an error at once: the first failed worker its own, all
    /// others [`Error::OtherWorker`]. An unfinished task then continues in the background until the
    /// process ends.
    pub fn together<T: Send + 'static>(
        &self,
        task: impl FnOnce() -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        if self.communicator.num_workers() == 1 {
            return task();
        }
        let (sender, receiver) = mpsc::channel();
        let mut thread = Some(std::thread::spawn(move || sender.send(task()).is_ok()));
        self.share(|| match receiver.recv_timeout(BEAT) {
            Ok(result) => Some(result),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => {
                let panic = thread.take()?.join().err()?;
                Some(Err(Error::Panic {
                    worker: self.communicator.worker_index(),
                    reason: message(&*panic),
                }))
            }
        })
    }

    /// This worker's result, if no worker has failed. Every worker calls it.
    ///
    /// # Errors
    ///
    /// Those of [`together`](Self::together).
    pub fn agree<T>(&self, result: Result<T, Error>) -> Result<T, Error> {
        if self.communicator.num_workers() == 1 {
            return result;
        }
        let mut result = Some(result);
        self.share(|| result.take())
    }

    /// Waits for this worker's result, and exchanges beats until all workers have theirs.
    fn share<T>(&self, mut ask: impl FnMut() -> Option<Result<T, Error>>) -> Result<T, Error> {
        let mut result = None;
        loop {
            if result.is_none() {
                result = ask();
            }
            let state = match &result {
                None => BUSY,
                Some(Ok(_)) => DONE,
                Some(Err(_)) => FAILED,
            };
            let states = match self.gather(state) {
                Ok(states) => states,
                // This worker's own error says more.
                Err(error) => return result.and_then(Result::err).map_or(Err(error), Err),
            };
            if let Some(worker) = states.iter().position(|&state| state == FAILED) {
                return match result {
                    Some(Err(error)) if worker == self.communicator.worker_index() => Err(error),
                    _ => Err(Error::OtherWorker { worker }),
                };
            }
            if states.iter().all(|&state| state == DONE) {
                return result.expect("this worker is done");
            }
        }
    }

    fn gather(&self, own: u8) -> Result<Vec<u8>, Error> {
        let states = self.communicator.all_gather_bytes(&[own])?;
        Ok(states.concat())
    }

    /// The text that worker 0 has. Every worker calls it.
    ///
    /// # Errors
    ///
    /// [`Error::Comm`].
    pub fn text_of_first(&self, own: &str) -> Result<String, Error> {
        let received = self.communicator.broadcast_bytes(own.as_bytes(), 0)?;
        Ok(String::from_utf8(received).expect("worker 0 sends UTF-8"))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use hd_pissa::comm::thread_group;

    use super::*;

    /// The results of `work` on each of `workers` threads, whose communicator waits at most
    /// `timeout`.
    fn on_threads<T: Send>(
        workers: usize,
        timeout: Duration,
        work: impl Fn(Team<'_>, usize) -> T + Sync,
    ) -> Vec<T> {
        std::thread::scope(|scope| {
            let threads: Vec<_> = thread_group(workers, timeout)
                .into_iter()
                .map(|communicator| {
                    let work = &work;
                    scope.spawn(move || {
                        let worker = communicator.worker_index();
                        work(Team::new(&communicator), worker)
                    })
                })
                .collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap())
                .collect()
        })
    }

    #[test]
    fn a_task_may_take_longer_than_the_time_limit() {
        let timeout = Duration::from_millis(400);
        let results = on_threads(3, timeout, |team, worker| {
            team.together(move || {
                if worker == 0 {
                    std::thread::sleep(3 * timeout);
                }
                Ok(10 + worker)
            })
        });
        let results: Vec<usize> = results.into_iter().map(Result::unwrap).collect();
        assert_eq!(results, [10, 11, 12]);
    }

    #[test]
    fn a_failure_ends_the_tasks_of_all_at_once_and_is_told_by_one() {
        let start = Instant::now();
        let results = on_threads(4, Duration::from_secs(30), |team, worker| {
            let result = team.together(move || match worker {
                1 => Err(Error::field("data", "line 3", "is bad")),
                // The first worker still has to do everything.
                0 => {
                    std::thread::sleep(Duration::from_secs(20));
                    Ok(())
                }
                _ => Ok(()),
            });
            result.unwrap_err().to_string()
        });
        assert!(start.elapsed() < Duration::from_secs(15));
        assert_eq!(results[1], "data: line 3: is bad");
        for worker in [0, 2, 3] {
            assert_eq!(results[worker], "worker 1 could not start");
        }
    }

    #[test]
    fn a_panic_is_an_error() {
        let results = on_threads(2, Duration::from_secs(30), |team, worker| {
            let result = team.together(move || match worker {
                1 => panic!("out of luck"),
                _ => Ok(()),
            });
            result.unwrap_err().to_string()
        });
        assert_eq!(results[0], "worker 1 could not start");
        assert!(results[1].starts_with("worker 1 panicked: out of luck"));
    }

    #[test]
    fn all_see_the_text_of_the_first() {
        let results = on_threads(3, Duration::from_secs(30), |team, worker| {
            let own = format!("{} is the text of worker {worker} – ü", "x".repeat(worker));
            team.text_of_first(&own).unwrap()
        });
        assert_eq!(results, [" is the text of worker 0 – ü"; 3]);
    }
}
