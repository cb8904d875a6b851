//! Weight files: one, or several with an index as transformers writes it.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use safetensors::{SafeTensorError, View};
use serde_json::json;

use crate::Error;
use crate::weights::{INDEX, SINGLE, Unwritten};

/// Writes tensors into a folder, in files of at most `max_size` bytes of values. A larger tensor has a file
/// of its own.
pub(super) fn write_folder(
    tensors: Vec<(String, Unwritten<'_>)>,
    folder: &Path,
    max_size: u64,
) -> Result<(), Error> {
    let sizes: Vec<u64> = tensors.iter().map(|(_, t)| t.data_len() as u64).collect();
    let values: usize = tensors
        .iter()
        .map(|(_, tensor)| tensor.shape.iter().product::<usize>())
        .sum();
    let lengths = lengths(&sizes, max_size);
    let count = lengths.len();
    if count < 2 {
        return write_file(tensors, &folder.join(SINGLE));
    }
    let mut weight_map = BTreeMap::new();
    let mut rest = tensors.into_iter();
    for (index, length) in lengths.into_iter().enumerate() {
        let file = format!("model-{:05}-of-{count:05}.safetensors", index + 1);
        let own: Vec<_> = rest.by_ref().take(length).collect();
        let names = own.iter().map(|(name, _)| (name.clone(), file.clone()));
        weight_map.extend(names);
        write_file(own, &folder.join(file))?;
    }
    let index = json!({
        "metadata": {"total_parameters": values, "total_size": sizes.iter().sum::<u64>()},
        "weight_map": weight_map,
    });
    let path = folder.join(INDEX);
    std::fs::write(&path, format!("{index:#}\n")).map_err(Error::io(&path))
}

/// Number of tensors in each file, in order.
fn lengths(sizes: &[u64], max_size: u64) -> Vec<usize> {
    let mut lengths = Vec::new();
    let mut room = 0;
    for &size in sizes {
        match lengths.last_mut() {
            Some(last) if size <= room => {
                *last += 1;
                room -= size;
            }
            _ => {
                lengths.push(1);
                room = max_size.saturating_sub(size);
            }
        }
    }
    lengths
}

/// Writes tensors into one file.
pub(super) fn write_file(tensors: Vec<(String, Unwritten<'_>)>, path: &Path) -> Result<(), Error> {
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    let views = tensors.iter().map(|(name, tensor)| (name, tensor));
    safetensors::serialize_to_file(views, Some(metadata), path).map_err(|error| match error {
        SafeTensorError::IoError(source) => Error::io(path)(source),
        other => Error::field(path, "content", other.to_string()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_takes_what_it_has_room_for() {
        assert_eq!(lengths(&[3, 3, 3, 1], 6), [2, 2]);
        assert_eq!(lengths(&[3, 3, 3, 1], 5), [1, 1, 2]);
        // Larger than a file may be.
        assert_eq!(lengths(&[1, 9, 1, 1], 5), [1, 1, 2]);
        assert_eq!(lengths(&[4], 0), [1]);
        assert!(lengths(&[], 5).is_empty());
    }
}
