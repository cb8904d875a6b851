//! Trials in separate processes, a few at a time, each with one compute thread.
//!
//! A separate process shows the peak memory of one trial. Each finished trial leaves a file, so an
//! interrupted series continues where it stopped.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::Instant;

use burn::tensor::Device;

use super::task::Files;
use super::trial::{Trial, TrialResult};
use crate::Error;
use crate::progress::Progress;

/// How trials are run.
#[derive(Clone, Debug)]
pub struct Children {
    /// The folder of their results.
    pub folder: PathBuf,
    /// The number of trials at a time.
    pub processes: usize,
    /// Name of their device.
    pub device: Option<String>,
    /// What tasks with records are about.
    pub files: Option<Files>,
    /// Whether the results have records, for a report.
    pub record: bool,
    /// When no more are started.
    pub until: Option<Instant>,
    /// Starts this program with other arguments.
    pub program: fn(&[OsString]) -> std::io::Result<Command>,
}

/// This program with these arguments.
///
/// # Errors
///
/// If the system does not give the program's path.
pub fn this_program(arguments: &[OsString]) -> std::io::Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(arguments);
    Ok(command)
}

impl Children {
    /// Runs the trials that have no result yet, and returns the results of all, in their order;
    /// without those that there was no time for.
    ///
    /// # Errors
    ///
    /// [`Error::Child`] for the first that fails, and those of the results.
    pub fn run(&self, trials: &[Trial], label: &str) -> Result<Vec<TrialResult>, Error> {
        std::fs::create_dir_all(&self.folder).map_err(Error::io(&self.folder))?;
        let mut results: Vec<Option<TrialResult>> = trials
            .iter()
            .map(|trial| TrialResult::read(&self.path(trial), trial))
            .collect::<Result<_, _>>()?;
        let missing = |(_, result): &(usize, &Option<TrialResult>)| result.is_none();
        let waiting: VecDeque<usize> = results
            .iter()
            .enumerate()
            .filter(missing)
            .map(|(index, _)| index)
            .collect();
        let done = trials.len() - waiting.len();
        let progress = Progress::resumed(label, trials.len(), done, false);
        let waiting = Mutex::new(waiting);
        let is_late = || self.until.is_some_and(|until| Instant::now() >= until);
        let next = || match is_late() {
            true => None,
            false => waiting.lock().expect("nothing panics there").pop_front(),
        };
        std::thread::scope(|scope| {
            let (sender, finished) = std::sync::mpsc::channel();
            for _ in 0..self.processes.max(1) {
                let sender = sender.clone();
                scope.spawn(move || {
                    while let Some(index) = next() {
                        let result = self.child(&trials[index]);
                        let failed = result.is_err();
                        // Nobody listens after another trial has failed.
                        if sender.send((index, result)).is_err() || failed {
                            break;
                        }
                    }
                });
            }
            drop(sender);
            for (index, result) in finished {
                match result {
                    Ok(result) => results[index] = Some(result),
                    Err(error) => {
                        waiting.lock().expect("nothing panics there").clear();
                        return Err(error);
                    }
                }
                progress.tick();
            }
            Ok(())
        })?;
        progress.finish();
        Ok(results.into_iter().flatten().collect())
    }

    fn path(&self, trial: &Trial) -> PathBuf {
        self.folder.join(format!("{}.json", trial.name()))
    }

    fn child(&self, trial: &Trial) -> Result<TrialResult, Error> {
        let failed = |reason: String| Error::Child {
            trial: trial.name(),
            reason,
        };
        let settings = serde_json::to_string(trial).expect("a trial has a JSON form");
        let path = self.path(trial);
        let mut arguments: Vec<OsString> = vec!["trial".into(), "--settings".into()];
        arguments.extend([settings.into(), "--result".into(), path.clone().into()]);
        if let Some(device) = &self.device {
            arguments.extend(["--device".into(), device.into()]);
        }
        if self.record {
            arguments.push("--record".into());
        }
        if let Some(Files { model, train, test }) = &self.files {
            arguments.extend([
                "--model".into(),
                model.into(),
                "--data".into(),
                train.into(),
            ]);
            arguments.extend(["--test".into(), test.into()]);
        }
        let mut command = (self.program)(&arguments).map_err(|error| failed(error.to_string()))?;
        command.env("RAYON_NUM_THREADS", "1");
        // The child ends when its input ends, and thus when this process ends in any way.
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| failed(error.to_string()))?;
        let alive = child.stdin.take();
        let output = child
            .wait_with_output()
            .map_err(|error| failed(error.to_string()))?;
        drop(alive);
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            let last = said.trim_end().lines().last().unwrap_or_default();
            return Err(failed(format!("{}: {last}", output.status)));
        }
        TrialResult::read(&path, trial)?.ok_or_else(|| failed("it left no result".into()))
    }
}

/// The child's side: runs the trial that the parent has written out, and writes its result.
///
/// # Errors
///
/// Those of the trial.
pub fn run_trial(
    settings: &str,
    device: &Device,
    files: Option<&Files>,
    record: bool,
    result: &Path,
) -> Result<(), Error> {
    let trial: Trial = serde_json::from_str(settings).map_err(|error| Error::Option {
        option: "settings",
        reason: error.to_string(),
    })?;
    let found = match record {
        true => trial.run_recorded(device, files),
        false => trial.run(device, files),
    };
    found?.write(result)
}

/// Ends this process when its standard input ends, together with the process that started it.
pub(crate) fn end_with_parent() {
    std::thread::spawn(|| {
        let mut input = std::io::stdin();
        while input.read(&mut [0; 64]).is_ok_and(|read| read > 0) {}
        std::process::exit(1);
    });
}
