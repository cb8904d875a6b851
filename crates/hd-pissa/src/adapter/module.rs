//! The adapter of a weight, as a Burn module.

use burn::module::{
    Content, Devices, Flag, Module, ModuleDisplay, ModuleDisplayDefault, ModuleMapper,
    ModuleVisitor, Param, Reparameterization,
};
use burn::tensor::{Device, Int, Tensor};

use super::joined::JoinedFrames;
use crate::GradientMode;
use crate::ops::adapter_weight;
use crate::path::{ADAPTER, RESIDUAL, ShardName, stochastic_name};
use crate::windows::FrameChoice;
use crate::{FrameScale, Windows};

/// One shard of an adapter: a window of principal components of the weight, or of other directions
/// that [`Windows`] chooses.
///
/// The factors are fixed frames. They take gradients, but an optimizer step moves the weight, not
/// the factors.
#[derive(Debug, Module)]
pub struct HdPissaShard {
    /// Left factor, `U_k · √Σ_k` unless [`FrameScale`] says otherwise, `[d_input, rank]`, `f32`.
    pub a: Param<Tensor<2>>,
    /// Right factor, `√Σ_k · V_kᵀ` likewise, `[rank, d_output]`, `f32`.
    pub b: Param<Tensor<2>>,
    /// Whether gradients of the next forward pass go to this shard.
    pub selected: Param<Flag>,
    /// Index `k` of the shard, which determines its window; see [`Windows`].
    pub index: usize,
}

/// The adapter of one weight: the factors of the shards that this worker hosts, or of all shards if
/// they share gradients.
///
/// Attached to a `Param<Tensor<2>>` as a [`Reparameterization`]. The value of the parameter is the
/// unchanged base weight. The gradients go to the shard that
/// [`select_shard`](crate::HdPissaModule::select_shard) chose, or to all shards.
///
/// Parameter paths are `{weight}.hd_pissa.shard_{k}_of_{K}.a` and `.b`, and
/// `{weight}.hd_pissa.companion`. Settings that differ from the published ones are part of the
/// shard's name, as in `shard_{k}_of_{K}_random_7_unit_shared`: records of one choice do not load
/// into another.
#[derive(Clone, Debug)]
pub struct HdPissaAdapter {
    /// The shards, by ascending index.
    pub shards: Vec<HdPissaShard>,
    /// Number of shards `K` over all workers.
    pub num_shards: usize,
    /// Which gradients a shard learns from.
    pub gradients: GradientMode,
    /// Which directions of the weight the shards hold.
    pub windows: Windows,
    /// The length of the vectors of the frames.
    pub frame_scale: FrameScale,
    /// Gradient scale `s = alpha / rank`.
    pub scale: f64,
    /// 16 more bits of every element of a half-precision weight, with
    /// [`MergePrecision::Compensated`](crate::MergePrecision::Compensated): `i32`,
    /// `[d_input, ceil(d_output / 2)]`, each word for two neighbours in a row.
    pub residual: Option<Param<Tensor<2, Int>>>,
    /// Seed of stochastic rounding, with
    /// [`MergePrecision::Stochastic`](crate::MergePrecision::Stochastic).
    pub rounding_seed: Option<u64>,
    pub(crate) joined: JoinedFrames,
}

impl HdPissaAdapter {
    /// The shards that gradients go to: none in validation mode.
    pub fn selected(&self) -> impl Iterator<Item = &HdPissaShard> {
        self.shards
            .iter()
            .filter(|shard| shard.selected.is_enabled())
    }

    /// The frames of the [selected](Self::selected) shards side by side, `[d_input, n · rank]` and
    /// `[n · rank, d_output]` for `n` shards. `None` if no shard is selected.
    pub(crate) fn frames(&self) -> Option<(Tensor<2>, Tensor<2>)> {
        let selected = self.selected();
        let mut pairs: Vec<_> = selected
            .map(|shard| [shard.a.val(), shard.b.val()])
            .collect();
        let [a, b] = match pairs.len() {
            0 => return None,
            1 => pairs.remove(0),
            _ => self.joined.of(pairs),
        };
        Some((a, b))
    }

    fn name(&self, shard: &HdPissaShard) -> String {
        let name = ShardName {
            index: shard.index,
            shards: self.num_shards,
            frames: FrameChoice {
                windows: self.windows,
                scale: self.frame_scale,
            },
            gradients: self.gradients,
        };
        name.to_string()
    }

    fn map_parts(
        self,
        shard: impl FnMut(HdPissaShard) -> HdPissaShard,
        residual: impl FnOnce(Param<Tensor<2, Int>>) -> Param<Tensor<2, Int>>,
    ) -> Self {
        Self {
            shards: self.shards.into_iter().map(shard).collect(),
            residual: self.residual.map(residual),
            ..self
        }
    }
}

impl Reparameterization for HdPissaAdapter {
    const NAME: &'static str = ADAPTER;

    fn apply<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
        match self.frames() {
            Some((a, b)) => {
                // Adapters are attached only to rank-2 parameters; this restates the type.
                let base = Tensor::<2>::from_dispatch(base.into_dispatch());
                let weight = adapter_weight(base, a, b, self.scale);
                Tensor::from_dispatch(weight.into_dispatch())
            }
            None => base,
        }
    }
}

/// Container type that traversals of the adapter announce.
const CONTAINER: &str = "Struct:HdPissaAdapter";

/// Written by hand: the name of a shard carries its index, and a derived traversal of a `Vec` would
/// replace it by the position.
impl Module for HdPissaAdapter {
    fn visit<V: ModuleVisitor>(&self, visitor: &mut V) {
        for shard in &self.shards {
            let name = self.name(shard);
            visitor.enter_module(&name, CONTAINER);
            shard.visit(visitor);
            visitor.exit_module(&name, CONTAINER);
        }
        if let Some(residual) = &self.residual {
            visitor.enter_module(RESIDUAL, CONTAINER);
            residual.visit(visitor);
            visitor.exit_module(RESIDUAL, CONTAINER);
        }
        if let Some(seed) = self.rounding_seed {
            let name = stochastic_name(seed);
            visitor.enter_module(&name, CONTAINER);
            visitor.exit_module(&name, CONTAINER);
        }
    }

    fn map<M: ModuleMapper>(mut self, mapper: &mut M) -> Self {
        let shards = std::mem::take(&mut self.shards).into_iter();
        let shards = shards
            .map(|shard| {
                let name = self.name(&shard);
                mapper.enter_module(&name, CONTAINER);
                let shard = shard.map(mapper);
                mapper.exit_module(&name, CONTAINER);
                shard
            })
            .collect();
        let residual = self.residual.map(|residual| {
            mapper.enter_module(RESIDUAL, CONTAINER);
            let residual = Module::map(residual, mapper);
            mapper.exit_module(RESIDUAL, CONTAINER);
            residual
        });
        Self {
            shards,
            residual,
            ..self
        }
    }

    fn collect_devices(&self, devices: Devices) -> Devices {
        self.shards.collect_devices(devices)
    }

    fn fork(self, device: &Device) -> Self {
        self.map_parts(|shard| shard.fork(device), |c| c.fork(device))
    }

    fn to_device(self, device: &Device) -> Self {
        self.map_parts(|shard| shard.to_device(device), |c| c.to_device(device))
    }

    fn train(self) -> Self {
        self.map_parts(Module::train, Module::train)
    }

    fn valid(&self) -> Self {
        Self {
            shards: self.shards.valid(),
            residual: self.residual.valid(),
            joined: self.joined.clone(),
            ..*self
        }
    }

    fn materialize(self) -> Self {
        self
    }
}

impl ModuleDisplayDefault for HdPissaAdapter {
    fn content(&self, content: Content) -> Option<Content> {
        content
            .add("num_shards", &self.num_shards)
            .add_debug_attribute("gradients", &self.gradients)
            .add_debug_attribute("windows", &self.windows)
            .add_debug_attribute("frame_scale", &self.frame_scale)
            .add("scale", &self.scale)
            .add("residual", &self.residual.is_some())
            .add("shards", &self.shards)
            .optional()
    }
}

impl ModuleDisplay for HdPissaAdapter {}
