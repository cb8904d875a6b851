//! Which weights are adapted, and what that costs.

use std::fmt::{self, Display, Formatter};

use burn::module::{Module, ModuleVisitor, Param, ParamGroup, ParamId};
use burn::tensor::{DType, Tensor, TensorData};

use crate::frames::{self, WeightFrames};
use crate::path::REPARAMETERIZATION;
use crate::svd::Decomposition;
use crate::{
    FrameScale, GradientMode, HdPissaConfig, HdPissaError, MergePrecision, SvdMethod, Windows, ops,
};

/// Names of the layers that are not adapted by default: heads, whose outputs are logits.
const HEADS: [&str; 2] = ["lm_head", "head"];

/// A weight chosen by the configuration, checked against it.
#[derive(Debug)]
pub(crate) struct Target {
    pub(crate) path: String,
    pub(crate) rank: usize,
    pub(crate) weight: Tensor<2>,
}

/// How targets are chosen and sized; shared by HD-PiSSA and its baseline PiSSA.
pub(crate) struct Selection<'a> {
    pub(crate) targets: Option<&'a ParamGroup>,
    pub(crate) rank: &'a dyn Fn(&ParamId, &str) -> usize,
    pub(crate) shards: usize,
    pub(crate) alpha: Option<f64>,
}

impl Selection<'_> {
    /// Which weights of `model` are targets and which are not.
    pub(crate) fn choose<M: Module>(&self, model: &M) -> Result<Choice, HdPissaError> {
        if self.shards == 0 {
            return Err(HdPissaError::ZeroShards);
        }
        if let Some(alpha) = self.alpha
            && !(alpha.is_finite() && alpha > 0.0)
        {
            return Err(HdPissaError::InvalidAlpha { alpha });
        }
        let mut finder = TargetFinder {
            selection: self,
            stack: Vec::new(),
            candidates: Vec::new(),
            choice: Choice::default(),
            error: None,
        };
        model.visit(&mut finder);
        match finder.error {
            Some(error) => Err(error),
            None if finder.choice.targets.is_empty() => Err(HdPissaError::NoTarget {
                candidates: finder.candidates,
            }),
            None => Ok(finder.choice),
        }
    }
}

/// The rank-2 parameters of a model, divided into targets and others, in traversal order.
#[derive(Default)]
pub(crate) struct Choice {
    pub(crate) targets: Vec<Target>,
    left_out: Vec<LeftOut>,
    /// Float parameters of the model.
    parameters: usize,
}

struct TargetFinder<'a> {
    selection: &'a Selection<'a>,
    /// Names and container types from the root.
    stack: Vec<(String, String)>,
    candidates: Vec<String>,
    choice: Choice,
    error: Option<HdPissaError>,
}

impl TargetFinder<'_> {
    fn path(&self) -> String {
        let names: Vec<&str> = self.stack.iter().map(|(name, _)| name.as_str()).collect();
        names.join(".")
    }

    /// Why a parameter of rank 2 is no target, if it is none.
    fn reason_to_leave_out(&self, id: &ParamId, path: &str) -> Option<LeftOutReason> {
        if let Some(group) = self.selection.targets {
            return (!group.matches(id, Some(path))).then_some(LeftOutReason::NotTargeted);
        }
        let is_linear = self.stack.last().is_some_and(|(name, container)| {
            name == "weight"
                && matches!(container.as_str(), "Struct:Linear" | "Struct:HdPissaLinear")
        });
        if !is_linear {
            return Some(LeftOutReason::NotLinear);
        }
        // The field that holds the layer; the last of the stack is `weight`.
        let layer = self.stack.iter().rev().nth(1);
        layer
            .is_some_and(|(name, _)| HEADS.contains(&name.as_str()))
            .then_some(LeftOutReason::Head)
    }
}

/// Refuses a weight that cannot have `shards` adapters of rank `rank`.
fn check(path: &str, rank: usize, shards: usize, weight: &Tensor<2>) -> Result<(), HdPissaError> {
    let path = path.to_string();
    if rank == 0 {
        return Err(HdPissaError::ZeroRank { path });
    }
    let [d_input, d_output] = weight.dims();
    if rank.saturating_mul(shards) > d_input.min(d_output) {
        return Err(HdPissaError::RankTooLarge {
            path,
            d_input,
            d_output,
            rank,
            shards,
        });
    }
    if !matches!(weight.dtype(), DType::F32 | DType::F16 | DType::BF16) {
        return Err(HdPissaError::UnsupportedDtype {
            path,
            dtype: weight.dtype(),
        });
    }
    let device = weight.device();
    if !ops::is_supported(&device) {
        return Err(HdPissaError::UnsupportedBackend {
            path,
            device: format!("{device:?}"),
        });
    }
    Ok(())
}

impl ModuleVisitor for TargetFinder<'_> {
    fn enter_module(&mut self, name: &str, container_type: &str) {
        if container_type == REPARAMETERIZATION {
            let path = self.path();
            self.error
                .get_or_insert_with(|| HdPissaError::AlreadyReparameterized {
                    path,
                    name: name.to_string(),
                });
        }
        self.stack.push((name.into(), container_type.into()));
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.stack.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.choice.parameters += param.lazy_shape().num_elements();
        if D != 2 || self.error.is_some() {
            return;
        }
        let path = self.path();
        if path.rsplit('.').next() == Some("weight") {
            self.candidates.push(path.clone());
        }
        if let Some(reason) = self.reason_to_leave_out(&param.id, &path) {
            let shape = param.lazy_shape();
            let shape = [shape[0], shape[1]];
            self.choice.left_out.push(LeftOut {
                path,
                shape,
                reason,
            });
            return;
        }
        let rank = (self.selection.rank)(&param.id, &path);
        let weight = Tensor::<2>::from_dispatch(param.base().into_dispatch());
        match check(&path, rank, self.selection.shards, &weight) {
            Ok(()) => self.choice.targets.push(Target { path, rank, weight }),
            Err(error) => self.error = Some(error),
        }
    }
}

impl HdPissaConfig {
    pub(crate) fn choose<M: Module>(&self, model: &M) -> Result<Choice, HdPissaError> {
        self.check_frames()?;
        Selection {
            targets: self.targets.as_ref(),
            rank: &|id, path| self.rank_of(id, path),
            shards: self.shards,
            alpha: self.alpha,
        }
        .choose(model)
    }

    fn check_frames(&self) -> Result<(), HdPissaError> {
        if let (Windows::Random { seed }, FrameScale::Balanced) = (self.windows, self.frame_scale) {
            return Err(HdPissaError::BalancedRandom { seed });
        }
        match (self.svd, self.windows) {
            (SvdMethod::Krylov, windows @ (Windows::Spread | Windows::Trailing)) => {
                Err(HdPissaError::KrylovWindows { windows })
            }
            _ => Ok(()),
        }
    }

    fn rank_of(&self, id: &ParamId, path: &str) -> usize {
        let mut entries = self.target_ranks.iter().rev();
        let found = entries.find(|entry| entry.targets.matches(id, Some(path)));
        found.map_or(self.rank, |entry| entry.rank)
    }

    /// The frames of all shards of a weight `[d_input, d_output]`: `a` of shape `[d_input, K·rank]` and `b`
    /// of shape `[K·rank, d_output]`, shard by shard, in `f32`.
    ///
    /// They are those of [`apply_hd_pissa`](crate::HdPissaModule::apply_hd_pissa) for a weight at
    /// `path`, bit for bit with the same build on the same kind of processor.
    /// [`target_ranks`](Self::target_ranks) that select weights by path count;
    /// [`targets`](Self::targets) does not.
    ///
    /// # Errors
    ///
    /// Those of `apply_hd_pissa` about one weight.
    pub fn frames(&self, path: &str, weight: &Tensor<2>) -> Result<[Tensor<2>; 2], HdPissaError> {
        self.check_frames()?;
        if self.shards == 0 {
            return Err(HdPissaError::ZeroShards);
        }
        // The id of no parameter.
        let rank = self.rank_of(&ParamId::from(0), path);
        check(path, rank, self.shards, weight)?;
        let frames = WeightFrames::compute(path, weight, rank, self)?;
        let [d_input, d_output] = weight.dims();
        let device = weight.device();
        let tensor = |values, dims| {
            let data = TensorData::new(values, dims);
            Tensor::<2>::from_data(data, (&device, DType::F32))
        };
        let windows = (0..self.shards).map(|shard| frames.window(shard));
        let (a, b) = windows
            .map(|(a, b)| (tensor(a, [d_input, rank]), tensor(b, [rank, d_output])))
            .unzip();
        Ok([Tensor::cat(a, 1), Tensor::cat(b, 0)])
    }

    /// What [`apply_hd_pissa`](crate::HdPissaModule::apply_hd_pissa) would do to `model`: a dry
    /// run, whose result prints as a table.
    ///
    /// Computes the singular values of every target, but no singular vectors, except that
    /// [`SvdMethod::Krylov`] finds both. With [`Windows::Random`] it computes the directions and no singular
    /// values.
    ///
    /// # Errors
    ///
    /// Those of `apply_hd_pissa`, except [`HdPissaError::InvalidHostedShards`].
    pub fn plan<M: Module>(&self, model: &M) -> Result<HdPissaPlan, HdPissaError> {
        let Choice {
            targets,
            left_out,
            parameters,
        } = self.choose(model)?;
        let weights = targets
            .into_iter()
            .map(|target| {
                let Target { path, rank, weight } = &target;
                let (explained_variance, decomposition) =
                    frames::explained_variance(path, weight, *rank, self)?;
                Ok(PlannedWeight {
                    shape: target.weight.dims(),
                    dtype: target.weight.dtype(),
                    explained_variance,
                    decomposition,
                    path: target.path,
                    rank: target.rank,
                })
            })
            .collect::<Result<_, HdPissaError>>()?;
        Ok(HdPissaPlan {
            weights,
            left_out,
            shards: self.shards,
            gradients: self.gradients,
            precision: self.precision,
            parameters,
        })
    }
}

/// One row of a [`HdPissaPlan`].
#[derive(Clone, Debug, PartialEq)]
pub struct PlannedWeight {
    /// Path of the weight.
    pub path: String,
    /// `[d_input, d_output]`.
    pub shape: [usize; 2],
    /// Its dtype.
    pub dtype: DType,
    /// Rank of each shard.
    pub rank: usize,
    /// Share of the weight's squared Frobenius norm in the window of each shard,
    /// `‖U_kᵀ W V_k‖² / ‖W‖²`.
    pub explained_variance: Vec<f64>,
    /// How its frames are found. [`Fallback`](Decomposition::Fallback) means that the block Krylov method
    /// does not converge.
    pub decomposition: Decomposition,
}

impl PlannedWeight {
    /// Trainable parameters of one shard: `rank · (d_input + d_output)`.
    pub fn parameters_per_shard(&self) -> usize {
        self.rank * (self.shape[0] + self.shape[1])
    }
}

/// A rank-2 parameter that a configuration does not adapt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeftOut {
    /// Path of the parameter.
    pub path: String,
    /// Its shape.
    pub shape: [usize; 2],
    /// Why it is no target.
    pub reason: LeftOutReason,
}

/// Why a rank-2 parameter is no target. Prints as a clause.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeftOutReason {
    /// [`HdPissaConfig::targets`] does not match it.
    NotTargeted,
    /// It is not the weight of a linear layer, but for example an embedding.
    NotLinear,
    /// It is the weight of a linear layer called `lm_head` or `head`.
    Head,
}

impl Display for LeftOutReason {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotTargeted => "the targets do not match it",
            Self::NotLinear => "not the weight of a linear layer",
            Self::Head => "a head, by its layer's name; name it in the targets to adapt it",
        })
    }
}

/// The weights that a configuration adapts in a model, with their cost. Prints as a table.
#[derive(Clone, Debug, PartialEq)]
pub struct HdPissaPlan {
    /// The adapted weights in traversal order.
    pub weights: Vec<PlannedWeight>,
    /// The other rank-2 parameters in traversal order.
    pub left_out: Vec<LeftOut>,
    /// Number of shards.
    pub shards: usize,
    /// Which gradients the shards learn from.
    pub gradients: GradientMode,
    /// What half-precision weights keep of an update.
    pub precision: MergePrecision,
    /// Float parameters of the model without adapters.
    pub parameters: usize,
}

impl HdPissaPlan {
    /// Trainable parameters of one shard.
    pub fn parameters_per_shard(&self) -> usize {
        self.weights
            .iter()
            .map(PlannedWeight::parameters_per_shard)
            .sum()
    }

    /// Trainable parameters of all shards.
    pub fn trainable_parameters(&self) -> usize {
        self.shards * self.parameters_per_shard()
    }

    /// Bytes of `f32` deltas that each shard contributes to the gather of one step.
    pub fn bytes_per_shard_and_step(&self) -> usize {
        4 * self.parameters_per_shard()
    }

    /// Bytes that each of `workers` sends in a step, once for each worker that it sends them to: `f32`
    /// deltas, and with [`GradientMode::Shared`] the gradients of the shards that others host.
    ///
    /// Counts of bad values, and gradients of dense parameters, come on top.
    ///
    /// # Panics
    ///
    /// If `workers` is 0.
    pub fn bytes_sent_per_step(&self, workers: usize) -> usize {
        let hosted = self.shards.div_ceil(workers);
        let deltas = (workers - 1) * hosted * self.bytes_per_shard_and_step();
        match self.gradients {
            GradientMode::PerShard => deltas,
            // To each worker the gradients of its shards, which are as large as the deltas.
            GradientMode::Shared => 2 * deltas,
        }
    }

    /// What the adapters take on the device of each of `workers` that share the shards evenly.
    ///
    /// # Panics
    ///
    /// If `workers` is 0.
    pub fn memory_per_worker(&self, workers: usize) -> PlannedMemory {
        let of_shards = |shards: usize| shards * self.bytes_per_shard_and_step();
        let hosted = self.shards.div_ceil(workers);
        let known = match self.gradients {
            GradientMode::PerShard => hosted,
            GradientMode::Shared => self.shards,
        };
        let weights = self.weights.iter();
        let halves = weights.filter(|weight| weight.dtype != DType::F32);
        let words = halves.map(|weight| weight.shape[0] * weight.shape[1].div_ceil(2));
        PlannedMemory {
            factors: of_shards(known),
            frames: of_shards(self.shards),
            gradients: of_shards(known),
            moments: 2 * of_shards(hosted),
            residuals: match self.precision {
                MergePrecision::Compensated => 4 * words.sum::<usize>(),
                _ => 0,
            },
        }
    }
}

/// Bytes that the adapters take on the device of a worker, between steps. Prints as a clause.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlannedMemory {
    /// The factors in the model: those of the hosted shards, or of all shards where these share
    /// gradients.
    pub factors: usize,
    /// The packed frames of all shards, which every worker keeps for its merges from the first step
    /// on. On a CPU, a worker whose model has the factors of all shards packs them for each merge
    /// instead, one weight after the other, and keeps nothing.
    pub frames: usize,
    /// One gradient for each factor in the model.
    pub gradients: usize,
    /// Two moments for each factor of the hosted shards, as Adam keeps them. Twice as much during a
    /// step, which keeps those from before it until it succeeds.
    pub moments: usize,
    /// The residual bits of half-precision weights.
    pub residuals: usize,
}

impl PlannedMemory {
    /// All of them.
    pub fn total(&self) -> usize {
        let Self {
            factors,
            frames,
            gradients,
            moments,
            residuals,
        } = self;
        factors + frames + gradients + moments + residuals
    }
}

/// A number of bytes with one decimal, in the largest unit that leaves no zero in front.
fn readable(bytes: usize) -> String {
    match [(1e9, "GB"), (1e6, "MB"), (1e3, "kB")]
        .into_iter()
        .find(|&(unit, _)| bytes as f64 >= unit)
    {
        Some((unit, name)) => format!("{:.1} {name}", bytes as f64 / unit),
        None => format!("{bytes} B"),
    }
}

impl Display for PlannedMemory {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "factors {}, frames of all shards {}, gradients {}, two moments {}",
            readable(self.factors),
            readable(self.frames),
            readable(self.gradients),
            readable(self.moments)
        )?;
        if self.residuals > 0 {
            write!(f, ", residual bits {}", readable(self.residuals))?;
        }
        write!(f, ": {} in all", readable(self.total()))
    }
}

impl Display for HdPissaPlan {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let width = self
            .weights
            .iter()
            .map(|weight| weight.path.len())
            .chain(self.left_out.iter().map(|left_out| left_out.path.len()))
            .max()
            .unwrap_or(0)
            .max("weight".len());
        writeln!(
            f,
            "{:width$}  {:>14}  {:>5}  {:>10}  {:>21}  {:>12}  {:>12}",
            "weight",
            "shape",
            "rank",
            "variance %",
            "first..last shard %",
            "trainable",
            "bytes/step"
        )?;
        for weight in &self.weights {
            let percent = |share: f64| format!("{:.2}", 100.0 * share);
            let first = weight.explained_variance.first().copied().unwrap_or(0.0);
            let last = weight.explained_variance.last().copied().unwrap_or(0.0);
            writeln!(
                f,
                "{:width$}  {:>14}  {:>5}  {:>10}  {:>21}  {:>12}  {:>12}",
                weight.path,
                format!("{}x{}", weight.shape[0], weight.shape[1]),
                weight.rank,
                percent(weight.explained_variance.iter().sum()),
                format!("{}..{}", percent(first), percent(last)),
                self.shards * weight.parameters_per_shard(),
                self.shards * 4 * weight.parameters_per_shard(),
            )?;
        }
        for left_out in &self.left_out {
            writeln!(
                f,
                "{:width$}  {:>14}  left out: {}",
                left_out.path,
                format!("{}x{}", left_out.shape[0], left_out.shape[1]),
                left_out.reason
            )?;
        }
        for weight in &self.weights {
            if let Decomposition::Fallback(failure) = weight.decomposition {
                writeln!(f, "{:width$}  decomposed exactly: {failure}", weight.path)?;
            }
        }
        write!(
            f,
            "{} weights, {} shards; trainable {} of {} parameters ({:.2} %); \
             {} bytes per shard and step",
            self.weights.len(),
            self.shards,
            self.trainable_parameters(),
            self.parameters,
            100.0 * self.trainable_parameters() as f64 / self.parameters.max(1) as f64,
            self.bytes_per_shard_and_step(),
        )?;
        let mut layouts = vec![1, self.shards];
        layouts.dedup();
        for workers in layouts {
            let hosted = self.shards / workers;
            write!(
                f,
                "\nworker with {hosted} of {} shards: {}; {} sent per step",
                self.shards,
                self.memory_per_worker(workers),
                readable(self.bytes_sent_per_step(workers))
            )?;
        }
        Ok(())
    }
}
