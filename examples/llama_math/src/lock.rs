//! A lock that allows one run at a time in a folder of checkpoints.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Read, Seek, Write};
use std::path::{Path, PathBuf};

use crate::Error;
use crate::console::complain;

const NAME: &str = ".lock";

/// A folder that this process has locked. The system releases the lock when the process ends in any
/// way. Dropping it also removes the folder if it is empty.
#[derive(Debug)]
pub struct Lock {
    folder: PathBuf,
    /// Locked while it is open.
    _file: File,
}

impl Lock {
    /// Locks the folder, and creates it if it is missing.
    ///
    /// # Errors
    ///
    /// [`Error::Option`] with the process that has it, and [`Error::Io`] if it cannot be written to.
    pub fn take(folder: &Path) -> Result<Self, Error> {
        fs::create_dir_all(folder).map_err(Error::io(folder))?;
        let path = folder.join(NAME);
        let mut file = loop {
            let mut options = OpenOptions::new();
            let options = options.read(true).write(true).create(true).truncate(false);
            let mut file = options.open(&path).map_err(Error::io(&path))?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    let mut holder = String::new();
                    let _ = file.read_to_string(&mut holder);
                    let holder = match holder.trim() {
                        "" => "another run",
                        holder => holder,
                    };
                    return Err(Error::Option {
                        option: "checkpoints",
                        reason: format!(
                            "{} is in use by {holder}; wait for that run, or give this one another \
                             --output",
                            folder.display()
                        ),
                    });
                }
                // Some network file systems have no locks. A single run does not need one.
                Err(TryLockError::Error(error)) if error.kind() == ErrorKind::Unsupported => {
                    complain!("{}: the file system has no locks", folder.display());
                }
                Err(TryLockError::Error(source)) => return Err(Error::io(&path)(source)),
            }
            // The previous holder may have removed the file since it was opened.
            if is_same(&file, &path) {
                break file;
            }
            fs::create_dir_all(folder).map_err(Error::io(folder))?;
        };
        let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let host = match host.trim() {
            "" => String::new(),
            host => format!(" on {host}"),
        };
        let holder = format!("process {}{host}\n", std::process::id());
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

/// Whether `path` still is the file that was opened.
#[cfg(unix)]
fn is_same(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let number = |found: fs::Metadata| (found.dev(), found.ino());
    let opened = file.metadata().map(number).ok();
    opened.is_some() && path.metadata().map(number).ok() == opened
}

#[cfg(not(unix))]
fn is_same(_file: &File, path: &Path) -> bool {
    path.exists()
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
