//! Settings of a parameter's tensor, saved before its values are replaced.

use burn::backend::GradientCheckpointingStrategy;
use burn::module::ParamId;
use burn::tensor::Tensor;

/// The settings of a parameter's tensor, without its values.
pub(crate) struct Settings {
    id: ParamId,
    autodiff: bool,
    require_grad: bool,
    distributed: bool,
    checkpointing: Option<GradientCheckpointingStrategy>,
}

impl Settings {
    pub(crate) fn of<const D: usize>(id: ParamId, parameter: &Tensor<D>) -> Self {
        let autodiff = parameter.is_autodiff();
        Self {
            id,
            autodiff,
            require_grad: parameter.is_require_grad(),
            distributed: autodiff && parameter.is_distributed(),
            checkpointing: parameter.gradient_checkpointing_strategy(),
        }
    }

    pub(crate) fn restore<const D: usize>(self, value: Tensor<D>) -> Tensor<D> {
        if !self.autodiff {
            return value;
        }
        let value = Tensor::from_inner(value);
        let value = match self.checkpointing {
            Some(strategy) => value.with_gradient_checkpointing_strategy(strategy),
            None => value,
        };
        let value = value.set_require_grad(self.require_grad);
        match self.distributed {
            true => value.set_distributed(self.id),
            false => value,
        }
    }
}
