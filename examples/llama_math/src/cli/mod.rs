//! The command line.

mod parse;
mod watching;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::{Args, Parser, Subcommand};
use hd_pissa::{CommunicationDtype, FrameScale, GradientMode, Windows};

use crate::batch::BatcherConfig;
use crate::compare::Comparison;
use crate::data::Fields;
use crate::evidence::children::{self, Children};
use crate::evidence::report;
use crate::evidence::reproduce::Settings;
use crate::evidence::results;
use crate::evidence::row::Row;
use crate::evidence::sweep::Sweep;
use crate::evidence::task::{Files, Task};
use crate::export::{ExportConfig, ExportOptions, OutputDtype, Rounding, VerifyOptions};
use crate::finetune::{Change, FineTuning, Resume, SaveOptions, TemplateChoice};
use crate::loss::LossMean;
use crate::method::{Adaptation, Method, SvdOption, WindowsOption};
use crate::pretrain::Pretraining;
use crate::recipe::Recipe;
use crate::run::{Length, RunConfig};
use crate::scaling::cost::{Layout, Work};
use crate::scaling::{Question, Scaling};
use crate::schedule::Decay;
use crate::token_cache::TokenCache;
use crate::train::OptimizerSettings;
use crate::{Error, console, device, memory, mpi, user_cache};

use parse::{at_least, frame_scale, gradients, not_negative, positive, share, wire};
use watching::WatchingOptions;

/// Where the comparison writes unless told otherwise; replaced by the next run.
const COMPARISON_OUTPUT: &str = "target/llama_math";

/// The same for the simulations.
const SCALING_OUTPUT: &str = "target/scaling";
/// The settings of the results in the book, seen from the root of the repository.
const REPRODUCE_SETTINGS: &str = "examples/llama_math/reproduce.json";
/// Queries, keys, values and outputs; gates and ups; downs.
const LLAMA_2_7B: &str = "4096x4096x128,4096x11008x64,11008x4096x32";

/// Fine-tunes Llama-family models on word problems with HD-PiSSA and its baselines.
///
/// Without arguments it compares LoRA, PiSSA, HD-PiSSA and full fine-tuning on a tiny model and
/// generated data, each at the learning rate that a sweep has found. With --model and --data it
/// fine-tunes a Hugging Face checkpoint, by default with HD-PiSSA whose shards share gradients and
/// hold random directions; --published has everything as in the paper.
#[derive(Parser, Debug)]
#[command(name = "llama_math", version, args_conflicts_with_subcommands = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    /// Print only errors and results. RUST_LOG adds what is to be printed, such as hd_pissa=debug
    #[arg(long, global = true)]
    quiet: bool,
    #[command(flatten)]
    options: Options,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Pre-trains the tiny model whose weights are part of this example.
    Pretrain(PretrainOptions),
    /// Shows what more shards do to loss, rank and time, and predicts a run on many devices.
    ///
    /// Trains the tiny model and a synthetic layer with ever more virtual shards on this device,
    /// fits the constants of a cost model to the times, and predicts the time of a step on many
    /// such devices.
    Scaling(ScalingOptions),
    /// Searches the learning rate of every method on the tiny model's tasks, and repeats the best.
    ///
    /// Every training is a process of its own with one compute thread, and leaves a file in the
    /// output: a sweep that is started again goes on where it stopped.
    Sweep(SweepOptions),
    /// Writes the model of an earlier run in another form: merged in another dtype or in several files, as a
    /// LoRA adapter, or as a delta.
    Export(ExportOptions),
    /// Says whether an output is what was written, and which program loads it.
    ///
    /// Compares the files with their digests, and logits with those of the trained model.
    Verify(VerifyOptions),
    /// Runs every experiment of a settings file, and writes tables and pictures of the results.
    ///
    /// Each training leaves a file in the output: a run that is started again goes on where it stopped.
    Reproduce(ReproduceOptions),
    /// Fine-tunes as a file says, or shows what that would take.
    ///
    /// A recipe for several processes is started by an MPI launcher, as in `mpirun -np 8 llama_math
    /// recipe FILE`; paths in it are seen from the working directory.
    Recipe(RecipeOptions),
    /// One training of a sweep or of the comparison, in a process of its own.
    #[command(hide = true)]
    Trial(TrialOptions),
}

#[derive(Args, Debug)]
struct Options {
    /// Folder of a Hugging Face checkpoint, or OWNER/NAME on the Hub (feature `hub`): Llama 2 or 3,
    /// Mistral, Qwen2, Qwen3, Phi-3, SmolLM2, SmolLM3
    #[arg(long, value_name = "MODEL", requires_all = ["data", "output"])]
    model: Option<PathBuf>,
    /// Training data, files or folders of JSON lines, JSON arrays, either packed with gzip, or Parquet
    /// (feature `parquet`), or OWNER/NAME on the Hub (feature `hub`), with the fields of GSM8K,
    /// MetaMathQA, Alpaca, or with conversations
    #[arg(long, value_name = "PATH", requires = "model", num_args = 1..)]
    data: Vec<PathBuf>,
    /// Fields of prompt and answer, for other data
    #[arg(long, value_name = "PROMPT,ANSWER", requires = "model")]
    fields: Option<String>,
    /// File with the prompt, used byte for byte with {instruction} replaced [default: Alpaca's]
    #[arg(long, value_name = "FILE", requires = "model")]
    prompt_template: Option<PathBuf>,
    /// Write problems too by the checkpoint's chat template, as conversations are
    #[arg(long, requires = "model", conflicts_with = "prompt_template")]
    chat: bool,
    /// Longest sequence, prompt and answer together; longer ones are cut on the right
    /// [default: 512]
    #[arg(long, requires = "model", value_parser = at_least(2))]
    max_length: Option<usize>,
    /// How to fine-tune
    #[arg(long, requires = "model", default_value = "hd-pissa")]
    method: Method,
    /// Rank of the adapters, with HD-PiSSA of each shard's [default: 16; without --model 4]
    #[arg(long, value_parser = at_least(1))]
    rank: Option<usize>,
    /// Shards of HD-PiSSA; the other methods average the gradients of as many micro-batches
    #[arg(long, default_value_t = 8, value_parser = at_least(1))]
    shards: usize,
    /// HD-PiSSA as published: --gradients per-shard --windows leading --frame-scale balanced
    /// --loss-mean micro-batches
    #[arg(long, requires = "model", conflicts_with_all = ["gradients", "windows", "frame_scale", "loss_mean"])]
    published: bool,
    /// Which gradients a shard of HD-PiSSA learns from: those of its own micro-batches, or the mean
    /// over all micro-batches of a step [default: shared]
    #[arg(long, requires = "model", value_parser = gradients())]
    gradients: Option<GradientMode>,
    /// Which directions of a weight the shards of HD-PiSSA hold [default: random; with --frame-scale
    /// balanced leading]
    #[arg(long, requires = "model")]
    windows: Option<WindowsOption>,
    /// How long the frames of HD-PiSSA are: roots of singular values, or all the same [default: unit;
    /// with --windows leading balanced]
    #[arg(long, requires = "model", value_parser = frame_scale())]
    frame_scale: Option<FrameScale>,
    /// How the principal components of HD-PiSSA and PiSSA are computed: krylov finds the leading ones
    /// of large weights faster, and takes exact where it does not converge [default: exact]
    #[arg(long, requires = "model")]
    svd: Option<SvdOption>,
    /// Neither look for encoded data and principal components of earlier runs, nor keep them for
    /// later ones, in llama_math below XDG_CACHE_HOME or ~/.cache
    #[arg(long, requires = "model")]
    no_cache: bool,
    /// Numerator of the adapters' scale alpha / rank [default: the rank]
    #[arg(long, requires = "model", value_parser = positive)]
    alpha: Option<f64>,
    /// Weights to adapt, by regular expression on their names [default: every projection]
    #[arg(long, value_name = "REGEX", requires = "model")]
    targets: Option<String>,
    /// Largest learning rate [default: 2e-5; without --model each method's own]
    #[arg(long, value_parser = positive)]
    lr: Option<f64>,
    /// What follows the warm-up
    #[arg(long, requires = "model", default_value = "cosine")]
    schedule: Decay,
    /// Share of the steps that warm up
    #[arg(long, requires = "model", default_value_t = 0.0, value_parser = share)]
    warmup_ratio: f64,
    /// Passes over the data [default: 1]
    #[arg(long, requires = "model", conflicts_with = "steps", value_parser = at_least(1))]
    epochs: Option<usize>,
    /// Steps, also the length of the schedule
    #[arg(long, value_parser = at_least(1))]
    steps: Option<usize>,
    /// Records per micro-batch
    #[arg(long, requires = "model", default_value_t = 1, value_parser = at_least(1))]
    batch_size: usize,
    /// Micro-batches per step; with --gradients per-shard, and other methods than hd-pissa, times
    /// --shards [default: 1; with shared gradients as many as --shards]
    #[arg(long, requires = "model", value_parser = at_least(1))]
    accumulation: Option<usize>,
    /// Pack the records of a micro-batch into one row without padding; the result is the same
    #[arg(long, requires = "model")]
    packing: bool,
    /// Put records of about the same length into one micro-batch, so that little of it is padding
    #[arg(long, requires = "model")]
    group_by_length: bool,
    /// Over what the loss of a step is the mean: over all its target tokens, or over the means of its
    /// micro-batches, as published [default: tokens]
    #[arg(long, requires = "model")]
    loss_mean: Option<LossMean>,
    /// Largest global gradient norm; of each shard where it has gradients of its own
    #[arg(long, requires = "model", value_parser = positive)]
    clip: Option<f64>,
    /// Decoupled weight decay; not with HD-PiSSA
    #[arg(long, requires = "model", value_parser = not_negative)]
    weight_decay: Option<f64>,
    /// Seed of the order, of generated problems and of random adapters
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Keep the order of the file: shard k takes records k, k+K, k+2K, ...
    #[arg(long, requires = "model")]
    no_shuffle: bool,
    /// Threads that share the shards of HD-PiSSA; must divide their number. The result is the same
    #[arg(long, value_name = "N", requires = "model", default_value_t = 1, value_parser = at_least(1))]
    workers: usize,
    /// Compute threads of this process, shared out among its workers; without --model trainings at a
    /// time. The result is the same [default: as many as cores]
    #[arg(long, value_name = "N", value_parser = at_least(1))]
    threads: Option<usize>,
    /// One worker in each of the processes that an MPI launcher starts, as in `mpirun -np 4
    /// llama_math --mpi ...`; their number must divide that of shards. Takes a build with the
    /// feature `mpi`
    #[arg(long, requires = "model", conflicts_with = "workers")]
    mpi: bool,
    /// How long workers wait for one that does not answer, in seconds
    #[arg(long, value_name = "SECONDS", requires = "model", default_value_t = 60.0, value_parser = positive)]
    timeout: f64,
    /// In what precision deltas of HD-PiSSA travel between workers; bf16 halves the traffic and
    /// rounds them, also where one worker has them all
    #[arg(long, requires = "model", default_value = "f32", value_parser = wire())]
    wire: CommunicationDtype,
    /// Backend, such as flex, wgpu or cuda:0, as far as built in; with several workers and no index
    /// each takes a CUDA or ROCm device of its own
    #[arg(long)]
    device: Option<String>,
    /// Save a checkpoint every so many steps, and after the last
    #[arg(long, value_name = "STEPS", requires = "model", value_parser = at_least(1))]
    save_every: Option<usize>,
    /// Save a checkpoint when so many minutes have passed since the one before, and after the last
    /// step
    #[arg(long, value_name = "M", requires = "model", value_parser = positive)]
    save_minutes: Option<f64>,
    /// Checkpoints that are kept
    #[arg(long, value_name = "N", requires = "model", default_value_t = 2, value_parser = at_least(1))]
    keep_last: usize,
    /// Folder of the checkpoints [default: OUTPUT.checkpoints]
    #[arg(long, value_name = "DIR", requires = "model")]
    checkpoints: Option<PathBuf>,
    /// Go on from a checkpoint: the newest of this run, or that in DIR
    #[arg(long, value_name = "DIR", requires = "model", num_args = 0..=1, default_missing_value = "latest")]
    resume: Option<PathBuf>,
    /// Settings that may differ from those of the checkpoint to go on from
    #[arg(
        long,
        value_name = "SETTING",
        requires = "resume",
        value_delimiter = ','
    )]
    change: Vec<Change>,
    /// Held-out data for loss and exact match: a file, a folder, or OWNER/NAME on the Hub
    #[arg(long, value_name = "PATH", requires = "model")]
    eval: Option<PathBuf>,
    /// Records of --eval that are used
    #[arg(long, requires = "eval", default_value_t = 50, value_parser = at_least(1))]
    eval_samples: usize,
    /// Longest generated answer, in tokens; 0 skips the answers and measures the loss alone
    #[arg(long, requires = "eval", default_value_t = 256, value_parser = at_least(0))]
    max_new_tokens: usize,
    #[command(flatten)]
    watching: WatchingOptions,
    /// Folder of the results [default: without --model target/llama_math]
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
    /// Dtype of the written weights; `same` is that of the checkpoint
    #[arg(long, value_name = "DTYPE", requires = "model", default_value = "same")]
    output_dtype: OutputDtype,
    /// How 16-bit weights are rounded; to the nearest value most of a small update is lost
    #[arg(long, requires = "model", default_value = "nearest")]
    rounding: Rounding,
    /// Replace the folder of an earlier run
    #[arg(long)]
    overwrite: bool,
    /// A short run: few steps and few evaluated records
    #[arg(long)]
    quick: bool,
}

#[derive(Args, Debug)]
struct PretrainOptions {
    /// Folder of the checkpoint
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    /// Seed of weights and texts
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Steps
    #[arg(long, default_value_t = 2500, value_parser = at_least(1))]
    steps: usize,
    /// Backend
    #[arg(long)]
    device: Option<String>,
    /// Replace an existing folder
    #[arg(long)]
    overwrite: bool,
}

#[derive(Args, Debug)]
struct ScalingOptions {
    /// Workers of the run that is predicted
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = at_least(1))]
    workers: usize,
    /// Its shards [default: as many as workers]
    #[arg(long, value_parser = at_least(1))]
    shards: Option<usize>,
    /// Rank of each shard
    #[arg(long, default_value_t = 16, value_parser = at_least(1))]
    rank: usize,
    /// Tokens of each shard in each step
    #[arg(long, default_value_t = 4096, value_parser = at_least(1))]
    tokens: usize,
    /// What reaches each worker, in GB/s
    #[arg(long, value_name = "GB/S", default_value_t = 25.0, value_parser = positive)]
    bandwidth: f64,
    /// Folder of the model that is predicted [default: the shapes of Llama 2 7B]
    #[arg(long, value_name = "DIR", conflicts_with = "shapes")]
    model: Option<PathBuf>,
    /// The adapted weights of another model, as ROWSxCOLUMNSxCOUNT,...
    #[arg(long)]
    shapes: Option<String>,
    /// Tokens per second of one worker, if known from a run of the model on such a device
    #[arg(long, value_name = "T", value_parser = positive)]
    tokens_per_second: Option<f64>,
    /// Seed of problems and weights
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Backend
    #[arg(long)]
    device: Option<String>,
    /// Folder of tables and picture [default: target/scaling, which is replaced]
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
    /// Replace an existing folder
    #[arg(long)]
    overwrite: bool,
    /// Few shards and steps
    #[arg(long)]
    quick: bool,
}

#[derive(Args, Debug)]
struct SweepOptions {
    /// Tasks
    #[arg(long, value_delimiter = ',', default_values_t = Task::COMPARED)]
    tasks: Vec<Task>,
    /// Methods
    #[arg(long, value_delimiter = ',', default_values_t = Row::swept())]
    rows: Vec<Row>,
    /// Seeds by which learning rates are chosen
    #[arg(long, value_delimiter = ',', default_values_t = [1])]
    tuning_seeds: Vec<u64>,
    /// Seeds of the results
    #[arg(long, value_delimiter = ',', default_values_t = [2, 3, 4])]
    seeds: Vec<u64>,
    /// Trainings at a time [default: as many as cores]
    #[arg(long, value_name = "N", value_parser = at_least(1))]
    threads: Option<usize>,
    /// Backend
    #[arg(long)]
    device: Option<String>,
    /// Folder with a file for each training
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    /// Folder of table, picture and best learning rates [default: that of --output]
    #[arg(long, value_name = "DIR")]
    results: Option<PathBuf>,
    /// Few steps and few test problems or facts
    #[arg(long)]
    quick: bool,
}

impl SweepOptions {
    fn run(self) -> Result<(), Error> {
        let device = device::parse(self.device.as_deref())?;
        let children = Children {
            folder: self.output,
            processes: self.threads.unwrap_or_else(cores),
            device: self.device,
            files: None,
            record: false,
            until: None,
            program: children::this_program,
        };
        let sweep = Sweep {
            tasks: self.tasks,
            rows: self.rows,
            tuning_seeds: self.tuning_seeds,
            seeds: self.seeds,
            rank: 4,
            shards: 8,
            quick: self.quick,
        };
        let findings = sweep.run(&children)?;
        let mut base = Vec::new();
        for &task in &sweep.tasks {
            base.push((task, sweep.base(task, &device)?));
        }
        let folder = self.results.unwrap_or(children.folder);
        results::write(&folder, &sweep, &findings, &base)
    }
}

#[derive(Args, Debug)]
struct FilesOptions {
    /// Folder of a checkpoint, for tasks with records
    #[arg(long, value_name = "DIR", requires_all = ["data", "test"])]
    model: Option<PathBuf>,
    /// Its training data
    #[arg(long, value_name = "FILE", requires = "model")]
    data: Option<PathBuf>,
    /// Its test data
    #[arg(long, value_name = "FILE", requires = "model")]
    test: Option<PathBuf>,
}

impl FilesOptions {
    fn files(&self) -> Option<Files> {
        Some(Files {
            model: self.model.clone()?,
            train: self.data.clone()?,
            test: self.test.clone()?,
        })
    }
}

#[derive(Args, Debug)]
struct ReproduceOptions {
    /// What is run
    #[arg(long, value_name = "FILE", default_value = REPRODUCE_SETTINGS)]
    settings: PathBuf,
    /// Folder with a file for each training
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    /// Folder of tables, pictures and numbers [default: that of --output]
    #[arg(long, value_name = "DIR")]
    results: Option<PathBuf>,
    #[command(flatten)]
    files: FilesOptions,
    /// Start no training after so many minutes, and write what there is; 0 runs nothing
    #[arg(long, value_name = "M", value_parser = not_negative)]
    minutes: Option<f64>,
    /// Trainings at a time [default: as many as cores]
    #[arg(long, value_name = "N", value_parser = at_least(1))]
    threads: Option<usize>,
    /// Backend
    #[arg(long)]
    device: Option<String>,
}

impl ReproduceOptions {
    fn run(self) -> Result<(), Error> {
        let settings = Settings::read(&self.settings)?;
        let children = Children {
            folder: self.output,
            processes: self.threads.unwrap_or_else(cores),
            device: self.device,
            files: self.files.files(),
            record: false,
            until: self.minutes.map(|number| Instant::now() + minutes(number)),
            program: children::this_program,
        };
        let answers = settings.run(&children)?;
        let folder = self.results.unwrap_or(children.folder);
        report::write(&folder, &settings, &answers)
    }
}

#[derive(Args, Debug)]
struct RecipeOptions {
    /// The recipe
    file: PathBuf,
    /// Print shapes, memory, bytes and hours, and train nothing. Needs neither model nor data
    #[arg(long)]
    dry_run: bool,
    /// Tokens per second of one GPU, for the hours of a dry run; the default is a guess
    #[arg(long, value_name = "T", requires = "dry_run", default_value_t = 2000.0, value_parser = positive)]
    tokens_per_second: f64,
}

impl RecipeOptions {
    fn run(self) -> Result<(), Error> {
        let recipe = Recipe::read(&self.file)?;
        let program = ["llama_math".to_string()].into_iter();
        let cli = Cli::parse_from(program.chain(recipe.arguments()));
        let options = &cli.options;
        match (&options.model, &options.output) {
            (Some(model), Some(output)) if self.dry_run => {
                let run = options.fine_tuning(model, output)?.run;
                recipe.dry_run(&run, self.tokens_per_second)
            }
            (Some(_), _) => cli.run(),
            _ => Err(Error::field(&self.file, "options / model", "is missing")),
        }
    }
}

#[derive(Args, Debug)]
struct TrialOptions {
    /// The trial, as JSON
    #[arg(long)]
    settings: String,
    /// File of the result
    #[arg(long)]
    result: PathBuf,
    /// Write its steps and changes into it too
    #[arg(long)]
    record: bool,
    #[command(flatten)]
    files: FilesOptions,
    /// Backend
    #[arg(long)]
    device: Option<String>,
}

/// Number of cores.
fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

impl ScalingOptions {
    fn run(self) -> Result<(), Error> {
        let device = device::parse(self.device.as_deref())?;
        let (model, shapes) = match (&self.model, &self.shapes) {
            (Some(folder), _) => (
                folder.display().to_string(),
                Question::shapes_of(folder, &device)?,
            ),
            (None, Some(shapes)) => ("these weights".into(), Question::parse_shapes(shapes)?),
            (None, None) => ("Llama 2 7B".into(), Question::parse_shapes(LLAMA_2_7B)?),
        };
        let question = Question {
            model,
            work: Work {
                shapes,
                rank: self.rank,
                tokens: self.tokens as f64,
            },
            layout: Layout {
                shards: self.shards.unwrap_or(self.workers),
                workers: self.workers,
            },
            bandwidth: 1e9 * self.bandwidth,
            tokens_per_second: self.tokens_per_second,
        };
        let scaling = Scaling::new(self.quick, self.seed, question);
        let report = match self.output {
            Some(output) => scaling.run(&device, &output, self.overwrite),
            None => scaling.run(&device, SCALING_OUTPUT.as_ref(), true),
        };
        report.map(drop)
    }
}

impl Cli {
    /// Does what the command line says.
    ///
    /// # Errors
    ///
    /// Whatever goes wrong; [`Error::exit_code`] tells usage errors from others.
    pub fn run(self) -> Result<(), Error> {
        console::start(self.quiet)?;
        let threads = self.options.threads;
        let limit = |reason| Error::Environment {
            variable: "memory",
            reason,
        };
        memory::check_limit(threads.unwrap_or_else(cores)).map_err(limit)?;
        if let Some(threads) = threads {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
            pool.build_global().map_err(|error| Error::Option {
                option: "threads",
                reason: error.to_string(),
            })?;
        }
        device::check_variable()?;
        match self.command {
            Some(Command::Pretrain(options)) => {
                let device = device::parse(options.device.as_deref())?;
                let pretraining = Pretraining {
                    seed: options.seed,
                    steps: options.steps,
                    batch_size: 32,
                    lr: 2e-3,
                };
                pretraining.run(&device, &options.output, options.overwrite)
            }
            Some(Command::Scaling(options)) => options.run(),
            Some(Command::Sweep(options)) => options.run(),
            Some(Command::Export(options)) => options.run(),
            Some(Command::Verify(options)) => options.run(),
            Some(Command::Reproduce(options)) => options.run(),
            Some(Command::Recipe(options)) => options.run(),
            Some(Command::Trial(options)) => {
                children::end_with_parent();
                let device = device::parse(options.device.as_deref())?;
                let files = options.files.files();
                children::run_trial(
                    &options.settings,
                    &device,
                    files.as_ref(),
                    options.record,
                    &options.result,
                )
            }
            None => match (&self.options.model, &self.options.output) {
                (Some(model), Some(output)) => {
                    let fine_tuning = self.options.fine_tuning(model, output)?.fetch()?;
                    let device = self.options.device.as_deref();
                    if self.options.mpi {
                        return mpi::run(&fine_tuning, device);
                    }
                    let workers = self.options.workers;
                    fine_tuning.run.check_workers("workers", workers)?;
                    fine_tuning.run(&device::of_workers(device, workers)?)
                }
                _ => self.options.compare(),
            },
        }
    }
}

impl Options {
    fn compare(self) -> Result<(), Error> {
        let device = device::parse(self.device.as_deref())?;
        let defaults = Comparison::new(self.threads.unwrap_or_else(cores));
        let comparison = Comparison {
            seed: self.seed,
            steps: self.steps,
            rank: self.rank.unwrap_or(defaults.rank),
            shards: self.shards,
            lr: self.lr,
            quick: self.quick,
            device: self.device,
            ..defaults
        };
        match self.output {
            Some(output) => comparison.run(&device, &output, self.overwrite),
            None => comparison.run(&device, COMPARISON_OUTPUT.as_ref(), true),
        }
    }

    /// Gradients, windows and scale of the frames: as given, and for the rest shared gradients and
    /// random directions, which recall more facts than the published form in the sweep of the book.
    /// Other methods than HD-PiSSA do not read them.
    fn form(&self) -> (GradientMode, Windows, FrameScale) {
        if self.published || self.method != Method::HdPissa {
            let leading = Windows::Leading;
            return (GradientMode::PerShard, leading, FrameScale::Balanced);
        }
        let windows = self.windows.unwrap_or(match self.frame_scale {
            Some(FrameScale::Balanced) => WindowsOption::Leading,
            _ => WindowsOption::Random,
        });
        let frame_scale = self.frame_scale.unwrap_or(match windows {
            WindowsOption::Leading => FrameScale::Balanced,
            _ => FrameScale::Unit,
        });
        let gradients = self.gradients.unwrap_or(GradientMode::Shared);
        (gradients, windows.with_seed(self.seed), frame_scale)
    }

    fn fine_tuning(
        &self,
        model: &std::path::Path,
        output: &std::path::Path,
    ) -> Result<FineTuning, Error> {
        if self.method == Method::HdPissa && self.weight_decay.is_some() {
            return Err(Error::Usage {
                option: "weight-decay",
                reason: "hd-pissa has none: its factors are fixed, and decaying them would not \
                         decay the weights"
                    .into(),
            });
        }
        let of_hd_pissa = [
            ("published", self.published, "no form of its own"),
            (
                "gradients",
                self.gradients.is_some(),
                "no shards that could share gradients",
            ),
            (
                "wire",
                self.wire != CommunicationDtype::F32,
                "no deltas that workers exchange",
            ),
            (
                "windows",
                self.windows.is_some(),
                "no shards that hold directions",
            ),
            ("frame-scale", self.frame_scale.is_some(), "no frames"),
        ];
        for (option, is_given, lacks) in of_hd_pissa {
            if self.method != Method::HdPissa && is_given {
                return Err(Error::Usage {
                    option,
                    reason: format!("{} has {lacks}", self.method),
                });
            }
        }
        let (gradients, windows, frame_scale) = self.form();
        let groups = match gradients {
            GradientMode::PerShard => self.shards,
            GradientMode::Shared => 1,
        };
        if let (Windows::Random { .. }, FrameScale::Balanced) = (windows, frame_scale) {
            return Err(Error::Usage {
                option: "windows",
                reason: "random directions have no singular values to balance: leave out \
                         --frame-scale, or choose unit"
                    .into(),
            });
        }
        let decomposes = match self.method {
            Method::HdPissa => windows == Windows::Leading,
            Method::Pissa => true,
            Method::Lora | Method::Full => false,
        };
        if self.svd.is_some() && !decomposes {
            let reason = match self.method {
                Method::HdPissa => {
                    "takes --windows leading, or --published: other directions than the \
                                    leading ones are found in one way"
                        .into()
                }
                method => format!("{method} has no principal components"),
            };
            return Err(Error::Usage {
                option: "svd",
                reason,
            });
        }
        let length = match (self.steps, self.epochs, self.quick) {
            (Some(steps), ..) => Length::Steps(steps),
            (None, _, true) => Length::Steps(2),
            (None, epochs, false) => Length::Epochs(epochs.unwrap_or(1)),
        };
        let samples = if self.quick {
            self.eval_samples.min(2)
        } else {
            self.eval_samples
        };
        Ok(FineTuning {
            model: model.into(),
            data: self.data.clone(),
            fields: self.fields.as_deref().map(Fields::parse).transpose()?,
            template: match (&self.prompt_template, self.chat) {
                (Some(path), _) => TemplateChoice::File(path.clone()),
                (None, true) => TemplateChoice::Chat,
                (None, false) => TemplateChoice::ByData,
            },
            max_length: self.max_length,
            eval: self.eval.clone().map(|path| (vec![path], samples)),
            max_new_tokens: self.max_new_tokens,
            token_cache: match self.no_cache {
                true => TokenCache::none(),
                false => TokenCache::of_user(),
            },
            run: RunConfig {
                adaptation: Adaptation {
                    method: self.method,
                    rank: self.rank.unwrap_or(16),
                    shards: self.shards,
                    windows,
                    frame_scale,
                    alpha: self.alpha,
                    targets: self.targets.clone(),
                    gradients,
                    svd: self.svd.unwrap_or_default(),
                    svd_cache: user_cache::folder().filter(|_| !self.no_cache),
                },
                optimizer: OptimizerSettings {
                    clip: self.clip,
                    weight_decay: self.weight_decay.unwrap_or(0.0),
                    wire: self.wire,
                    loss_mean: match (self.loss_mean, self.published) {
                        (Some(mean), _) => mean,
                        (None, true) => LossMean::MicroBatches,
                        (None, false) => LossMean::Tokens,
                    },
                },
                batcher: BatcherConfig {
                    shards: groups,
                    accumulation: self.accumulation.unwrap_or(self.shards / groups),
                    batch_size: self.batch_size,
                    shuffle: (!self.no_shuffle).then_some(self.seed),
                    packing: self.packing,
                    by_length: self.group_by_length,
                },
                length,
                lr: self.lr.unwrap_or(2e-5),
                decay: self.schedule,
                warmup_ratio: self.warmup_ratio,
            },
            output: output.into(),
            overwrite: self.overwrite,
            export: ExportConfig {
                dtype: self.output_dtype,
                rounding: self.rounding,
                seed: self.seed,
                ..ExportConfig::default()
            },
            seed: self.seed,
            saving: SaveOptions {
                folder: self.checkpoints.clone(),
                every: self.save_every,
                interval: self.save_minutes.map(minutes),
                keep_last: self.keep_last,
                resume: self.resume.clone().map(|path| match path.to_str() {
                    Some("latest") => Resume::Latest,
                    _ => Resume::At(path),
                }),
                change: self.change.clone(),
            },
            timeout: seconds(self.timeout),
            watch: self.watching.options(),
        })
    }
}

/// A time from the command line. Thirty years are as good as never, and a clock can add them.
fn seconds(seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds.min(1e9))
}

fn minutes(minutes: f64) -> Duration {
    seconds(60.0 * minutes)
}
