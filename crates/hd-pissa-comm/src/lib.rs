//! Transports between the workers of an HD-PiSSA run.
//!
//! A *worker* is a thread or a process with one device that hosts one or more shards. Workers
//! exchange flat buffers of floats through a [`Communicator`]:
//!
//! | transport | workers | feature |
//! |---|---|---|
//! | [`Solo`] | one | |
//! | [`thread_group`] | threads of a process, each with a device | |
//! | `collective_group` | the same, by Burn's own collectives: NCCL on CUDA | `collectives` |
//! | `MpiCommunicator` | processes, on one machine or many | `mpi` |
//!
//! No call waits for ever: a worker that panics, ends, is killed or stalls ends the calls of all
//! others with a [`CommError`] that names it, within a time limit.

#![warn(missing_docs)]
#![deny(unsafe_code)]
#![cfg_attr(not(feature = "mpi"), forbid(unsafe_code))]

#[cfg(feature = "collectives")]
mod collectives;
mod communicator;
#[cfg(feature = "mpi")]
mod mpi;
mod solo;
mod threads;

#[cfg(feature = "collectives")]
pub use collectives::{CollectiveCommunicator, collective_group};
pub use communicator::{CommError, Communicator, PendingGather, Traffic};
#[cfg(feature = "mpi")]
pub use mpi::MpiCommunicator;
pub use solo::Solo;
pub use threads::{ThreadCommunicator, thread_group};
