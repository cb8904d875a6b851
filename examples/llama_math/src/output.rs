//! Output folders that are complete or absent.
//!
//! A folder is written under a hidden name beside its place, brought to disk, and renamed. Where its
//! place is an empty folder that cannot be replaced, such as a mount point, it is written inside
//! and its files are renamed one by one, `config.json` last.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Component, Path, PathBuf};

use serde_json::{Value, json};

use crate::Error;

/// The file that marks a folder as an output of this program and says what made it.
pub const RECORD: &str = "llama_math.json";

/// A folder on its way to its place.
///
/// Dropped before [`commit`](Self::commit), it leaves nothing behind.
pub struct Staged {
    /// Where to write; `None` once it is committed or kept.
    staging: Option<PathBuf>,
    place: Place,
}

/// Where an output goes.
#[derive(Clone, Debug)]
struct Place {
    /// Without links and without needless parts.
    target: PathBuf,
    parent: PathBuf,
    /// The last part of the target.
    name: String,
    overwrite: bool,
}

/// `path` without `.`, doubled or trailing separators; empty for the working directory.
pub fn normalized(path: &Path) -> PathBuf {
    let parts = path.components();
    parts.filter(|part| *part != Component::CurDir).collect()
}

impl Place {
    fn of(target: &Path, overwrite: bool) -> Result<Self, Error> {
        let target = normalized(target);
        // A link is followed: what it names is the output.
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

    /// A hidden name that says whose it is and what it holds.
    fn hidden(&self, what: &str) -> String {
        format!(".{}.{what}-{}", self.name, std::process::id())
    }

    fn is_hidden(&self, name: &str, what: &str) -> bool {
        name.strip_prefix(&format!(".{}.{what}-", self.name))
            .is_some_and(|process| process.parse::<u32>().is_ok())
    }

    /// Refuses what may not be replaced.
    fn check(&self) -> Result<(), Error> {
        let target = self.target.display();
        let Ok(found) = self.target.metadata() else {
            return Ok(());
        };
        if !found.is_dir() {
            return Err(invalid(format!("{target} is no folder")));
        }
        let names = entries(&self.target)?;
        if names.iter().all(|name| self.is_hidden(name, PARTIAL)) {
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

    /// Deletes what a program that ended early has left, and gives an output that it was about to
    /// replace its name back.
    fn tidy(&self) -> Result<(), Error> {
        for folder in [&self.parent, &self.target] {
            if !folder.is_dir() {
                continue;
            }
            for name in entries(folder)? {
                let left = folder.join(&name);
                if self.is_hidden(&name, PARTIAL) {
                    fs::remove_dir_all(&left).map_err(Error::io(&left))?;
                } else if self.is_hidden(&name, REPLACED) {
                    match self.target.exists() {
                        true => fs::remove_dir_all(&left).map_err(Error::io(&left))?,
                        false => fs::rename(&left, &self.target).map_err(Error::io(&left))?,
                    }
                }
            }
        }
        Ok(())
    }

    /// A fresh folder to write into, beside the target or, where that cannot be, inside.
    fn stage(&self) -> Result<PathBuf, Error> {
        if !self.parent.exists() {
            fs::create_dir_all(&self.parent).map_err(Error::io(&self.parent))?;
        }
        let name = self.hidden(PARTIAL);
        let beside = self.parent.join(&name);
        match fs::create_dir(&beside) {
            Ok(()) => Ok(beside),
            Err(_) if self.target.is_dir() && !self.overwrite => {
                let inside = self.target.join(&name);
                fs::create_dir(&inside).map_err(Error::io(&inside))?;
                Ok(inside)
            }
            Err(error) => Err(Error::io(beside)(error)),
        }
    }
}

/// Endings of the hidden names of a folder that is being written, and of one that is being replaced.
const PARTIAL: &str = "partial";
const REPLACED: &str = "replaced";

fn invalid(reason: String) -> Error {
    Error::Option {
        option: "output",
        reason,
    }
}

fn entries(folder: &Path) -> Result<Vec<String>, Error> {
    let read = || -> std::io::Result<Vec<String>> {
        let name = |entry: std::io::Result<fs::DirEntry>| Ok(entry?.file_name());
        let names = fs::read_dir(folder)?.map(name);
        let names: std::io::Result<Vec<_>> = names.collect();
        Ok(names?
            .into_iter()
            .map(|name| name.to_string_lossy().into_owned())
            .collect())
    };
    read().map_err(Error::io(folder))
}

impl Staged {
    /// What [`new`](Self::new) checks, for a run whose output comes much later. Removes what an
    /// earlier program has left half-written, and leaves nothing itself.
    ///
    /// `kept` are files and folders that the run reads or works in: an output that would replace
    /// or contain one of them is refused.
    ///
    /// # Errors
    ///
    /// Those of [`new`](Self::new), and [`Error::Option`] for an overlap.
    pub fn check(target: &Path, overwrite: bool, kept: &[&Path]) -> Result<(), Error> {
        let place = Place::of(target, overwrite)?;
        let absolute = |path: &Path| {
            let path = std::path::absolute(path).unwrap_or_else(|_| path.into());
            // Links count where they lead, as far as they exist.
            path.canonicalize().unwrap_or(path)
        };
        let own = absolute(&place.target);
        for path in kept {
            if absolute(path).starts_with(&own) {
                let reason = format!("{} contains {}", target.display(), path.display());
                return Err(invalid(reason));
            }
        }
        place.tidy()?;
        Self::new(target, overwrite).map(drop)
    }

    /// Prepares to write `target`. An empty folder is a fine target.
    ///
    /// # Errors
    ///
    /// [`Error::Option`] if `target` exists and may not be replaced: without `overwrite`, or if it is
    /// no earlier output. [`Error::Io`] if its place cannot be written to.
    pub fn new(target: &Path, overwrite: bool) -> Result<Self, Error> {
        let place = Place::of(target, overwrite)?;
        place.check()?;
        let staging = Some(place.stage()?);
        Ok(Self { staging, place })
    }

    /// Where to write.
    pub fn path(&self) -> &Path {
        self.staging.as_deref().expect("neither committed nor kept")
    }

    /// Writes down which program and settings made the output.
    ///
    /// # Errors
    ///
    /// [`Error::Io`].
    pub fn record(&self, settings: Value) -> Result<(), Error> {
        let program = concat!("llama_math ", env!("CARGO_PKG_VERSION"));
        let record = json!({"written_by": program, "settings": settings});
        let path = self.path().join(RECORD);
        fs::write(&path, format!("{record:#}\n")).map_err(Error::io(path))
    }

    /// Brings everything to disk and moves the folder to its place.
    ///
    /// # Errors
    ///
    /// [`Error::NotMoved`], with the folder that holds the files; an old output is then as it was, or
    /// the message says where it is.
    pub fn commit(mut self) -> Result<(), Error> {
        if !self.path().join(RECORD).exists() {
            self.record(Value::Null)?;
        }
        let staging = self.staging.take().expect("committed once");
        let place = &self.place;
        move_to(&staging, place).map_err(|source| Error::NotMoved {
            target: place.target.clone(),
            // It may be there already, and only not be on disk for certain.
            kept: match staging.exists() {
                true => staging,
                false => place.target.clone(),
            },
            source,
        })
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        if let Some(staging) = &self.staging {
            let _ = fs::remove_dir_all(staging);
        }
    }
}

fn move_to(staging: &Path, place: &Place) -> std::io::Result<()> {
    let names = fs::read_dir(staging)?.map(|entry| Ok(entry?.file_name()));
    let mut names: Vec<_> = names.collect::<std::io::Result<_>>()?;
    for name in &names {
        let path = staging.join(name);
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            // Some libraries write private files; the folder has what the user's mask allows.
            let mode = staging.metadata()?.permissions().mode() & 0o666;
            if path.is_file() {
                fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
            }
        }
        sync(&path)?;
    }
    sync(staging)?;
    let target = &place.target;
    let is_empty = |folder: &Path| {
        let names = entries(folder).unwrap_or_default();
        names.iter().all(|name| place.is_hidden(name, PARTIAL))
    };
    if target.is_dir() && is_empty(target) {
        let is_inside = staging.starts_with(target);
        // A mount point refuses to be removed.
        if is_inside || fs::remove_dir(target).is_err() {
            // Readers look for the configuration first.
            names.sort_by_key(|name| name == "config.json");
            for name in &names {
                let (from, to) = (staging.join(name), target.join(name));
                if let Err(error) = fs::rename(&from, &to) {
                    // Another file system is mounted there.
                    match error.kind() {
                        ErrorKind::CrossesDevices => {
                            fs::copy(&from, &to)?;
                            sync(&to)?;
                        }
                        _ => return Err(error),
                    }
                }
            }
            sync(target)?;
            // Empty, or copied.
            let _ = fs::remove_dir_all(staging);
            return Ok(());
        }
        fs::rename(staging, target)?;
        return sync(&place.parent);
    }
    if !target.exists() {
        fs::rename(staging, target)?;
        return sync(&place.parent);
    }
    let replaced = place.parent.join(place.hidden(REPLACED));
    fs::rename(target, &replaced)?;
    if let Err(error) = fs::rename(staging, target) {
        return match fs::rename(&replaced, target) {
            Ok(()) => Err(error),
            Err(again) => {
                let old = replaced.display();
                let reason = format!("{error}; the old output is in {old} ({again})");
                Err(std::io::Error::new(error.kind(), reason))
            }
        };
    }
    sync(&place.parent)?;
    // The new output is there: a left-over is no failure.
    let _ = fs::remove_dir_all(&replaced);
    Ok(())
}

/// Waits until a file, or the entries of a folder, are on disk.
fn sync(path: &Path) -> std::io::Result<()> {
    match cfg!(unix) || path.is_file() {
        true => File::open(path)?.sync_all(),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
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
        // An empty folder is fine, and a link is followed.
        fs::create_dir(path("empty")).unwrap();
        std::os::unix::fs::symlink(path("empty"), path("link")).unwrap();
        let staged = Staged::new(&path("link"), false).unwrap();
        write(&staged, "1");
        staged.commit().unwrap();
        assert!(path("empty").join(RECORD).is_file());
        assert!(path("link").is_symlink());
        // Somebody's checkpoint is not.
        fs::create_dir(path("model")).unwrap();
        fs::write(path("model").join("config.json"), "{}").unwrap();
        let error = Staged::new(&path("model"), true).err().unwrap();
        assert!(error.to_string().contains("no llama_math.json"), "{error}");
        // Nor an output that holds what the run needs.
        for kept in ["empty", "empty/data.jsonl", "empty/not/there/yet"] {
            let kept = path(kept);
            let error = Staged::check(&path("empty"), true, &[&kept]).unwrap_err();
            assert!(error.to_string().contains("contains"), "{error}");
        }
        Staged::check(&path("empty"), true, &[&path("model")]).unwrap();
        Staged::check(&path("model/out"), true, &[&path("model")]).unwrap();
    }

    #[test]
    fn left_overs_are_removed_or_restored() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("out");
        for name in [
            ".out.partial-1",
            ".out.replaced-1",
            ".other.partial-1",
            ".out.partial-x",
        ] {
            fs::create_dir(root.path().join(name)).unwrap();
        }
        fs::write(root.path().join(".out.replaced-1").join("a"), "1").unwrap();
        let error = Staged::check(&target, false, &[]).unwrap_err();
        assert!(error.to_string().contains("exists"), "{error}");
        assert!(target.join("a").is_file());
        let mut names = entries(root.path()).unwrap();
        names.sort();
        assert_eq!(names, [".other.partial-1", ".out.partial-x", "out"]);
    }
}
