//! The jobs of one worker of a group; every worker runs the same function.

#[cfg(feature = "mpi")]
pub mod mpirun;

use std::time::{Duration, Instant};

use burn::tensor::{DType, Device, Tensor, TensorData};
use hd_pissa_comm::{
    CommError, Communicator, Disagreement, Failure, PendingGather, Traffic, agree, all_or_none,
    gather_integers,
};

/// Long, because nobody fails.
pub const CONTRACT_TIMEOUT: Duration = Duration::from_secs(60);
/// What Burn reads the default device's name from; no device has this one.
pub const NO_DEFAULT_DEVICE: (&str, &str) = ("BURN_DEVICE", "none");
/// The time limit of the tests of faults.
pub const SHORT_TIMEOUT: Duration = Duration::from_secs(2);

fn bytes(tensor: Tensor<1>) -> Vec<u8> {
    tensor.into_data().as_bytes().to_vec()
}

fn tensor(bytes: &[u8], dtype: DType) -> Tensor<1> {
    let data = TensorData::from_bytes_vec(bytes.to_vec(), [bytes.len() / dtype.size()], dtype);
    Tensor::from_data(data, (&Device::flex(), dtype))
}

/// Bytes that depend on everything a transport could mix up. As floats they include many kinds of
/// NaN, infinities, subnormals and negative zeros.
fn noise(len: usize, worker: usize, round: usize) -> Vec<u8> {
    let mut state = (worker as u64) << 32 | round as u64 | 1 << 63;
    let mut bytes: Vec<u8> = (0..len)
        .map(|_| {
            // Knuth's linear congruential generator for 64 bits.
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        })
        .collect();
    let special = [f32::NAN, -f32::NAN, f32::INFINITY, -0.0, f32::from_bits(1)];
    for (place, value) in bytes.chunks_exact_mut(4).zip(special) {
        place.copy_from_slice(&value.to_le_bytes());
    }
    bytes
}

/// Checks every transport must pass without faults.
pub fn contract(communicator: &impl Communicator) {
    let (worker, workers) = (communicator.worker_index(), communicator.num_workers());
    assert!(worker < workers);
    let mut expected = Traffic::default();
    // Several rounds, so a fast worker meets a slow one in the round before.
    for round in 0..50 {
        let dtype = [DType::F32, DType::BF16, DType::F16][round % 3];
        // Nothing, less than a page, and sometimes more than one message.
        let len = match round {
            17 => 1_000_003,
            18 => 700_001,
            _ => [0, 1, 5, 1021][round % 4],
        } * dtype.size();
        let others = (workers - 1) as u64;

        let gathered = communicator
            .all_gather(tensor(&noise(len, worker, round), dtype))
            .unwrap();
        assert_eq!(gathered.dtype(), dtype);
        let all: Vec<u8> = (0..workers).flat_map(|w| noise(len, w, round)).collect();
        assert!(bytes(gathered) == all, "gather of round {round}");
        expected.sent += others * len as u64;
        expected.received += others * len as u64;

        let root = round % workers;
        // The others do not need to know the length.
        let own = if worker == root { len } else { 0 };
        let received = communicator
            .broadcast(tensor(&noise(own, worker, round), dtype), root)
            .unwrap();
        assert!(
            bytes(received) == noise(len, root, round),
            "broadcast of round {round}"
        );
        if worker == root {
            expected.sent += others * len as u64;
        } else {
            expected.received += len as u64;
        }
        let n = len / dtype.size();
        let own = |worker| mixed(workers * n, worker, round);
        let reduced = communicator.reduce_scatter(values(&own(worker))).unwrap();
        assert_eq!(reduced.dtype(), DType::F32);
        let chunks = (0..workers).map(|w| own(w)[worker * n..(worker + 1) * n].to_vec());
        let sum = tree_sum(&chunks.collect::<Vec<_>>());
        assert!(
            bytes(reduced) == le_bytes(&sum),
            "reduce_scatter of round {round}"
        );
        expected.sent += others * 4 * n as u64;
        expected.received += others * 4 * n as u64;

        communicator.barrier().unwrap();
        assert_eq!(communicator.traffic(), expected);
        byte_strings(communicator, round, len);
        started_gathers(communicator, round, len / dtype.size());
        expected = communicator.traffic();
    }
}

/// Finite values of very different sizes: their sum depends on the order.
pub fn mixed(len: usize, worker: usize, round: usize) -> Vec<f32> {
    let bytes = noise(4 * len, worker, round);
    let (bits, _) = bytes.as_chunks();
    let values = bits.iter().map(|&bits| {
        // 16 exponents, up to that of 1.
        f32::from_bits(u32::from_le_bytes(bits) & 0x87ff_ffff | 0x3800_0000)
    });
    values.collect()
}

fn values(values: &[f32]) -> Tensor<1> {
    Tensor::from_floats(values, &Device::flex())
}

fn le_bytes(values: &[f32]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect()
}

/// The order that a reduce_scatter promises, from the top: the terms before the largest power of
/// two, and the rest.
pub fn tree_sum(terms: &[Vec<f32>]) -> Vec<f32> {
    let [first, _, ..] = terms else {
        return terms[0].clone();
    };
    let middle = terms.len().next_power_of_two() / 2;
    let (left, right) = (tree_sum(&terms[..middle]), tree_sum(&terms[middle..]));
    assert_eq!(left.len(), first.len());
    left.iter().zip(right).map(|(x, y)| x + y).collect()
}

/// Byte strings with a different length on each worker.
fn byte_strings(communicator: &impl Communicator, round: usize, len: usize) {
    let (worker, workers) = (communicator.worker_index(), communicator.num_workers());
    let before = communicator.traffic();
    // Worker `round`, `round + workers`, … sends nothing.
    let own = |worker: usize| noise((worker + round) % workers * (len + 3), worker, round);
    let all: Vec<_> = (0..workers).map(own).collect();
    assert!(communicator.all_gather_bytes(&all[worker]).unwrap() == all);
    let root = (round + 1) % workers;
    let received = communicator.broadcast_bytes(&all[worker], root).unwrap();
    assert!(received == all[root]);

    let after = communicator.traffic();
    let (own, total) = (all[worker].len(), all.concat().len());
    let mut sent = own * (workers - 1);
    let mut received = total - own;
    match worker == root {
        true => sent += own * (workers - 1),
        false => received += all[root].len(),
    }
    assert_eq!(after.sent - before.sent, sent as u64);
    assert_eq!(after.received - before.received, received as u64);
}

/// Checks of the functions on top of byte strings, on every transport.
pub fn control(communicator: &impl Communicator) {
    let (worker, workers) = (communicator.worker_index(), communicator.num_workers());
    let last = workers - 1;

    // All succeed; one fails; two fail; one with an error that prints nothing.
    let ok: Result<usize, Failure<String>> = all_or_none(communicator, Ok(worker));
    assert_eq!(ok, Ok(worker));
    for (failing, reason) in [
        (vec![last], "no space: ü"),
        (vec![0, last], "two"),
        (vec![0], ""),
    ] {
        let own = match failing.contains(&worker) {
            true => Err(format!("{reason}{worker}").repeat(reason.len().min(1))),
            false => Ok(worker),
        };
        let expected = match own.clone() {
            Err(error) => Failure::Own(error),
            Ok(_) => Failure::Other {
                worker: failing[0],
                reason: format!("{reason}{}", failing[0]).repeat(reason.len().min(1)),
            },
        };
        assert_eq!(all_or_none(communicator, own), Err(expected));
    }

    // Equal descriptions, and descriptions where only the last worker differs.
    for (text, other, line, theirs) in [
        ("", "", None, None),
        ("one\ntwo ü\nthree", "one\ntwo ü\nthree", None, None),
        (
            "one\ntwo ü\nthree",
            "one\ntwo u\nthree",
            Some("two ü"),
            Some("two u"),
        ),
        ("one\ntwo", "one", Some("two"), None),
        ("one", "one\n", None, Some("")),
        ("", "two", Some(""), Some("two")),
        ("one\r\ntwo", "one\ntwo", Some("one\r"), Some("one")),
    ] {
        let result = agree(communicator, if worker == last { other } else { text });
        let (line, theirs) = (line.map(String::from), theirs.map(String::from));
        if last == 0 || text == other {
            assert_eq!(result, Ok(()));
            continue;
        }
        let (worker, ours, theirs) = match worker == last {
            true => (0, theirs, line),
            false => (last, line, theirs),
        };
        let expected = Disagreement::Line {
            worker,
            ours,
            theirs,
        };
        assert_eq!(result, Err(expected));
    }
    // All descriptions differ: all workers name worker 0, which names the first of them.
    let result = agree(communicator, &format!("same\n{worker}"));
    if workers > 1 {
        let other = usize::from(worker == 0);
        let expected = Disagreement::Line {
            worker: other,
            ours: Some(worker.to_string()),
            theirs: Some(other.to_string()),
        };
        assert_eq!(result, Err(expected));
    }

    let integers = |worker: usize| [worker as u64, u64::MAX, 0, 1 << 53 | 1];
    let expected: Vec<_> = (0..workers).map(|w| integers(w).to_vec()).collect();
    let gathered = gather_integers(communicator, &integers(worker)).unwrap();
    assert_eq!(gathered, expected);
    assert_eq!(
        gather_integers(communicator, &[]),
        Ok(vec![vec![]; workers])
    );
    if workers == 1 {
        return;
    }
    let own = vec![7; if worker == last { 3 } else { 2 }];
    let error = gather_integers(communicator, &own).unwrap_err();
    let expected = CommError::LengthMismatch {
        worker: last,
        len: 3,
        expected: 2,
    };
    assert_eq!(error, expected);

    // Different functions, which are the same call of the transport.
    let mismatch = |call: &str| CommError::CallMismatch {
        worker: last,
        call: call.into(),
        expected: "all_or_none".into(),
    };
    for bare in [false, true] {
        let result = match worker == last {
            true if bare => {
                communicator.all_gather_bytes(b"bare").unwrap();
                continue;
            }
            true => gather_integers(communicator, &[1]).map(|_| ()),
            false => all_or_none(communicator, Ok::<_, String>(())).map_err(|error| match error {
                Failure::Comm(error) => error,
                error => panic!("{error}"),
            }),
        };
        let call = if bare {
            "all_gather_bytes"
        } else {
            "gather_integers"
        };
        assert_eq!(result, Err(mismatch(call)));
    }
}

/// Several open gathers, with another call between them. The worker waits for them in another order
/// than it started them, or not at all.
fn started_gathers(communicator: &impl Communicator, round: usize, len: usize) {
    let (worker, workers) = (communicator.worker_index(), communicator.num_workers());
    let before = communicator.traffic();
    let kinds = [(len, DType::F32), (7, DType::BF16), (0, DType::F32)];
    let own = |kind: usize| {
        let (len, dtype) = kinds[kind];
        tensor(
            &noise(len * dtype.size(), worker, 1000 * kind + round),
            dtype,
        )
    };
    let start = |kind: usize| communicator.start_all_gather(own(kind)).unwrap();
    let first = start(0);
    communicator.barrier().unwrap();
    let mut pending = vec![(0, first), (1, start(1)), (2, start(2))];
    if round.is_multiple_of(5) {
        drop(start(1));
    }
    if round.is_multiple_of(2) {
        pending.rotate_left(1 + round % 3);
    }
    for (kind, gather) in pending {
        let (len, dtype) = kinds[kind];
        let gathered = gather.wait().unwrap();
        assert_eq!(gathered.dtype(), dtype);
        let all: Vec<u8> = (0..workers)
            .flat_map(|w| noise(len * dtype.size(), w, 1000 * kind + round))
            .collect();
        assert!(bytes(gathered) == all, "gather {kind} of round {round}");
    }
    let bytes = ((workers - 1) * (4 * len + 2 * 7)) as u64;
    let after = communicator.traffic();
    assert_eq!(after.sent - before.sent, bytes);
    assert_eq!(after.received - before.received, bytes);
}

/// How the last worker of a group fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    Panic,
    Exit,
    Kill,
    Stall,
    Leave,
    Length,
    Call,
}

const FAULTS: [Fault; 7] = [
    Fault::Panic,
    Fault::Exit,
    Fault::Kill,
    Fault::Stall,
    Fault::Leave,
    Fault::Length,
    Fault::Call,
];

/// The call in which it fails. Large calls have buffers of more than one message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    Gather,
    /// A gather, while another one is under way.
    GatherBesideAnother,
    ReduceScatter,
    Bytes,
}

impl Verb {
    /// The error of a call with buffers of `len` values.
    fn call<C: Communicator>(
        self,
        communicator: &C,
        len: usize,
        under_way: Option<Box<dyn PendingGather + '_>>,
    ) -> CommError {
        let zeros = |len| Tensor::zeros([len], &Device::flex());
        match (self, under_way) {
            (Self::ReduceScatter, _) => {
                let buffer = zeros(len * communicator.num_workers());
                communicator.reduce_scatter(buffer).unwrap_err()
            }
            (Self::Bytes, _) => communicator.all_gather_bytes(&vec![0; len]).unwrap_err(),
            (_, None) => communicator.all_gather(zeros(len)).unwrap_err(),
            // The first may still succeed, depending on its progress.
            (_, Some(first)) => match (communicator.start_all_gather(zeros(len)), first.wait()) {
                (Ok(second), Ok(_)) => second.wait().unwrap_err(),
                (_, Err(error)) | (Err(error), _) => error,
            },
        }
    }

    /// Its name in errors.
    fn name(self) -> &'static str {
        match self {
            Self::Gather | Self::GatherBesideAnother => "all_gather of F32 values",
            Self::ReduceScatter => "reduce_scatter",
            Self::Bytes => "all_gather_bytes",
        }
    }

    /// The faults that can happen to it.
    pub fn faults(self) -> impl Iterator<Item = Fault> {
        let of_any_length = self == Self::Bytes;
        let faults = FAULTS.into_iter();
        faults.filter(move |&fault| !(of_any_length && fault == Fault::Length))
    }
}

/// Numbers of workers, and the call in which the last of them fails.
pub const FAULTY_CALLS: [(usize, Verb); 4] = [
    (2, Verb::Gather),
    (4, Verb::ReduceScatter),
    (3, Verb::GatherBesideAnother),
    (2, Verb::Bytes),
];

/// The error of a call, and the time it took.
fn fails<C: Communicator>(
    communicator: &C,
    verb: Verb,
    len: usize,
    under_way: Option<Box<dyn PendingGather + '_>>,
) -> (CommError, Duration) {
    let start = Instant::now();
    let error = verb.call(communicator, len, under_way);
    let elapsed = start.elapsed();
    let again = communicator.barrier().unwrap_err();
    assert_eq!(again, error, "a communicator that failed stays so");
    (error, elapsed)
}

/// Makes three calls that succeed, then one in which the last worker fails in the given way.
/// Returns the error that this worker gets, and the time it took.
pub fn fault<C: Communicator>(communicator: &C, fault: Fault, verb: Verb) -> (CommError, Duration) {
    const LEN: usize = 100_003;
    for _ in 0..3 {
        communicator.barrier().unwrap();
    }
    let under_way = (verb == Verb::GatherBesideAnother).then(|| {
        let buffer = Tensor::zeros([LEN], &Device::flex());
        communicator.start_all_gather(buffer).unwrap()
    });
    if communicator.worker_index() + 1 < communicator.num_workers() {
        return fails(communicator, verb, LEN, under_way);
    }
    match fault {
        Fault::Panic => panic!("this worker dies on purpose"),
        Fault::Exit => std::process::exit(3),
        Fault::Kill => {
            let pid = std::process::id().to_string();
            let status = std::process::Command::new("kill")
                .args(["-9", &pid])
                .status();
            unreachable!("kill -9 {pid}: {status:?}");
        }
        Fault::Stall => std::thread::sleep(SHORT_TIMEOUT * 2),
        Fault::Leave => {}
        Fault::Length => return fails(communicator, verb, LEN + 1, under_way),
        Fault::Call => {
            let error = communicator.barrier().unwrap_err();
            return (error, Duration::ZERO);
        }
    }
    let start = Instant::now();
    let error = match fault {
        Fault::Leave => {
            // The others see this fault; this worker's own error is made up.
            let worker = communicator.worker_index();
            CommError::WorkerGone { worker }
        }
        _ => communicator.barrier().unwrap_err(),
    };
    (error, start.elapsed())
}

impl Fault {
    /// Whether it ends the whole process.
    pub fn ends_process(self) -> bool {
        matches!(self, Fault::Exit | Fault::Kill)
    }

    /// The number of workers that survive to report it.
    #[cfg(feature = "mpi")]
    pub fn reporters(self, workers: usize) -> usize {
        workers - usize::from(self.ends_process() || self == Fault::Panic)
    }

    /// Checks what a worker reports.
    pub fn check(self, error: &CommError, elapsed: Duration, workers: usize, verb: Verb) {
        let last = workers - 1;
        let expected = match self {
            Fault::Panic | Fault::Leave => CommError::WorkerGone { worker: last },
            Fault::Exit | Fault::Kill | Fault::Stall => CommError::TimedOut {
                missing: vec![last],
                after: SHORT_TIMEOUT,
            },
            Fault::Length => CommError::LengthMismatch {
                worker: last,
                len: 100_004,
                expected: 100_003,
            },
            Fault::Call => CommError::CallMismatch {
                worker: last,
                call: "barrier".into(),
                expected: verb.name().into(),
            },
        };
        assert_eq!(*error, expected);
        let limit = match expected {
            CommError::TimedOut { after, .. } => after + Duration::from_secs(1),
            _ => SHORT_TIMEOUT,
        };
        assert!(elapsed < limit, "{self:?} took {elapsed:?}");
    }
}
