//! Output folders that are complete or absent.
//!
//! A folder is written under a hidden name beside its place, brought to disk, and renamed. Where that
//! cannot work, as with a mount point, it is written inside its place and its entries are moved one by
//! one. [`RECORD`] is written last and moved last: a hidden folder that holds it is complete, and the
//! next run finishes what a killed one has begun.

use std::fs::{self, File};
use std::io;
use std::path::{Component, Path, PathBuf};

use serde_json::{Value, json};

use crate::Error;
use crate::console::{complain, say};

/// The file that marks a folder as an output of this program and says what made it.
pub const RECORD: &str = "llama_math.json";

/// Endings of the hidden names of a folder that is being written, and of one that is being replaced.
const PARTIAL: &str = "partial";
const REPLACED: &str = "replaced";
/// The same of one that gets the entries of an output that stays where it is, until it has all.
const RETIRING: &str = "retiring";

/// A folder on its way to its place.
///
/// Dropped before [`commit`](Self::commit), it leaves nothing behind.
pub struct Staged {
    /// Where to write; `None` once it is committed or kept.
    staging: Option<PathBuf>,
    place: Place,
    settings: Value,
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

/// `path` from the root, links followed as far as they exist.
fn absolute(path: &Path) -> PathBuf {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.into());
    let existing = path.ancestors().find_map(|ancestor| {
        let rest = path.strip_prefix(ancestor).ok()?;
        Some(ancestor.canonicalize().ok()?.join(rest))
    });
    existing.unwrap_or(path)
}

fn invalid(reason: String) -> Error {
    Error::Option {
        option: "output",
        reason,
    }
}

fn entries(folder: &Path) -> io::Result<Vec<String>> {
    fs::read_dir(folder)?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect()
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

    /// The process that made a hidden folder.
    fn maker(&self, name: &str, what: &str) -> Option<u32> {
        let process = name.strip_prefix(&format!(".{}.{what}-", self.name))?;
        process.parse().ok()
    }

    /// Whether nothing is in the target but what this program hides there.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(entries(&self.target)?
            .iter()
            .all(|name| self.is_hidden(name)))
    }

    fn is_hidden(&self, name: &str) -> bool {
        let all = [PARTIAL, RETIRING, REPLACED];
        all.iter().any(|what| self.maker(name, what).is_some())
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

    /// Finishes what a program that ended early has begun, or takes it back.
    fn tidy(&self) -> Result<(), Error> {
        for folder in [&self.parent, &self.target] {
            let Ok(names) = entries(folder) else {
                continue;
            };
            // What is complete first: it decides about what it was to replace.
            for what in [RETIRING, PARTIAL, REPLACED] {
                for name in &names {
                    match self.maker(name, what) {
                        // At work right now.
                        Some(process) if is_alive(process) => {}
                        Some(_) => self
                            .tidy_one(&folder.join(name), what)
                            .map_err(Error::io(folder.join(name)))?,
                        None => {}
                    }
                }
            }
        }
        Ok(())
    }

    fn tidy_one(&self, left: &Path, what: &str) -> io::Result<()> {
        let target = &self.target;
        let is_inside = left.starts_with(target);
        let is_there = target.join(RECORD).is_file();
        if what == RETIRING {
            return fill(left, target);
        }
        if what == REPLACED {
            return match (is_there, target.exists()) {
                (true, _) => fs::remove_dir_all(left),
                (false, false) => fs::rename(left, target),
                (false, true) => fill(left, target),
            };
        }
        if !left.join(RECORD).is_file() {
            return fs::remove_dir_all(left);
        }
        if !target.exists() {
            fs::rename(left, target)?;
        } else if !is_there && (is_inside || self.is_empty()?) {
            fill(left, target)?;
        } else {
            complain!(
                "a complete output of an earlier run is in {}; move or delete it",
                left.display()
            );
            return Ok(());
        }
        say!(
            "recovered: {}, which an earlier run has written",
            target.display()
        );
        Ok(())
    }

    /// A fresh folder to write into: beside the target, or inside where it could not be renamed from
    /// there.
    fn stage(&self) -> Result<PathBuf, Error> {
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

    /// Gives `staging` the place of the target.
    fn put(&self, staging: &Path) -> io::Result<()> {
        let target = &self.target;
        if !target.exists() {
            fs::rename(staging, target)?;
            return sync(&self.parent);
        }
        if self.is_empty()? {
            // Those of earlier programs that could not be removed.
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
        // A mount point cannot be renamed, nor can what a lower layer of an overlay holds.
        if fs::rename(target, &replaced).is_err() {
            return self.replace_inside(staging);
        }
        if let Err(error) = fs::rename(staging, target) {
            return Err(taken_back(error, &replaced, fs::rename(&replaced, target)));
        }
        sync(&self.parent)?;
        // The new output is there: a left-over is no failure.
        let _ = fs::remove_dir_all(&replaced);
        Ok(())
    }

    /// Replaces the entries of the target, which stays where it is.
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

/// An error after which the old output is back, or lies where the message says.
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

/// Whether another file system begins at `folder`.
#[cfg(unix)]
fn is_mounted(folder: &Path, parent: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let device = |path: &Path| path.metadata().ok().map(|found| found.dev());
    device(folder).is_some_and(|own| Some(own) != device(parent))
}

#[cfg(not(unix))]
fn is_mounted(_folder: &Path, _parent: &Path) -> bool {
    false
}

/// Whether a process is there, where the system tells, and is not this one.
fn is_alive(process: u32) -> bool {
    process != std::process::id() && Path::new("/proc").join(process.to_string()).exists()
}

/// Names in the order in which they become visible: readers look for the configuration, and this
/// program for the record.
fn in_order(mut names: Vec<String>) -> Vec<String> {
    names.sort_by_key(|name| (name == RECORD, name == "config.json"));
    names
}

/// Moves every entry of one folder into another, the record last, and removes the first.
fn fill(from: &Path, target: &Path) -> io::Result<()> {
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

fn copy(from: &Path, to: &Path) -> io::Result<()> {
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
fn sync(path: &Path) -> io::Result<()> {
    match cfg!(unix) || path.is_file() {
        true => File::open(path)?.sync_all(),
        false => Ok(()),
    }
}

/// Waits until everything in a folder is on disk.
fn sync_all(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        for name in entries(path)? {
            sync_all(&path.join(name))?;
        }
    }
    sync(path)
}

/// Brings a folder to disk and marks it as complete.
fn seal(folder: &Path, settings: &Value) -> io::Result<()> {
    for name in entries(folder)? {
        let path = folder.join(name);
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            // Some libraries write private files; the folder has what the user's mask allows.
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

impl Staged {
    /// Finishes or removes what an earlier program has left of this output.
    ///
    /// # Errors
    ///
    /// [`Error::Io`].
    pub fn tidy(target: &Path) -> Result<(), Error> {
        Place::of(target, false)?.tidy()
    }

    /// What [`new`](Self::new) checks, for a run whose output comes much later. Leaves nothing.
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

    /// Refuses an output for which the file system has no room now, where it tells.
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

    /// Prepares to write `target`. An empty folder is a fine target.
    ///
    /// # Errors
    ///
    /// [`Error::Option`] if `target` exists and may not be replaced: without `overwrite`, or if it is
    /// no earlier output. [`Error::Io`] if its place cannot be written to.
    pub fn new(target: &Path, overwrite: bool) -> Result<Self, Error> {
        let place = Place::of(target, overwrite)?;
        place.check()?;
        Ok(Self {
            staging: Some(place.stage()?),
            place,
            settings: Value::Null,
        })
    }

    /// With the settings that made it, for whoever looks at it later.
    pub fn with_settings(mut self, settings: Value) -> Self {
        self.settings = settings;
        self
    }

    /// Where to write.
    pub fn path(&self) -> &Path {
        self.staging.as_deref().expect("neither committed nor kept")
    }

    /// Brings everything to disk and moves the folder to its place.
    ///
    /// # Errors
    ///
    /// [`Error::NotMoved`], with the folder that holds the files; an old output is then as it was, or
    /// the message says where it is.
    pub fn commit(mut self) -> Result<(), Error> {
        let staging = self.staging.take().expect("committed once");
        let place = &self.place;
        let sealed = seal(&staging, &self.settings);
        let moved = sealed.and_then(|()| place.put(&staging));
        moved.map_err(|source| Error::NotMoved {
            target: place.target.clone(),
            // It may be there already, and only not be on disk for certain.
            kept: match staging.exists() {
                true => staging,
                false => place.target.clone(),
            },
            source,
        })
    }

    /// Writes the output elsewhere, when its place fails with `source`: into the working directory, or
    /// into the system's folder of temporary files.
    ///
    /// # Errors
    ///
    /// [`Error::NotMoved`] with the folder, or what else went wrong everywhere.
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

/// What is free on the file system of a folder, in bytes.
#[cfg(unix)]
fn room(folder: &Path) -> Option<u64> {
    let found = rustix::fs::statvfs(folder).ok()?;
    Some(found.f_bavail.saturating_mul(found.f_frsize))
}

#[cfg(not(unix))]
fn room(_folder: &Path) -> Option<u64> {
    None
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

    /// Above every process number.
    const GONE: u32 = 4_200_000_000;

    #[test]
    fn left_overs_are_finished_restored_or_removed() {
        let make = |folder: PathBuf, names: &[&str]| {
            fs::create_dir_all(&folder).unwrap();
            for name in names {
                fs::write(folder.join(name), folder.to_str().unwrap()).unwrap();
            }
        };
        // What a killed program has left beside the output, and whose file is in the output then.
        for (left, expected) in [
            (&["partial"][..], None),
            (&["replaced"], Some("replaced")),
            (&["partial", "replaced"], Some("replaced")),
            (&["partial+"], Some("partial")),
            (&["partial+", "replaced"], Some("partial")),
            (&["partial+", "retiring"], Some("retiring")),
        ] {
            for inside in [false, true] {
                if !inside && left.contains(&RETIRING) {
                    continue;
                }
                let root = tempfile::tempdir().unwrap();
                let target = root.path().join("out");
                let folder = match inside {
                    true => &target,
                    false => root.path(),
                };
                fs::create_dir_all(folder).unwrap();
                for what in left {
                    let name = what.trim_end_matches('+');
                    let complete = what.ends_with('+') || name != PARTIAL;
                    let names: &[&str] = if complete { &["a", RECORD] } else { &["a"] };
                    make(folder.join(format!(".out.{name}-{GONE}")), names);
                }
                for other in [".other.partial-1", ".out.partial-x", ".out.partial-1"] {
                    make(root.path().join(other), &["a"]);
                }
                Staged::tidy(&target).unwrap();
                let found = fs::read_to_string(target.join("a")).ok();
                let case = format!("{left:?} inside {inside}");
                assert_eq!(found.is_some(), expected.is_some(), "{case}");
                if let (Some(found), Some(expected)) = (found, expected) {
                    assert!(found.contains(expected), "{case}: {found}");
                    assert!(target.join(RECORD).is_file(), "{case}");
                }
                let hidden = |folder: &Path| {
                    let mut names = entries(folder).unwrap_or_default();
                    names.retain(|name| name.starts_with('.'));
                    names.sort();
                    names
                };
                // Somebody else's, and one of a process that is there.
                let others = [".other.partial-1", ".out.partial-1", ".out.partial-x"];
                assert_eq!(hidden(root.path()), others, "{case}");
                // The old output is back, and the new one has no place.
                let stays = usize::from(left.contains(&RETIRING));
                assert_eq!(hidden(&target).len(), stays, "{case}");
            }
        }
    }

    #[test]
    fn a_complete_output_without_a_place_is_left_alone() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("out");
        let left = root.path().join(format!(".out.partial-{GONE}"));
        for folder in [&target, &left] {
            fs::create_dir(folder).unwrap();
            fs::write(folder.join(RECORD), folder.to_str().unwrap()).unwrap();
        }
        Staged::tidy(&target).unwrap();
        assert!(left.join(RECORD).is_file());
        let record = fs::read_to_string(target.join(RECORD)).unwrap();
        assert_eq!(record, target.to_str().unwrap());
    }

    #[test]
    fn what_cannot_be_renamed_is_replaced_inside() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("out");
        let staged = Staged::new(&target, false).unwrap();
        fs::write(staged.path().join("old"), "1").unwrap();
        write(&staged, "1");
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
        // A failure puts the old one back.
        let error = place.put(&target.join(".out.partial-0")).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        let mut names = entries(&target).unwrap();
        names.sort();
        assert_eq!(names, ["a", "folder", RECORD]);
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
