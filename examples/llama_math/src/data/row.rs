//! A row of a data file, and its place.

use serde_json::Value;

/// A row with its place, for messages.
pub(super) type Row = (String, Value);

/// The place of the record at `index` of an array or table.
pub(super) fn place(index: usize) -> String {
    format!("record {}", index + 1)
}
