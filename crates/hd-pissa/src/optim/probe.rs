//! Trials that show what an optimizer's update depends on.

use burn::module::ParamId;
use burn::optim::{GradientsParams, ModuleOptimizer, OptimizerRecord};
use burn::tensor::{Device, Tensor, TensorData};

use super::OptimizerError;
use super::factors::Factors;
use super::packed::unpack;
use super::param_list::ParamList;
use super::rows::{Rows, divide};
use crate::ops::join;
use crate::optimizer_state::OptimizerState;

/// Large enough to show a decay of 1e-6 at learning rate 1. It is a power of two: adding an update
/// of order 1 rounds by no more than 2⁻¹².
const VALUE: f64 = 4096.0;

/// Two steps of gradients, of different sizes and signs: with two equal ones, an optimizer that
/// normalizes gradients would hide a decay. Small ones show an epsilon.
const GRADIENTS: [[[f64; 3]; 2]; 2] = [
    [[1.0, -0.5, 1e-6], [0.75, 2.0, -1e-9]],
    [[-0.75, 0.25, 0.5], [1.0, -1.0, 1e-7]],
];

/// Small parameters with given paths and ids, which parameter groups match.
#[derive(Clone, Debug)]
pub(super) struct Probe {
    params: ParamList,
    device: Device,
}

impl Probe {
    pub(super) fn new(
        device: &Device,
        params: impl IntoIterator<Item = (String, ParamId)>,
    ) -> Self {
        let params = params.into_iter().map(|(path, id)| (path, id, [2, 3]));
        Self {
            params: ParamList::zeros(device, params),
            device: device.clone(),
        }
    }

    /// The updates of each parameter, or the path of the first whose update depends on its value.
    pub(super) fn updates(&self, optimizer: &ModuleOptimizer) -> Result<Vec<Vec<f32>>, String> {
        let at_zero = self.updates_at(optimizer, 0.0);
        let at_value = self.updates_at(optimizer, VALUE);
        let differ = |x: &[f32], y: &[f32]| x.iter().zip(y).any(|(x, y)| (x - y).abs() > 2e-3);
        let mut pairs = at_zero.iter().zip(&at_value);
        match pairs.position(|(x, y)| differ(x, y)) {
            Some(position) => Err(self.params.paths().nth(position).expect("as many").into()),
            None => Ok(at_zero),
        }
    }

    /// The update that two steps of a fresh copy of `optimizer` make to parameters of value
    /// `start`.
    fn updates_at(&self, optimizer: &ModuleOptimizer, start: f64) -> Vec<Vec<f32>> {
        let mut optimizer = fresh(optimizer);
        let mut params = self.params.clone().filled(start);
        for gradient in GRADIENTS {
            let mut gradients = GradientsParams::new();
            for id in params.ids() {
                gradients.register(id, Tensor::<2>::from_floats(gradient, &self.device));
            }
            params = optimizer.step(1.0, params, gradients);
        }
        let updates = params.into_values().map(|value| value - start);
        updates
            .map(|update| update.into_data().iter::<f32>().collect())
            .collect()
    }
}

/// `optimizer` without a state.
pub(super) fn fresh(optimizer: &ModuleOptimizer) -> ModuleOptimizer {
    optimizer.clone().load_record(OptimizerRecord::default())
}

/// For each weight whether `optimizer` gives the same numbers, bit for bit, when the factors of all
/// hosted shards are one parameter as when each is a parameter of its own.
///
/// This needs an optimizer that works element by element, in the same way for all factors of the
/// weight. `updates` come from a [`Probe`] of all factors: equal updates come from equal
/// optimizers.
pub(super) fn are_elementwise(
    optimizer: &ModuleOptimizer,
    factors: &Factors,
    updates: &[Vec<f32>],
) -> Result<Vec<bool>, OptimizerError> {
    let per_weight = 2 * factors.hosted.len();
    let mut tried: Vec<([usize; 3], &[f32], bool)> = Vec::new();
    let mut result = Vec::with_capacity(factors.weights.len());
    for (weight, updates) in factors.weights.iter().zip(updates.chunks(per_weight)) {
        let first = &updates[0];
        if updates.iter().any(|update| update != first) {
            result.push(false);
            continue;
        }
        let sizes = [weight.d_input(), weight.rank(), weight.d_output()];
        let known = tried.iter().find(|(of, by, _)| *of == sizes && by == first);
        let fits = match known {
            Some(&(_, _, fits)) => fits,
            None => {
                // Two shards show an optimizer that mixes shards.
                let fits = is_elementwise(optimizer, &Rows::of(weight, 2), &factors.device())?;
                tried.push((sizes, first, fits));
                fits
            }
        };
        result.push(fits);
    }
    Ok(result)
}

/// Three steps both ways, with gradients of all sizes: the updates and the states must be the same.
fn is_elementwise(
    optimizer: &ModuleOptimizer,
    rows: &Rows,
    device: &Device,
) -> Result<bool, OptimizerError> {
    let factors = rows.factors.iter();
    let factors = factors.map(|factor| (factor.path.clone(), factor.id, factor.shape));
    let mut apart = (fresh(optimizer), ParamList::zeros(device, factors));
    let together = [(rows.factors[0].path.clone(), rows.id(), rows.shape())];
    let mut together = (fresh(optimizer), ParamList::zeros(device, together));
    let [shards, row_len] = rows.shape();
    let [d_input, rank] = rows.factors[0].shape;
    for step in 0..3 {
        let gradient = TensorData::new(gradient(shards * row_len, step), [shards, row_len]);
        let gradient = Tensor::<2>::from_data(gradient, device);
        let parts = (0..shards).flat_map(|shard| {
            let (a, b) = unpack(gradient.clone().narrow(0, shard, 1), d_input, rank);
            [a, b]
        });
        let mut gradients = GradientsParams::new();
        for (factor, part) in rows.factors.iter().zip(parts) {
            gradients.register(factor.id, part);
        }
        apart.1 = apart.0.step(1.0, apart.1, gradients);
        let mut gradients = GradientsParams::new();
        gradients.register(rows.id(), gradient);
        together.1 = together.0.step(1.0, together.1, gradients);
        let [apart, together] = [&apart.1, &together.1].map(|params| {
            let joined = join(params.clone().into_values().collect());
            let joined = joined.into_data();
            joined.iter::<f32>().map(f32::to_bits).collect::<Vec<u32>>()
        });
        if apart != together {
            return Ok(false);
        }
    }
    let state = |optimizer: ModuleOptimizer| -> Result<_, OptimizerError> {
        let bytes = optimizer.into_bytes()?;
        Ok(OptimizerState::from_bytes(bytes)?)
    };
    let (apart, together) = (state(apart.0)?, state(together.0)?);
    let same = || -> Result<bool, burn_pack::Error> {
        let Some(together) = divide(together, std::iter::once(rows))? else {
            return Ok(false);
        };
        together.is_same(&apart)
    };
    Ok(same()?)
}

/// Values of either sign from 1e-12 to 1e3, and zeros.
fn gradient(len: usize, step: u32) -> Vec<f32> {
    let mut bits = 0x9e37_79b9_u32 ^ step.wrapping_mul(0x85eb_ca6b);
    let values = (0..len).map(|_| {
        bits = bits.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let (mantissa, exponent) = (bits >> 8 & 0xffff, (bits >> 24) as i32 % 16);
        match mantissa % 17 {
            0 => 0.0,
            sign => {
                (f32::from(mantissa as u16) / 65536.0 - f32::from(sign as u8 % 2))
                    * 10f32.powi(exponent - 12)
            }
        }
    });
    values.collect()
}
