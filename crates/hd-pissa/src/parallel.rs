//! Parallel work, each piece on one thread.
//!
//! On a CPU, many operations of a model run on one thread, and products gain little from a second
//! thread. Micro-batches and decompositions are independent of each other. One on each core uses
//! all cores.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::num::NonZeroUsize;
use std::sync::{Condvar, Mutex, PoisonError};

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::Tensor;
use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::ops;
use crate::settings::Settings;

/// Applies `work` to the model and each of `batches`, several at a time, and passes the results to
/// `collect` in the order of `batches`, on this thread.
///
/// On Flex, as many threads work as the current [rayon] pool has. A pool of another size, or
/// `RAYON_NUM_THREADS`, changes that. On a GPU one thread works, because GPU operations run in
/// parallel anyway.
///
/// Every thread has a copy of the model with the same ids, which shares the memory of its
/// parameters. With frozen weights, as in HD-PiSSA, a thread therefore needs memory only for the
/// activations of its own batch. `work` runs in its own [rayon] pool, of one thread, or of more if
/// there are fewer batches than threads. At most twice as many results as threads wait for
/// `collect`.
///
/// The results do not depend on the number of threads, bit for bit on Flex, unless `work` draws
/// random numbers from the device.
///
/// ```
/// use burn::nn::LinearConfig;
/// use burn::optim::{AdamConfig, GradientsParams};
/// use burn::tensor::{Device, Distribution, Tensor};
/// use hd_pissa::{HdPissaConfig, HdPissaModule, HdPissaOptimizerConfig, ShardGradients, comm::Solo};
/// use hd_pissa::side_by_side;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let device = Device::flex().autodiff();
/// let config = HdPissaConfig::new().with_rank(2).with_shards(2);
/// let mut model = LinearConfig::new(8, 8).init(&device).apply_hd_pissa(&config, 0..2)?;
/// let mut optim = HdPissaOptimizerConfig::new().init(AdamConfig::new().init(), Solo)?;
///
/// // Two micro-batches for each of two shards.
/// let batch = || Tensor::<2>::random([4, 8], Distribution::Default, &device);
/// let batches: Vec<_> = [0, 0, 1, 1].map(|shard| (shard, batch())).into();
/// let mut gradients = ShardGradients::new(&model);
/// side_by_side(
///     &model,
///     batches,
///     |model, (shard, batch)| {
///         let model = model.clone().select_shard(shard).unwrap();
///         let loss = model.forward(batch).square().mean();
///         (shard, GradientsParams::from_grads(loss.backward(), &model))
///     },
///     |(shard, of_batch)| gradients.push(shard, of_batch),
/// );
/// model = optim.step(1e-4, model, gradients.into_mean())?;
/// # Ok(())
/// # }
/// ```
///
/// # Panics
///
/// If `work` or `collect` panics, or the system refuses to start a thread.
pub fn side_by_side<M: Module, B: Send, R: Send>(
    model: &M,
    batches: Vec<B>,
    work: impl Fn(&M, B) -> R + Sync,
    mut collect: impl FnMut(R),
) {
    let device = model.devices().into_iter().next();
    let threads = match &device {
        Some(device) if !ops::is_cpu(device) => NonZeroUsize::MIN,
        _ => current_threads(),
    };
    if threads.get() == 1 || batches.len() < 2 {
        return batches
            .into_iter()
            .map(|batch| work(model, batch))
            .for_each(collect);
    }
    let workers = (0..threads.get().min(batches.len())).map(|_| fork(model));
    let collect = |result| {
        collect(result);
        Ok(())
    };
    let Ok(()) = spread::<_, _, _, Infallible>(workers.collect(), batches, threads, work, collect);
}

/// A copy of the model for another thread, over the same memory.
pub(crate) fn fork<M: Module>(model: &M) -> M {
    model.clone().map(&mut Fork)
}

/// Gives every parameter its own node in the autodiff graph, over the same memory: threads that
/// share a node wait for each other.
///
/// Burn's own fork moves tensors to a device first, and autodiff records this even if nothing
/// moves. The records stay with the parameters of the forked model and slow down every backward
/// pass.
struct Fork;

impl ModuleMapper for Fork {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let (id, value, mapper) = param.consume();
        let settings = Settings::of(id, &value);
        let value = match value.is_autodiff() {
            true => settings.restore(value.inner()),
            false => value,
        };
        Param::from_mapped_value(id, value, mapper)
    }
}

/// Applies `work` to each item, on as many threads as the current rayon pool has, and passes the
/// results to `collect` in the order of `items`. After an error of `collect`, no further item
/// starts.
pub(crate) fn try_for_each<T: Send, R: Send, E>(
    items: Vec<T>,
    work: impl Fn(T) -> R + Sync,
    collect: impl FnMut(R) -> Result<(), E>,
) -> Result<(), E> {
    let threads = current_threads();
    if threads.get() == 1 || items.len() < 2 {
        return items.into_iter().map(work).try_for_each(collect);
    }
    let workers = vec![(); threads.get().min(items.len())];
    spread(workers, items, threads, |(), item| work(item), collect)
}

/// Runs `work` on one compute thread, for any size of the current rayon pool. Results whose last
/// bits would depend on the number of threads then do not.
pub(crate) fn on_one_thread<R: Send>(work: impl FnOnce() -> R + Send) -> R {
    match rayon::current_num_threads() {
        1 => work(),
        _ => pool(1).install(work),
    }
}

fn current_threads() -> NonZeroUsize {
    NonZeroUsize::new(rayon::current_num_threads()).unwrap_or(NonZeroUsize::MIN)
}

/// One thread for each worker, which takes one item after the other. Together they have `threads`
/// compute threads.
fn spread<W: Send, T: Send, R: Send, E>(
    workers: Vec<W>,
    items: Vec<T>,
    threads: NonZeroUsize,
    work: impl Fn(&W, T) -> R + Sync,
    mut collect: impl FnMut(R) -> Result<(), E>,
) -> Result<(), E> {
    let (count, total) = (workers.len(), items.len());
    let queue = Queue::new(items, 2 * count);
    std::thread::scope(|scope| {
        for (worker, pool) in workers.into_iter().zip(share_out(threads, count)) {
            let (queue, work) = (&queue, &work);
            scope.spawn(move || {
                let _end = queue.guard();
                pool.install(move || {
                    while let Some((index, item)) = queue.next_item() {
                        queue.done(index, work(&worker, item));
                    }
                });
            });
        }
        // Ends the threads if `collect` panics.
        let _end = queue.guard();
        for index in 0..total {
            // A missing result means that a thread has panicked. The end of the scope passes the
            // panic on.
            let Some(result) = queue.result(index) else {
                return Ok(());
            };
            if let Err(error) = collect(result) {
                queue.stop();
                return Err(error);
            }
        }
        Ok(())
    })
}

/// A pool for each of `count` threads, which divide the compute threads of the current pool. A pool
/// has at least one.
#[cfg(feature = "learner")]
pub(crate) fn pools(count: usize) -> Vec<ThreadPool> {
    share_out(current_threads(), count)
}

fn share_out(threads: NonZeroUsize, count: usize) -> Vec<ThreadPool> {
    let threads = threads.get().max(count);
    let share = |index| threads / count + usize::from(index < threads % count);
    (0..count).map(|index| pool(share(index))).collect()
}

fn pool(threads: usize) -> ThreadPool {
    let builder = ThreadPoolBuilder::new().num_threads(threads);
    builder.build().expect("the system starts threads")
}

/// Items on their way to threads, and results on their way back.
struct Queue<T, R> {
    state: Mutex<State<T, R>>,
    changed: Condvar,
    /// How far threads may be ahead of the taken results.
    ahead: usize,
}

struct State<T, R> {
    items: std::iter::Enumerate<std::vec::IntoIter<T>>,
    /// The number of items handed out, and of results taken.
    started: usize,
    taken: usize,
    results: BTreeMap<usize, R>,
    /// Whether some thread has panicked, or nobody wants further results.
    stopped: bool,
}

impl<T, R> Queue<T, R> {
    fn new(items: Vec<T>, ahead: usize) -> Self {
        Self {
            state: Mutex::new(State {
                items: items.into_iter().enumerate(),
                started: 0,
                taken: 0,
                results: BTreeMap::new(),
                stopped: false,
            }),
            changed: Condvar::new(),
            ahead,
        }
    }

    /// Waits until `ready` returns a decision.
    fn wait<A>(&self, ready: impl Fn(&mut State<T, R>) -> Option<A>) -> A {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(answer) = ready(&mut state) {
                self.changed.notify_all();
                return answer;
            }
            let waited = self.changed.wait(state);
            state = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The next item with its index; `None` if there is none, or the queue is stopped.
    fn next_item(&self) -> Option<(usize, T)> {
        self.wait(|state| {
            if state.stopped {
                return Some(None);
            }
            (state.started < state.taken + self.ahead).then(|| {
                state.started += 1;
                state.items.next()
            })
        })
    }

    fn done(&self, index: usize, result: R) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.results.insert(index, result);
        self.changed.notify_all();
    }

    /// The result of item `index`; `None` if the queue is stopped.
    fn result(&self, index: usize) -> Option<R> {
        self.wait(|state| {
            if let Some(result) = state.results.remove(&index) {
                state.taken += 1;
                return Some(Some(result));
            }
            state.stopped.then_some(None)
        })
    }

    /// Stops handing out items, and wakes all waiting threads.
    fn stop(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.stopped = true;
        self.changed.notify_all();
    }

    /// Stops the queue if its owner panics.
    fn guard(&self) -> Guard<'_, T, R> {
        Guard(self)
    }
}

struct Guard<'a, T, R>(&'a Queue<T, R>);

impl<T, R> Drop for Guard<'_, T, R> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.stop();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn results_come_in_order_and_never_too_far_ahead() {
        for threads in 1..6 {
            let (running, seen) = (Mutex::new(0usize), Mutex::new(Vec::new()));
            spread(
                vec![(); threads],
                (0..50usize).collect(),
                NonZeroUsize::new(threads).unwrap(),
                |(), item| {
                    *running.lock().unwrap() += 1;
                    std::thread::sleep(Duration::from_micros((item as u64 * 7919) % 400));
                    item * item
                },
                |result| {
                    let mut seen = seen.lock().unwrap();
                    let started = *running.lock().unwrap();
                    assert!(started <= seen.len() + 2 * threads + 1);
                    seen.push(result);
                    Ok::<(), Infallible>(())
                },
            )
            .unwrap();
            let expected: Vec<usize> = (0..50).map(|item| item * item).collect();
            assert_eq!(*seen.lock().unwrap(), expected);
        }
    }

    #[test]
    fn compute_threads_are_shared_out() {
        for (threads, items, expected) in
            [(4, 2, vec![2, 2]), (3, 2, vec![1, 2]), (2, 5, vec![1; 5])]
        {
            let mut counts = Vec::new();
            let workers = vec![(); threads.min(items)];
            spread(
                workers,
                vec![(); items],
                NonZeroUsize::new(threads).unwrap(),
                |(), ()| {
                    // Long enough for every thread to take an item.
                    std::thread::sleep(Duration::from_millis(20));
                    rayon::current_num_threads()
                },
                |count| {
                    counts.push(count);
                    Ok::<(), Infallible>(())
                },
            )
            .unwrap();
            counts.sort_unstable();
            assert_eq!(counts, expected);
        }
    }

    #[test]
    fn a_panic_ends_everything() {
        for bad in [0usize, 7, 19] {
            let caught = std::panic::catch_unwind(|| {
                spread(
                    vec![(); 3],
                    (0..20usize).collect(),
                    NonZeroUsize::new(3).unwrap(),
                    |(), item| assert_ne!(item, bad, "as wanted"),
                    |()| Ok::<(), Infallible>(()),
                )
            });
            assert!(caught.is_err());
        }
        let caught = std::panic::catch_unwind(|| {
            spread(
                vec![(); 3],
                (0..20usize).collect(),
                NonZeroUsize::new(3).unwrap(),
                |(), item| item,
                |item| {
                    assert_ne!(item, 5, "as wanted");
                    Ok::<(), Infallible>(())
                },
            )
        });
        assert!(caught.is_err());
    }

    #[test]
    fn an_error_starts_nothing_more() {
        let started = Mutex::new(0);
        let result = spread(
            vec![(); 2],
            (0..100usize).collect(),
            NonZeroUsize::new(2).unwrap(),
            |(), item| {
                *started.lock().unwrap() += 1;
                item
            },
            |item| if item == 3 { Err("enough") } else { Ok(()) },
        );
        assert_eq!(result, Err("enough"));
        assert!(*started.lock().unwrap() <= 4 + 4);
    }
}
