//! Transports between the workers of an HD-PiSSA run.
//!
//! A *worker* is a thread or a process with one device that hosts one or more shards. Workers
//! exchange flat `f32` buffers through a [`Communicator`]. [`Solo`] is the transport of a single
//! worker; [`thread_group`] connects threads of one process.

#![warn(missing_docs)]
#![forbid(unsafe_code)]

mod communicator;
mod solo;
mod threads;

pub use communicator::{CommError, Communicator};
pub use solo::Solo;
pub use threads::{ThreadCommunicator, thread_group};
