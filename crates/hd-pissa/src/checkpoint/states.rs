//! The optimizer's state, divided by shard and merged again.
//!
//! Burn's record holds tensors with a parameter's id, scalars named `{id}.{field}`, and the path of
//! a parameter under its id. The ids of factors are the same in every process, so the records of
//! several workers can be merged. Other parameters get their ids back with the model.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use burn::tensor::{Bytes, Shape};

use super::CheckpointError;
use super::parameters::{self, Parameters};
use crate::optimizer_state::OptimizerState;

/// State by shard; the state of other parameters, and of none, under `None`.
pub(super) struct States(BTreeMap<Option<usize>, OptimizerState>);

impl States {
    pub(super) fn split(
        bytes: Bytes,
        shard_of: &HashMap<u64, usize>,
    ) -> Result<Self, CheckpointError> {
        let state = OptimizerState::from_bytes(bytes)?;
        let shard = |id: Option<u64>| id.and_then(|id| shard_of.get(&id).copied());
        let mut parts: BTreeMap<Option<usize>, OptimizerState> = BTreeMap::new();
        for (key, value) in state.scalars {
            let id = key.split('.').next().and_then(|id| id.parse().ok());
            let part = parts.entry(shard(id)).or_default();
            part.scalars.insert(key, value);
        }
        for (key, value) in state.metadata {
            let part = parts.entry(shard(key.parse().ok())).or_default();
            part.metadata.insert(key, value);
        }
        for tensor in state.tensors {
            let part = parts.entry(shard(tensor.param_id)).or_default();
            part.tensors.push(tensor);
        }
        Ok(Self(parts))
    }

    pub(super) fn write(
        &mut self,
        shard: Option<usize>,
        path: &Path,
    ) -> Result<(), CheckpointError> {
        let part = self.0.remove(&shard).unwrap_or_default();
        let tensors = part.tensors.clone();
        parameters::write(part.into_writer(), &tensors, path)
    }
}

/// One record of the states in `paths`, which are in `folder`. Each is checked against the parameters
/// of a model.
pub(super) fn merge<'a>(
    folder: &Path,
    paths: impl Iterator<Item = &'a Path>,
    parameters: &Parameters,
) -> Result<Bytes, CheckpointError> {
    let shapes: HashMap<u64, &Shape> = parameters
        .all
        .iter()
        .map(|parameter| (parameter.id.val(), &parameter.entry.shape))
        .collect();
    let mut all = OptimizerState::default();
    for path in paths {
        let damaged = |reason: String| CheckpointError::damaged(path, reason);
        let reader = parameters::open(path)?;
        let state = OptimizerState {
            tensors: parameters::read(path)?,
            scalars: reader.scalars().clone(),
            metadata: reader.metadata().clone(),
        };
        state.check().map_err(damaged)?;
        for tensor in &state.tensors {
            let shape = tensor.param_id.and_then(|id| shapes.get(&id));
            let Some(shape) = shape else {
                let reason = format!("`{}` belongs to no parameter of the model", tensor.name);
                return Err(damaged(reason));
            };
            // Some optimizers keep means over a dimension.
            let mut dims = tensor.shape.iter().zip(shape.iter());
            let fits = dims.all(|(&state, &parameter)| state == parameter || state == 1);
            if tensor.shape.num_dims() != shape.num_dims() || !fits {
                let reason = format!(
                    "`{}` has shape {:?}, its parameter {:?}",
                    tensor.name,
                    &tensor.shape[..],
                    &shape[..]
                );
                return Err(damaged(reason));
            }
        }
        all.scalars.extend(state.scalars);
        all.metadata.extend(state.metadata);
        all.tensors.extend(state.tensors);
    }
    all.into_bytes()
        .map_err(|error| CheckpointError::damaged_by(folder, error))
}
