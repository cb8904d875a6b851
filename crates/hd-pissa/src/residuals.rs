//! The residual bits of half-precision weights, apart from the model and joined with the weights.

use std::collections::HashMap;

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{DType, Element, Int, Tensor, TensorData};
use half::{bf16, f16};
use hd_pissa_bits::Half;

use crate::path::{PathTracker, Place, track_path};

/// The residual bits of half-precision weights, by the weight's path.
pub(crate) type Residuals = HashMap<String, Tensor<2, Int>>;

/// Takes the residual bits out of a model. A traversal visits a weight before its residual bits,
/// and both are needed at once.
pub(crate) fn take_residuals<M: Module>(model: M) -> (M, Residuals) {
    #[derive(Default)]
    struct Take {
        path: PathTracker,
        residuals: Residuals,
    }

    impl ModuleMapper for Take {
        track_path!(path);

        fn map_int<const D: usize>(
            &mut self,
            param: Param<Tensor<D, Int>>,
        ) -> Param<Tensor<D, Int>> {
            match self.path.place() {
                Place::Residual { weight } => {
                    let (id, value, mapper) = param.consume();
                    // A placeholder without memory of the weight's size.
                    let placeholder = Tensor::zeros([1; D], (&value.device(), value.dtype()));
                    let value = Tensor::from_dispatch(value.into_dispatch());
                    self.residuals.insert(weight, value);
                    Param::from_mapped_value(id, placeholder, mapper)
                }
                _ => param,
            }
        }
    }

    let mut take = Take::default();
    let model = model.map(&mut take);
    (model, take.residuals)
}

/// The model without adapters, every half-precision parameter in `f32`, the weights with their
/// residual bits.
pub(crate) fn materialize_f32<M: Module>(model: &M) -> M {
    struct Widen {
        path: PathTracker,
        residuals: Residuals,
    }

    impl ModuleMapper for Widen {
        track_path!(path);

        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            let residual = self.residuals.remove(&self.path.path());
            if !matches!(param.dtype(), DType::F16 | DType::BF16) {
                return param;
            }
            let (id, value, mapper) = param.consume();
            let value = match residual {
                Some(residual) => joined(value, residual),
                None => value.cast(DType::F32),
            };
            Param::from_mapped_value(id, value, mapper)
        }
    }

    let (model, residuals) = take_residuals(model.valid());
    model.materialize().map(&mut Widen {
        path: PathTracker::default(),
        residuals,
    })
}

/// A weight `[rows, cols]` with its residual bits, in `f32`. Burn has no operation on the bits of a float, so
/// the host joins them.
fn joined<const D: usize>(weight: Tensor<D>, residual: Tensor<2, Int>) -> Tensor<D> {
    fn values<H: Half + Element>(data: &TensorData, words: &[i32]) -> Vec<f32> {
        let cols = data.shape().last().copied().unwrap_or(1).max(1);
        let per_row = cols.div_ceil(2);
        let low = |index: usize| {
            let (row, col) = (index / cols, index % cols);
            (words[row * per_row + col / 2] as u32 >> (16 * (col % 2))) as u16
        };
        let joined = data.iter::<H>().enumerate();
        joined.map(|(i, high)| high.join(low(i))).collect()
    }

    let (device, shape) = (weight.device(), weight.shape());
    let words: Vec<i32> = residual.into_data().iter::<i32>().collect();
    let data = weight.into_data();
    let values = match data.dtype() {
        DType::F16 => values::<f16>(&data, &words),
        _ => values::<bf16>(&data, &words),
    };
    Tensor::from_data(TensorData::new(values, shape), (&device, DType::F32))
}
