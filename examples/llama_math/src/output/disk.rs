//! Operations of the file system on files and folders.

use std::fs::{self, File};
use std::io;
use std::path::Path;

pub(super) fn entries(folder: &Path) -> io::Result<Vec<String>> {
    fs::read_dir(folder)?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect()
}

pub(super) fn copy(from: &Path, to: &Path) -> io::Result<()> {
    if !from.is_dir() {
        return fs::copy(from, to).map(drop);
    }
    fs::create_dir_all(to)?;
    for name in entries(from)? {
        copy(&from.join(&name), &to.join(&name))?;
    }
    Ok(())
}

/// Waits until a file, or the entries of a folder, are on disk.
pub(super) fn sync(path: &Path) -> io::Result<()> {
    match cfg!(unix) || path.is_file() {
        true => File::open(path)?.sync_all(),
        false => Ok(()),
    }
}

/// Waits until everything in a folder is on disk.
pub(super) fn sync_all(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        for name in entries(path)? {
            sync_all(&path.join(name))?;
        }
    }
    sync(path)
}

/// Whether another file system begins at `folder`.
#[cfg(unix)]
pub(super) fn is_mounted(folder: &Path, parent: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let device = |path: &Path| path.metadata().ok().map(|found| found.dev());
    device(folder).is_some_and(|own| Some(own) != device(parent))
}

#[cfg(not(unix))]
pub(super) fn is_mounted(_folder: &Path, _parent: &Path) -> bool {
    false
}

/// Free space on the file system of a folder, in bytes.
#[cfg(unix)]
pub(super) fn room(folder: &Path) -> Option<u64> {
    let found = rustix::fs::statvfs(folder).ok()?;
    Some(found.f_bavail.saturating_mul(found.f_frsize))
}

#[cfg(not(unix))]
pub(super) fn room(_folder: &Path) -> Option<u64> {
    None
}
