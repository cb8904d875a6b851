//! The state of a Burn optimizer from its record, parameter by parameter.

use std::collections::{BTreeMap, HashMap};

use burn::tensor::Bytes;
use burn_pack::{Error, Reader, Scalar, Tensor, Writer};

/// Largest number of dimensions of a parameter that Burn's optimizers take.
const MAX_DIMS: usize = 8;

/// The content of a record: tensors with a parameter's id and scalars, both named `{id}.{field}`,
/// and the path of a parameter under its id.
#[derive(Clone, Default)]
pub(crate) struct OptimizerState {
    pub(crate) tensors: Vec<Tensor>,
    pub(crate) scalars: BTreeMap<String, Scalar>,
    pub(crate) metadata: BTreeMap<String, String>,
}

impl OptimizerState {
    pub(crate) fn from_bytes(bytes: Bytes) -> Result<Self, Error> {
        let reader = Reader::from_bytes(bytes)?;
        Ok(Self {
            scalars: reader.scalars().clone(),
            metadata: reader.metadata().clone(),
            tensors: reader.into_tensors()?,
        })
    }

    pub(crate) fn into_writer(self) -> Writer {
        let mut writer = Writer::new(self.tensors);
        for (key, value) in self.scalars {
            writer = writer.with_scalar(&key, value);
        }
        for (key, value) in &self.metadata {
            writer = writer.with_metadata(key, value);
        }
        writer
    }

    pub(crate) fn into_bytes(self) -> Result<Bytes, Error> {
        self.into_writer().into_bytes()
    }

    /// Whether both have the same state of every parameter, in any order. Paths are not compared.
    pub(crate) fn is_same(&self, other: &Self) -> Result<bool, Error> {
        let by_name = |state: &Self| -> BTreeMap<String, Tensor> {
            let tensors = state.tensors.iter();
            tensors
                .map(|tensor| (tensor.name.clone(), tensor.clone()))
                .collect()
        };
        let (ours, theirs) = (by_name(self), by_name(other));
        if self.scalars != other.scalars || !ours.keys().eq(theirs.keys()) {
            return Ok(false);
        }
        for (ours, theirs) in ours.values().zip(theirs.values()) {
            let same = (ours.dtype, &ours.shape) == (theirs.dtype, &theirs.shape);
            if !same || ours.to_bytes()?[..] != theirs.to_bytes()?[..] {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Adds the states of other parameters.
    pub(crate) fn extend(&mut self, other: Self) {
        self.tensors.extend(other.tensors);
        self.scalars.extend(other.scalars);
        self.metadata.extend(other.metadata);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.tensors.is_empty() && self.scalars.is_empty()
    }

    /// Refuses states on which Burn's optimizers would panic: they trust a record's number of
    /// dimensions.
    pub(crate) fn check(&self) -> Result<(), String> {
        const RANK: &str = "__rank";
        let mut ranks = HashMap::new();
        for (key, &value) in &self.scalars {
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
        for tensor in &self.tensors {
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
}
