//! Calls of workers, and the check that all workers make the same call.

use std::fmt::{self, Display, Formatter};

use burn::tensor::DType;

use crate::CommError;

/// A call, as a worker makes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Call {
    AllGather(DType),
    Broadcast(DType, usize),
    /// Of f32 values.
    ReduceScatter,
    AllGatherBytes,
    BroadcastBytes(usize),
    Barrier,
}

impl Call {
    /// Bytes of each value that it carries.
    pub(crate) fn value_size(self) -> usize {
        match self {
            Self::AllGather(dtype) | Self::Broadcast(dtype, _) => dtype.size(),
            Self::ReduceScatter => DType::F32.size(),
            Self::AllGatherBytes | Self::BroadcastBytes(_) | Self::Barrier => 1,
        }
    }
}

impl Display for Call {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::AllGather(dtype) => write!(f, "all_gather of {dtype:?} values"),
            Self::Broadcast(dtype, root) => {
                write!(f, "broadcast of {dtype:?} values from worker {root}")
            }
            Self::ReduceScatter => write!(f, "reduce_scatter"),
            Self::AllGatherBytes => write!(f, "all_gather_bytes"),
            Self::BroadcastBytes(root) => write!(f, "broadcast_bytes from worker {root}"),
            Self::Barrier => write!(f, "barrier"),
        }
    }
}

/// Compares the workers' calls with that of worker 0, and also the numbers of values that each
/// sends if they must be equal.
pub(crate) fn compare(calls: &[(Call, usize)]) -> Result<(), CommError> {
    let (expected, expected_len) = calls[0];
    for (worker, &(call, len)) in calls.iter().enumerate() {
        if call != expected {
            return Err(CommError::CallMismatch {
                worker,
                call: call.to_string(),
                expected: expected.to_string(),
            });
        }
        if matches!(call, Call::AllGather(_) | Call::ReduceScatter) && len != expected_len {
            return Err(CommError::LengthMismatch {
                worker,
                len,
                expected: expected_len,
            });
        }
    }
    Ok(())
}

/// Stops a broadcast from a worker that does not exist.
pub(crate) fn check_root(root: usize, workers: usize) {
    assert!(root < workers, "broadcast from worker {root} of {workers}");
}
