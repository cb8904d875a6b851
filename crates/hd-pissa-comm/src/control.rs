//! Agreement between workers: whether all succeeded, whether all do the same, and a few integers.
//! It uses only byte strings, so no device takes part.
//!
//! Every worker calls the same function. Only a [`CommError`] leaves the communicator unusable.

use std::fmt::Display;

use crate::{CommError, Communicator};

/// Why a common task has no result on this worker; see [`all_or_none`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure<E> {
    /// This worker failed, with this error.
    #[error("{0}")]
    Own(E),
    /// This worker succeeded, another one failed.
    #[error("worker {worker}: {reason}")]
    Other {
        /// Index of the first worker that failed.
        worker: usize,
        /// The text of its error.
        reason: String,
    },
    /// This worker succeeded; the exchange failed.
    #[error(transparent)]
    Comm(#[from] CommError),
}

/// This worker's result if every worker has one: either all continue or none does. Takes one
/// exchange, of the reasons of the workers that failed.
///
/// ```
/// # use std::time::Duration;
/// use hd_pissa_comm::{Failure, all_or_none, thread_group};
///
/// let mut group = thread_group(2, Duration::from_secs(60)).into_iter();
/// let (first, second) = (group.next().unwrap(), group.next().unwrap());
/// let other = std::thread::spawn(move || all_or_none(&second, Err::<u8, _>("no space is left")));
///
/// let reason = "no space is left".into();
/// let failure = Failure::Other { worker: 1, reason };
/// assert_eq!(all_or_none(&first, Ok::<_, &str>(7)), Err(failure));
/// assert_eq!(other.join().unwrap(), Err(Failure::Own("no space is left")));
/// ```
///
/// # Errors
///
/// [`Failure`]. A worker with its own error keeps it, even if the exchange fails.
pub fn all_or_none<T, E: Display>(
    communicator: &dyn Communicator,
    own: Result<T, E>,
) -> Result<T, Failure<E>> {
    let message = match &own {
        Ok(_) => Vec::new(),
        // The mark distinguishes an error with an empty text from no error.
        Err(error) => format!("!{error}").into_bytes(),
    };
    let messages = gather(communicator, "all_or_none", &message);
    let own = own.map_err(Failure::Own)?;
    let failed = messages?
        .into_iter()
        .enumerate()
        .find(|(_, message)| !message.is_empty());
    match failed {
        Some((worker, message)) => Err(Failure::Other {
            worker,
            reason: text(&message[1..]),
        }),
        None => Ok(own),
    }
}

/// Why workers do not agree; see [`agree`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Disagreement {
    /// Two descriptions differ.
    #[error("worker {worker} has {}, this worker {}", or_end(theirs), or_end(ours))]
    Line {
        /// Index of the other worker: 0, or, on workers that agree with worker 0, the first that
        /// does not.
        worker: usize,
        /// The first line that differs, on this worker; none if its description has ended.
        ours: Option<String>,
        /// The same line on the other worker.
        theirs: Option<String>,
    },
    /// The exchange failed.
    #[error(transparent)]
    Comm(#[from] CommError),
}

fn or_end(line: &Option<String>) -> &str {
    line.as_deref().unwrap_or("nothing more")
}

/// Compares a description of the next task, in lines, with that of worker 0. Takes two exchanges:
/// the description of worker 0, then the lines that differ.
///
/// ```
/// # use std::time::Duration;
/// use hd_pissa_comm::{agree, thread_group};
///
/// let mut group = thread_group(2, Duration::from_secs(60)).into_iter();
/// let (first, second) = (group.next().unwrap(), group.next().unwrap());
/// let other = std::thread::spawn(move || agree(&second, "8 shards\nrank 4"));
///
/// let error = agree(&first, "8 shards\nrank 16").unwrap_err();
/// assert_eq!(error.to_string(), "worker 1 has rank 4, this worker rank 16");
/// let error = other.join().unwrap().unwrap_err();
/// assert_eq!(error.to_string(), "worker 0 has rank 16, this worker rank 4");
/// ```
///
/// # Errors
///
/// [`Disagreement`], on every worker as soon as one differs.
pub fn agree(communicator: &dyn Communicator, own: &str) -> Result<(), Disagreement> {
    let first = text(&communicator.broadcast_bytes(own.as_bytes(), 0)?);
    let difference = first_difference(own, &first);
    let message = match difference {
        None => Vec::new(),
        Some(number) => {
            let line = line(own, number).map(|line| format!("+{line}"));
            let line = line.unwrap_or_default();
            [&(number as u64).to_le_bytes(), line.as_bytes()].concat()
        }
    };
    let messages = gather(communicator, "agree", &message)?;
    let disagreement = |worker, number, theirs| {
        let ours = line(own, number).map(String::from);
        Err(Disagreement::Line {
            worker,
            ours,
            theirs,
        })
    };
    if let Some(number) = difference {
        return disagreement(0, number, line(&first, number).map(String::from));
    }
    let other = messages.iter().enumerate().find_map(|(worker, message)| {
        let (number, line) = message.split_first_chunk()?;
        Some((worker, u64::from_le_bytes(*number) as usize, line))
    });
    match other {
        Some((worker, number, line)) => disagreement(worker, number, line.get(1..).map(text)),
        None => Ok(()),
    }
}

/// Number of the first line in which two texts differ.
fn first_difference(ours: &str, theirs: &str) -> Option<usize> {
    let longest = ours.split('\n').count().max(theirs.split('\n').count());
    let mut pairs = (ours.split('\n'), theirs.split('\n'));
    (0..longest).find(|_| pairs.0.next() != pairs.1.next())
}

fn line(text: &str, number: usize) -> Option<&str> {
    text.split('\n').nth(number)
}

/// The integers of every worker, by index. All workers send the same number.
///
/// # Errors
///
/// [`CommError::LengthMismatch`] on every worker if one sends more or fewer than worker 0; else see
/// [`CommError`].
pub fn gather_integers(
    communicator: &dyn Communicator,
    own: &[u64],
) -> Result<Vec<Vec<u64>>, CommError> {
    let bytes: Vec<u8> = own
        .iter()
        .flat_map(|integer| integer.to_le_bytes())
        .collect();
    let all: Vec<Vec<u64>> = gather(communicator, "gather_integers", &bytes)?
        .iter()
        .map(|bytes| {
            let (integers, _) = bytes.as_chunks();
            integers.iter().copied().map(u64::from_le_bytes).collect()
        })
        .collect();
    let expected = all[0].len();
    match all.iter().position(|integers| integers.len() != expected) {
        Some(worker) => Err(CommError::LengthMismatch {
            worker,
            len: all[worker].len(),
            expected,
        }),
        None => Ok(all),
    }
}

/// Gathers messages that start with the name of the sending function, because all functions here
/// make the same call of the transport.
fn gather(
    communicator: &dyn Communicator,
    function: &str,
    message: &[u8],
) -> Result<Vec<Vec<u8>>, CommError> {
    let own = [function.as_bytes(), &[0], message].concat();
    let all = communicator.all_gather_bytes(&own)?;
    let parts: Vec<_> = all
        .iter()
        .map(|all| {
            let end = all.iter().position(|&byte| byte == 0);
            // A worker that made the bare call may send any bytes.
            end.map_or(("all_gather_bytes".into(), &all[..]), |end| {
                (text(&all[..end]), &all[end + 1..])
            })
        })
        .collect();
    let (expected, _) = &parts[0];
    match parts.iter().position(|(function, _)| function != expected) {
        Some(worker) => Err(CommError::CallMismatch {
            worker,
            call: parts[worker].0.clone(),
            expected: expected.clone(),
        }),
        None => Ok(parts
            .into_iter()
            .map(|(_, message)| message.to_vec())
            .collect()),
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
