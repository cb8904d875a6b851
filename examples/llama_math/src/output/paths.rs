//! Paths in a form that compares.

use std::path::{Component, Path, PathBuf};

/// `path` without `.`, doubled or trailing separators; empty for the working directory.
pub fn normalized(path: &Path) -> PathBuf {
    let parts = path.components();
    parts.filter(|part| *part != Component::CurDir).collect()
}

/// `path` from the root, with all existing links followed.
pub(super) fn absolute(path: &Path) -> PathBuf {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.into());
    let existing = path.ancestors().find_map(|ancestor| {
        let rest = path.strip_prefix(ancestor).ok()?;
        Some(ancestor.canonicalize().ok()?.join(rest))
    });
    existing.unwrap_or(path)
}
