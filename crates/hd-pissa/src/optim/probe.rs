//! Finds out whether an optimizer's update depends on the value of the parameter.

use burn::module::{Devices, Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::optim::{GradientsParams, ModuleOptimizer, OptimizerRecord};
use burn::tensor::{Device, Tensor};

/// Large enough for a decay of 1e-6 at learning rate 1 to show, and a power of two, so that adding
/// an update of order 1 to it rounds by no more than 2⁻¹².
const VALUE: f64 = 4096.0;

/// A module of small parameters at given paths, with given ids, as parameter groups see them.
#[derive(Clone, Debug)]
pub(super) struct Probe {
    params: Vec<(String, Param<Tensor<2>>)>,
}

impl Probe {
    pub(super) fn new(
        device: &Device,
        params: impl IntoIterator<Item = (String, ParamId)>,
    ) -> Self {
        // Burn's optimizers take parameters with autodiff, and gradients without.
        let device = device.clone().autodiff();
        let params = params
            .into_iter()
            .map(|(path, id)| {
                let mut param = Param::from_tensor(Tensor::zeros([2, 3], &device));
                param.id = id;
                (path, param)
            })
            .collect();
        Self { params }
    }

    /// Path of the first parameter whose update depends on its value.
    pub(super) fn reads_parameter(&self, optimizer: &ModuleOptimizer) -> Option<String> {
        let at_zero = self.updates(optimizer, 0.0);
        let at_value = self.updates(optimizer, VALUE);
        let differ = |x: &[f32], y: &[f32]| x.iter().zip(y).any(|(x, y)| (x - y).abs() > 2e-3);
        self.params
            .iter()
            .zip(at_zero.iter().zip(&at_value))
            .find(|(_, (x, y))| differ(x, y))
            .map(|((path, _), _)| path.clone())
    }

    /// What two steps of a fresh copy of `optimizer` add to parameters of value `start`.
    fn updates(&self, optimizer: &ModuleOptimizer, start: f64) -> Vec<Vec<f32>> {
        let mut optimizer = optimizer.clone().load_record(OptimizerRecord::default());
        let mut probe = self.clone();
        for (_, param) in &mut probe.params {
            *param = param
                .clone()
                .map(|value| Tensor::from_inner(value.inner().zeros_like() + start).require_grad());
        }
        // Of different sizes and signs: an optimizer that normalizes gradients would hide a decay
        // behind two equal ones.
        for gradient in [
            [[1.0, -0.5, 0.25], [0.75, 2.0, -1.5]],
            [[-0.75, 0.25, 0.5], [1.0, -1.0, 0.5]],
        ] {
            let mut gradients = GradientsParams::new();
            for (_, param) in &probe.params {
                let device = param.val().device().inner();
                gradients.register(param.id, Tensor::<2>::from_floats(gradient, &device));
            }
            probe = optimizer.step(1.0, probe, gradients);
        }
        probe
            .params
            .iter()
            .map(|(_, param)| {
                let update = param.val().inner() - start;
                update.into_data().iter::<f32>().collect()
            })
            .collect()
    }
}

impl Module for Probe {
    fn visit<V: ModuleVisitor>(&self, visitor: &mut V) {
        for (_, param) in &self.params {
            param.visit(visitor);
        }
    }

    fn map<M: ModuleMapper>(self, mapper: &mut M) -> Self {
        let params = self
            .params
            .into_iter()
            .map(|(path, param)| {
                for name in path.split('.') {
                    mapper.enter_module(name, "Probe");
                }
                let param = Module::map(param, mapper);
                for name in path.rsplit('.') {
                    mapper.exit_module(name, "Probe");
                }
                (path, param)
            })
            .collect();
        Self { params }
    }

    fn collect_devices(&self, devices: Devices) -> Devices {
        self.params.iter().fold(devices, |devices, (_, param)| {
            param.collect_devices(devices)
        })
    }

    fn fork(self, device: &Device) -> Self {
        self.to_device(device)
    }

    fn to_device(self, device: &Device) -> Self {
        let move_to = |(path, param): (String, Param<Tensor<2>>)| (path, param.to_device(device));
        Self {
            params: self.params.into_iter().map(move_to).collect(),
        }
    }

    fn train(self) -> Self {
        self
    }

    fn valid(&self) -> Self {
        self.clone()
    }

    fn materialize(self) -> Self {
        self
    }
}
