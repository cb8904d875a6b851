//! Messages besides payloads: a header before each payload, and one farewell.

use std::time::Duration;

use burn::tensor::DType;

use crate::CommError;
use crate::call::Call;

const WORD: usize = size_of::<u64>();
/// Longest text of a farewell; the rest is cut off.
const TEXT: usize = 256;
const DTYPES: [DType; 5] = [
    DType::F64,
    DType::F32,
    DType::Flex32,
    DType::F16,
    DType::BF16,
];

/// Announces a worker's call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) call: Call,
    /// Length in bytes of the payload that follows; no payload follows if it is 0.
    pub(super) bytes: usize,
}

impl Header {
    pub(super) const LEN: usize = 4 * WORD;

    pub(super) fn encode(self) -> Vec<u8> {
        let code = |dtype| {
            let position = DTYPES.iter().position(|&known| known == dtype);
            position.expect("a buffer of floats") as u64
        };
        let (kind, dtype, root) = match self.call {
            Call::Barrier => (0, 0, 0),
            Call::Broadcast(dtype, root) => (1, code(dtype), root as u64),
            Call::AllGather(dtype) => (2, code(dtype), 0),
            Call::ReduceScatter => (3, 0, 0),
            Call::AllGatherBytes => (4, 0, 0),
            Call::BroadcastBytes(root) => (5, 0, root as u64),
        };
        encode_words(&[kind, dtype, root, self.bytes as u64])
    }

    /// `None` if the bytes are not a header.
    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let words = decode_words(bytes);
        let &[kind, dtype, root, bytes] = &words[..] else {
            return None;
        };
        let dtype = *DTYPES.get(usize::try_from(dtype).ok()?)?;
        let call = match kind {
            0 => Call::Barrier,
            1 => Call::Broadcast(dtype, usize::try_from(root).ok()?),
            2 => Call::AllGather(dtype),
            3 => Call::ReduceScatter,
            4 => Call::AllGatherBytes,
            5 => Call::BroadcastBytes(usize::try_from(root).ok()?),
            _ => return None,
        };
        let bytes = usize::try_from(bytes).ok()?;
        Some(Self { call, bytes })
    }
}

/// The last message of a worker to each other worker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Farewell {
    /// It dropped its communicator after its last call.
    Done,
    /// It panicked, or found that the workers' calls differ. All others find the same.
    Gone,
    /// A call failed.
    Failed(CommError),
}

impl Farewell {
    /// Length of every farewell among `workers` workers.
    pub(super) fn len(workers: usize) -> usize {
        WORD * (4 + workers) + TEXT
    }

    pub(super) fn encode(&self, workers: usize) -> Vec<u8> {
        let (kind, first, second, list, text) = match self {
            Self::Done => (0, 0, 0, &[][..], ""),
            Self::Gone => (1, 0, 0, &[][..], ""),
            Self::Failed(CommError::WorkerGone { worker }) => (2, *worker as u64, 0, &[][..], ""),
            Self::Failed(CommError::TimedOut { missing, after }) => {
                let nanos = u64::from(after.subsec_nanos());
                (3, after.as_secs(), nanos, &missing[..], "")
            }
            Self::Failed(CommError::Transfer { workers, reason }) => (
                4,
                workers[0] as u64,
                workers[1] as u64,
                &[][..],
                &reason[..],
            ),
            Self::Failed(_) => (1, 0, 0, &[][..], ""),
        };
        let mut words: Vec<u64> = vec![kind, first, second, list.len() as u64];
        words.extend(list.iter().map(|&worker| worker as u64));
        words.resize(4 + workers, 0);
        let mut bytes = encode_words(&words);
        bytes.extend(text.bytes().take(TEXT));
        bytes.resize(Self::len(workers), 0);
        bytes
    }

    /// An unreadable farewell counts as [`Gone`](Self::Gone).
    pub(super) fn decode(bytes: &[u8]) -> Self {
        let (head, text) = bytes.split_at(bytes.len().saturating_sub(TEXT));
        let words = decode_words(head);
        let &[kind, first, second, len, ref list @ ..] = &words[..] else {
            return Self::Gone;
        };
        Self::Failed(match kind {
            0 => return Self::Done,
            2 => CommError::WorkerGone {
                worker: first as usize,
            },
            3 => CommError::TimedOut {
                missing: (list.iter().map(|&worker| worker as usize))
                    .take(len as usize)
                    .collect(),
                after: Duration::from_secs(first).saturating_add(Duration::from_nanos(second)),
            },
            4 => CommError::Transfer {
                workers: [first as usize, second as usize],
                reason: String::from_utf8_lossy(text)
                    .trim_end_matches('\0')
                    .to_string(),
            },
            _ => return Self::Gone,
        })
    }
}

fn encode_words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn decode_words(bytes: &[u8]) -> Vec<u64> {
    let (words, _) = bytes.as_chunks::<WORD>();
    words.iter().map(|&word| u64::from_le_bytes(word)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_survive_the_wire() {
        for call in [
            Call::Barrier,
            Call::Broadcast(DType::F16, 7),
            Call::AllGather(DType::BF16),
            Call::AllGather(DType::F32),
            Call::ReduceScatter,
            Call::AllGatherBytes,
            Call::BroadcastBytes(3),
        ] {
            let header = Header { call, bytes: 123 };
            let bytes = header.encode();
            assert_eq!(bytes.len(), Header::LEN);
            assert_eq!(Header::decode(&bytes), Some(header));
        }
        assert_eq!(Header::decode(&[9; Header::LEN]), None);
        assert_eq!(Header::decode(&[]), None);
    }

    fn survives(farewell: Farewell) {
        let bytes = farewell.encode(5);
        assert_eq!(bytes.len(), Farewell::len(5));
        assert_eq!(Farewell::decode(&bytes), farewell);
    }

    #[test]
    fn farewells_survive_the_wire() {
        for farewell in [
            Farewell::Done,
            Farewell::Gone,
            Farewell::Failed(CommError::WorkerGone { worker: 3 }),
            Farewell::Failed(CommError::Transfer {
                workers: [0, 2],
                reason: "a reason".into(),
            }),
        ] {
            survives(farewell);
        }
        let (long, short) = (Duration::from_secs(40), Duration::from_nanos(1));
        for after in [Duration::ZERO, short, long + short, Duration::MAX] {
            survives(Farewell::Failed(CommError::TimedOut {
                missing: vec![1, 4],
                after,
            }));
        }
        assert_eq!(Farewell::decode(&[]), Farewell::Gone);
    }
}
