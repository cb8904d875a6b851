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
//! Every call has a time limit. A worker that panics, ends, is killed or stalls ends the calls of all
//! others with a [`CommError`] that names it, within that limit. One part of `collective_group` has
//! none: its workers agree on each call within the limit, but the sum that follows is NCCL's, and waits
//! for a worker that is killed between the two.

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
