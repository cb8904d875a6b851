//! The inner optimizer, and its view of factors: the packed rows of a weight as one parameter if
//! that gives the same numbers, else one parameter for each factor. Weights step side by side on a CPU.

use std::sync::Arc;

use burn::lr_scheduler::module_lr_scheduler::ModuleLearningRate;
use burn::module::{Module, ParamId};
use burn::optim::{GradientsParams, ModuleOptimizer, OptimizerRecord};
use burn::tensor::{Device, Tensor};
use rayon::prelude::*;

use super::OptimizerError;
use super::factors::{Factors, WeightFactors};
use super::packed::unpack;
use super::param_list::ParamList;
use super::probe::{Probe, are_elementwise, fresh};
use super::rows::{Rows, by_weight, divide, unite};
use crate::ops::{is_cpu, join};
use crate::optimizer_state::OptimizerState;

/// A [`ModuleOptimizer`] that steps packed gradients.
///
/// Its record always has the states of single factors.
#[derive(Clone)]
pub(super) struct InnerOptimizer {
    /// With the states of all parameters but those of `of_weights`.
    optimizer: ModuleOptimizer,
    /// The state of a record, until the next step arranges it. Nothing else has a state then.
    loaded: Option<Box<OptimizerState>>,
    /// Whether packed rows may be parameters.
    packs: bool,
    /// The views of the model that it was last used for, weight by weight.
    weights: Arc<Vec<Arranged>>,
    /// For each of these weights an optimizer of its own.
    of_weights: Vec<ModuleOptimizer>,
}

/// The optimizer's view of a weight's factors.
#[derive(Clone)]
struct Arranged {
    /// Path of the weight.
    path: String,
    rows: Rows,
    is_packed: bool,
}

/// A weight, its optimizer, and the parameters that it steps with their gradients.
type Job<'a> = (
    &'a Arranged,
    &'a mut ModuleOptimizer,
    ParamList,
    GradientsParams,
);

impl Arranged {
    /// The parameters: path, id and shape.
    fn params(&self) -> Vec<(String, ParamId, [usize; 2])> {
        let factors = &self.rows.factors;
        if self.is_packed {
            return vec![(factors[0].path.clone(), self.rows.id(), self.rows.shape())];
        }
        let factors = factors.iter();
        factors.map(|f| (f.path.clone(), f.id, f.shape)).collect()
    }

    /// The number of the parameters.
    fn count(&self) -> usize {
        match self.is_packed {
            true => 1,
            false => self.rows.factors.len(),
        }
    }

    /// The gradients of the parameters, from those in packed form.
    fn gradients(&self, weight: &WeightFactors, packed: Tensor<2>) -> GradientsParams {
        let mut gradients = GradientsParams::new();
        if self.is_packed {
            gradients.register(self.rows.id(), packed);
            return gradients;
        }
        for (row, factors) in self.rows.factors.chunks(2).enumerate() {
            let row = packed.clone().narrow(0, row, 1);
            let (a, b) = unpack(row, weight.d_input(), weight.rank());
            gradients.register(factors[0].id, a);
            gradients.register(factors[1].id, b);
        }
        gradients
    }

    /// The parameters' deltas in packed form.
    fn delta(&self, mut parts: Vec<Tensor<2>>) -> Tensor<2> {
        match self.is_packed {
            true => parts.remove(0),
            false => join(parts).reshape(self.rows.shape()),
        }
    }
}

impl InnerOptimizer {
    pub(super) fn new(optimizer: ModuleOptimizer, packs: bool) -> Self {
        Self {
            optimizer,
            loaded: None,
            packs,
            weights: Arc::default(),
            of_weights: Vec::new(),
        }
    }

    /// Prepares for a step of `factors`.
    ///
    /// # Errors
    ///
    /// [`OptimizerError::ReadsParameter`], found with the model's own paths and ids, which parameter
    /// groups match.
    pub(super) fn arrange(
        &mut self,
        factors: &Factors,
        lr: &ModuleLearningRate,
    ) -> Result<(), OptimizerError> {
        let arranged = self.weights.iter();
        let now = factors.weights.iter().map(|weight| &weight.path);
        if arranged.clone().map(|weight| &weight.path).eq(now)
            && arranged
                .zip(&factors.weights)
                .all(|(of, weight)| of.rows.are_of(weight))
        {
            // Rates may differ now.
            let fits = |weight: &Arranged| !weight.is_packed || weight.rows.have_one(lr);
            if self.weights.iter().all(fits) {
                return Ok(());
            }
            let mut weights = (*self.weights).clone();
            for weight in &mut weights {
                weight.is_packed = fits(weight) && weight.is_packed;
            }
            return self.rearrange(weights);
        }
        let params = factors
            .iter()
            .map(|(weight, shard, side, factor)| (weight.factor_path(shard, side), factor.id));
        let updates = Probe::new(&factors.device(), params).updates(&self.optimizer);
        let updates =
            updates.map_err(|path| OptimizerError::ReadsParameter { path: Some(path) })?;
        let elementwise = match self.packs {
            true => are_elementwise(&self.optimizer, factors, &updates)?,
            false => vec![false; factors.weights.len()],
        };
        let weights = factors.weights.iter().zip(elementwise);
        let weights = weights.map(|(weight, is_elementwise)| {
            let rows = Rows::of(weight, usize::MAX);
            let is_packed = is_elementwise && rows.have_one(lr);
            Arranged {
                path: weight.path.clone(),
                rows,
                is_packed,
            }
        });
        self.rearrange(weights.collect())
    }

    fn rearrange(&mut self, mut weights: Vec<Arranged>) -> Result<(), OptimizerError> {
        let packed = weights.iter_mut().filter(|weight| weight.is_packed);
        let packed: Vec<&mut Arranged> = packed.collect();
        let rows = packed.iter().map(|weight| &weight.rows);
        let (state, united) = unite(self.state()?, rows)?;
        for (weight, is_united) in packed.into_iter().zip(united) {
            weight.is_packed = is_united;
        }
        let (states, rest) = by_weight(state, weights.iter().map(|weight| &weight.rows));
        let load = |state| with_state(&self.optimizer, state);
        let of_weights = states.into_iter().map(load).collect::<Result<_, _>>()?;
        self.optimizer = with_state(&self.optimizer, rest)?;
        self.of_weights = of_weights;
        self.weights = Arc::new(weights);
        self.loaded = None;
        Ok(())
    }

    /// The deltas of `weights`, the neighbours of positions `range` in what was arranged.
    ///
    /// - gradients, output: `[hosted shards, row_len]` for each weight
    pub(super) fn step(
        &mut self,
        lr: ModuleLearningRate,
        start: usize,
        weights: &[WeightFactors],
        gradients: Vec<Tensor<2>>,
        device: &Device,
    ) -> Vec<Tensor<2>> {
        let range = start..start + weights.len();
        let arranged = &self.weights[range.clone()];
        let params = arranged.iter().flat_map(|weight| weight.params());
        // An update does not read the parameter. From a parameter of zeros, the result is exactly
        // the delta.
        let mut params = ParamList::zeros(device, params);
        let optimizers = self.of_weights[range].iter_mut();
        let weights = arranged.iter().zip(weights);
        let jobs: Vec<_> = weights
            .zip(optimizers)
            .zip(gradients)
            .map(|(((arranged, weight), optimizer), gradient)| {
                let params = params.take(arranged.count());
                let gradients = arranged.gradients(weight, gradient);
                (arranged, optimizer, params, gradients)
            })
            .collect();
        let step = |(arranged, optimizer, params, gradients): Job| {
            let moved = optimizer.step(lr.clone(), params, gradients);
            arranged.delta(moved.into_values().collect())
        };
        match is_cpu(device) {
            true => jobs.into_par_iter().map(step).collect(),
            // The order of calls is that of a device's queue.
            false => jobs.into_iter().map(step).collect(),
        }
    }

    /// Burn's own step, for parameters outside the adapters.
    pub(super) fn step_dense<M: Module>(
        &mut self,
        lr: ModuleLearningRate,
        model: M,
        gradients: GradientsParams,
    ) -> M {
        if gradients.is_empty() {
            return model;
        }
        self.optimizer.step(lr, model, gradients)
    }

    /// The states of single factors, and of dense parameters.
    pub(super) fn state(&self) -> Result<OptimizerState, OptimizerError> {
        if let Some(loaded) = &self.loaded {
            return Ok((**loaded).clone());
        }
        let mut all = OptimizerState::default();
        for optimizer in std::iter::once(&self.optimizer).chain(&self.of_weights) {
            all.extend(OptimizerState::from_bytes(optimizer.into_bytes()?)?);
        }
        let packed = self.weights.iter().filter(|weight| weight.is_packed);
        let divided = divide(all, packed.map(|weight| &weight.rows))?;
        Ok(divided.expect("a trial has found states of the rows' shape"))
    }

    /// Takes over the states of single factors, and of dense parameters.
    ///
    /// Until a step knows the model, they stay as they are: moments are large, and each form that
    /// they are in takes that memory once more.
    ///
    /// # Errors
    ///
    /// Those of Burn's record; nothing has changed then.
    pub(super) fn load(&mut self, state: OptimizerState) -> Result<(), OptimizerError> {
        let bytes = state.into_bytes()?.shared();
        OptimizerRecord::from_bytes(bytes.clone())?;
        let state = OptimizerState::from_bytes(bytes)?;
        *self = Self::new(fresh(&self.optimizer), self.packs);
        self.loaded = Some(Box::new(state));
        Ok(())
    }
}

/// `optimizer` with the state `state`.
fn with_state(
    optimizer: &ModuleOptimizer,
    state: OptimizerState,
) -> Result<ModuleOptimizer, OptimizerError> {
    if state.is_empty() {
        return Ok(fresh(optimizer));
    }
    let record = OptimizerRecord::from_bytes(state.into_bytes()?)?;
    Ok(optimizer.clone().load_record(record))
}

#[cfg(test)]
mod tests {
    use burn::module::ParamGroup;
    use burn::nn::LinearConfig;
    use burn::optim::{
        AdafactorConfig, AdamConfig, AdamWConfig, AdanConfig, LionConfig, MuonConfig,
        RmsPropConfig, SgdConfig,
    };
    use hd_pissa_comm::Solo;

    use super::*;
    use crate::{HdPissaConfig, HdPissaModule};

    /// Whether a weight's rows are one parameter of `optimizer`.
    fn is_packed(optimizer: ModuleOptimizer, packs: bool) -> bool {
        let device = Device::flex().autodiff();
        let config = HdPissaConfig::new().with_rank(2).with_shards(3);
        let model = LinearConfig::new(9, 7).init(&device);
        let model = model.apply_hd_pissa(&config, 0..3).unwrap();
        let factors = Factors::of(&model, &Solo).unwrap();
        let mut inner = InnerOptimizer::new(optimizer, packs);
        inner.arrange(&factors, &1e-3.into()).unwrap();
        inner.weights[0].is_packed
    }

    #[test]
    fn rows_are_packed_where_elements_do_not_depend_on_each_other() {
        let adam = || AdamConfig::new().with_epsilon(1e-8);
        for (optimizer, expected) in [
            (adam().init(), true),
            (AdamWConfig::new().with_weight_decay(0.0).init(), true),
            (SgdConfig::new().init(), true),
            (RmsPropConfig::new().init(), true),
            (AdanConfig::new().init(), true),
            (LionConfig::new().with_weight_decay(0.0).init(), true),
            (MuonConfig::new().init(), false),
            (
                AdafactorConfig::new().with_scale_parameter(false).init(),
                false,
            ),
        ] {
            assert_eq!(is_packed(optimizer, true), expected);
        }
        assert!(!is_packed(adam().init(), false));
        let group = ParamGroup::from_predicate("shard_1_of_3");
        let other = AdamConfig::new().with_epsilon(1e-9).build();
        assert!(!is_packed(
            adam().init().with_group(group, other, None),
            true
        ));
    }
}
