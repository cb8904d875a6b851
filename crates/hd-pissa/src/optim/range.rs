//! Whether an update may carry a weight out of the range of its dtype.

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{DType, Tensor};

use super::factors::Factors;
use super::statistics::Statistics;
use crate::ops::{self, join};
use crate::path::{PathTracker, Place, track_path};

/// The largest finite values.
const MAX_F16: f32 = 65504.0;
const MAX_BF16: f32 = 255.0 * (1u128 << 120) as f32;
/// Half of the distance between the two largest finite `f32` values.
const HALF_STEP_F32: f32 = (1u128 << 103) as f32;

/// The room that each weight has left.
pub(super) struct Ranges {
    /// The largest magnitude in each half-precision weight, and zero for the others, `[weights]`.
    /// `None` without half-precision weights.
    largest: Option<Tensor<1>>,
    /// The limit for the sum of that and the update, `[weights]`.
    limits: Tensor<1>,
}

impl Ranges {
    /// The ranges of every adapted weight of `model`, in the order of `factors`.
    pub(super) fn of_weights<M: Module>(model: &M, factors: &Factors) -> Self {
        let mut finder = Finder {
            path: PathTracker::default(),
            factors,
            largest: Vec::with_capacity(factors.weights.len()),
        };
        model.visit(&mut finder);
        let device = factors.device();
        let limits = factors.weights.iter().map(|weight| match weight.dtype {
            DType::F16 => MAX_F16,
            DType::BF16 => MAX_BF16,
            _ => HALF_STEP_F32,
        });
        let limits: Vec<f32> = limits.collect();
        let has_half = finder.largest.iter().any(Option::is_some);
        Self {
            largest: has_half.then(|| {
                let zero = Tensor::zeros([1], (&device, DType::F32));
                let largest = finder.largest.into_iter();
                let largest = largest.map(|largest| largest.unwrap_or_else(|| zero.clone()));
                join(largest.map(Tensor::unsqueeze).collect())
            }),
            limits: Tensor::from_data(&limits[..], (&device, DType::F32)),
        }
    }

    /// For each weight 1 if a value may leave the range of its dtype in the merge, else 0;
    /// `[weights]`. Takes the norms of its factors and the statistics of its deltas.
    ///
    /// No element of the update `(a + Δa)·Δb + Δa·b`, and no partial sum of one, is larger than the
    /// product of the norms of its factors (the Cauchy-Schwarz inequality). An `f32` weight takes
    /// every update below half of its last rounding step: even its largest value then rounds back
    /// into its range.
    pub(super) fn may_be_left(
        &self,
        (a, b): (Tensor<1>, Tensor<1>),
        deltas: &Statistics,
    ) -> Tensor<1> {
        let (delta_a, delta_b) = deltas.norms();
        let update = (a + delta_a.clone()) * delta_b + delta_a * b;
        let sum = match &self.largest {
            Some(largest) => update + largest.clone(),
            None => update,
        };
        // NaN, the product of an infinite norm and zero, is not below the limit either.
        let stays = sum.lower(self.limits.clone());
        stays.bool_not().float().cast(DType::F32)
    }
}

struct Finder<'a> {
    path: PathTracker,
    factors: &'a Factors,
    /// `[1]` for each half-precision weight.
    largest: Vec<Option<Tensor<1>>>,
}

impl ModuleVisitor for Finder<'_> {
    track_path!(path);

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        // Both are in the order of a traversal.
        let Some(next) = self.factors.weights.get(self.largest.len()) else {
            return;
        };
        if self.path.place() != Place::Other(next.path.clone()) {
            return;
        }
        self.largest.push(match next.dtype {
            DType::F16 | DType::BF16 => {
                let weight = param.base().inner().into_dispatch();
                Some(ops::max_abs(Tensor::<2>::from_dispatch(weight)))
            }
            _ => None,
        });
    }
}
