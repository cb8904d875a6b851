//! The optimizer's state, divided by shard and put together again.
//!
//! Burn's record holds tensors with a parameter's id, scalars named `{id}.{field}`, and the path of
//! a parameter under its id. The ids of factors are the same in every process, so that the records
//! of several workers can be merged; other parameters get theirs back with the model.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use burn::tensor::{Bytes, Shape};
use burn_pack::{Reader, Scalar, Writer};

use super::CheckpointError;
use super::parameters::{self, Parameters};

/// Largest number of dimensions of a parameter that Burn's optimizers take.
const MAX_DIMS: usize = 8;

/// The state of some parameters.
#[derive(Default)]
struct Part {
    tensors: Vec<burn_pack::Tensor>,
    scalars: BTreeMap<String, Scalar>,
    metadata: BTreeMap<String, String>,
}

impl Part {
    fn into_writer(self) -> Writer {
        let mut writer = Writer::new(self.tensors);
        for (key, value) in self.scalars {
            writer = writer.with_scalar(&key, value);
        }
        for (key, value) in &self.metadata {
            writer = writer.with_metadata(key, value);
        }
        writer
    }
}

/// State by shard; that of other parameters, and what belongs to none, under `None`.
pub(super) struct States(BTreeMap<Option<usize>, Part>);

impl States {
    pub(super) fn split(
        bytes: Bytes,
        shard_of: &HashMap<u64, usize>,
    ) -> Result<Self, CheckpointError> {
        let invalid = |error: burn_pack::Error| CheckpointError::InvalidState {
            reason: error.to_string(),
        };
        let reader = Reader::from_bytes(bytes).map_err(invalid)?;
        let shard = |id: Option<u64>| id.and_then(|id| shard_of.get(&id).copied());
        let mut parts: BTreeMap<Option<usize>, Part> = BTreeMap::new();
        for (key, value) in reader.scalars() {
            let id = key.split('.').next().and_then(|id| id.parse().ok());
            let part = parts.entry(shard(id)).or_default();
            part.scalars.insert(key.clone(), *value);
        }
        for (key, value) in reader.metadata() {
            let part = parts.entry(shard(key.parse().ok())).or_default();
            part.metadata.insert(key.clone(), value.clone());
        }
        for tensor in reader.into_tensors().map_err(invalid)? {
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

/// One record of the states in `paths`, each checked against the parameters of a model.
pub(super) fn merge<'a>(
    paths: impl Iterator<Item = &'a Path>,
    parameters: &Parameters,
) -> Result<Bytes, CheckpointError> {
    let shapes: HashMap<u64, &Shape> = parameters
        .all
        .iter()
        .map(|parameter| (parameter.id.val(), &parameter.entry.shape))
        .collect();
    let mut all = Part::default();
    for path in paths {
        let damaged = |reason: String| CheckpointError::damaged(path, reason);
        let reader = parameters::open(path)?;
        let tensors = parameters::read(path)?;
        check_record(&tensors, reader.scalars()).map_err(damaged)?;
        for tensor in &tensors {
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
        all.scalars.extend(reader.scalars().clone());
        all.metadata.extend(reader.metadata().clone());
        all.tensors.extend(tensors);
    }
    all.into_writer()
        .into_bytes()
        .map_err(|error| CheckpointError::InvalidState {
            reason: error.to_string(),
        })
}

/// Refuses what Burn's optimizers would panic on: they take a record's word for the number of
/// dimensions of a state.
pub(crate) fn check_record(
    tensors: &[burn_pack::Tensor],
    scalars: &BTreeMap<String, Scalar>,
) -> Result<(), String> {
    const RANK: &str = "__rank";
    let mut ranks = HashMap::new();
    for (key, &value) in scalars {
        let Some((id, RANK)) = key.split_once('.') else {
            continue;
        };
        let id: u64 = id
            .parse()
            .map_err(|_| format!("`{key}` names no parameter"))?;
        match usize::try_from(value) {
            Ok(rank) if (1..=MAX_DIMS).contains(&rank) => ranks.insert(id, rank),
            _ => return Err(format!("`{key}` is {value:?}, not 1 to {MAX_DIMS}")),
        };
    }
    for tensor in tensors {
        let name = &tensor.name;
        let Some(id) = tensor.param_id else {
            return Err(format!("`{name}` has no parameter id"));
        };
        if !tensor.dtype.is_float() {
            return Err(format!("`{name}` is {:?}, not a float", tensor.dtype));
        }
        let dims = tensor.shape.num_dims();
        if ranks.get(&id) != Some(&dims) {
            let expected = ranks.get(&id);
            return Err(format!(
                "`{name}` has {dims} dimensions, its parameter {expected:?}"
            ));
        }
    }
    Ok(())
}
