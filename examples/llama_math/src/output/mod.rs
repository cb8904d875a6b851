//! Output folders that are complete or absent.
//!
//! A folder is written under a hidden name next to its place, synchronized to disk, and renamed. If
//! that is impossible, as with a mount point, it is written inside its place and its entries are
//! moved one by one. [`RECORD`] is written last and moved last. A hidden folder with this file is
//! complete, and the next run finishes the work of a killed one.

mod disk;
mod leftovers;
mod paths;
mod place;
mod record;
mod staged;

pub use paths::normalized;
pub use record::RECORD;
pub use staged::Staged;
