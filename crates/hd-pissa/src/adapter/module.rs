use burn::module::{
    Content, Devices, Flag, Module, ModuleDisplay, ModuleDisplayDefault, ModuleMapper,
    ModuleVisitor, Param, Reparameterization,
};
use burn::tensor::{Device, Tensor};

use super::path::shard_name;
use crate::ops::adapter_weight;

/// One shard of an adapter: a window of principal components of the weight.
///
/// The factors are fixed frames. They take gradients, but an optimizer step moves the weight and
/// leaves them as they are.
#[derive(Debug, Module)]
pub struct HdPissaShard {
    /// Left factor `U_k · √Σ_k`, `[d_input, rank]`, `f32`.
    pub a: Param<Tensor<2>>,
    /// Right factor `√Σ_k · V_kᵀ`, `[rank, d_output]`, `f32`.
    pub b: Param<Tensor<2>>,
    /// Whether gradients of the next forward pass go to this shard.
    pub selected: Param<Flag>,
    /// Index `k` of the shard: the window of components `k·rank .. (k+1)·rank`.
    pub index: usize,
}

/// The adapter of one weight: the factors of the shards that this worker hosts.
///
/// Attached to a `Param<Tensor<2>>` as a [`Reparameterization`]. The value of the parameter is the
/// base weight, unchanged; the shard that [`select_shard`](crate::HdPissaModule::select_shard)
/// chose receives the gradients.
///
/// Parameter paths are `{weight}.hd_pissa.shard_{k}_of_{K}.a` and `.b`.
#[derive(Clone, Debug)]
pub struct HdPissaAdapter {
    /// The hosted shards, by ascending index.
    pub shards: Vec<HdPissaShard>,
    /// Number of shards `K` over all workers.
    pub num_shards: usize,
    /// Gradient scale `s = alpha / rank`.
    pub scale: f64,
}

impl HdPissaAdapter {
    /// The shard that gradients go to, if any: none in validation mode.
    pub fn selected(&self) -> Option<&HdPissaShard> {
        self.shards.iter().find(|shard| shard.selected.is_enabled())
    }

    fn map_shards(self, map: impl FnMut(HdPissaShard) -> HdPissaShard) -> Self {
        Self {
            shards: self.shards.into_iter().map(map).collect(),
            ..self
        }
    }
}

impl Reparameterization for HdPissaAdapter {
    const NAME: &'static str = "hd_pissa";

    fn apply<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
        match self.selected() {
            Some(shard) => {
                // Attached to rank-2 parameters only; this restates the type.
                let base = Tensor::<2>::from_dispatch(base.into_dispatch());
                let weight = adapter_weight(base, shard.a.val(), shard.b.val(), self.scale);
                Tensor::from_dispatch(weight.into_dispatch())
            }
            None => base,
        }
    }
}

/// Written out because the name of a shard carries its index, which a derived traversal of a `Vec`
/// replaces by the position.
impl Module for HdPissaAdapter {
    fn visit<V: ModuleVisitor>(&self, visitor: &mut V) {
        for shard in &self.shards {
            let name = shard_name(shard.index, self.num_shards);
            visitor.enter_module(&name, "Struct:HdPissaAdapter");
            shard.visit(visitor);
            visitor.exit_module(&name, "Struct:HdPissaAdapter");
        }
    }

    fn map<M: ModuleMapper>(self, mapper: &mut M) -> Self {
        let num_shards = self.num_shards;
        self.map_shards(|shard| {
            let name = shard_name(shard.index, num_shards);
            mapper.enter_module(&name, "Struct:HdPissaAdapter");
            let shard = shard.map(mapper);
            mapper.exit_module(&name, "Struct:HdPissaAdapter");
            shard
        })
    }

    fn collect_devices(&self, devices: Devices) -> Devices {
        self.shards.collect_devices(devices)
    }

    fn fork(self, device: &Device) -> Self {
        self.map_shards(|shard| shard.fork(device))
    }

    fn to_device(self, device: &Device) -> Self {
        self.map_shards(|shard| shard.to_device(device))
    }

    fn train(self) -> Self {
        self.map_shards(Module::train)
    }

    fn valid(&self) -> Self {
        Self {
            shards: self.shards.valid(),
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
            .add("scale", &self.scale)
            .add("shards", &self.shards)
            .optional()
    }
}

impl ModuleDisplay for HdPissaAdapter {}
