//! The end of a step: updates merged into the weights.

use std::collections::HashMap;

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{Int, Tensor};

use super::factors::{Factors, WeightFactors};
use crate::ops::{self, MergeInputs};
use crate::path::{PathTracker, Place, track_path};
use crate::residuals::Residuals;
use crate::settings::Settings;

/// Merges the updates into the weights and their residual bits.
pub(super) struct Commit<'a, F> {
    path: PathTracker,
    /// The adapted weights with their positions.
    weights: HashMap<&'a str, (usize, &'a WeightFactors)>,
    residuals: Residuals,
    step: u64,
    inputs: F,
    squares: Vec<Tensor<1>>,
}

impl<'a, F: Fn(usize) -> MergeInputs> Commit<'a, F> {
    /// The model after optimizer step `step`, and for each weight the sum of the squares of its
    /// update, `[1]`.
    ///
    /// `inputs` is called with the position of each weight just before its merge, so only the
    /// buffers of one weight are live.
    pub(super) fn apply<M: Module>(
        model: M,
        factors: &'a Factors,
        residuals: Residuals,
        step: u64,
        inputs: F,
    ) -> (M, Vec<Tensor<1>>) {
        let weights = factors.weights.iter().enumerate();
        let mut mapper = Self {
            path: PathTracker::default(),
            weights: weights
                .map(|(position, weight)| (weight.path.as_str(), (position, weight)))
                .collect(),
            residuals,
            step,
            inputs,
            squares: Vec::with_capacity(factors.weights.len()),
        };
        let model = model.map(&mut mapper);
        (model, mapper.squares)
    }
}

impl<F: Fn(usize) -> MergeInputs> ModuleMapper for Commit<'_, F> {
    track_path!(path);

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        match self.path.place() {
            Place::Other(path) => match self.weights.get(path.as_str()) {
                Some(&(position, weight)) => {
                    let (id, value, mapper) = param.consume();
                    // Keep only the settings: a handle of the storage would make the merge copy.
                    let settings = Settings::of(id, &value);
                    let value = Tensor::<2>::from_dispatch(value.inner().into_dispatch());
                    let inputs = (self.inputs)(position);
                    let (merged, squares) = match self.residuals.remove(&path) {
                        Some(residual) => {
                            let (merged, residual, squares) =
                                ops::merge_compensated(value, residual, inputs);
                            // A traversal visits the residual bits after the weight.
                            self.residuals.insert(path, residual);
                            (merged, squares)
                        }
                        None => ops::merge_rounded(value, inputs, weight.rounding(self.step)),
                    };
                    self.squares.push(squares);
                    let merged = Tensor::<D>::from_dispatch(merged.into_dispatch());
                    Param::from_mapped_value(id, settings.restore(merged), mapper)
                }
                None => param,
            },
            _ => param,
        }
    }

    fn map_int<const D: usize>(&mut self, param: Param<Tensor<D, Int>>) -> Param<Tensor<D, Int>> {
        let residual = match self.path.place() {
            Place::Residual { weight } => self.residuals.remove(&weight),
            _ => None,
        };
        match residual {
            Some(residual) => {
                let (id, _, mapper) = param.consume();
                let residual = Tensor::from_dispatch(residual.into_dispatch());
                Param::from_mapped_value(id, residual, mapper)
            }
            None => param,
        }
    }
}
