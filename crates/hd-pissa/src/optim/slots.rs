//! Sums of gradients, parameter by parameter of a model.

use burn::module::{Module, ModuleVisitor, Param, ParamId};
use burn::optim::GradientsParams;
use burn::tensor::Tensor;

/// The float parameters of a model.
#[derive(Clone, Default)]
pub(super) struct Slots(Vec<Slot>);

/// A float parameter, with the operations that need its number of dimensions.
#[derive(Clone, Copy)]
struct Slot {
    id: ParamId,
    add: fn(&mut GradientsParams, &mut GradientsParams, ParamId),
    scale: fn(&mut GradientsParams, ParamId, f64),
}

impl Slots {
    pub(super) fn of<M: Module>(model: &M) -> Self {
        let mut slots = Self::default();
        model.visit(&mut slots);
        slots
    }

    /// Moves the gradients of the model's parameters from `new` to `sum`. A parameter without one
    /// counts as zero.
    pub(super) fn add(&self, sum: &mut GradientsParams, new: &mut GradientsParams) {
        for slot in &self.0 {
            (slot.add)(sum, new, slot.id);
        }
    }

    /// Multiplies every gradient by `factor`.
    pub(super) fn scale(&self, gradients: &mut GradientsParams, factor: f64) {
        for slot in &self.0 {
            (slot.scale)(gradients, slot.id, factor);
        }
    }
}

impl ModuleVisitor for Slots {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.0.push(Slot {
            id: param.id,
            add: add::<D>,
            scale: scale::<D>,
        });
    }
}

fn add<const D: usize>(sum: &mut GradientsParams, new: &mut GradientsParams, id: ParamId) {
    if let Some(new) = new.remove::<D>(id) {
        let new = match sum.remove::<D>(id) {
            Some(sum) => sum + new,
            None => new,
        };
        sum.register(id, new);
    }
}

fn scale<const D: usize>(sum: &mut GradientsParams, id: ParamId, factor: f64) {
    if let Some(gradient) = sum.remove::<D>(id) {
        sum.register(id, gradient * factor);
    }
}
