//! MPI: one worker per process.

mod communicator;
mod group;
mod transfer;
mod wire;

pub use communicator::MpiCommunicator;
