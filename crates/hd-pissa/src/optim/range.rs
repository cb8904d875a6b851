//! Whether an update may carry a weight out of the range of its dtype.

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{DType, Tensor};

use super::factors::Factors;
use super::packed::RowStatistics;
use crate::adapter::path::{PathTracker, Place, track_path};
use crate::ops;

/// The largest finite values.
const MAX_F16: f64 = 65504.0;
const MAX_BF16: f64 = 255.0 * (1u128 << 120) as f64;
/// Half of the distance between the two largest finite `f32` values.
const HALF_STEP_F32: f64 = (1u128 << 103) as f64;

/// What a weight can still take.
pub(super) struct Range {
    /// The largest magnitude in a half-precision weight, `[1]`.
    largest: Option<Tensor<1>>,
    /// What that and the update together must stay below.
    limit: f64,
}

impl Range {
    /// Of every adapted weight of `model`, in the order of `factors`.
    pub(super) fn of_weights<M: Module>(model: &M, factors: &Factors) -> Vec<Self> {
        let mut finder = Finder {
            path: PathTracker::default(),
            factors,
            ranges: Vec::with_capacity(factors.weights.len()),
        };
        model.visit(&mut finder);
        finder.ranges
    }

    /// 1 if the merged weight may hold a value that its dtype cannot, else 0; `[1]`.
    ///
    /// No element of the update `(a + Δa)·Δb + Δa·b`, and no partial sum of one, is larger than the
    /// product of the norms of its factors (the Cauchy-Schwarz inequality). An `f32` weight takes
    /// every update below half of its last rounding step: even its largest value then rounds back
    /// into its range.
    pub(super) fn may_be_left(&self, frames: &RowStatistics, deltas: &RowStatistics) -> Tensor<1> {
        let ((a, b), (delta_a, delta_b)) = (frames.norms(), deltas.norms());
        let update = (a + delta_a.clone()) * delta_b + delta_a * b;
        let sum = match &self.largest {
            Some(largest) => update + largest.clone(),
            None => update,
        };
        // NaN, of an infinite norm and a zero, is not below the limit either.
        let stays = sum.lower_elem(self.limit);
        stays.bool_not().float().cast(DType::F32)
    }
}

struct Finder<'a> {
    path: PathTracker,
    factors: &'a Factors,
    ranges: Vec<Range>,
}

impl ModuleVisitor for Finder<'_> {
    track_path!(path);

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        // Both are in the order of a traversal.
        let Some(next) = self.factors.weights.get(self.ranges.len()) else {
            return;
        };
        if self.path.place() != Place::Other(next.path.clone()) {
            return;
        }
        let limit = match next.dtype {
            DType::F16 => MAX_F16,
            DType::BF16 => MAX_BF16,
            _ => {
                let (largest, limit) = (None, HALF_STEP_F32);
                self.ranges.push(Range { largest, limit });
                return;
            }
        };
        let weight = Tensor::<2>::from_dispatch(param.base().inner().into_dispatch());
        let largest = Some(ops::max_abs(weight));
        self.ranges.push(Range { largest, limit });
    }
}
