//! Output folders that are complete or absent.
//!
//! A folder is written under a hidden name beside its place, brought to disk, and renamed. Where that
//! cannot work, as with a mount point, it is written inside its place and its entries are moved one by
//! one. [`RECORD`] is written last and moved last: a hidden folder that holds it is complete, and the
//! next run finishes what a killed one has begun.

mod disk;
mod leftovers;
mod paths;
mod place;
mod record;
mod staged;

pub use paths::normalized;
pub use record::RECORD;
pub use staged::Staged;
