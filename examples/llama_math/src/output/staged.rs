//! A folder that is written next to its place and moved there when it is complete.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::disk::room;
use super::paths::{absolute, normalized};
use super::place::{Place, invalid};
use super::record::seal;
use crate::Error;

/// An unfinished output folder.
///
/// If it is dropped before [`commit`](Self::commit), it leaves nothing behind.
pub struct Staged {
    /// Where to write; `None` once it is committed or kept.
    staging: Option<PathBuf>,
    place: Place,
    settings: Value,
}

impl Staged {
    /// Finishes or removes an earlier program's left-overs of this output.
    ///
    /// # Errors
    ///
    /// [`Error::Io`].
    pub fn tidy(target: &Path) -> Result<(), Error> {
        Place::of(target, false)?.tidy()
    }

    /// Makes the checks of [`new`](Self::new), for a run whose output comes much later. Leaves
    /// nothing behind.
    ///
    /// `kept` are files and folders that the run reads or works in: an output that would replace
    /// or contain one of them is refused.
    ///
    /// # Errors
    ///
    /// Those of [`new`](Self::new), and [`Error::Option`] for an overlap.
    pub fn check(target: &Path, overwrite: bool, kept: &[&Path]) -> Result<(), Error> {
        let place = Place::of(target, overwrite)?;
        let own = absolute(&place.target);
        for path in kept {
            if absolute(path).starts_with(&own) {
                let reason = format!("{} contains {}", target.display(), path.display());
                return Err(invalid(reason));
            }
        }
        Self::new(target, overwrite).map(drop)
    }

    /// Refuses an output for which the file system has no room, if it reports that.
    ///
    /// # Errors
    ///
    /// [`Error::Option`].
    pub fn check_room(target: &Path, size: u64) -> Result<(), Error> {
        let target = absolute(target);
        let existing = target.ancestors().find(|folder| folder.exists());
        match existing.and_then(room) {
            Some(room) if room < size => Err(invalid(format!(
                "takes {} MiB, and the file system of {} has {} MiB left",
                size.div_ceil(1 << 20),
                target.display(),
                room >> 20
            ))),
            _ => Ok(()),
        }
    }

    /// Prepares to write `target`, which may be an empty folder.
    ///
    /// # Errors
    ///
    /// [`Error::Option`] if `target` exists and may not be replaced: without `overwrite`, or if it
    /// is not an earlier output. [`Error::Io`] if its place cannot be written to.
    pub fn new(target: &Path, overwrite: bool) -> Result<Self, Error> {
        let place = Place::of(target, overwrite)?;
        place.check()?;
        Ok(Self {
            staging: Some(place.stage()?),
            place,
            settings: Value::Null,
        })
    }

    /// Adds the settings that made it, for a later reader.
    pub fn with_settings(mut self, settings: Value) -> Self {
        self.settings = settings;
        self
    }

    /// Where to write.
    pub fn path(&self) -> &Path {
        self.staging.as_deref().expect("neither committed nor kept")
    }

    /// Synchronizes everything to disk and moves the folder to its place.
    ///
    /// # Errors
    ///
    /// [`Error::NotMoved`], with the folder that holds the files. An old output is then unchanged,
    /// or the message says where it is.
    pub fn commit(mut self) -> Result<(), Error> {
        let staging = self.staging.take().expect("committed once");
        let place = &self.place;
        let sealed = seal(&staging, &self.settings);
        let moved = sealed.and_then(|()| place.put(&staging));
        moved.map_err(|source| Error::NotMoved {
            target: place.target.clone(),
            // The output may be in its place already, but perhaps not on disk.
            kept: match staging.exists() {
                true => staging,
                false => place.target.clone(),
            },
            source,
        })
    }

    /// Writes the output to another place if its own fails with `source`: to the working directory,
    /// or to the system's folder of temporary files.
    ///
    /// # Errors
    ///
    /// [`Error::NotMoved`] with the folder, or the error if every place fails.
    pub fn rescue(
        target: &Path,
        source: io::Error,
        settings: &Value,
        write: impl Fn(&Path) -> Result<(), Error>,
    ) -> Error {
        let name = normalized(target);
        let name = name.file_name().unwrap_or_default().to_string_lossy();
        let name = format!("{name}.rescued-{}", std::process::id());
        for folder in [PathBuf::from("."), std::env::temp_dir()] {
            let kept = absolute(&folder.join(&name));
            let rescue = || {
                fs::create_dir(&kept).map_err(Error::io(&kept))?;
                write(&kept)?;
                seal(&kept, settings).map_err(Error::io(&kept))
            };
            if rescue().is_ok() {
                return Error::NotMoved {
                    target: target.into(),
                    kept,
                    source,
                };
            }
            let _ = fs::remove_dir_all(&kept);
        }
        Error::io(target)(source)
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        if let Some(staging) = &self.staging {
            let _ = fs::remove_dir_all(staging);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::disk::entries;
    use super::super::record::RECORD;
    use super::*;

    fn write(staged: &Staged, content: &str) {
        fs::write(staged.path().join("a"), content).unwrap();
    }

    #[test]
    fn a_folder_is_complete_or_absent() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("out");
        let names = || entries(root.path()).unwrap();

        drop(Staged::new(&target, false).unwrap());
        assert!(names().is_empty());

        let staged = Staged::new(&target, false).unwrap();
        write(&staged, "1");
        staged.commit().unwrap();
        assert!(matches!(
            Staged::new(&target, false),
            Err(Error::Option { .. })
        ));

        let staged = Staged::new(&target.join("."), true).unwrap();
        write(&staged, "2");
        fs::write(staged.path().join("b"), "2").unwrap();
        assert_eq!(fs::read_to_string(target.join("a")).unwrap(), "1");
        staged.commit().unwrap();
        assert_eq!(fs::read_to_string(target.join("a")).unwrap(), "2");
        assert!(target.join("b").is_file());
        assert_eq!(names(), ["out"]);
    }

    #[test]
    fn only_an_earlier_output_is_replaced() {
        let root = tempfile::tempdir().unwrap();
        let path = |name: &str| root.path().join(name);
        // An empty folder is allowed, and a link is followed.
        fs::create_dir(path("empty")).unwrap();
        std::os::unix::fs::symlink(path("empty"), path("link")).unwrap();
        let staged = Staged::new(&path("link"), false).unwrap();
        write(&staged, "1");
        staged.commit().unwrap();
        assert!(path("empty").join(RECORD).is_file());
        assert!(path("link").is_symlink());
        // Somebody's checkpoint is refused.
        fs::create_dir(path("model")).unwrap();
        fs::write(path("model").join("config.json"), "{}").unwrap();
        let error = Staged::new(&path("model"), true).err().unwrap();
        assert!(error.to_string().contains("no llama_math.json"), "{error}");
        // So is an output that holds something that the run needs.
        for kept in ["empty", "empty/data.jsonl", "empty/not/there/yet"] {
            let kept = path(kept);
            let error = Staged::check(&path("empty"), true, &[&kept]).unwrap_err();
            assert!(error.to_string().contains("contains"), "{error}");
        }
        Staged::check(&path("empty"), true, &[&path("model")]).unwrap();
        Staged::check(&path("model/out"), true, &[&path("model")]).unwrap();
    }

    #[test]
    fn overlaps_are_seen_through_links() {
        let root = tempfile::tempdir().unwrap();
        let path = |name: &str| root.path().join(name);
        fs::create_dir(path("real")).unwrap();
        std::os::unix::fs::symlink(path("real"), path("link")).unwrap();
        let (output, inside) = (path("real/out"), path("link/out/checkpoints"));
        let error = Staged::check(&output, false, &[&inside]).unwrap_err();
        assert!(error.to_string().contains("contains"), "{error}");
    }

    #[test]
    fn an_output_without_room_is_refused_and_one_without_a_place_written_elsewhere() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("out");
        Staged::check_room(&target, 1).unwrap();
        let error = Staged::check_room(&target, u64::MAX).unwrap_err();
        assert!(error.to_string().contains("MiB left"), "{error}");

        let failure = || io::Error::from(io::ErrorKind::StorageFull);
        let write = |folder: &Path| {
            // Only the second place works.
            match folder.starts_with(std::env::temp_dir()) {
                true => fs::write(folder.join("a"), "1").map_err(Error::io(folder)),
                false => Err(Error::io(folder)(failure())),
            }
        };
        let error = Staged::rescue(&target, failure(), &Value::Null, write);
        let Error::NotMoved { kept, .. } = error else {
            panic!("{error}");
        };
        assert!(kept.join("a").is_file() && kept.join(RECORD).is_file());
        fs::remove_dir_all(kept).unwrap();
        let write = |folder: &Path| Err(Error::io(folder)(failure()));
        let error = Staged::rescue(&target, failure(), &Value::Null, write);
        assert!(matches!(error, Error::Io { .. }), "{error}");
    }
}
