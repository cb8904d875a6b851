//! The record that marks a folder as complete: it is written last, and moved last.

use std::fs;
use std::io;
use std::path::Path;

use serde_json::{Value, json};

use super::disk::{copy, entries, sync, sync_all};

/// The file that marks a folder as an output of this program, with the settings that made it.
pub const RECORD: &str = "llama_math.json";

/// Synchronizes a folder to disk and marks it as complete.
pub(super) fn seal(folder: &Path, settings: &Value) -> io::Result<()> {
    for name in entries(folder)? {
        let path = folder.join(name);
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            // Some libraries write private files. The folder gets the permissions of the user's
            // mask.
            let mode = folder.metadata()?.permissions().mode() & 0o666;
            if path.is_file() {
                fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
            }
        }
        sync_all(&path)?;
    }
    let program = concat!("llama_math ", env!("CARGO_PKG_VERSION"));
    let record = json!({"written_by": program, "settings": settings});
    let path = folder.join(RECORD);
    fs::write(&path, format!("{record:#}\n"))?;
    sync(&path)?;
    sync(folder)
}

/// Names in the order in which they become visible: readers look for the configuration, this
/// program for the record.
pub(super) fn in_order(mut names: Vec<String>) -> Vec<String> {
    names.sort_by_key(|name| (name == RECORD, name == "config.json"));
    names
}

/// Moves every entry of one folder into another, the record last, and removes the first.
pub(super) fn fill(from: &Path, target: &Path) -> io::Result<()> {
    for name in in_order(entries(from)?) {
        let (old, new) = (from.join(&name), target.join(&name));
        match fs::rename(&old, &new) {
            Err(error) if error.kind() == io::ErrorKind::CrossesDevices => {
                copy(&old, &new)?;
                sync_all(&new)?;
            }
            result => result?,
        }
    }
    sync(target)?;
    // Empty, or copied.
    let _ = fs::remove_dir_all(from);
    Ok(())
}
