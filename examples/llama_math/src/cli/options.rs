//! The options of a fine-tuning and of the comparison.

use std::path::{Path, PathBuf};

use clap::Args;
use hd_pissa::{CommunicationDtype, FrameScale, GradientMode, Windows};

use super::parse::{
    at_least, cores, frame_scale, gradients, minutes, not_negative, positive, seconds, share, wire,
};
use super::watching::WatchingOptions;
use crate::batch::BatcherConfig;
use crate::compare::Comparison;
use crate::data::Fields;
use crate::export::{ExportConfig, OutputDtype, Rounding};
use crate::finetune::{Change, FineTuning, Resume, SaveOptions, TemplateChoice};
use crate::loss::LossMean;
use crate::method::{Adaptation, Method, SvdOption, WindowsOption};
use crate::model_dtype::ModelDtype;
use crate::run::{Length, RunConfig};
use crate::schedule::Decay;
use crate::token_cache::TokenCache;
use crate::train::OptimizerSettings;
use crate::{Error, device, mpi, user_cache};

/// Where the comparison writes unless told otherwise; replaced by the next run.
const COMPARISON_OUTPUT: &str = "target/llama_math";

#[derive(Args, Debug)]
pub(super) struct Options {
    /// Folder of a Hugging Face checkpoint, or OWNER/NAME on the Hub (feature `hub`): Llama 2 or 3,
    /// Mistral, Qwen2, Qwen3, Phi-3, SmolLM2, SmolLM3
    #[arg(long, value_name = "MODEL", requires_all = ["data", "output"])]
    pub(super) model: Option<PathBuf>,
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
    /// Dtype of weights and activations while the model trains and answers; bf16 with HD-PiSSA alone, whose
    /// updates lose nothing by it
    #[arg(long, requires = "model", default_value = "f32")]
    dtype: ModelDtype,
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
    pub(super) threads: Option<usize>,
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
    pub(super) output: Option<PathBuf>,
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

impl Options {
    /// Fine-tunes, or compares methods where there is no model.
    pub(super) fn run(self) -> Result<(), Error> {
        let (Some(model), Some(output)) = (&self.model, &self.output) else {
            return self.compare();
        };
        let fine_tuning = self.fine_tuning(model, output)?.fetch()?;
        let device = self.device.as_deref();
        if self.mpi {
            return mpi::run(&fine_tuning, device);
        }
        let workers = self.workers;
        fine_tuning.run.check_workers("workers", workers)?;
        fine_tuning.run(&device::of_workers(device, workers)?)
    }

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

    /// The settings of a fine-tuning of `model` that writes `output`.
    pub(super) fn fine_tuning(&self, model: &Path, output: &Path) -> Result<FineTuning, Error> {
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
            (
                "dtype",
                self.dtype == ModelDtype::Bf16,
                "no residual bits, which keep what a bf16 weight would lose of an update; take f32",
            ),
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
            dtype: self.dtype,
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
