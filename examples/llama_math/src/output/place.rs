//! The place of an output, and the move of a folder to it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::disk::{entries, is_mounted, sync};
use super::paths::normalized;
use super::record::{RECORD, fill, in_order};
use crate::Error;

/// Endings of the hidden names of a folder that is being written, and of one that is being replaced.
pub(super) const PARTIAL: &str = "partial";
pub(super) const REPLACED: &str = "replaced";
/// The ending for a folder that collects the entries of an output that cannot be renamed, until it
/// has all.
pub(super) const RETIRING: &str = "retiring";

/// The place of an output.
#[derive(Clone, Debug)]
pub(super) struct Place {
    /// The path without links and without redundant parts.
    pub(super) target: PathBuf,
    pub(super) parent: PathBuf,
    /// The last part of the target.
    name: String,
    overwrite: bool,
}

pub(super) fn invalid(reason: String) -> Error {
    Error::Option {
        option: "output",
        reason,
    }
}

impl Place {
    pub(super) fn of(target: &Path, overwrite: bool) -> Result<Self, Error> {
        let target = normalized(target);
        // A link is followed: its target is the output.
        let target = match target.symlink_metadata() {
            Ok(found) if found.is_symlink() => {
                fs::canonicalize(&target).map_err(Error::io(&target))?
            }
            _ => target,
        };
        let Some(name) = target.file_name() else {
            return Err(invalid(format!("{} names no folder", target.display())));
        };
        let name = name.to_string_lossy().into_owned();
        let parent = match target.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        Ok(Self {
            parent: parent.into(),
            name,
            target,
            overwrite,
        })
    }

    /// A hidden name with its output and its content.
    fn hidden(&self, what: &str) -> String {
        format!(".{}.{what}-{}", self.name, std::process::id())
    }

    /// The process that made a hidden folder.
    pub(super) fn maker(&self, name: &str, what: &str) -> Option<u32> {
        let process = name.strip_prefix(&format!(".{}.{what}-", self.name))?;
        process.parse().ok()
    }

    /// Whether the target holds only this program's hidden entries.
    pub(super) fn is_empty(&self) -> io::Result<bool> {
        Ok(entries(&self.target)?
            .iter()
            .all(|name| self.is_hidden(name)))
    }

    fn is_hidden(&self, name: &str) -> bool {
        let all = [PARTIAL, RETIRING, REPLACED];
        all.iter().any(|what| self.maker(name, what).is_some())
    }

    /// Refuses a target that may not be replaced.
    pub(super) fn check(&self) -> Result<(), Error> {
        let target = self.target.display();
        let Ok(found) = self.target.metadata() else {
            return Ok(());
        };
        if !found.is_dir() {
            return Err(invalid(format!("{target} is no folder")));
        }
        if self.is_empty().map_err(Error::io(&self.target))? {
            return Ok(());
        }
        if !self.overwrite {
            return Err(invalid(format!("{target} exists; --overwrite replaces it")));
        }
        match self.target.join(RECORD).is_file() {
            true => Ok(()),
            false => Err(invalid(format!(
                "{target} has no {RECORD}, so that it is no output of an earlier run; --overwrite \
                 replaces nothing else"
            ))),
        }
    }

    /// A new folder to write into: next to the target, or inside it if a folder next to it could
    /// not be renamed to it.
    pub(super) fn stage(&self) -> Result<PathBuf, Error> {
        if !self.parent.exists() {
            fs::create_dir_all(&self.parent).map_err(Error::io(&self.parent))?;
        }
        let name = self.hidden(PARTIAL);
        let (beside, inside) = (self.parent.join(&name), self.target.join(&name));
        if is_mounted(&self.target, &self.parent) {
            fs::create_dir(&inside).map_err(Error::io(&inside))?;
            return Ok(inside);
        }
        match fs::create_dir(&beside) {
            Ok(()) => Ok(beside),
            Err(_) if self.target.is_dir() => {
                fs::create_dir(&inside).map_err(Error::io(&inside))?;
                Ok(inside)
            }
            Err(error) => Err(Error::io(beside)(error)),
        }
    }

    /// Moves `staging` to the place of the target.
    pub(super) fn put(&self, staging: &Path) -> io::Result<()> {
        let target = &self.target;
        if !target.exists() {
            fs::rename(staging, target)?;
            return sync(&self.parent);
        }
        if self.is_empty()? {
            // Left-overs of earlier programs that could not be removed.
            if staging.starts_with(target) || fs::remove_dir(target).is_err() {
                return fill(staging, target);
            }
            fs::rename(staging, target)?;
            return sync(&self.parent);
        }
        if staging.starts_with(target) {
            return self.replace_inside(staging);
        }
        let replaced = self.parent.join(self.hidden(REPLACED));
        // A mount point cannot be renamed, and neither can an entry in a lower layer of an overlay.
        if fs::rename(target, &replaced).is_err() {
            return self.replace_inside(staging);
        }
        if let Err(error) = fs::rename(staging, target) {
            return Err(taken_back(error, &replaced, fs::rename(&replaced, target)));
        }
        sync(&self.parent)?;
        // The new output is complete. A left-over is not a failure.
        let _ = fs::remove_dir_all(&replaced);
        Ok(())
    }

    /// Replaces the entries of the target, which keeps its place.
    fn replace_inside(&self, staging: &Path) -> io::Result<()> {
        let target = &self.target;
        let [retiring, replaced] = [RETIRING, REPLACED].map(|what| target.join(self.hidden(what)));
        fs::create_dir(&retiring)?;
        let old = entries(target)?
            .into_iter()
            .filter(|name| !self.is_hidden(name));
        let retired = in_order(old.collect())
            .iter()
            .rev()
            .try_for_each(|name| fs::rename(target.join(name), retiring.join(name)))
            .and_then(|()| fs::rename(&retiring, &replaced));
        if let Err(error) = retired {
            return Err(taken_back(error, &retiring, fill(&retiring, target)));
        }
        if let Err(error) = fill(staging, target) {
            return Err(taken_back(error, &replaced, fill(&replaced, target)));
        }
        let _ = fs::remove_dir_all(&replaced);
        Ok(())
    }
}

/// An error after which the old output is restored, or is at the place in the message.
fn taken_back(error: io::Error, replaced: &Path, result: io::Result<()>) -> io::Error {
    match result {
        Ok(()) => error,
        Err(again) => {
            let reason = format!(
                "{error}; the old output is in {} ({again})",
                replaced.display()
            );
            io::Error::new(error.kind(), reason)
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::super::record::seal;
    use super::super::staged::Staged;
    use super::*;

    #[test]
    fn what_cannot_be_renamed_is_replaced_inside() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("out");
        let staged = Staged::new(&target, false).unwrap();
        fs::write(staged.path().join("old"), "1").unwrap();
        fs::write(staged.path().join("a"), "1").unwrap();
        staged.commit().unwrap();
        let place = Place::of(&target, true).unwrap();
        let inside = target.join(place.hidden(PARTIAL));
        fs::create_dir(&inside).unwrap();
        fs::create_dir(inside.join("folder")).unwrap();
        fs::write(inside.join("folder").join("b"), "2").unwrap();
        fs::write(inside.join("a"), "2").unwrap();
        seal(&inside, &Value::Null).unwrap();
        place.put(&inside).unwrap();
        let mut names = entries(&target).unwrap();
        names.sort();
        assert_eq!(names, ["a", "folder", RECORD]);
        assert_eq!(fs::read_to_string(target.join("a")).unwrap(), "2");
        // A failure restores the old one.
        let error = place.put(&target.join(".out.partial-0")).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        let mut names = entries(&target).unwrap();
        names.sort();
        assert_eq!(names, ["a", "folder", RECORD]);
    }
}
