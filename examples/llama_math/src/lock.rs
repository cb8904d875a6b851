//! One run at a time in a folder of checkpoints.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};

use crate::Error;

const NAME: &str = ".lock";

/// A folder that this process has for itself. The system gives it back when the process ends,
/// however it ends; dropped, it also removes the folder if nothing is in it.
#[derive(Debug)]
pub struct Lock {
    folder: PathBuf,
    /// Locked as long as it is open.
    _file: File,
}

impl Lock {
    /// Takes the folder, and makes it where it is missing.
    ///
    /// # Errors
    ///
    /// [`Error::Option`] with the process that has it, and [`Error::Io`] if it cannot be written to.
    pub fn take(folder: &Path) -> Result<Self, Error> {
        fs::create_dir_all(folder).map_err(Error::io(folder))?;
        let path = folder.join(NAME);
        let mut options = OpenOptions::new();
        let options = options.read(true).write(true).create(true).truncate(false);
        let mut file = options.open(&path).map_err(Error::io(&path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut holder = String::new();
                let _ = file.read_to_string(&mut holder);
                return Err(Error::Option {
                    option: "checkpoints",
                    reason: format!(
                        "{} is in use by {}; wait for that run, or give this one another --output",
                        folder.display(),
                        if holder.is_empty() {
                            "another run"
                        } else {
                            holder.trim()
                        }
                    ),
                });
            }
            Err(TryLockError::Error(source)) => return Err(Error::io(&path)(source)),
        }
        let holder = format!("process {}\n", std::process::id());
        let note = |file: &mut File| {
            file.set_len(0)?;
            file.rewind()?;
            file.write_all(holder.as_bytes())
        };
        note(&mut file).map_err(Error::io(&path))?;
        Ok(Self {
            folder: folder.into(),
            _file: file,
        })
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        let _ = fs::remove_file(self.folder.join(NAME));
        let _ = fs::remove_dir(&self.folder);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_has_one_holder() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("run.checkpoints");
        let lock = Lock::take(&folder).unwrap();
        let error = Lock::take(&folder).unwrap_err().to_string();
        let holder = format!("in use by process {}", std::process::id());
        assert!(error.contains(&holder), "{error}");
        drop(lock);
        assert!(!folder.exists());
        let lock = Lock::take(&folder).unwrap();
        fs::write(folder.join("step"), "").unwrap();
        drop(lock);
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 1);
    }
}
