//! PiSSA, a baseline: one adapter that starts at the principal components of the weight.

use std::collections::HashMap;

use burn::config::Config;
use burn::module::{LoraAdapter, Module, Param, ParamGroup, Reparameterizer};
use burn::tensor::{Tensor, TensorData};

use crate::frames::WeightFrames;
use crate::plan::Selection;
use crate::{HdPissaError, SvdCache, SvdMethod, SvdPrecision};

/// Configuration of PiSSA, a baseline: one low-rank adapter that starts at the principal
/// components of the weight (Meng et al. 2024, arXiv 2404.02948).
#[derive(Config, Debug)]
pub struct PissaConfig {
    /// Rank of the adapter.
    #[config(default = 16)]
    pub rank: usize,
    /// Numerator of the scale `alpha / rank`; `None` takes the rank, for a scale of 1.
    #[config(default = "None")]
    pub alpha: Option<f64>,
    /// The weights to adapt; the default is that of
    /// [`HdPissaConfig::targets`](crate::HdPissaConfig::targets).
    #[config(default = "None")]
    pub targets: Option<ParamGroup>,
    /// The method for computing principal components.
    #[config(default = "SvdMethod::Exact(SvdPrecision::F32)")]
    pub svd: SvdMethod,
    /// Where decompositions are kept for later runs; `None` keeps none.
    #[config(default = "None")]
    pub svd_cache: Option<SvdCache>,
}

/// The [`Reparameterizer`] that attaches Burn's [`LoraAdapter`] with a principal start.
///
/// With `scale = alpha / rank`, the adapter starts as `a = U√(Σ/scale)`, `b = √(Σ/scale)Vᵀ` over
/// the leading `rank` components, in the dtype of the weight, and the base loses exactly the
/// adapter's part: `base = W − scale · a · b`. The base and all other parameters are frozen.
#[derive(Debug)]
pub struct Pissa {
    parts: HashMap<String, (Tensor<2>, LoraAdapter)>,
}

impl Pissa {
    /// Computes the adapters of `model`.
    ///
    /// # Errors
    ///
    /// See [`HdPissaError`].
    pub fn prepare<M: Module>(model: &M, config: &PissaConfig) -> Result<Self, HdPissaError> {
        let targets = Selection {
            targets: config.targets.as_ref(),
            rank: &|_, _| config.rank,
            shards: 1,
            alpha: config.alpha,
        }
        .choose(model)?
        .targets;
        let scale = config.alpha.map_or(1.0, |alpha| alpha / config.rank as f64);
        let mut parts = HashMap::with_capacity(targets.len());
        for target in targets {
            let (path, rank) = (&target.path, target.rank);
            let svd = (config.svd, config.svd_cache.as_ref());
            let frames = WeightFrames::leading(path, &target.weight, svd, rank, scale)?;
            let (a, b) = frames.window(0);
            let [d_input, d_output] = target.weight.dims();
            let options = (&target.weight.device(), target.weight.dtype());
            let adapter = LoraAdapter {
                a: Param::from_tensor(Tensor::from_data(
                    TensorData::new(a, [d_input, target.rank]),
                    options,
                )),
                b: Param::from_tensor(Tensor::from_data(
                    TensorData::new(b, [target.rank, d_output]),
                    options,
                )),
                scale,
            };
            let base = (target.weight - adapter.delta()).detach();
            parts.insert(target.path, (base, adapter));
        }
        Ok(Self { parts })
    }
}

impl Reparameterizer for Pissa {
    type Reparam = LoraAdapter;

    fn reparameterize<const D: usize>(
        &mut self,
        path: &str,
        param: Param<Tensor<D>>,
    ) -> (Param<Tensor<D>>, Option<Self::Reparam>) {
        let param = param.set_require_grad(false);
        match self.parts.remove(path) {
            Some((base, adapter)) => {
                let base = Tensor::<D>::from_dispatch(base.into_dispatch());
                (param.map(|_| base), Some(adapter))
            }
            None => (param, None),
        }
    }
}

/// PiSSA on any Burn model.
pub trait PissaModule: Module {
    /// Attaches PiSSA adapters to the weights that `config` chooses and freezes every other float
    /// parameter.
    ///
    /// # Errors
    ///
    /// See [`HdPissaError`].
    fn apply_pissa(self, config: &PissaConfig) -> Result<Self, HdPissaError> {
        let pissa = Pissa::prepare(&self, config)?;
        Ok(self.apply_reparameterization(pissa))
    }
}

impl<M: Module> PissaModule for M {}
