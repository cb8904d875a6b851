//! The rows of a Parquet file.

use std::path::Path;

use bytes::Bytes;
use parquet::file::reader::{FileReader, SerializedFileReader};

use super::row::{Row, place};
use crate::{Error, memory, panics};

/// All rows, each a JSON object of its columns.
///
/// # Errors
///
/// [`Error::Field`] for a file that is damaged or packed in a way that is not built in, with the record,
/// or for a table that does not fit into memory.
pub(super) fn rows(bytes: Vec<u8>, path: &Path) -> Result<Vec<Row>, Error> {
    let fail = |field: String, reason: String| Error::field(path, field, reason);
    let mut done = 0;
    // The library panics on some damaged files (parquet 60.1) instead of refusing them.
    let result = panics::caught(|| {
        let whole = |error: parquet::errors::ParquetError| {
            fail(
                "content".into(),
                format!("is a damaged parquet file: {error}"),
            )
        };
        let reader = SerializedFileReader::new(Bytes::from(bytes)).map_err(whole)?;
        let groups = reader.metadata().row_groups().iter();
        let size: u64 = groups
            .map(|group| group.total_byte_size().max(0) as u64)
            .sum();
        memory::check(size).map_err(|reason| fail("content".into(), reason))?;
        let mut rows = Vec::new();
        for row in reader.get_row_iter(None).map_err(whole)? {
            let row = row.map_err(|error| fail(place(done), error.to_string()))?;
            rows.push((place(done), row.to_json_value()));
            done += 1;
        }
        Ok(rows)
    });
    result.unwrap_or_else(|reason| Err(fail(place(done), format!("is damaged: {reason}"))))
}
