//! Files: read whole, as far as they are what they should be, and replaced whole.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use crate::{Error, memory};

/// The content of a file.
///
/// # Errors
///
/// [`Error::Io`], and [`Error::Field`] for what is no file, such as a named pipe that would keep the
/// program waiting, or for a file that does not fit into memory.
pub(crate) fn read(path: &Path) -> Result<Vec<u8>, Error> {
    let size = size(path)?;
    memory::check(size).map_err(|reason| Error::field(path, "content", reason))?;
    std::fs::read(path).map_err(Error::io(path))
}

/// The size of a file.
///
/// # Errors
///
/// [`Error::Io`], and [`Error::Field`] for what is no file.
pub(crate) fn size(path: &Path) -> Result<u64, Error> {
    let found = std::fs::metadata(path).map_err(Error::io(path))?;
    if found.is_dir() {
        return Err(Error::io(path)(ErrorKind::IsADirectory.into()));
    }
    match found.is_file() {
        true => Ok(found.len()),
        false => Err(Error::field(
            path,
            "content",
            "is a pipe or device, not a file",
        )),
    }
}

/// The text of a file, without a byte order mark.
///
/// # Errors
///
/// Those of [`read`], and [`Error::Field`] for files of another kind and bytes that are not UTF-8.
pub(crate) fn text(path: &Path) -> Result<String, Error> {
    let bytes = read(path)?;
    as_text(&bytes, path).map(String::from)
}

/// As [`text`], of the bytes of `path`.
pub(crate) fn as_text<'a>(bytes: &'a [u8], path: &Path) -> Result<&'a str, Error> {
    if let Some(kind) = kind_of(bytes) {
        return Err(Error::field(path, "content", format!("is {kind}")));
    }
    // It says nothing in UTF-8.
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    std::str::from_utf8(bytes).map_err(|error| {
        let before = &bytes[..error.valid_up_to()];
        let line = 1 + before.iter().filter(|&&byte| byte == b'\n').count();
        Error::field(path, format!("line {line}"), "is not UTF-8 text")
    })
}

/// What a file is that is taken for text or weights, by its first bytes.
pub(crate) fn kind_of(bytes: &[u8]) -> Option<&'static str> {
    const KINDS: [(&[u8], &str); 10] = [
        (b"\x1f\x8b", "a gzip archive; unpack it first"),
        (b"PK\x03\x04", "a zip archive; unpack it first"),
        (b"\x28\xb5\x2f\xfd", "a zstandard archive; unpack it first"),
        (b"BZh", "a bzip2 archive; unpack it first"),
        (b"\xfd7zXZ", "an xz archive; unpack it first"),
        (b"PAR1", "a parquet file"),
        (b"\xff\xfe", "text in UTF-16; convert it to UTF-8"),
        (b"\xfe\xff", "text in UTF-16; convert it to UTF-8"),
        (
            b"version https://git-lfs",
            "a Git LFS pointer; `git lfs pull` brings the file itself",
        ),
        (b"<!DOCTYPE", "a web page; the download has failed"),
    ];
    let found = KINDS.iter().find(|(start, _)| bytes.starts_with(start));
    let found = found.map(|(_, kind)| *kind);
    // Without a mark: every other byte of such text is zero.
    let is_wide = |byte: usize| bytes.len() >= 4 && bytes[byte] == 0 && bytes[byte + 2] == 0;
    let is_text = |byte: usize| bytes[byte].is_ascii_graphic() || bytes[byte].is_ascii_whitespace();
    let wide = (is_wide(0) && is_text(1)) || (is_wide(1) && is_text(0) && is_text(2));
    found.or_else(|| wide.then_some("text in UTF-16; convert it to UTF-8"))
}
/// Writes a file that is complete, or as it was before.
///
/// # Errors
///
/// [`Error::Io`].
pub(crate) fn replace(path: &Path, content: &[u8]) -> Result<(), Error> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(format!(".partial-{}", std::process::id()));
    let partial = PathBuf::from(partial);
    std::fs::write(&partial, content).map_err(Error::io(&partial))?;
    std::fs::rename(&partial, path).map_err(Error::io(path))
}
