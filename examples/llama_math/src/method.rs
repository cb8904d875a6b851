//! The methods that are compared, and how each prepares a model.

use std::fmt::{self, Display, Formatter};
use std::ops::Range;
use std::path::PathBuf;

use burn::module::{Lora, Module, ModuleVisitor, Param, ParamGroup};
use burn::tensor::Tensor;
use clap::ValueEnum;
use hd_pissa::checkpoint::{Checkpoint, CheckpointError};
use hd_pissa::comm::{Communicator, Solo};
use hd_pissa::{
    FrameScale, GradientMode, HdPissa, HdPissaConfig, PissaConfig, PissaModule, SvdCache,
    SvdMethod, SvdPrecision, Windows,
};
use regex::Regex;
use serde::{Deserialize, Serialize};

use crate::decompositions::Decompositions;
use crate::{Error, Llama};

/// A way to fine-tune.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// Low-rank adapters that start at zero.
    Lora,
    /// One low-rank adapter that starts at the leading principal components.
    Pissa,
    /// High-rank updates from shards of principal components.
    HdPissa,
    /// Every parameter.
    Full,
}

impl Method {
    /// All of them, in the order of the table.
    pub const ALL: [Self; 4] = [Self::Lora, Self::Pissa, Self::HdPissa, Self::Full];
}

impl Display for Method {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Lora => "lora",
            Self::Pissa => "pissa",
            Self::HdPissa => "hd-pissa",
            Self::Full => "full",
        })
    }
}

/// A gradient mode as the command line has it.
pub fn gradients_name(gradients: GradientMode) -> &'static str {
    match gradients {
        GradientMode::PerShard => "per-shard",
        GradientMode::Shared => "shared",
    }
}

/// Which directions of a weight the shards of HD-PiSSA hold: [`Windows`] without a seed of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum WindowsOption {
    /// The leading components, as published.
    Leading,
    /// Components spread evenly over the whole spectrum.
    Spread,
    /// The trailing components.
    Trailing,
    /// Random directions of the run's seed, without a decomposition; with `--frame-scale unit`.
    Random,
}

impl WindowsOption {
    /// The choice in a run with this seed.
    pub fn with_seed(self, seed: u64) -> Windows {
        match self {
            Self::Leading => Windows::Leading,
            Self::Spread => Windows::Spread,
            Self::Trailing => Windows::Trailing,
            Self::Random => Windows::Random { seed },
        }
    }
}

/// How principal components are computed: [`SvdMethod`] without a precision.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum SvdOption {
    /// By a full decomposition.
    #[default]
    Exact,
    /// By a block Krylov method, and in full where that does not converge.
    Krylov,
}

impl From<SvdOption> for SvdMethod {
    fn from(option: SvdOption) -> Self {
        match option {
            SvdOption::Exact => Self::Exact(SvdPrecision::F32),
            SvdOption::Krylov => Self::Krylov,
        }
    }
}

/// The projections of attention and feed-forward layers.
pub const DEFAULT_TARGETS: &str = r"(q|k|v|o|gate|up|down)_proj\.weight$";

/// Which weights are adapted, and how.
#[derive(Clone, Debug)]
pub struct Adaptation {
    /// The method.
    pub method: Method,
    /// Rank of an adapter; with HD-PiSSA of each shard's.
    pub rank: usize,
    /// Number of shards of HD-PiSSA.
    pub shards: usize,
    /// Which directions of a weight the shards of HD-PiSSA hold.
    pub windows: Windows,
    /// How long the frames of HD-PiSSA are.
    pub frame_scale: FrameScale,
    /// Numerator of the scale `alpha / rank`; `None` for a scale of 1.
    pub alpha: Option<f64>,
    /// Regular expression on parameter paths; `None` for [`DEFAULT_TARGETS`].
    pub targets: Option<String>,
    /// Which gradients a shard of HD-PiSSA learns from.
    pub gradients: GradientMode,
    /// How HD-PiSSA and PiSSA compute principal components.
    pub svd: SvdOption,
    /// The folder where these are kept for later runs, if any.
    pub svd_cache: Option<PathBuf>,
}

impl Adaptation {
    /// Refuses a number of workers that cannot share out evenly the shards, or the `micro_batches` of
    /// a step where these are for all shards.
    ///
    /// # Errors
    ///
    /// [`Error::Usage`] for `option`, which chooses the number.
    pub fn check_workers(
        &self,
        option: &'static str,
        workers: usize,
        micro_batches: usize,
    ) -> Result<(), Error> {
        let Self { method, shards, .. } = self;
        let reason = if workers > 1 && *method != Method::HdPissa {
            format!("{method} has no shards to share out")
        } else if !shards.is_multiple_of(workers) {
            format!("{workers} workers cannot share {shards} shards out evenly")
        } else if self.shares_gradients() && !micro_batches.is_multiple_of(workers) {
            format!(
                "{workers} workers cannot share out evenly the {micro_batches} micro-batches of a \
                 step; --accumulation sets their number"
            )
        } else {
            return Ok(());
        };
        Err(Error::Usage { option, reason })
    }

    /// The names of the adapted weights, as a regular expression.
    ///
    /// # Errors
    ///
    /// [`Error::Option`] for a pattern that is none.
    pub(crate) fn names(&self) -> Result<Regex, Error> {
        let pattern = self.targets.as_deref().unwrap_or(DEFAULT_TARGETS);
        Regex::new(pattern).map_err(|error| {
            // The last line says what is wrong.
            let message = error.to_string();
            let reason = message.lines().last().unwrap_or_default().trim();
            Error::Option {
                option: "targets",
                reason: format!("`{pattern}` is no regular expression: {reason}"),
            }
        })
    }

    /// Whether every shard learns from all micro-batches.
    pub fn shares_gradients(&self) -> bool {
        self.method == Method::HdPissa && self.gradients == GradientMode::Shared
    }

    /// Attaches the adapters and freezes what is not trained.
    ///
    /// # Errors
    ///
    /// [`Error::Option`] for a pattern that is no regular expression or matches no matrix and a
    /// LoRA rank that is too large, and [`Error::Adapter`].
    pub fn apply(&self, model: Llama) -> Result<Llama, Error> {
        self.apply_hosted(model, 0..self.shards, &Solo, None)
    }

    /// As [`apply`](Self::apply), on a worker that hosts only some of HD-PiSSA's shards. Workers
    /// share the decompositions. With a checkpoint of the same run all parameters get its values, and
    /// nothing is decomposed.
    ///
    /// # Errors
    ///
    /// Those of [`apply`](Self::apply), and [`Error::Checkpoint`].
    pub fn apply_hosted(
        &self,
        model: Llama,
        hosted: Range<usize>,
        communicator: &dyn Communicator,
        saved: Option<&Checkpoint>,
    ) -> Result<Llama, Error> {
        let pattern = self.targets.as_deref().unwrap_or(DEFAULT_TARGETS);
        let invalid = |reason| Error::Option {
            option: "targets",
            reason,
        };
        // Checked here for its message, which Burn's error does not carry.
        self.names()?;
        let targets = ParamGroup::from_regex(pattern)
            .map_err(|error| invalid(format!("`{pattern}`: {error:?}")))?;
        let matched: Vec<(String, [usize; 2])> = model
            .matrices()
            .into_iter()
            .filter(|(path, weight)| targets.matches(&weight.id, Some(path)))
            .map(|(path, weight)| (path, weight.lazy_shape().dims()))
            .collect();
        if matched.is_empty() {
            let example = "model.layers.0.self_attn.q_proj.weight";
            return Err(invalid(format!(
                "`{pattern}` matches no matrix, such as `{example}`"
            )));
        }
        let svd_cache = self.svd_cache.clone().map(SvdCache::new);
        let lora = || Lora {
            param_group: targets.clone(),
            ..Lora::new(self.rank, self.alpha.unwrap_or(self.rank as f64))
        };
        match self.method {
            Method::Full => restored(model, saved),
            Method::HdPissa => {
                let config = HdPissaConfig::new()
                    .with_rank(self.rank)
                    .with_shards(self.shards)
                    .with_windows(self.windows)
                    .with_frame_scale(self.frame_scale)
                    .with_alpha(self.alpha)
                    .with_gradients(self.gradients)
                    .with_svd(self.svd.into())
                    .with_svd_cache(svd_cache)
                    .with_targets(Some(targets));
                if let Some(saved) = saved {
                    return Ok(saved.apply_hd_pissa(model, &config, hosted)?);
                }
                let mut found = Decompositions::default();
                let adapters =
                    HdPissa::prepare_shared(&model, &config, hosted, communicator, |weight| {
                        found.push(&weight);
                    })?;
                found.report();
                Ok(model.apply_reparameterization(adapters))
            }
            // PiSSA is LoRA that starts elsewhere.
            Method::Pissa if saved.is_some() => restored(model.apply_lora(lora()), saved),
            Method::Pissa => {
                let config = PissaConfig::new()
                    .with_rank(self.rank)
                    .with_alpha(self.alpha)
                    .with_svd(self.svd.into())
                    .with_svd_cache(svd_cache)
                    .with_targets(Some(targets));
                Ok(model.apply_pissa(&config)?)
            }
            Method::Lora => {
                for (path, [d_input, d_output]) in matched {
                    if self.rank == 0 || self.rank > d_input.min(d_output) {
                        let reason = format!(
                            "is {}; `{path}` of shape [{d_input}, {d_output}] takes 1 to {}",
                            self.rank,
                            d_input.min(d_output)
                        );
                        return Err(Error::Option {
                            option: "rank",
                            reason,
                        });
                    }
                }
                let mut lora = lora();
                // The deviation of PEFT's uniform start, for inputs as wide as the hidden state.
                let hidden = model.model.embed_tokens.weight.lazy_shape()[1];
                lora.init_std = Some((3.0 * hidden as f64).sqrt().recip());
                restored(model.apply_lora(lora), saved)
            }
        }
    }
}

/// The model with the values of the checkpoint, if there is one.
fn restored(model: Llama, saved: Option<&Checkpoint>) -> Result<Llama, Error> {
    Ok(match saved {
        Some(saved) => saved.restore(model).map_err(CheckpointError::from)?,
        None => model,
    })
}

/// Number of values that gradients move.
pub fn num_trainable(model: &impl Module) -> usize {
    struct Count(usize);

    impl ModuleVisitor for Count {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            if param.is_require_grad() {
                self.0 += param.lazy_shape().num_elements();
            }
        }
    }

    let mut count = Count(0);
    model.visit(&mut count);
    count.0
}
