//! A trained model in files: merged, as a LoRA adapter, or as a delta.

mod card;
mod command;
mod format;
mod made;
mod merged;
mod options;
mod probe;
mod shards;
mod sums;
mod verify;

pub use card::Card;
pub(crate) use card::{Form, command, name_of};
pub use command::Export;
pub use format::Format;
pub(crate) use made::FORMAT;
pub use merged::{ExportConfig, Exported, OutputDtype, Rounding, write_weights};
pub use options::{ExportOptions, VerifyOptions};
pub use probe::Probe;
pub use sums::write_sums;
pub use verify::Verify;
