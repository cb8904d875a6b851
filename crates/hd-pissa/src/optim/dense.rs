//! Dense parameters, which train outside the adapters: they take the mean of all shards' gradients.

use std::collections::HashMap;

use burn::backend::DispatchTensor;
use burn::module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::optim::GradientsParams;
use burn::tensor::{DType, Tensor};
use hd_pissa_comm::Communicator;

use super::OptimizerError;
use super::layout::ShardLayout;
use crate::ops::row_statistics;
use crate::path::{PathTracker, Place, track_path};

/// The mean gradients, and for each parameter its path and its number of bad values.
#[derive(Default)]
pub(super) struct MeanGradients {
    pub(super) gradients: GradientsParams,
    pub(super) non_finite: Vec<(String, Tensor<1>)>,
}

/// Takes the gradients of dense parameters out of each of `sets`, one after the other. Gives a row
/// `[n]` in `f32` for each set, or no row for a model without dense parameters. A parameter without
/// a gradient in a set counts as zero there.
pub(super) fn take_rows<M: Module>(model: &M, sets: &mut [GradientsParams]) -> Vec<Tensor<1>> {
    let mut flatten = Flatten {
        path: PathTracker::default(),
        rows: vec![Vec::new(); sets.len()],
        sets,
    };
    model.visit(&mut flatten);
    let rows = flatten.rows.into_iter().filter(|row| !row.is_empty());
    rows.map(|row| Tensor::cat(row, 0)).collect()
}

impl MeanGradients {
    /// The gradients of all dense parameters, from one row.
    pub(super) fn of_row<M: Module>(model: &M, mean: Tensor<1>) -> Self {
        let mut unflatten = Unflatten {
            path: PathTracker::default(),
            mean,
            start: 0,
            result: Self::default(),
        };
        model.visit(&mut unflatten);
        unflatten.result
    }
}

/// Takes the gradients of parameters outside the adapters out of `shards` and averages them over
/// all shards of all workers, summing in the order of shards, in `f32`.
pub(super) fn mean_gradients<M: Module>(
    model: &M,
    shards: &mut [GradientsParams],
    layout: &ShardLayout,
    communicator: &dyn Communicator,
) -> Result<MeanGradients, OptimizerError> {
    let rows = take_rows(model, shards);
    if rows.is_empty() {
        return Ok(MeanGradients::default());
    }
    let rows = match communicator.num_workers() {
        1 => rows,
        workers => {
            let (hosted, len) = (rows.len(), rows[0].dims()[0]);
            let gathered = communicator.all_gather(Tensor::cat(rows, 0))?;
            let rows = layout.sorted(gathered.reshape([workers * hosted, len]));
            let row = |shard| rows.clone().narrow(0, shard, 1).flatten(0, 1);
            (0..workers * hosted).map(row).collect()
        }
    };
    let count = rows.len() as f64;
    let sum = rows.into_iter().reduce(|sum, row| sum + row);
    let mean = sum.expect("there is a shard") / count;
    Ok(MeanGradients::of_row(model, mean))
}

/// The path of a dense parameter. An adapted weight is not dense: it requires no gradient, or the
/// step is refused earlier.
fn dense_path<const D: usize>(path: &PathTracker, param: &Param<Tensor<D>>) -> Option<String> {
    match path.place() {
        Place::Other(path) if param.is_require_grad() => Some(path),
        _ => None,
    }
}

struct Flatten<'a> {
    path: PathTracker,
    sets: &'a mut [GradientsParams],
    /// Flat gradients of each set.
    rows: Vec<Vec<Tensor<1>>>,
}

impl ModuleVisitor for Flatten<'_> {
    track_path!(path);

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if dense_path(&self.path, param).is_none() {
            return;
        }
        for (set, row) in self.sets.iter_mut().zip(&mut self.rows) {
            let gradient = match set.remove::<D>(param.id) {
                Some(gradient) => gradient,
                None => param.base().inner().zeros_like(),
            };
            let len = gradient.shape().num_elements();
            row.push(gradient.cast(DType::F32).reshape([len]));
        }
    }
}

struct Unflatten {
    path: PathTracker,
    mean: Tensor<1>,
    start: usize,
    result: MeanGradients,
}

impl ModuleVisitor for Unflatten {
    track_path!(path);

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let Some(path) = dense_path(&self.path, param) else {
            return;
        };
        let shape = param.lazy_shape();
        let len = shape.num_elements();
        let mean = self.mean.clone().narrow(0, self.start, len);
        self.start += len;
        let count = non_finite(mean.clone());
        self.result.non_finite.push((path, count));
        let gradient = mean.reshape::<D, _>(shape).cast(param.base().dtype());
        self.result.gradients.register(param.id, gradient);
    }
}

/// The number of NaN and infinite values, `[1]`.
fn non_finite<const D: usize>(values: Tensor<D>) -> Tensor<1> {
    let len = values.shape().num_elements();
    let row = values.reshape([1, len]).cast(DType::F32);
    row_statistics(row, len).narrow(1, 0, 1).flatten(0, 1)
}

/// For each dense parameter its path and the number of its values that are NaN or infinite, `[1]`.
pub(super) fn non_finite_values<M: Module>(model: &M) -> Vec<(String, Tensor<1>)> {
    struct Count {
        path: PathTracker,
        counts: Vec<(String, Tensor<1>)>,
    }

    impl ModuleVisitor for Count {
        track_path!(path);

        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            if let Some(path) = dense_path(&self.path, param) {
                self.counts.push((path, non_finite(param.base().inner())));
            }
        }
    }

    let mut count = Count {
        path: PathTracker::default(),
        counts: Vec::new(),
    };
    model.visit(&mut count);
    count.counts
}

/// The dense parameters before a step. A refusal restores them.
#[derive(Default)]
pub(super) struct DenseBefore {
    path: PathTracker,
    values: HashMap<ParamId, DispatchTensor>,
}

impl DenseBefore {
    pub(super) fn of<M: Module>(model: &M) -> Self {
        let mut before = Self::default();
        model.visit(&mut before);
        before
    }

    pub(super) fn restore<M: Module>(mut self, model: M) -> M {
        model.map(&mut self)
    }
}

impl ModuleVisitor for DenseBefore {
    track_path!(path);

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if dense_path(&self.path, param).is_some() {
            self.values.insert(param.id, param.base().into_dispatch());
        }
    }
}

impl ModuleMapper for DenseBefore {
    track_path!(path);

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        match self.values.remove(&param.id) {
            Some(value) => {
                let (id, _, mapper) = param.consume();
                Param::from_mapped_value(id, Tensor::from_dispatch(value), mapper)
            }
            None => param,
        }
    }
}
