//! The folder of a run's checkpoints: writing, finding and removing them.

use std::collections::BTreeMap;
use std::collections::hash_map::RandomState;
use std::fs::{File, TryLockError};
use std::hash::BuildHasher;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use burn::module::Module;
use burn::tensor::Bytes;
use hd_pissa_comm::{CommError, Communicator, all_or_none};
use serde_json::Value;

use super::manifest::{MANIFEST, Manifest, SUMS};
use super::parameters::Parameters;
use super::saved::{Checkpoint, MODEL, OPTIMIZER, frames_file, moments_file};
use super::states::States;
use super::{CheckpointError, files};

const PREFIX: &str = "step-";
/// Ending of the hidden name of a checkpoint that is being replaced.
const REPLACED: &str = "old";
/// Ending of the hidden name of a checkpoint that is being written; a number follows.
const PARTIAL: &str = "partial";
/// Ending of the hidden name of a folder that is being deleted; a number follows.
const DISCARDED: &str = "discarded";

/// The content of a checkpoint.
#[derive(Clone, Debug)]
pub struct Snapshot<'a, M> {
    /// Number of steps taken.
    pub step: u64,
    /// The model, with its adapters.
    pub model: &'a M,
    /// The state of the optimizer:
    /// [`HdPissaOptimizerRecord::into_bytes`](crate::HdPissaOptimizerRecord::into_bytes) or
    /// [`ModuleOptimizer::into_bytes`](burn::optim::ModuleOptimizer::into_bytes).
    pub optimizer: Bytes,
    /// The settings that a resumed run must share; see [`Checkpoint::check_settings`]. They are
    /// text, so they compare exactly.
    pub settings: BTreeMap<String, String>,
    /// Other data that the run needs to continue: its place in the data, seeds, times. Worker 0
    /// saves it.
    pub progress: Value,
    /// Further files by name. Worker 0 saves them unchanged.
    pub attachments: BTreeMap<String, Vec<u8>>,
}

impl<'a, M> Snapshot<'a, M> {
    /// A snapshot after `step` steps, without settings, progress and attachments.
    pub fn new(step: u64, model: &'a M, optimizer: Bytes) -> Self {
        Self {
            step,
            model,
            optimizer,
            settings: BTreeMap::new(),
            progress: Value::Null,
            attachments: BTreeMap::new(),
        }
    }
}

/// A folder of checkpoints of one run.
#[derive(Clone, Debug)]
pub struct Checkpoints {
    folder: PathBuf,
    keep_last: usize,
}

/// The newest checkpoint that can be used.
#[derive(Clone, Debug)]
pub struct Found {
    /// `None` if no checkpoint can be used.
    pub checkpoint: Option<Checkpoint>,
    /// Why newer checkpoints cannot be used, the newest first.
    pub damaged: Vec<CheckpointError>,
    /// Their folders.
    damaged_folders: Vec<PathBuf>,
}

impl Checkpoints {
    /// Checkpoints in `folder`, which may not exist yet. This reads and writes nothing.
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Self {
            folder: folder.into(),
            keep_last: usize::MAX,
        }
    }

    /// Keeps the `count` newest checkpoints instead of all.
    ///
    /// # Panics
    ///
    /// If `count` is 0.
    pub fn with_keep_last(mut self, count: usize) -> Self {
        assert!(count > 0, "the newest checkpoint is always kept");
        self.keep_last = count;
        self
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Steps of the existing checkpoints, ascending; empty if the folder does not exist.
    ///
    /// # Errors
    ///
    /// [`CheckpointError::Io`] if the folder cannot be read.
    pub fn steps(&self) -> Result<Vec<u64>, CheckpointError> {
        let names = self.names()?;
        let step = |name: &String| {
            let own = || name.strip_prefix(PREFIX)?.parse().ok();
            let step = replaced_step(name).or_else(own)?;
            // A folder that somebody else called `step-1` is not ours.
            let names = [self.path(step), self.hidden(step, REPLACED)];
            let is_ours = names.contains(&self.folder.join(name));
            (is_ours && self.folder.join(name).is_dir()).then_some(step)
        };
        let mut steps: Vec<u64> = names.iter().filter_map(step).collect();
        steps.sort_unstable();
        steps.dedup();
        Ok(steps)
    }

    fn names(&self) -> Result<Vec<String>, CheckpointError> {
        let io = |error| CheckpointError::io(&self.folder, error);
        let entries = match std::fs::read_dir(&self.folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(io(error)),
        };
        let name = |entry: std::io::Result<std::fs::DirEntry>| {
            let name = entry.map_err(io)?.file_name();
            Ok(name.to_string_lossy().into_owned())
        };
        entries.map(name).collect()
    }

    fn path(&self, step: u64) -> PathBuf {
        self.folder.join(format!("{PREFIX}{step:09}"))
    }

    /// A hidden folder next to the checkpoint.
    fn hidden(&self, step: u64, what: &str) -> PathBuf {
        self.folder.join(format!(".{PREFIX}{step:09}.{what}"))
    }

    /// The place of the checkpoint of `step`. A program that ends while it replaces a checkpoint
    /// leaves the old one complete, under a hidden name.
    fn located(&self, step: u64) -> PathBuf {
        let (path, old) = (self.path(step), self.hidden(step, REPLACED));
        match !path.exists() && old.exists() {
            true => old,
            false => path,
        }
    }

    /// Deletes what interrupted programs have left, and restores the names of checkpoints that they
    /// were replacing. A draft that a program is writing stays.
    ///
    /// # Errors
    ///
    /// The first error; it continues with the other folders.
    fn tidy(&self) -> Result<(), CheckpointError> {
        let is_left = |name: &String| is_hidden(name) && self.folder.join(name).is_dir();
        let tidy = |name: String| {
            let hidden = self.folder.join(&name);
            match replaced_step(&name).map(|step| self.path(step)) {
                Some(path) if !path.exists() => rename(&hidden, &path),
                _ => match locked(&hidden) {
                    Err(TryLockError::WouldBlock) => Ok(()),
                    _lock => self.remove(&hidden),
                },
            }
        };
        let left = self.names()?.into_iter().filter(is_left);
        left.map(tidy).fold(Ok(()), Result::and)
    }

    /// The newest checkpoint whose files are all unchanged.
    ///
    /// # Errors
    ///
    /// [`CheckpointError::Io`] if the folder cannot be read. Damaged checkpoints are not errors
    /// here: see [`Found::damaged`].
    pub fn latest(&self) -> Result<Found, CheckpointError> {
        let mut found = Found {
            checkpoint: None,
            damaged: Vec::new(),
            damaged_folders: Vec::new(),
        };
        for step in self.steps()?.into_iter().rev() {
            match Checkpoint::open(self.located(step)) {
                Ok(checkpoint) => {
                    found.checkpoint = Some(checkpoint);
                    break;
                }
                Err(error) => {
                    found.damaged.push(error);
                    found.damaged_folders.push(self.located(step));
                }
            }
        }
        Ok(found)
    }

    /// Renames the damaged checkpoints of `found` to names that start with `damaged-`. A run that
    /// continues from an earlier checkpoint then does not count them among the newest.
    ///
    /// # Errors
    ///
    /// [`CheckpointError::Io`].
    pub fn set_aside(&self, found: &Found) -> Result<(), CheckpointError> {
        for path in &found.damaged_folders {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let aside = self.folder.join(format!("damaged-{name}"));
            self.remove(&aside)?;
            rename(path, &aside)?;
        }
        Ok(())
    }

    /// Writes a checkpoint. Every worker calls it with the same step; each writes the files of its
    /// shards, worker 0 everything else. Returns when it is on disk, with its folder.
    ///
    /// Reads one tensor at a time from the device.
    ///
    /// # Errors
    ///
    /// [`CheckpointError::Io`] with the file or folder, on the worker where it failed, and
    /// [`CheckpointError::OtherWorker`] on the others; the earlier checkpoints are then unchanged.
    /// [`CheckpointError::InvalidState`] if [`Snapshot::optimizer`] is not a record.
    ///
    /// # Panics
    ///
    /// If the name of an attachment is not a file name, or is the name of one of the checkpoint's
    /// own files.
    pub fn save<M: Module>(
        &self,
        snapshot: &Snapshot<'_, M>,
        communicator: &dyn Communicator,
    ) -> Result<PathBuf, CheckpointError> {
        let together = |own| all_or_none(communicator, own).map_err(CheckpointError::from);
        let is_first = communicator.worker_index() == 0;
        let number = number_of_first(communicator)?;
        let draft = self.hidden(snapshot.step, &format!("{PARTIAL}-{number:06x}"));
        let path = self.path(snapshot.step);
        let mut lock = None;
        let begun = match is_first {
            true => self.begin(&draft).map(|held| lock = held),
            false => Ok(()),
        };
        let finish = || match is_first {
            true => self.finish(snapshot, &draft, &path),
            false => Ok(()),
        };
        let written = together(begun)
            .and_then(|()| together(write_parts(snapshot, communicator, &draft)))
            .and_then(|()| together(finish()));
        drop(lock);
        if written.is_err() && is_first {
            // Report the first failure, not a failure to clean up after it.
            let _ = self.remove(&draft);
        }
        written.map(|()| path)
    }

    /// Makes the folder of a draft. Other programs leave it alone while the returned lock is held;
    /// some file systems have none.
    fn begin(&self, draft: &Path) -> Result<Option<File>, CheckpointError> {
        std::fs::create_dir_all(&self.folder)
            .map_err(|error| CheckpointError::io(&self.folder, error))?;
        // A left-over folder does not end the run.
        if let Err(error) = self.tidy() {
            log::warn!("a left-over is not removed: {error}");
        }
        std::fs::create_dir(draft).map_err(|error| CheckpointError::io(draft, error))?;
        Ok(locked(draft).ok())
    }

    fn finish<M: Module>(
        &self,
        snapshot: &Snapshot<'_, M>,
        draft: &Path,
        path: &Path,
    ) -> Result<(), CheckpointError> {
        let adapters = Parameters::of(snapshot.model);
        let settings = snapshot.settings.clone();
        let progress = snapshot.progress.clone();
        let shards = adapters.shards;
        let of_shard = |shard| [frames_file(shard, shards), moments_file(shard, shards)];
        let own = [MODEL, OPTIMIZER].map(String::from);
        let files = own.into_iter().chain((0..shards).flat_map(of_shard));
        let files = files.chain(snapshot.attachments.keys().cloned());
        Manifest::new(snapshot.step, &adapters, settings, progress).write(draft, files)?;
        files::sync_folder(draft)?;
        if path.exists() {
            // A resumed run saves the same step again. If the program ends at any moment, one of
            // the two can be found.
            let old = self.hidden(snapshot.step, REPLACED);
            rename(path, &old)?;
            if let Err(error) = rename(draft, path) {
                rename(&old, path)?;
                return Err(error);
            }
            files::sync_folder(&self.folder)?;
            if let Err(error) = self.remove(&old) {
                log::warn!("a replaced checkpoint is not removed: {error}");
            }
        } else {
            rename(draft, path)?;
            files::sync_folder(&self.folder)?;
        }
        // The new checkpoint is complete. An old one that stays does not end the run.
        if let Err(error) = self.prune(snapshot.step) {
            log::warn!("an old checkpoint is not removed: {error}");
        }
        Ok(())
    }

    /// Removes all but the newest of the checkpoints up to `step`. A run that resumed from an
    /// earlier checkpoint must not lose the one it has just written.
    fn prune(&self, step: u64) -> Result<(), CheckpointError> {
        let steps = self.steps()?;
        let old = steps.into_iter().filter(|&other| other <= step).rev();
        let old = old.skip(self.keep_last);
        old.map(|step| self.discard(step)).fold(Ok(()), Result::and)
    }

    fn discard(&self, step: u64) -> Result<(), CheckpointError> {
        self.remove(&self.located(step))?;
        self.remove(&self.hidden(step, REPLACED))
    }

    /// Deletes a folder of this folder if it exists.
    ///
    /// It first takes a name that only this call knows. A program that is still writing it, or is
    /// about to give it the name of a checkpoint, then finds nothing under the old name. So a
    /// checkpoint never loses its files one by one.
    fn remove(&self, path: &Path) -> Result<(), CheckpointError> {
        let discarded = format!(".{PREFIX}{DISCARDED}-{:06x}", random_number());
        let discarded = self.folder.join(discarded);
        match std::fs::rename(path, &discarded) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            renamed => renamed.map_err(|error| CheckpointError::io(path, error))?,
        }
        match std::fs::remove_dir_all(&discarded) {
            // Another program may tidy at the same time.
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(CheckpointError::io(&discarded, error))
            }
            _ => Ok(()),
        }
    }

    /// Deletes every checkpoint, and the folder if nothing else is in it.
    ///
    /// # Errors
    ///
    /// [`CheckpointError::Io`].
    pub fn discard_all(&self) -> Result<(), CheckpointError> {
        for step in self.steps()? {
            self.discard(step)?;
        }
        self.tidy()?;
        // Fails if the folder has other files, which are not ours.
        let _ = std::fs::remove_dir(&self.folder);
        Ok(())
    }
}

/// Whether a folder of this name is one of ours that is not a checkpoint.
fn is_hidden(name: &str) -> bool {
    let is_digit = |character: char| character.is_ascii_digit();
    name.strip_prefix('.')
        .and_then(|name| name.strip_prefix(PREFIX))
        .map(|name| name.trim_start_matches(is_digit).trim_start_matches('.'))
        .is_some_and(|what| {
            [REPLACED, PARTIAL, DISCARDED]
                .iter()
                .any(|it| what.starts_with(it))
        })
}

/// The step of a checkpoint that was being replaced, by the name of its folder.
fn replaced_step(name: &str) -> Option<u64> {
    let name = name.strip_prefix('.')?.strip_prefix(PREFIX)?;
    name.strip_suffix(REPLACED)?.strip_suffix('.')?.parse().ok()
}

fn write_parts<M: Module>(
    snapshot: &Snapshot<'_, M>,
    communicator: &dyn Communicator,
    folder: &Path,
) -> Result<(), CheckpointError> {
    let parameters = Parameters::of(snapshot.model);
    let mut states = States::split(snapshot.optimizer.clone(), &parameters.shard_of())?;
    for shard in parameters.hosted(communicator) {
        let file = |name: fn(usize, usize) -> String| folder.join(name(shard, parameters.shards));
        parameters.write(Some(shard), &file(frames_file))?;
        states.write(Some(shard), &file(moments_file))?;
    }
    if communicator.worker_index() == 0 {
        parameters.write(None, &folder.join(MODEL))?;
        states.write(None, &folder.join(OPTIMIZER))?;
        for (name, content) in &snapshot.attachments {
            let path = folder.join(name);
            let is_plain = Path::new(name).file_name() == Some(name.as_ref());
            let is_own = path.exists() || [MANIFEST, SUMS].contains(&name.as_str());
            assert!(
                is_plain && !is_own,
                "`{name}` cannot be the name of an attachment"
            );
            files::write(&path, content)?;
        }
    }
    Ok(())
}

/// A number of 24 bits that worker 0 draws.
fn number_of_first(communicator: &dyn Communicator) -> Result<u32, CommError> {
    let received = communicator.broadcast_bytes(&random_number().to_le_bytes(), 0)?;
    let number = received.first_chunk().expect("worker 0 sends four bytes");
    Ok(u32::from_le_bytes(*number))
}

/// A number of 24 bits: an empty hash with random keys.
fn random_number() -> u32 {
    (RandomState::new().hash_one(()) >> 40) as u32
}

/// A lock on a folder, which the system releases when its program ends in any way.
fn locked(folder: &Path) -> Result<File, TryLockError> {
    let folder = File::open(folder).map_err(TryLockError::Error)?;
    folder.try_lock()?;
    Ok(folder)
}

fn rename(from: &Path, to: &Path) -> Result<(), CheckpointError> {
    std::fs::rename(from, to).map_err(|error| CheckpointError::io(from, error))
}
