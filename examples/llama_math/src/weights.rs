//! Weight files: where tensors are, and their values to and from `f32`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::files::kind_of;
use crate::{Error, files, memory};

pub(crate) const SINGLE: &str = "model.safetensors";
pub(crate) const INDEX: &str = "model.safetensors.index.json";
/// That of the format.
const LONGEST_HEADER: u64 = 100_000_000;
/// Bytes that are read and decoded at once.
const PART: usize = 1 << 20;

/// Where the bytes of a weight file are.
#[derive(Debug, Clone)]
pub(crate) enum Source {
    File(PathBuf),
    Embedded(&'static [u8]),
}

impl Source {
    /// Adds the content to a digest.
    pub(crate) fn hash(&self, hash: &mut Sha256) -> Result<(), Error> {
        match self {
            Self::File(path) => {
                let mut file = File::open(path).map_err(Error::io(path))?;
                let mut buffer = vec![0; 1 << 16];
                loop {
                    match file.read(&mut buffer).map_err(Error::io(path))? {
                        0 => return Ok(()),
                        len => hash.update(&buffer[..len]),
                    }
                }
            }
            Self::Embedded(bytes) => hash.update(bytes),
        }
        Ok(())
    }
}

/// Digits of a digest.
pub(crate) fn hexadecimal(digest: &[u8]) -> String {
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A tensor of a weight file.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) source: Source,
    pub(crate) path: PathBuf,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    start: u64,
    /// In bytes.
    pub(crate) len: usize,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// The tensors of a folder, and the names of the files that hold them: the single file, or those of
/// the index, which must agree with each other.
pub(crate) fn read_tensors(
    folder: &Path,
) -> Result<(BTreeMap<String, Entry>, BTreeSet<String>), Error> {
    let (single, index) = (folder.join(SINGLE), folder.join(INDEX));
    let mut tensors = BTreeMap::new();
    if !index.exists() {
        read_file(&single, &mut tensors)?;
        return Ok((tensors, [SINGLE.to_string()].into()));
    }
    let weight_map = read_index(&index)?;
    let names: BTreeSet<String> = weight_map.values().cloned().collect();
    for name in &names {
        read_file(&folder.join(name), &mut tensors)?;
    }
    for (tensor, name) in &weight_map {
        if tensors.get(tensor).map(|entry| &entry.path) != Some(&folder.join(name)) {
            let reason = format!("`{tensor}` is not in {name}");
            return Err(Error::field(&index, "weight_map", reason));
        }
    }
    if let Some(tensor) = tensors
        .keys()
        .find(|tensor| !weight_map.contains_key(*tensor))
    {
        let path = tensors[tensor].path.display();
        let reason = format!("does not list `{tensor}`, which is in {path}");
        return Err(Error::field(&index, "weight_map", reason));
    }
    // Some programs would read this one, others those of the index.
    if !names.contains(SINGLE) && single.exists() {
        let mut others = BTreeMap::new();
        read_file(&single, &mut others)?;
        for tensor in tensors.keys().chain(others.keys()) {
            let is_same = match (tensors.get(tensor), others.get(tensor)) {
                (Some(own), Some(other)) => own.holds_the_same_as(other, tensor)?,
                _ => false,
            };
            if !is_same {
                let reason = format!(
                    "is not the same as in the files of {}; remove the ones that are not meant",
                    index.display()
                );
                return Err(Error::field(&single, tensor, reason));
            }
        }
    }
    Ok((tensors, names))
}

/// The names of the files that an index names.
#[cfg(feature = "hub")]
pub(crate) fn names_of_index(path: &Path) -> Result<BTreeSet<String>, Error> {
    read_index(path).map(|weight_map| weight_map.into_values().collect())
}

/// The file of each tensor, by its name. All are in the folder of the index.
fn read_index(path: &Path) -> Result<BTreeMap<String, String>, Error> {
    let text = files::text(path)?;
    let Index { weight_map } = serde_json::from_str(&text)
        .map_err(|error| Error::field(path, "weight_map", error.to_string()))?;
    if weight_map.is_empty() {
        return Err(Error::field(path, "weight_map", "is empty"));
    }
    let is_in_folder = |name: &&String| Path::new(name).file_name() == Some(name.as_ref());
    match weight_map.values().find(|name| !is_in_folder(name)) {
        Some(name) => {
            let reason = format!("`{name}` is not the name of a file in the same folder");
            Err(Error::field(path, "weight_map", reason))
        }
        None => Ok(weight_map),
    }
}

fn read_file(path: &Path, tensors: &mut BTreeMap<String, Entry>) -> Result<(), Error> {
    let size = files::size(path)?;
    let file = File::open(path).map_err(Error::io(path))?;
    read_header(file, size, Source::File(path.into()), path, tensors)
}

/// Adds the tensors of one weight file, without reading their values.
pub(crate) fn read_header(
    mut file: impl Read,
    size: u64,
    source: Source,
    path: &Path,
    tensors: &mut BTreeMap<String, Entry>,
) -> Result<(), Error> {
    let broken = |reason: String| Error::field(path, "header", reason);
    let mut prefix = [0; 8];
    if size < 8 {
        return Err(broken(format!(
            "the file has {size} bytes, too few for safetensors"
        )));
    }
    file.read_exact(&mut prefix).map_err(Error::io(path))?;
    // A header is never as long as eight letters would make it.
    let start = match &prefix {
        b"version " => &b"version https://git-lfs"[..],
        other => other,
    };
    if let Some(kind) = kind_of(start) {
        return Err(broken(format!("the file is {kind}")));
    }
    let header_len = u64::from_le_bytes(prefix);
    let data_start = match header_len.checked_add(8) {
        Some(start) if start <= size => start,
        _ => {
            return Err(broken(
                "not a safetensors file, or cut off in its header".into(),
            ));
        }
    };
    if header_len > LONGEST_HEADER {
        let reason = format!("takes {header_len} bytes; safetensors allows {LONGEST_HEADER}");
        return Err(broken(reason));
    }
    let mut header = vec![0; header_len as usize];
    file.read_exact(&mut header).map_err(Error::io(path))?;
    let metadata: Metadata = serde_json::from_slice(&header)
        .map_err(|error| broken(format!("not a safetensors file: {error}")))?;
    let expected = data_start + metadata.data_len() as u64;
    if expected != size {
        let reason = format!("the file has {size} bytes where its header says {expected}");
        return Err(broken(reason));
    }
    for (name, info) in metadata.tensors() {
        let TensorInfo {
            dtype,
            shape,
            data_offsets: (start, end),
        } = info;
        let entry = Entry {
            source: source.clone(),
            path: path.into(),
            dtype: *dtype,
            shape: shape.clone(),
            start: data_start + *start as u64,
            len: end - start,
        };
        if let Some(other) = tensors.insert(name.clone(), entry) {
            let reason = format!("is in {} too", other.path.display());
            return Err(Error::field(path, name, reason));
        }
    }
    Ok(())
}

impl Entry {
    /// What the file holds of it.
    fn reader(&self) -> Result<Box<dyn Read + '_>, Error> {
        Ok(match &self.source {
            Source::File(path) => {
                let mut file = File::open(path).map_err(Error::io(path))?;
                file.seek(SeekFrom::Start(self.start))
                    .map_err(Error::io(path))?;
                Box::new(file)
            }
            Source::Embedded(all) => Box::new(&all[self.start as usize..]),
        })
    }

    fn bytes(&self, name: &str) -> Result<Vec<u8>, Error> {
        self.check_memory(name)?;
        let mut bytes = vec![0; self.len];
        self.reader()?
            .read_exact(&mut bytes)
            .map_err(Error::io(&self.path))?;
        Ok(bytes)
    }

    /// Refuses a tensor that does not fit into memory.
    pub(crate) fn check_memory(&self, name: &str) -> Result<(), Error> {
        // The values, which may take more than the bytes, and perhaps a transposed copy.
        let fits = memory::check((self.len as u64).saturating_mul(4));
        fits.map_err(|reason| Error::field(&self.path, name, reason))
    }

    pub(crate) fn num_values(&self) -> usize {
        self.shape.iter().product()
    }

    fn holds_the_same_as(&self, other: &Self, name: &str) -> Result<bool, Error> {
        let describe = |entry: &Self| (entry.dtype, entry.shape.clone());
        Ok(describe(self) == describe(other) && self.bytes(name)? == other.bytes(name)?)
    }

    /// The values; `name` is for messages.
    pub(crate) fn read(&self, name: &str) -> Result<Vec<f32>, Error> {
        let fail = |reason: String| Error::field(&self.path, name, reason);
        let decode: fn(&[u8], &mut Vec<f32>) = match self.dtype {
            Dtype::F32 => |bytes, values| extend(values, bytes, f32::from_le_bytes),
            Dtype::F16 => |bytes, values| {
                extend(values, bytes, |bytes| f16::from_le_bytes(bytes).to_f32());
            },
            Dtype::BF16 => |bytes, values| {
                extend(values, bytes, |bytes| bf16::from_le_bytes(bytes).to_f32());
            },
            other => {
                return Err(fail(format!(
                    "has dtype {other:?}; supported are F32, F16, BF16"
                )));
            }
        };
        self.check_memory(name)?;
        let mut reader = self.reader()?;
        let mut values = Vec::with_capacity(self.num_values());
        // In parts, so that the bytes are never there beside all of the values.
        let mut buffer = vec![0; PART.min(self.len)];
        let mut left = self.len;
        while left > 0 {
            let part = &mut buffer[..left.min(PART)];
            reader.read_exact(part).map_err(Error::io(&self.path))?;
            decode(part, &mut values);
            left -= part.len();
        }
        match values.iter().filter(|value| !value.is_finite()).count() {
            0 => Ok(values),
            count => Err(fail(format!("holds {count} NaN or infinite values"))),
        }
    }
}

fn extend<const N: usize>(values: &mut Vec<f32>, bytes: &[u8], value: impl Fn([u8; N]) -> f32) {
    let (chunks, _) = bytes.as_chunks::<N>();
    values.extend(chunks.iter().map(|&chunk| value(chunk)));
}

/// The transpose of a `[rows, cols]` matrix, in blocks that stay in cache.
pub(crate) fn transpose(values: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    const BLOCK: usize = 32;
    let mut result = vec![0.0; values.len()];
    for row_start in (0..rows).step_by(BLOCK) {
        for col_start in (0..cols).step_by(BLOCK) {
            for row in row_start..rows.min(row_start + BLOCK) {
                for col in col_start..cols.min(col_start + BLOCK) {
                    result[col * rows + row] = values[row * cols + col];
                }
            }
        }
    }
    result
}

/// Bytes of values that `dtype` has.
pub(crate) fn encode(values: &[f32], dtype: Dtype) -> Vec<u8> {
    fn bytes<const N: usize>(values: &[f32], bytes: impl Fn(f32) -> [u8; N]) -> Vec<u8> {
        values.iter().flat_map(|&value| bytes(value)).collect()
    }

    match dtype {
        Dtype::F16 => bytes(values, |value| f16::from_f32(value).to_le_bytes()),
        Dtype::BF16 => bytes(values, |value| bf16::from_f32(value).to_le_bytes()),
        _ => bytes(values, f32::to_le_bytes),
    }
}

/// A tensor to be written. Its bytes exist only while they are written.
pub(crate) struct Unwritten<'a> {
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: Box<dyn Fn() -> Vec<u8> + 'a>,
}

impl safetensors::View for &Unwritten<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> std::borrow::Cow<'_, [u8]> {
        (self.bytes)().into()
    }

    fn data_len(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8
    }
}
