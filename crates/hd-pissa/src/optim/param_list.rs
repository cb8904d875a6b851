//! A module of matrices at given paths, for an optimizer to step.

use std::collections::HashMap;

use burn::module::{Devices, Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::tensor::{DType, Device, Tensor};

/// `f32` parameters for parameter groups: each has its path and its id.
#[derive(Clone, Debug)]
pub(super) struct ParamList(Vec<(String, Param<Tensor<2>>)>);

impl ParamList {
    /// Zeros of given shapes on `device`.
    pub(super) fn zeros(
        device: &Device,
        params: impl IntoIterator<Item = (String, ParamId, [usize; 2])>,
    ) -> Self {
        let device = device.clone().inner();
        // Parameters of one shape share their memory.
        let mut zeros: HashMap<[usize; 2], Tensor<2>> = HashMap::new();
        let params = params.into_iter().map(|(path, id, shape)| {
            let zeros = zeros
                .entry(shape)
                .or_insert_with(|| Tensor::zeros(shape, (&device, DType::F32)));
            // Burn's optimizers take parameters with autodiff, and gradients without.
            let param = Tensor::from_inner(zeros.clone()).require_grad();
            (path, Param::initialized(id, param))
        });
        Self(params.collect())
    }

    /// The same parameters with another value in all elements.
    pub(super) fn filled(mut self, value: f64) -> Self {
        for (_, param) in &mut self.0 {
            *param = param
                .clone()
                .map(|old| Tensor::from_inner(old.inner().zeros_like() + value).require_grad());
        }
        self
    }

    /// Takes the first `count` parameters out of the list.
    pub(super) fn take(&mut self, count: usize) -> Self {
        Self(self.0.drain(..count).collect())
    }

    pub(super) fn ids(&self) -> impl Iterator<Item = ParamId> {
        self.0.iter().map(|(_, param)| param.id)
    }

    pub(super) fn paths(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|(path, _)| path.as_str())
    }

    /// Their values, without autodiff.
    pub(super) fn into_values(self) -> impl Iterator<Item = Tensor<2>> {
        self.0.into_iter().map(|(_, param)| param.val().inner())
    }
}

impl Module for ParamList {
    fn visit<V: ModuleVisitor>(&self, visitor: &mut V) {
        for (_, param) in &self.0 {
            param.visit(visitor);
        }
    }

    fn map<M: ModuleMapper>(self, mapper: &mut M) -> Self {
        let params = self.0.into_iter().map(|(path, param)| {
            for name in path.split('.') {
                mapper.enter_module(name, "ParamList");
            }
            let param = Module::map(param, mapper);
            for name in path.rsplit('.') {
                mapper.exit_module(name, "ParamList");
            }
            (path, param)
        });
        Self(params.collect())
    }

    fn collect_devices(&self, devices: Devices) -> Devices {
        let params = self.0.iter();
        params.fold(devices, |devices, (_, param)| {
            param.collect_devices(devices)
        })
    }

    fn fork(self, device: &Device) -> Self {
        self.to_device(device)
    }

    fn to_device(self, device: &Device) -> Self {
        let params = self.0.into_iter();
        Self(
            params
                .map(|(path, param)| (path, param.to_device(device)))
                .collect(),
        )
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
