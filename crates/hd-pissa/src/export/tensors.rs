//! Factors in safetensors files, with what is known of each change in the metadata.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use faer::{Mat, MatRef};
use safetensors::{Dtype, SafeTensorError, SafeTensors, View};
use serde::{Deserialize, Serialize};

use super::{ExportError, WeightChange};

/// Key of the metadata that says what each weight's change is.
const CHANGES: &str = "hd_pissa";

/// What a file says of a change, beside its factors.
#[derive(Serialize, Deserialize)]
struct Entry {
    base_sha256: String,
    relative_error: f64,
}

/// The two tensors of a change in a file.
pub(super) struct Names {
    pub(super) left: String,
    pub(super) right: String,
    /// Whether they are the transposes of the factors, as PEFT has them.
    pub(super) transposed: bool,
}

/// Writes the factors of all changes, complete or not at all.
pub(super) fn write(
    file: &Path,
    changes: &[WeightChange],
    names: impl Fn(&WeightChange) -> Result<Names, ExportError>,
) -> Result<(), ExportError> {
    if changes.is_empty() {
        return Err(ExportError::Empty { file: file.into() });
    }
    let mut entries = BTreeMap::new();
    let mut tensors = Vec::new();
    for change in changes {
        let entry = Entry {
            base_sha256: change.base.clone(),
            relative_error: change.relative_error,
        };
        if entries.insert(&change.path, entry).is_some() {
            return Err(ExportError::content(file, &change.path, "is given twice"));
        }
        let Names {
            left,
            right,
            transposed,
        } = names(change)?;
        for (name, matrix) in [(left, &change.left), (right, &change.right)] {
            let matrix = match transposed {
                true => matrix.transpose(),
                false => matrix.as_ref(),
            };
            let shape = [matrix.nrows(), matrix.ncols()];
            tensors.push((name, Factor { matrix, shape }));
        }
    }
    let entries = serde_json::to_string(&entries).expect("texts and numbers have a JSON form");
    // transformers and PEFT look for the format.
    let metadata = [("format", "pt".into()), (CHANGES, entries)];
    let metadata: HashMap<String, String> = metadata.map(|(key, value)| (key.into(), value)).into();
    safetensors::serialize_to_file(tensors, Some(metadata), file).map_err(|error| match error {
        SafeTensorError::IoError(error) => ExportError::io(file)(error),
        other => ExportError::content(file, "content", other.to_string()),
    })
}

/// Reads what [`write()`] wrote. `names` gives the tensors of a path.
pub(super) fn read(
    file: &Path,
    names: impl Fn(&str) -> Option<Names>,
) -> Result<Vec<WeightChange>, ExportError> {
    let bytes = std::fs::read(file).map_err(ExportError::io(file))?;
    let broken = |error: SafeTensorError| ExportError::content(file, "content", error.to_string());
    let (_, header) = SafeTensors::read_metadata(&bytes).map_err(broken)?;
    let tensors = SafeTensors::deserialize(&bytes).map_err(broken)?;
    let entries = header.metadata().as_ref().and_then(|all| all.get(CHANGES));
    let Some(entries) = entries else {
        let reason = "is not in the metadata, so that no export of hd-pissa wrote this file";
        return Err(ExportError::content(file, CHANGES, reason));
    };
    let entries: BTreeMap<String, Entry> = serde_json::from_str(entries)
        .map_err(|error| ExportError::content(file, CHANGES, error.to_string()))?;
    let matrix = |name: &str, transposed: bool| {
        let tensor = tensors
            .tensor(name)
            .map_err(|error| ExportError::content(file, name, error.to_string()))?;
        let (Dtype::F32, &[rows, cols]) = (tensor.dtype(), tensor.shape()) else {
            let reason = format!(
                "is {:?} of shape {:?}; it must be an F32 matrix",
                tensor.dtype(),
                tensor.shape()
            );
            return Err(ExportError::content(file, name, reason));
        };
        let (values, _) = tensor.data().as_chunks::<4>();
        let values: Vec<f32> = values.iter().map(|&v| f32::from_le_bytes(v)).collect();
        if !values.iter().all(|value| value.is_finite()) {
            let reason = "holds NaN or infinite values";
            return Err(ExportError::content(file, name, reason));
        }
        let matrix = MatRef::from_row_major_slice(&values, rows, cols);
        Ok(match transposed {
            true => matrix.transpose().to_owned(),
            false => matrix.to_owned(),
        })
    };
    let change = |(path, entry): (String, Entry)| {
        let Some(names) = names(&path) else {
            return Err(ExportError::NoLayer { path });
        };
        let left: Mat<f32> = matrix(&names.left, names.transposed)?;
        let right = matrix(&names.right, names.transposed)?;
        if left.ncols() != right.nrows() {
            let reason = format!(
                "has rank {} and {} rank {}",
                left.ncols(),
                names.right,
                right.nrows()
            );
            return Err(ExportError::content(file, names.left, reason));
        }
        Ok(WeightChange {
            path,
            left,
            right,
            relative_error: entry.relative_error,
            base: entry.base_sha256,
        })
    };
    entries.into_iter().map(change).collect()
}

/// A matrix that a file holds row by row.
struct Factor<'a> {
    matrix: MatRef<'a, f32>,
    shape: [usize; 2],
}

impl View for Factor<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let rows = self.matrix.row_iter();
        let values = rows.flat_map(|row| row.iter().copied());
        values
            .flat_map(f32::to_le_bytes)
            .collect::<Vec<u8>>()
            .into()
    }

    fn data_len(&self) -> usize {
        4 * self.shape[0] * self.shape[1]
    }
}
