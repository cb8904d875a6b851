//! Output folders that are complete or absent.

use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::Error;

/// A folder written beside its final place, and moved there at the end.
///
/// Dropped before [`commit`](Self::commit), it leaves nothing behind.
pub struct Staged {
    staging: TempDir,
    target: PathBuf,
    overwrite: bool,
}

impl Staged {
    /// What [`new`](Self::new) checks, for a run whose output comes much later. Leaves nothing.
    ///
    /// # Errors
    ///
    /// Those of [`new`](Self::new).
    pub fn check(target: &Path, overwrite: bool) -> Result<(), Error> {
        Self::new(target, overwrite).map(drop)
    }

    /// Prepares to write `target`.
    ///
    /// # Errors
    ///
    /// [`Error::Option`] if `target` exists and may not be replaced, [`Error::Io`] if its parent
    /// cannot be written to.
    pub fn new(target: &Path, overwrite: bool) -> Result<Self, Error> {
        let invalid = |reason: String| Error::Option {
            option: "output",
            reason,
        };
        if target.file_name().is_none() {
            return Err(invalid(format!("{} names no folder", target.display())));
        }
        if !overwrite && target.symlink_metadata().is_ok() {
            let reason = format!("{} exists; --overwrite replaces it", target.display());
            return Err(invalid(reason));
        }
        if target.is_file() {
            return Err(invalid(format!("{} is a file", target.display())));
        }
        let parent = match target.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let created = !parent.exists();
        if created {
            std::fs::create_dir_all(parent).map_err(Error::io(parent))?;
        }
        let staging = tempfile::Builder::new()
            .prefix(".llama_math-")
            .tempdir_in(parent)
            .map_err(Error::io(parent))?;
        Ok(Self {
            staging,
            target: target.into(),
            overwrite,
        })
    }

    /// Where to write.
    pub fn path(&self) -> &Path {
        self.staging.path()
    }

    /// Moves the folder to its place.
    ///
    /// # Errors
    ///
    /// [`Error::Io`]; an old folder is then as it was.
    pub fn commit(self) -> Result<(), Error> {
        let Self {
            staging,
            target,
            overwrite,
        } = self;
        let parent = staging
            .path()
            .parent()
            .unwrap_or(Path::new("."))
            .to_path_buf();
        // Temporary folders are private; results need not be.
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            let permissions = std::fs::Permissions::from_mode(0o755);
            std::fs::set_permissions(staging.path(), permissions)
                .map_err(Error::io(staging.path()))?;
        }
        if overwrite && target.exists() {
            let old = tempfile::Builder::new()
                .prefix(".llama_math-old-")
                .tempdir_in(&parent)
                .map_err(Error::io(&parent))?;
            let kept = old.path().join("old");
            std::fs::rename(&target, &kept).map_err(Error::io(&target))?;
            if let Err(error) = std::fs::rename(staging.path(), &target) {
                std::fs::rename(&kept, &target).map_err(Error::io(&target))?;
                return Err(Error::Io {
                    path: target,
                    source: error,
                });
            }
        } else {
            std::fs::rename(staging.path(), &target).map_err(Error::io(&target))?;
        }
        // Nothing is left at its old place to delete.
        let _ = staging.keep();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_complete_or_absent() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("out");
        let entries = || std::fs::read_dir(root.path()).unwrap().count();

        drop(Staged::new(&target, false).unwrap());
        assert_eq!(entries(), 0);

        let staged = Staged::new(&target, false).unwrap();
        std::fs::write(staged.path().join("a"), "1").unwrap();
        staged.commit().unwrap();
        assert!(matches!(
            Staged::new(&target, false),
            Err(Error::Option { .. })
        ));

        let staged = Staged::new(&target, true).unwrap();
        std::fs::write(staged.path().join("b"), "2").unwrap();
        assert!(target.join("a").is_file());
        staged.commit().unwrap();
        assert!(target.join("b").is_file() && !target.join("a").exists());
        assert_eq!(entries(), 1);
    }
}
