//! Where this user keeps what a later run need not compute again.

use std::path::PathBuf;

/// The folder `llama_math` in `XDG_CACHE_HOME` or in `~/.cache`; none where neither is set.
pub fn folder() -> Option<PathBuf> {
    let folder = |variable, below: &str| {
        let folder = std::env::var_os(variable).map(PathBuf::from);
        let folder = folder.filter(|folder| folder.is_absolute());
        folder.map(|folder| folder.join(below).join("llama_math"))
    };
    folder("XDG_CACHE_HOME", "").or_else(|| folder("HOME", ".cache"))
}
