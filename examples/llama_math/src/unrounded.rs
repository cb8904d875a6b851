//! The weights of a model that was trained in half precision, with every bit of the pretrained ones.

use std::collections::HashMap;

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{DType, Tensor};
use hd_pissa::HdPissaModule;

use crate::model_dtype::ModelDtype;
use crate::pretrained::TensorName;
use crate::{Error, Llama, Pretrained};

impl Pretrained {
    /// The trained model without adapters and in validation mode, in `f32`. `model` was loaded as `dtype`. If
    /// that rounded the pretrained weights, the change by the training is added to the weights as the
    /// files have them.
    ///
    /// # Errors
    ///
    /// Those of [`load`](Self::load).
    pub fn trained(&self, model: &Llama, dtype: ModelDtype) -> Result<Llama, Error> {
        let trained = model.materialize_f32();
        if !self.is_rounded_as(dtype) {
            return Ok(trained);
        }
        let base = self.load(&trained.device())?;
        let trained = trained.matrices().into_iter();
        let trained = trained.map(|(path, weight)| (path, weight.val())).collect();
        Ok(base.map(&mut WithChange {
            names: TensorName::default(),
            trained,
            dtype: dtype.dtype(),
        }))
    }
}

/// Adds to each matrix of a model what a training of the rounded matrix changed.
struct WithChange {
    names: TensorName,
    trained: HashMap<String, Tensor<2>>,
    dtype: DType,
}

impl ModuleMapper for WithChange {
    fn enter_module(&mut self, name: &str, container_type: &str) {
        self.names.enter(name, container_type);
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.names.exit();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Some(trained) = self.trained.remove(&self.names.name()) else {
            return param;
        };
        let trained = Tensor::<D>::from_dispatch(trained.into_dispatch());
        param.map(|base| {
            let rounded = base.clone().cast(self.dtype).cast(DType::F32);
            let is_whole = rounded.clone().equal(base.clone());
            let sum = base + (trained.clone() - rounded);
            sum.mask_where(is_whole, trained)
        })
    }
}
