//! What one worker of a group does; every worker runs the same function.

#[cfg(feature = "mpi")]
pub mod mpirun;

use std::time::{Duration, Instant};

use burn::tensor::{DType, Device, Tensor, TensorData};
use hd_pissa_comm::{CommError, Communicator, PendingGather, Traffic};

/// Generous: nobody fails.
pub const CONTRACT_TIMEOUT: Duration = Duration::from_secs(60);
/// What the tests of faults wait.
pub const SHORT_TIMEOUT: Duration = Duration::from_secs(2);

fn bytes(tensor: Tensor<1>) -> Vec<u8> {
    tensor.into_data().as_bytes().to_vec()
}

fn tensor(bytes: &[u8], dtype: DType) -> Tensor<1> {
    let data = TensorData::from_bytes_vec(bytes.to_vec(), [bytes.len() / dtype.size()], dtype);
    Tensor::from_data(data, (&Device::flex(), dtype))
}

/// Bytes that depend on everything a transport could mix up; as floats they hold NaN of many
/// kinds, infinities, subnormals and negative zeros.
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

/// What holds of every transport without faults.
pub fn contract(communicator: &impl Communicator) {
    let (worker, workers) = (communicator.worker_index(), communicator.num_workers());
    assert!(worker < workers);
    let mut expected = Traffic::default();
    // More rounds than one, so that a fast worker meets a slow one in the round before.
    for round in 0..50 {
        let dtype = [DType::F32, DType::BF16, DType::F16][round % 3];
        // Nothing, less than a page, and now and then what needs more than one message.
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
        // The others need not know how much comes.
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
        communicator.barrier().unwrap();
        assert_eq!(communicator.traffic(), expected);
        started_gathers(communicator, round, len / dtype.size());
        expected = communicator.traffic();
    }
}

/// Several gathers under way, with another call between them, waited for in another order than
/// that in which they started, or not at all.
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

pub const FAULTS: [Fault; 7] = [
    Fault::Panic,
    Fault::Exit,
    Fault::Kill,
    Fault::Stall,
    Fault::Leave,
    Fault::Length,
    Fault::Call,
];

/// A gather that fails, after the one that is under way already: large ones, whose buffers take
/// more than one message.
fn gather<'a, C: Communicator>(
    communicator: &'a C,
    len: usize,
    started: Option<Box<dyn PendingGather + 'a>>,
) -> (CommError, Duration) {
    let start = Instant::now();
    let buffer = Tensor::zeros([len], &Device::flex());
    let error = match started {
        None => communicator.all_gather(buffer).unwrap_err(),
        // Whether the first still succeeds depends on how far it has come.
        Some(first) => match (communicator.start_all_gather(buffer), first.wait()) {
            (Ok(second), Ok(_)) => second.wait().unwrap_err(),
            (_, Err(error)) | (Err(error), _) => error,
        },
    };
    let elapsed = start.elapsed();
    let again = communicator.barrier().unwrap_err();
    assert_eq!(again, error, "a communicator that failed stays so");
    (error, elapsed)
}

/// Three calls that succeed, then one in which the last worker fails in the way given, with a
/// gather `under_way` or not: the error that this worker gets, and the time it took.
pub fn fault<C: Communicator>(
    communicator: &C,
    fault: Fault,
    under_way: bool,
) -> (CommError, Duration) {
    const LEN: usize = 100_003;
    for _ in 0..3 {
        communicator.barrier().unwrap();
    }
    let started = under_way.then(|| {
        let buffer = Tensor::zeros([LEN], &Device::flex());
        communicator.start_all_gather(buffer).unwrap()
    });
    if communicator.worker_index() + 1 < communicator.num_workers() {
        return gather(communicator, LEN, started);
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
        Fault::Length => return gather(communicator, LEN + 1, started),
        Fault::Call => {
            let error = communicator.barrier().unwrap_err();
            return (error, Duration::ZERO);
        }
    }
    let start = Instant::now();
    let error = match fault {
        Fault::Leave => {
            // As far as the others can tell; this worker's own error is made up.
            let worker = communicator.worker_index();
            CommError::WorkerGone { worker }
        }
        _ => communicator.barrier().unwrap_err(),
    };
    (error, start.elapsed())
}

impl Fault {
    /// Whether it takes the whole process.
    pub fn ends_process(self) -> bool {
        matches!(self, Fault::Exit | Fault::Kill)
    }

    /// How many workers live to report it.
    #[cfg(feature = "mpi")]
    pub fn reporters(self, workers: usize) -> usize {
        workers - usize::from(self.ends_process() || self == Fault::Panic)
    }

    /// Checks what a worker reports.
    pub fn check(self, error: &CommError, elapsed: Duration, workers: usize) {
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
                expected: "all_gather of F32 values".into(),
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
