//! Transports between the workers of an HD-PiSSA run.
//!
//! A *worker* is a thread or a process with one device that hosts one or more shards. Workers
//! exchange flat buffers of floats, and byte strings, through a [`Communicator`]:
//!
//! | transport | workers | feature | what the time limit covers |
//! |---|---|---|---|
//! | [`Solo`] | one | | nothing: there is no other worker |
//! | [`thread_group`] | threads of a process, each with a device | | every call |
//! | `MpiCommunicator` | processes, on one machine or many | `mpi` | every call |
//! | `collective_group` | threads as above, through Burn's own collectives: NCCL on CUDA | `collectives` | the workers' agreement before each sum, but not the sum |
//!
//! Three functions, written once for all transports, exchange more than numbers: [`all_or_none`]
//! ends a task on every worker if it failed on one, [`agree`] finds the setting that differs, and
//! [`gather_integers`] exchanges counts, indices and hashes.
//!
//! If a worker panics, ends, is killed or stalls, the calls of all others end within the time
//! limit, with a [`CommError`] that names it. A sum by NCCL has no time limit: a worker that fails
//! between the agreement and the sum leaves the others waiting. A time limit beyond the range of
//! the clock, such as [`Duration::MAX`](std::time::Duration::MAX), means no limit.

#![cfg_attr(docsrs, feature(doc_cfg))]
#![warn(missing_docs)]
#![deny(unsafe_code)]
#![cfg_attr(not(feature = "mpi"), forbid(unsafe_code))]

mod call;
#[cfg(feature = "collectives")]
mod collectives;
mod communicator;
mod control;
mod error;
#[cfg(feature = "mpi")]
mod mpi;
mod solo;
mod sum;
mod threads;

#[cfg(feature = "collectives")]
pub use collectives::{CollectiveCommunicator, collective_group};
pub use communicator::{Communicator, PendingGather, Traffic};
pub use control::{Disagreement, Failure, agree, all_or_none, gather_integers};
pub use error::CommError;
#[cfg(feature = "mpi")]
pub use mpi::MpiCommunicator;
pub use solo::Solo;
pub use threads::{ThreadCommunicator, thread_group};
