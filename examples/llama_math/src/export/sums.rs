//! The digests of a folder's files, in the format of `sha256sum`.

use std::io::ErrorKind;
use std::path::Path;

use sha2::{Digest, Sha256};

use super::merged::README;
use crate::history::MEASUREMENTS;
use crate::report::REPORT;
use crate::weights::{Source, hexadecimal};
use crate::{Error, files};

/// Name of the file with the digests.
pub(crate) const SUMS: &str = "SHA256SUMS";

/// What is not among the digests: they themselves, the page, which people edit, and what the evaluation
/// completes.
const LEFT_OUT: [&str; 4] = [SUMS, README, REPORT, MEASUREMENTS];

/// Writes the digests of the files of a folder, also in its folders, into `SHA256SUMS`; but for the page,
/// which people edit, and for report and measurements, which are complete after the evaluation.
///
/// # Errors
///
/// [`Error::Io`].
pub fn write_sums(folder: &Path) -> Result<(), Error> {
    let mut lines = Vec::new();
    list(folder, "", &mut lines)?;
    lines.sort();
    let lines: Vec<String> = lines
        .into_iter()
        .map(|name| Ok(format!("{}  {name}\n", digest(&folder.join(&name))?)))
        .collect::<Result<_, Error>>()?;
    let path = folder.join(SUMS);
    std::fs::write(&path, lines.concat()).map_err(Error::io(&path))
}

/// Compares the files of a folder with their digests. Returns their number; `None` for a folder without
/// digests.
pub(super) fn check_sums(folder: &Path) -> Result<Option<usize>, Error> {
    let path = folder.join(SUMS);
    let text = match files::text(&path) {
        Err(Error::Io { source, .. }) if source.kind() == ErrorKind::NotFound => return Ok(None),
        text => text?,
    };
    for (number, line) in text.lines().enumerate() {
        let Some((expected, name)) = line.split_once("  ") else {
            let field = format!("line {}", number + 1);
            return Err(Error::field(&path, field, "is no digest with a file"));
        };
        let file = folder.join(name);
        let found = digest(&file)?;
        if found != expected {
            let reason = format!(
                "is {found}, but the file was written with {expected}; it has changed since"
            );
            return Err(Error::field(&file, "SHA-256", reason));
        }
    }
    Ok(Some(text.lines().count()))
}

fn digest(file: &Path) -> Result<String, Error> {
    let mut hash = Sha256::new();
    Source::File(file.into()).hash(&mut hash)?;
    Ok(hexadecimal(&hash.finalize()))
}

/// Names of all files, from the folder on.
fn list(folder: &Path, prefix: &str, names: &mut Vec<String>) -> Result<(), Error> {
    let entries = std::fs::read_dir(folder).map_err(Error::io(folder))?;
    for entry in entries {
        let entry = entry.map_err(Error::io(folder))?;
        let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
        match entry.path().is_dir() {
            true => list(&entry.path(), &format!("{name}/"), names)?,
            false if LEFT_OUT.contains(&&*name) => {}
            false => names.push(name),
        }
    }
    Ok(())
}
