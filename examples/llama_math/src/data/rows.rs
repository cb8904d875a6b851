//! The rows of a data file as JSON values: a JSON array, JSON lines, either of them packed with gzip, or
//! Parquet. What a file is, its content says, not its name.

use std::io::Read;
use std::path::Path;

use flate2::read::MultiGzDecoder;
use serde_json::Value;

use super::row::{Row, place};
use crate::{Error, files, memory};

/// Bytes that are unpacked at once, between looks at the memory that is left.
const CHUNK: u64 = 16 << 20;
const PARQUET: &[u8] = b"PAR1";

/// All rows of a file.
///
/// # Errors
///
/// [`Error::Io`], and [`Error::Field`] with the line (of JSON lines) or the number of the record.
pub(super) fn rows(path: &Path) -> Result<Vec<Row>, Error> {
    let mut bytes = files::read(path)?;
    if bytes.starts_with(b"\x1f\x8b") {
        bytes = unpacked(&bytes, path)?;
    }
    if bytes.starts_with(PARQUET) {
        return parquet(bytes, path);
    }
    let text = files::as_text(&bytes, path)?;
    match text.trim_start().starts_with('[') {
        true => array(text, path),
        false => lines(text, path),
    }
}

/// The content of a gzip archive.
fn unpacked(bytes: &[u8], path: &Path) -> Result<Vec<u8>, Error> {
    let fail = |reason: String| Error::field(path, "content", reason);
    let mut decoder = MultiGzDecoder::new(bytes);
    let mut content = Vec::new();
    loop {
        // A small archive may unpack to more than there is room for.
        let room = content.len() as u64 + 2 * CHUNK;
        memory::check(room).map_err(|reason| fail(format!("unpacked {reason}")))?;
        let read = decoder.by_ref().take(CHUNK).read_to_end(&mut content);
        match read {
            Ok(0) => return Ok(content),
            Ok(_) => {}
            Err(error) => return Err(fail(format!("is a damaged gzip archive: {error}"))),
        }
    }
}

#[cfg(feature = "parquet")]
fn parquet(bytes: Vec<u8>, path: &Path) -> Result<Vec<Row>, Error> {
    super::parquet::rows(bytes, path)
}

#[cfg(not(feature = "parquet"))]
fn parquet(_bytes: Vec<u8>, path: &Path) -> Result<Vec<Row>, Error> {
    let reason = "is a parquet file; build with `--features parquet`, or convert it to JSON lines";
    Err(Error::field(path, "content", reason))
}

fn array(text: &str, path: &Path) -> Result<Vec<Row>, Error> {
    let values: Vec<Value> = serde_json::from_str(text)
        .map_err(|error| Error::field(path, format!("line {}", error.line()), error.to_string()))?;
    let values = values.into_iter().enumerate();
    Ok(values.map(|(index, value)| (place(index), value)).collect())
}

fn lines(text: &str, path: &Path) -> Result<Vec<Row>, Error> {
    text.lines()
        .enumerate()
        .filter(|(_, line)| !line.trim().is_empty())
        .map(|(index, line)| {
            let place = format!("line {}", index + 1);
            match serde_json::from_str(line) {
                Ok(value) => Ok((place, value)),
                Err(error) => {
                    let message = error.to_string();
                    let reason = message.split(" at line").next().unwrap_or_default();
                    let reason = format!("is not JSON: {reason} at column {}", error.column());
                    Err(Error::field(path, place, reason))
                }
            }
        })
        .collect()
}
