//! The options of a fine-tuning run.

use std::path::PathBuf;
use std::time::Duration;

use clap::ValueEnum;

use crate::data::{Fields, Split};
use crate::export::ExportConfig;
use crate::model_dtype::ModelDtype;
use crate::run::RunConfig;
use crate::token_cache::TokenCache;
use crate::{Error, hub};

/// Settings of a fine-tuning run on files.
#[derive(Clone, Debug)]
pub struct FineTuning {
    /// Folder of the pretrained model.
    pub model: PathBuf,
    /// Training data: files, and folders of files.
    pub data: Vec<PathBuf>,
    /// Fields of a record; found where `None`.
    pub fields: Option<Fields>,
    /// How records are written.
    pub template: TemplateChoice,
    /// Longest sequence; 512 where `None`, or what the model was made for.
    pub max_length: Option<usize>,
    /// Held-out data, files and folders, and how many of its records are answered.
    pub eval: Option<(Vec<PathBuf>, usize)>,
    /// Longest generated answer, in tokens; with 0 nothing is answered.
    pub max_new_tokens: usize,
    /// Where encoded data is kept.
    pub token_cache: TokenCache,
    /// The dtype of the model while it trains and answers.
    pub dtype: ModelDtype,
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
    /// What is measured between steps.
    pub watch: WatchOptions,
}

impl FineTuning {
    /// The same with the folders and files of what is named on the Hub, downloaded.
    ///
    /// # Errors
    ///
    /// [`Error::Option`] for a name that cannot be fetched.
    pub fn fetch(mut self) -> Result<Self, Error> {
        self.model = hub::model(&self.model)?;
        self.data = hub::data("data", &self.data, Split::Train)?;
        if let Some((paths, _)) = &mut self.eval {
            *paths = hub::data("eval", paths, Split::HeldOut)?;
        }
        Ok(self)
    }
}

/// How records are written.
#[derive(Clone, Debug)]
pub enum TemplateChoice {
    /// Conversations by the chat template of the checkpoint; problems by the published prompt.
    ByData,
    /// All by the chat template of the checkpoint.
    Chat,
    /// Problems by the prompt template of a file.
    File(PathBuf),
}

/// What is measured between steps, for the record and the report.
#[derive(Clone, Debug)]
pub struct WatchOptions {
    /// Measure the loss on the held-out data every so many steps, and after the last.
    pub eval_every: Option<usize>,
    /// Measure the change of the weights every so many steps, and after the last; never where `None`.
    pub rank_every: Option<usize>,
    /// Number of held-out records whose answers are kept from before, each evaluation and after.
    pub samples: usize,
    /// The weight whose singular values are kept; the last adapted one of the middle layer where `None`.
    pub layer: Option<String>,
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
    pub(super) const ALL: [Self; 2] = [Self::Lr, Self::Steps];

    /// The name of the setting.
    pub(super) fn setting(self) -> &'static str {
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
