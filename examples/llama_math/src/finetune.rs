//! A user's checkpoint on a user's data.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use burn::module::Module;
use burn::tensor::Device;
use clap::ValueEnum;
use clap::builder::PossibleValue;
use hd_pissa::Windows;
use hd_pissa::checkpoint::{Checkpoint as Saved, CheckpointError, Checkpoints};
use hd_pissa::comm::{Communicator, Solo};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::batch::Sequence;
use crate::console::{complain, say};
use crate::data::{Fields, Record, read_records};
use crate::evaluate::{Solver, mean_loss};
use crate::export::{ExportConfig, Rounding};
use crate::lock::Lock;
use crate::method::gradients_name;
use crate::output::{RECORD, Staged, normalized};
use crate::progress::Progress;
use crate::run::{METRICS, Outcome, RunConfig, Saving, Trained, Training};
use crate::stop::Stop;
use crate::team::Team;
use crate::token_cache::TokenCache;
use crate::tokenize::{PromptTemplate, Tokens};
use crate::weights::hexadecimal;
use crate::{Checkpoint, Error, Llama, files, picture};

const GRADIENTS: &str = "--gradients";
const WINDOWS: &str = "--windows";
const FRAME_SCALE: &str = "--frame-scale";

/// Settings of a fine-tuning run on files.
#[derive(Clone, Debug)]
pub struct FineTuning {
    /// Folder of the checkpoint.
    pub model: PathBuf,
    /// Training data.
    pub data: PathBuf,
    /// Fields of a record; found where `None`.
    pub fields: Option<Fields>,
    /// File of the prompt template; the published one where `None`.
    pub template: Option<PathBuf>,
    /// Longest sequence; 512 where `None`, or what the model was made for.
    pub max_length: Option<usize>,
    /// Held-out data, and how many of its records are answered.
    pub eval: Option<(PathBuf, usize)>,
    /// Longest generated answer, in tokens; with 0 nothing is answered.
    pub max_new_tokens: usize,
    /// The training.
    pub run: RunConfig,
    /// Where the results go.
    pub output: PathBuf,
    /// Whether an existing folder is replaced.
    pub overwrite: bool,
    /// How the weights are written.
    pub export: ExportConfig,
    /// Seed of whatever is drawn.
    pub seed: u64,
    /// When to save, and where to go on.
    pub saving: SaveOptions,
    /// How long workers wait for each other.
    pub timeout: Duration,
}

/// The options about checkpoints.
#[derive(Clone, Debug)]
pub struct SaveOptions {
    /// Folder of the checkpoints; beside the output where `None`.
    pub folder: Option<PathBuf>,
    /// Save every so many steps.
    pub every: Option<usize>,
    /// Save when so much time has passed.
    pub interval: Option<Duration>,
    /// Number of checkpoints that are kept.
    pub keep_last: usize,
    /// Where to go on, if anywhere.
    pub resume: Option<Resume>,
    /// What may differ from the settings of the checkpoint.
    pub change: Vec<Change>,
}

/// A setting that a run that goes on may have changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Change {
    /// The largest learning rate.
    Lr,
    /// The number of steps, or of epochs.
    Steps,
}

impl Change {
    const ALL: [Self; 2] = [Self::Lr, Self::Steps];

    /// The name of the setting.
    fn setting(self) -> &'static str {
        match self {
            Self::Lr => "--lr",
            Self::Steps => "--steps",
        }
    }
}

/// Where a run goes on.
#[derive(Clone, Debug, PartialEq)]
pub enum Resume {
    /// At the newest checkpoint of this output, or at the start if there is none.
    Latest,
    /// At a checkpoint, or at the newest one of a folder.
    At(PathBuf),
}

/// Held-out records with their sequences.
struct HeldOut {
    records: Vec<Record>,
    sequences: Vec<Sequence>,
}

/// What the first worker finds before anyone reads.
#[derive(Default)]
struct Places {
    _lock: Option<Lock>,
    /// The checkpoint to go on from.
    saved: Option<Saved>,
    /// The settings of the output that is there already, for a run that resumes.
    finished: Option<Value>,
}

/// What a run reads before it trains.
struct Inputs {
    template: PromptTemplate,
    checkpoint: Checkpoint,
    tokens: Tokens,
    max_length: usize,
    /// What became of the records.
    summary: String,
    sequences: Arc<[Sequence]>,
    held_out: Option<HeldOut>,
    /// The checkpoint to go on from.
    saved: Option<Saved>,
    settings: BTreeMap<String, String>,
}

impl FineTuning {
    /// Loads, trains, evaluates and writes, with one thread for each of `devices`.
    ///
    /// # Errors
    ///
    /// Whatever is wrong with the files or the settings; nothing is written then but the
    /// checkpoints that were asked for. After the training [`Error::NotMoved`], which says where the
    /// model is, and what the evaluation finds once the model is written.
    pub fn run(&self, devices: &[Device]) -> Result<(), Error> {
        self.run_with(&devices[0], Solo, |training, model, solo| {
            match devices.len() {
                1 => training.work(model, solo),
                _ => training.work_in_threads(model, devices, self.timeout),
            }
        })
    }

    /// As [`run`](Self::run), on one of the workers that `communicator` connects. Worker 0 prints,
    /// evaluates and writes; all read.
    ///
    /// # Errors
    ///
    /// Those of [`run`](Self::run). What any worker finds before the first step ends all:
    /// [`Error::OtherWorker`] on those that found nothing.
    pub fn run_as_worker(
        &self,
        device: &Device,
        communicator: impl Communicator + 'static,
    ) -> Result<(), Error> {
        self.run_with(device, communicator, |training, model, communicator| {
            training.work(model, communicator)
        })
    }

    fn run_with<C: Communicator>(
        &self,
        device: &Device,
        communicator: C,
        train: impl FnOnce(&Training<'_>, Llama, C) -> Result<Outcome, Error>,
    ) -> Result<(), Error> {
        let team = Team::new(&communicator);
        let is_first = team.is_first();
        let workers = communicator.num_workers();
        team.agree(self.run.check_workers("mpi", workers))?;
        let checkpoints = Checkpoints::new(self.checkpoint_folder());
        let checkpoints = checkpoints.with_keep_last(self.saving.keep_last);

        // Only the first looks for output and checkpoints while others could still change them.
        let (this, own) = (self.clone(), checkpoints.clone());
        let places = team.together(move || match is_first {
            true => this.check_places(&own),
            false => Ok(Places::default()),
        })?;
        // Held until this run ends.
        let Places {
            _lock,
            saved,
            finished,
        } = places;
        let (this, own) = (self.clone(), checkpoints.clone());
        let inputs = team.together(move || match is_first {
            true => this.read(saved),
            false => this.read(this.find(&own, false)?),
        })?;
        team.agree(compare_with_first(&team, &inputs))?;
        let finished = team.agree(match finished {
            Some(settings) => self.is_finished(&settings, &self.of_output(&inputs.settings)),
            None => Ok(false),
        })?;
        if finished && is_first {
            say!("finished already: {}", self.output.display());
            remove_checkpoints(&checkpoints);
        }
        // The others need not know of the output.
        if !team
            .text_of_first(if finished { "yes" } else { "" })?
            .is_empty()
        {
            return Ok(());
        }
        if is_first {
            self.announce(&inputs, workers);
        }

        let method = self.run.adaptation.method.to_string();
        let mut training = Training::new(&self.run, inputs.sequences.clone(), &method)?;
        training.resume = inputs.saved.clone();
        training.saving = Some(Saving {
            checkpoints: checkpoints.clone(),
            every: self.saving.every,
            interval: self.saving.interval,
            settings: inputs.settings.clone(),
        });
        training.stop = Stop::on_signals()?;

        device.seed(self.seed);
        let discards = is_first && self.overwrite && inputs.saved.is_none();
        let (own, autodiff) = (checkpoints.clone(), device.clone().autodiff());
        // While the first evaluates, the others wait here and in no step.
        let (inputs, model) = team.together(move || {
            if discards {
                own.discard_all()?;
            }
            let model = inputs.checkpoint.load(&autodiff)?;
            if let Some(held_out) = inputs.held_out.as_ref().filter(|_| inputs.saved.is_none())
                && is_first
            {
                let loss = held_out_loss(&model.valid(), held_out);
                say!(
                    "held-out loss before: {loss:.4} ({} records)",
                    held_out.sequences.len()
                );
            }
            Ok((inputs, model))
        })?;
        let stop = training.stop.clone();
        // The communicator ends with the steps: what the first does afterwards keeps nobody.
        let outcome = train(&training, model, communicator);
        if outcome.is_ok() && is_first {
            stop.begin_writing();
        } else {
            stop.end();
        }
        let outcome = match outcome {
            Err(error) if is_first => {
                return Err(Error::Ended {
                    source: Box::new(error),
                    left: what_is_left(&checkpoints),
                });
            }
            outcome => outcome?,
        };
        if !is_first {
            return Ok(());
        }
        let trained = match outcome {
            Outcome::Finished(trained) => *trained,
            Outcome::Stopped {
                step,
                total,
                checkpoint,
            } => {
                say!(
                    "stopped after step {step} of {total}; saved: {}\nthe same command with \
                     --resume goes on from there",
                    checkpoint.display()
                );
                return Ok(());
            }
        };
        print_summary(&method, &trained);
        self.finish(inputs, trained, &checkpoints, &stop)
    }

    /// What the first worker checks before anyone reads: the output, and the checkpoints. Returns
    /// the one to go on from.
    fn check_places(&self, checkpoints: &Checkpoints) -> Result<Places, Error> {
        let folder = checkpoints.folder();
        let mut kept = vec![&*self.model, &*self.data, folder, Path::new(".")];
        kept.extend(self.template.as_deref());
        kept.extend(self.eval.as_ref().map(|(path, _)| &**path));
        if normalized(&self.output).starts_with(normalized(folder)) {
            let reason = format!(
                "is inside {}, the folder of the checkpoints",
                folder.display()
            );
            return Err(Error::Option {
                option: "output",
                reason,
            });
        }
        // Two runs that write the same output have the same checkpoints, unless told otherwise.
        let lock = Lock::take(folder)?;
        let has_checkpoints = !checkpoints.steps()?.is_empty();
        Staged::tidy(&self.output)?;
        // A run that replaces an output may have got half-way.
        let finished = match self.saving.resume {
            Some(_) if !(has_checkpoints && self.overwrite) => record_of(&self.output),
            _ => None,
        };
        if finished.is_none() || self.overwrite {
            Staged::check(&self.output, self.overwrite, &kept)?;
        }
        if self.saving.resume.is_none() && !self.overwrite {
            refuse_earlier_run(checkpoints)?;
        }
        let saved = match finished {
            Some(_) => None,
            None => self.find(checkpoints, true)?,
        };
        Ok(Places {
            _lock: Some(lock),
            saved,
            finished,
        })
    }

    /// What an output notes about itself: the settings of the training, and how it is written.
    fn of_output(&self, settings: &BTreeMap<String, String>) -> BTreeMap<String, String> {
        let name = |value: &dyn Fn() -> Option<PossibleValue>| {
            value().map_or_else(String::new, |value| value.get_name().to_string())
        };
        let ExportConfig {
            dtype, rounding, ..
        } = self.export;
        let mut all = settings.clone();
        all.insert("--output-dtype".into(), name(&|| dtype.to_possible_value()));
        all.insert("--rounding".into(), name(&|| rounding.to_possible_value()));
        all
    }

    /// Whether the output that is there is what this run would make. With `--overwrite` another one is
    /// replaced.
    fn is_finished(&self, theirs: &Value, ours: &BTreeMap<String, String>) -> Result<bool, Error> {
        let differs = |(name, value): &(&String, &String)| theirs.get(name) != Some(&json!(value));
        match ours.iter().find(differs) {
            None => Ok(true),
            Some(_) if self.overwrite => Ok(false),
            Some((name, ours)) => Err(Error::Option {
                option: "output",
                reason: format!(
                    "{} exists, made with {name} {} where this run has {ours}; --overwrite replaces \
                     it",
                    self.output.display(),
                    theirs.get(name).and_then(Value::as_str).unwrap_or("none")
                ),
            }),
        }
    }

    /// Compares the settings with those of the checkpoint to go on from, but for what may change.
    fn check_settings(
        &self,
        saved: &Saved,
        settings: &BTreeMap<String, String>,
        total: usize,
    ) -> Result<(), Error> {
        let mut compared = settings.clone();
        for change in &self.saving.change {
            if let Some(value) = saved.settings().get(change.setting()) {
                compared.insert(change.setting().into(), value.clone());
            }
        }
        // Checkpoints from before there was a choice say nothing of the published one.
        for (setting, published) in [
            (GRADIENTS, "per-shard"),
            (WINDOWS, "leading"),
            (FRAME_SCALE, "balanced"),
        ] {
            if !saved.settings().contains_key(setting) && compared[setting] == published {
                compared.remove(setting);
            }
        }
        let refused = |reason: String| Error::Option {
            option: "resume",
            reason,
        };
        saved.check_settings(&compared).map_err(|error| {
            let CheckpointError::SettingMismatch { setting, .. } = &error else {
                return error.into();
            };
            let named = |change: &Change| change.setting() == setting;
            match Change::ALL.into_iter().find(named) {
                Some(change) => {
                    let name = change.setting().trim_start_matches('-');
                    refused(format!("{error}, or allow the change with --change {name}"))
                }
                None => error.into(),
            }
        })?;
        if saved.step() > total as u64 {
            return Err(refused(format!(
                "{} has taken {} steps already, more than the {total} of --steps",
                saved.path().display(),
                saved.step()
            )));
        }
        Ok(())
    }

    fn read(&self, saved: Option<Saved>) -> Result<Inputs, Error> {
        let template = read_template(self.template.as_deref())?;
        let checkpoint = Checkpoint::open(&self.model)?;
        let tokens = Tokens::of(&checkpoint)?;
        let max_length = self.max_length(&checkpoint)?;
        let records = read_records(&self.data, self.fields.as_ref())?;
        let cache = TokenCache::of_user();
        let data = cache.sequences(&tokens, &records, &template, max_length)?;
        let held_out = match &self.eval {
            Some((path, samples)) => {
                let mut records = read_records(path, self.fields.as_ref())?;
                records.truncate(*samples);
                let sequences = tokens.sequences(&records, &template, max_length)?;
                if sequences.usable.is_empty() {
                    let reason = format!("no target to measure within {max_length} tokens");
                    return Err(Error::field(
                        path,
                        "content",
                        format!("{sequences}: {reason}"),
                    ));
                }
                let sequences = sequences.usable;
                Some(HeldOut { records, sequences })
            }
            None => None,
        };
        let summary = data.to_string();
        let digest = digest_of(&data.usable);
        let sequences: Arc<[Sequence]> = data.usable.into();
        let total = Training::new(&self.run, sequences.clone(), "")?.total();
        let settings = self.settings(&checkpoint, max_length, digest, total)?;
        if let Some(saved) = &saved {
            self.check_settings(saved, &settings, total)?;
        }
        let size = checkpoint.export_size(&self.export);
        Staged::check_room(&self.output, size)?;
        Ok(Inputs {
            template,
            checkpoint,
            tokens,
            max_length,
            summary,
            sequences,
            held_out,
            saved,
            settings,
        })
    }

    fn announce(&self, inputs: &Inputs, workers: usize) {
        say!(
            "{}: {} within {} tokens",
            self.data.display(),
            inputs.summary,
            inputs.max_length
        );
        let checkpoint = &inputs.checkpoint;
        if checkpoint.is_untied {
            say!(
                "{}: lm_head.weight differs from the embedding that tie_word_embeddings names; it is \
                 used, as transformers does, and the output says that nothing is tied",
                checkpoint.folder.display()
            );
        }
        if !checkpoint.left_out.is_empty() {
            let names = checkpoint.left_out.join(", ");
            say!("not carried over to the output: {names}");
        }
        if workers > 1 {
            let shards = self.run.adaptation.shards;
            say!(
                "{workers} processes, {} of {shards} shards each",
                shards / workers
            );
        }
        if let Some(saved) = &inputs.saved {
            say!(
                "resumed: {} of {} steps are taken ({})",
                saved.step(),
                inputs.settings["--steps"],
                saved.path().display()
            );
            for change in Change::ALL.map(Change::setting) {
                let before = saved.settings().get(change);
                if let Some(before) = before.filter(|&before| *before != inputs.settings[change]) {
                    say!(
                        "changed: {change} from {before} to {}",
                        inputs.settings[change]
                    );
                }
            }
        }
    }

    /// Writes, then evaluates: whatever fails or ends the program after the training, the model is
    /// there.
    fn finish(
        &self,
        inputs: Inputs,
        trained: Trained,
        checkpoints: &Checkpoints,
        stop: &Stop,
    ) -> Result<(), Error> {
        // Adapters are merged, as in what is written.
        let model = trained.model.valid().materialize();
        let device = model.device();
        let settings = serde_json::to_value(self.of_output(&inputs.settings));
        let settings = settings.expect("a map of texts has a JSON form");
        let write = |folder: &Path| {
            let exported = inputs.checkpoint.export(&model, folder, &self.export)?;
            let path = folder.join(METRICS);
            std::fs::write(&path, &trained.lines).map_err(Error::io(path))?;
            Ok(exported)
        };
        let staged = Staged::new(&self.output, self.overwrite).and_then(|staged| {
            let exported = write(staged.path())?;
            Ok((staged, exported))
        });
        let exported = match staged {
            Ok((staged, exported)) => {
                staged.with_settings(settings).commit()?;
                exported
            }
            Err(error) => {
                // Anywhere is better than nowhere.
                let error = match error {
                    Error::Io { source, .. } => {
                        let write = |folder: &Path| write(folder).map(drop);
                        Staged::rescue(&self.output, source, &settings, write)
                    }
                    error => error,
                };
                return Err(match error {
                    Error::NotMoved { .. } => error,
                    error => Error::Ended {
                        source: Box::new(error),
                        left: what_is_left(checkpoints),
                    },
                });
            }
        };
        stop.end();
        drop(model);
        say!("written: {}", self.output.display());
        if !exported.left_out.is_empty() {
            complain!("not carried over: {}", exported.left_out.join(", "));
        }
        if let Some(share) = exported.survived {
            say!(
                "{:.1} % of the update survives the rounding of the written weights{}",
                100.0 * share,
                match share < 0.99 && self.export.rounding == Rounding::Nearest {
                    true => "; --output-dtype f32 keeps all of it, --rounding stochastic its mean",
                    false => "",
                }
            );
        }
        let losses: Vec<f64> = trained.metrics.iter().map(|metrics| metrics.loss).collect();
        let method = self.run.adaptation.method.to_string();
        let title = format!("{method} on {}", file_name(&self.data));
        let picture = self.output.join("loss.svg");
        if let Err(error) = picture::losses(&picture, &title, &losses) {
            complain!("without a picture: {error}");
        }
        remove_checkpoints(checkpoints);

        let Some(held_out) = &inputs.held_out else {
            return Ok(());
        };
        if stop.requested() {
            say!("stopped before the evaluation");
            return Ok(());
        }
        // What is measured is what lies on the disk.
        let model = Checkpoint::open(&self.output)?.load(&device)?;
        let loss = held_out_loss(&model, held_out);
        say!("held-out loss after: {loss:.4}, of the weights as they are written");
        match self.max_new_tokens {
            0 => Ok(()),
            _ => self.answer(&model, held_out, &inputs.tokens, &inputs.template),
        }
    }

    fn checkpoint_folder(&self) -> PathBuf {
        self.saving.folder.clone().unwrap_or_else(|| {
            let mut name = normalized(&self.output).into_os_string();
            name.push(".checkpoints");
            name.into()
        })
    }

    /// The checkpoint to go on from. The first worker reports damaged ones and sets them aside; the
    /// others look after it has.
    fn find(&self, own: &Checkpoints, is_first: bool) -> Result<Option<Saved>, Error> {
        let (found, checkpoints, required) = match &self.saving.resume {
            None => return Ok(None),
            Some(Resume::Latest) => (own.latest()?, own.clone(), false),
            Some(Resume::At(path)) if path.join("manifest.json").exists() => {
                return Ok(Some(Saved::open(path)?));
            }
            Some(Resume::At(path)) => {
                let checkpoints = Checkpoints::new(path);
                (checkpoints.latest()?, checkpoints, true)
            }
        };
        for damaged in found.damaged.iter().filter(|_| is_first) {
            complain!("skipped a damaged checkpoint: {damaged}");
        }
        let folder = checkpoints.folder().display();
        let invalid = |reason: String| Error::Option {
            option: "resume",
            reason,
        };
        match found.checkpoint {
            // Not in the folder of another run, which may be at work there.
            Some(_) if is_first && !required => checkpoints.set_aside(&found)?,
            Some(_) => {}
            None if !found.damaged.is_empty() => {
                return Err(invalid(format!("every checkpoint in {folder} is damaged")));
            }
            None if required => return Err(invalid(format!("{folder} holds no checkpoint"))),
            None if is_first => {
                say!("no checkpoint in {folder} yet: starting from the beginning");
            }
            None => {}
        }
        Ok(found.checkpoint)
    }

    /// What a run that resumes must have in common with this one, by option. Text, so that it
    /// compares exactly.
    fn settings(
        &self,
        checkpoint: &Checkpoint,
        max_length: usize,
        tokens: String,
        total: usize,
    ) -> Result<BTreeMap<String, String>, Error> {
        let RunConfig {
            adaptation,
            optimizer,
            feed,
            lr,
            decay,
            warmup_ratio,
            ..
        } = &self.run;
        let optional = |value: Option<f64>| value.map_or("none".into(), |value| value.to_string());
        let targets = adaptation.targets.as_deref().unwrap_or("the default ones");
        let order = feed
            .shuffle
            .map_or("of the file".into(), |_| "shuffled".into());
        let windows = match adaptation.windows {
            // Its seed is that of the run.
            Windows::Random { .. } => "random".into(),
            windows => format!("{windows:?}").to_lowercase(),
        };
        let frame_scale = format!("{:?}", adaptation.frame_scale).to_lowercase();
        let settings: [(&str, String); 21] = [
            ("--model (SHA-256)", checkpoint.digest()?),
            ("--data, as tokens (SHA-256)", tokens),
            ("--max-length", max_length.to_string()),
            ("--method", adaptation.method.to_string()),
            ("--rank", adaptation.rank.to_string()),
            ("--shards", adaptation.shards.to_string()),
            (GRADIENTS, gradients_name(adaptation.gradients).into()),
            (WINDOWS, windows),
            (FRAME_SCALE, frame_scale),
            ("--alpha", optional(adaptation.alpha)),
            ("--targets", targets.into()),
            ("--clip", optional(optimizer.clip)),
            ("--weight-decay", optimizer.weight_decay.to_string()),
            ("--wire", optimizer.wire.to_string()),
            ("--accumulation", feed.accumulation.to_string()),
            ("--batch-size", feed.batch_size.to_string()),
            ("order of the data", order),
            ("--seed", self.seed.to_string()),
            ("--steps", total.to_string()),
            ("--lr", lr.to_string()),
            (
                "--schedule",
                format!("{decay} after {warmup_ratio} of the steps"),
            ),
        ];
        let named = |(name, value): (&str, String)| (name.to_string(), value);
        Ok(settings.into_iter().map(named).collect())
    }

    fn max_length(&self, checkpoint: &Checkpoint) -> Result<usize, Error> {
        let largest = checkpoint.config.max_positions;
        match self.max_length {
            Some(length) if length > largest => {
                let path = checkpoint.path("config.json");
                let reason = format!("is {largest}, less than the --max-length {length}");
                Err(Error::field(path, "max_position_embeddings", reason))
            }
            Some(length) => Ok(length),
            None => Ok(largest.min(512)),
        }
    }

    fn answer(
        &self,
        model: &Llama,
        held_out: &HeldOut,
        tokens: &Tokens,
        template: &PromptTemplate,
    ) -> Result<(), Error> {
        let solver = Solver {
            model,
            tokens,
            template,
            max_new_tokens: self.max_new_tokens,
        };
        let progress = Progress::new("answering", held_out.records.len());
        let (mut correct, mut scored) = (0, 0);
        let mut shown = Vec::new();
        for record in &held_out.records {
            let answer = solver.answer(record)?;
            correct += usize::from(answer.correct == Some(true));
            scored += usize::from(answer.correct.is_some());
            if shown.len() < 2 {
                shown.push((record, answer));
            }
            progress.tick();
        }
        progress.finish();
        let total = held_out.records.len();
        match total - scored {
            0 => say!("exact match: {correct} of {total}"),
            left => say!("exact match: {correct} of {scored}; {left} have no number to compare"),
        }
        for (record, answer) in shown {
            say!("\n{}\n-> {}", record.instruction, answer.text.trim());
        }
        say!("");
        Ok(())
    }
}

/// The output is on disk and replaces them.
fn remove_checkpoints(checkpoints: &Checkpoints) {
    let folder = checkpoints.folder().display();
    match checkpoints.steps() {
        Ok(steps) if steps.is_empty() => {}
        _ => match checkpoints.discard_all() {
            Ok(()) => say!("removed: the checkpoints in {folder}, which the output replaces"),
            Err(error) => complain!("the checkpoints in {folder} are not removed: {error}"),
        },
    }
}

/// What a run that ended early leaves.
fn what_is_left(checkpoints: &Checkpoints) -> String {
    let folder = checkpoints.folder().display();
    match checkpoints.steps().map(|mut steps| steps.pop()) {
        Ok(Some(step)) => format!(
            "the checkpoint of step {step} is in {folder}, and --resume goes on from there (with \
             --change lr at another --lr)"
        ),
        Ok(None) => "no checkpoint was saved".into(),
        Err(error) => format!("the checkpoints cannot be listed: {error}"),
    }
}

/// The settings of a finished output.
fn record_of(output: &Path) -> Option<Value> {
    let bytes = std::fs::read(output.join(RECORD)).ok()?;
    let record: Value = serde_json::from_slice(&bytes).ok()?;
    record.get("settings").cloned()
}

/// Whether this worker has read the same as worker 0.
fn compare_with_first(team: &Team<'_>, inputs: &Inputs) -> Result<(), Error> {
    let mut ours = inputs.settings.clone();
    let step = inputs.saved.as_ref().map_or(0, Saved::step);
    ours.insert("the step to go on from".into(), step.to_string());
    let text = serde_json::to_string(&ours).expect("a map of texts has a JSON form");
    let theirs = team.text_of_first(&text)?;
    let theirs: BTreeMap<String, String> =
        serde_json::from_str(&theirs).expect("worker 0 sends the same kind of map");
    match ours
        .into_iter()
        .find(|(setting, value)| theirs.get(setting) != Some(value))
    {
        Some((setting, ours)) => Err(Error::WorkerMismatch {
            theirs: theirs.get(&setting).cloned().unwrap_or_default(),
            setting,
            ours,
        }),
        None => Ok(()),
    }
}

fn held_out_loss(model: &Llama, held_out: &HeldOut) -> f64 {
    let progress = Progress::new("held out", held_out.sequences.len());
    let loss = mean_loss(model, &held_out.sequences, || progress.tick());
    progress.finish();
    loss
}

fn read_template(path: Option<&Path>) -> Result<PromptTemplate, Error> {
    let Some(path) = path else {
        return Ok(PromptTemplate::default());
    };
    let text = files::text(path)?;
    PromptTemplate::new(text).map_err(|reason| Error::field(path, "content", reason))
}

fn print_summary(method: &str, trained: &Trained) {
    say!(
        "{method}: {} steps in {:.1} s after {:.1} s of preparation, {:.0} tokens/s, {} trainable \
         parameters, peak memory {}",
        trained.metrics.len(),
        trained.seconds,
        trained.preparation,
        trained.tokens_per_second,
        trained.trainable,
        mebibytes(trained.peak_memory)
    );
    if let (Some(first), Some(last)) = (trained.metrics.first(), trained.metrics.last()) {
        say!(
            "training loss: {:.4} in the first step, {:.4} in the last",
            first.loss,
            last.loss
        );
    }
}

/// A run from the start would mix its checkpoints with those of another.
fn refuse_earlier_run(checkpoints: &Checkpoints) -> Result<(), Error> {
    let Some(step) = checkpoints.steps()?.pop() else {
        return Ok(());
    };
    let reason = format!(
        "{} holds checkpoints of an earlier run, up to step {step}; --resume goes on from there, \
         --overwrite discards them",
        checkpoints.folder().display()
    );
    Err(Error::Option {
        option: "checkpoints",
        reason,
    })
}

/// SHA-256 of everything that the steps see of the data.
fn digest_of(sequences: &[Sequence]) -> String {
    let mut hash = Sha256::new();
    for sequence in sequences {
        for number in [sequence.tokens.len(), sequence.prompt_len] {
            hash.update((number as u64).to_le_bytes());
        }
        for token in &sequence.tokens {
            hash.update(token.to_le_bytes());
        }
    }
    hexadecimal(&hash.finalize())
}

/// A number of bytes, for people.
pub fn mebibytes(bytes: Option<u64>) -> String {
    match bytes {
        Some(bytes) => format!("{:.0} MiB", bytes as f64 / f64::from(1 << 20)),
        None => "unknown".into(),
    }
}

fn file_name(path: &Path) -> String {
    path.file_name()
        .unwrap_or(path.as_os_str())
        .to_string_lossy()
        .into_owned()
}
