//! Factors of a weight as one parameter: the packed rows of its shards. The optimizer's states of
//! this parameter are divided among the factors and merged again.

use std::collections::BTreeMap;

use burn::lr_scheduler::module_lr_scheduler::ModuleLearningRate;
use burn::module::ParamId;
use burn::tensor::Bytes;
use burn_pack::{Error, Scalar};

use super::factors::WeightFactors;
use crate::optimizer_state::OptimizerState;

/// The factors of the hosted shards of one weight.
#[derive(Clone, Debug)]
pub(super) struct Rows {
    /// Shard by shard, `a` before `b`: in the order in which they are packed.
    pub(super) factors: Vec<RowFactor>,
    pub(super) shards: usize,
}

#[derive(Clone, Debug)]
pub(super) struct RowFactor {
    pub(super) id: ParamId,
    pub(super) path: String,
    pub(super) shape: [usize; 2],
}

impl RowFactor {
    fn len(&self) -> usize {
        self.shape[0] * self.shape[1]
    }
}

impl Rows {
    /// The rows of the first `shards` hosted shards.
    pub(super) fn of(weight: &WeightFactors, shards: usize) -> Self {
        let shards = &weight.shards[..shards.min(weight.shards.len())];
        let factors = shards.iter().flat_map(|shard| {
            shard.parts().map(|(side, factor)| RowFactor {
                id: factor.id,
                path: weight.factor_path(shard.name, side),
                shape: factor.value.dims(),
            })
        });
        Self {
            factors: factors.collect(),
            shards: shards.len(),
        }
    }

    /// Whether these are the factors of all hosted shards of `weight`, by ids and shapes.
    pub(super) fn are_of(&self, weight: &WeightFactors) -> bool {
        let factors = weight.shards.iter().flat_map(|shard| shard.parts());
        let factors = factors.map(|(_, factor)| (factor.id, factor.value.dims()));
        factors.eq(self.factors.iter().map(|factor| (factor.id, factor.shape)))
    }

    /// The id of all rows together: that of the first factor.
    pub(super) fn id(&self) -> ParamId {
        self.factors[0].id
    }

    /// `[shards, row_len]`
    pub(super) fn shape(&self) -> [usize; 2] {
        let len: usize = self.factors.iter().map(RowFactor::len).sum();
        [self.shards, len / self.shards]
    }

    /// Whether all factors have the same learning rate.
    pub(super) fn have_one(&self, lr: &ModuleLearningRate) -> bool {
        let mut rates = self
            .factors
            .iter()
            .map(|factor| lr.lr_from_param(factor.id, Some(&factor.path)));
        let first = rates.next();
        rates.all(|rate| Some(rate) == first)
    }
}

/// An optimizer's state of one parameter.
#[derive(Default)]
struct ParamState {
    /// By the name of the field.
    tensors: BTreeMap<String, burn_pack::Tensor>,
    scalars: BTreeMap<String, Scalar>,
    path: Option<String>,
}

impl ParamState {
    fn take(state: &mut BTreeMap<u64, Self>, id: ParamId) -> Self {
        state.remove(&id.val()).unwrap_or_default()
    }

    fn is_empty(&self) -> bool {
        self.tensors.is_empty() && self.scalars.is_empty()
    }
}

/// A state by parameter, and the rest, which belongs to no parameter.
struct ByParam(BTreeMap<u64, ParamState>, OptimizerState);

impl ByParam {
    fn of(state: OptimizerState) -> Self {
        let mut by_param: BTreeMap<u64, ParamState> = BTreeMap::new();
        let mut rest = OptimizerState::default();
        for tensor in state.tensors {
            let field = tensor
                .name
                .split_once('.')
                .map(|(_, field)| field.to_string());
            match (tensor.param_id, field) {
                (Some(id), Some(field)) => {
                    by_param
                        .entry(id)
                        .or_default()
                        .tensors
                        .insert(field, tensor);
                }
                _ => rest.tensors.push(tensor),
            }
        }
        for (key, value) in state.scalars {
            let parts = key.split_once('.');
            match parts.and_then(|(id, field)| Some((id.parse().ok()?, field.to_string()))) {
                Some((id, field)) => {
                    by_param.entry(id).or_default().scalars.insert(field, value);
                }
                None => {
                    rest.scalars.insert(key, value);
                }
            }
        }
        for (key, value) in state.metadata {
            match key.parse() {
                Ok(id) => by_param.entry(id).or_default().path = Some(value),
                Err(_) => {
                    rest.metadata.insert(key, value);
                }
            }
        }
        Self(by_param, rest)
    }

    fn into_state(self) -> OptimizerState {
        let Self(by_param, mut all) = self;
        for (id, state) in by_param {
            for (field, mut tensor) in state.tensors {
                tensor.name = format!("{id}.{field}");
                all.tensors.push(tensor);
            }
            let scalars = state.scalars.into_iter();
            all.scalars
                .extend(scalars.map(|(field, value)| (format!("{id}.{field}"), value)));
            all.metadata
                .extend(state.path.map(|path| (id.to_string(), path)));
        }
        all
    }
}

/// The states of the parameters of each of `rows`, which may be the factors or all of them together,
/// and the rest.
pub(super) fn by_weight<'a>(
    state: OptimizerState,
    rows: impl Iterator<Item = &'a Rows>,
) -> (Vec<OptimizerState>, OptimizerState) {
    let mut by_param = ByParam::of(state);
    let states = rows.map(|rows| {
        let ids = rows.factors.iter().map(|factor| factor.id.val());
        let own = ids.filter_map(|id| by_param.0.remove_entry(&id));
        ByParam(own.collect(), OptimizerState::default()).into_state()
    });
    let states = states.collect();
    (states, by_param.into_state())
}

/// The states of all `rows` divided among their factors; `None` if one has another shape than the rows.
pub(super) fn divide<'a>(
    state: OptimizerState,
    rows: impl Iterator<Item = &'a Rows>,
) -> Result<Option<OptimizerState>, Error> {
    let mut by_param = ByParam::of(state);
    for rows in rows {
        let state = ParamState::take(&mut by_param.0, rows.id());
        if state.is_empty() {
            continue;
        }
        let mut divided: Vec<ParamState> = rows
            .factors
            .iter()
            .map(|factor| ParamState {
                scalars: state.scalars.clone(),
                path: Some(factor.path.clone()),
                ..ParamState::default()
            })
            .collect();
        for (field, tensor) in state.tensors {
            let (_, dtype, shape, _, bytes) = tensor.into_parts()?;
            if shape[..] != rows.shape() {
                return Ok(None);
            }
            let mut start = 0;
            for (factor, divided) in rows.factors.iter().zip(&mut divided) {
                let end = start + factor.len() * dtype.size();
                let part = Bytes::from_bytes_vec(bytes[start..end].to_vec());
                start = end;
                let tensor = burn_pack::Tensor::new(
                    field.clone(),
                    dtype,
                    factor.shape,
                    Some(factor.id.val()),
                    part,
                );
                divided.tensors.insert(field.clone(), tensor);
            }
        }
        let ids = rows.factors.iter().map(|factor| factor.id.val());
        by_param.0.extend(ids.zip(divided));
    }
    Ok(Some(by_param.into_state()))
}

/// Merges the states of the factors of each of `rows`. Returns for each whether that was possible:
/// if the factors' states do not fit each other, or have another shape, they stay unchanged.
pub(super) fn unite<'a>(
    state: OptimizerState,
    rows: impl Iterator<Item = &'a Rows>,
) -> Result<(OptimizerState, Vec<bool>), Error> {
    let mut by_param = ByParam::of(state);
    let mut united = Vec::new();
    for rows in rows {
        let states: Vec<ParamState> = rows
            .factors
            .iter()
            .map(|factor| ParamState::take(&mut by_param.0, factor.id))
            .collect();
        if states.iter().all(ParamState::is_empty) {
            united.push(true);
            continue;
        }
        let first = &states[0];
        let fit = states.iter().zip(&rows.factors).all(|(state, factor)| {
            let shapes = |tensor: &burn_pack::Tensor| tensor.shape[..] == factor.shape;
            let types = |state: &ParamState| -> Vec<_> {
                let tensors = state.tensors.iter();
                tensors
                    .map(|(field, tensor)| (field.clone(), tensor.dtype))
                    .collect()
            };
            state.scalars == first.scalars
                && types(state) == types(first)
                && state.tensors.values().all(shapes)
        });
        united.push(fit);
        if !fit {
            let ids = rows.factors.iter().map(|factor| factor.id.val());
            by_param.0.extend(ids.zip(states));
            continue;
        }
        let mut all = ParamState {
            scalars: first.scalars.clone(),
            path: Some(rows.factors[0].path.clone()),
            ..ParamState::default()
        };
        for (field, tensor) in &first.tensors {
            let [shards, row_len] = rows.shape();
            let mut bytes = Vec::with_capacity(shards * row_len * tensor.dtype.size());
            for state in &states {
                bytes.extend_from_slice(&state.tensors[field].to_bytes()?);
            }
            let tensor = burn_pack::Tensor::new(
                field.clone(),
                tensor.dtype,
                rows.shape(),
                Some(rows.id().val()),
                Bytes::from_bytes_vec(bytes),
            );
            all.tensors.insert(field.clone(), tensor);
        }
        by_param.0.insert(rows.id().val(), all);
    }
    Ok((by_param.into_state(), united))
}
