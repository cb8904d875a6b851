//! The manifest of a checkpoint, and its verification.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::parameters::Parameters;
use super::{CheckpointError, files};
use crate::GradientMode;
use crate::windows::FrameChoice;

/// Version of the checkpoints that this build writes and reads.
const FORMAT_VERSION: u64 = 1;
pub(super) const MANIFEST: &str = "manifest.json";
pub(super) const SUMS: &str = "SHA256SUMS";

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Manifest {
    format_version: u64,
    written_by: String,
    pub(super) step: u64,
    /// Number of shards, 0 for a model without HD-PiSSA adapters.
    pub(super) shards: usize,
    /// The frames of the shards; if absent, the published ones.
    #[serde(default = "FrameChoice::published")]
    pub(super) frames: FrameChoice,
    /// The gradients that the shards learn from; if absent, their own.
    #[serde(default = "per_shard")]
    pub(super) gradients: GradientMode,
    pub(super) settings: BTreeMap<String, String>,
    pub(super) progress: Value,
    /// Size in bytes of every other file except the digests.
    files: BTreeMap<String, u64>,
}

fn per_shard() -> GradientMode {
    GradientMode::PerShard
}

/// Read first, to distinguish a manifest of another version from a damaged one.
#[derive(Deserialize)]
struct Header {
    format_version: u64,
    written_by: String,
}

impl Manifest {
    pub(super) fn new(
        step: u64,
        adapters: &Parameters,
        settings: BTreeMap<String, String>,
        progress: Value,
    ) -> Self {
        Self {
            format_version: FORMAT_VERSION,
            written_by: concat!("hd-pissa ", env!("CARGO_PKG_VERSION")).into(),
            step,
            shards: adapters.shards,
            frames: adapters.frames,
            gradients: adapters.gradients,
            settings,
            progress,
            files: BTreeMap::new(),
        }
    }

    /// Writes manifest and digests for `files` in `folder`.
    ///
    /// # Errors
    ///
    /// [`CheckpointError::Io`] with a file that is missing or cannot be read.
    pub(super) fn write(
        mut self,
        folder: &Path,
        files: impl IntoIterator<Item = String>,
    ) -> Result<(), CheckpointError> {
        let mut sums = String::new();
        for name in files {
            let path = folder.join(&name);
            let size = path.metadata().map_err(|e| CheckpointError::io(&path, e))?;
            self.files.insert(name, size.len());
        }
        let path = folder.join(MANIFEST);
        let mut json =
            serde_json::to_vec_pretty(&self).map_err(|error| CheckpointError::io(&path, error))?;
        json.push(b'\n');
        files::write(&path, &json)?;
        for name in self.files.keys() {
            let path = folder.join(name);
            let digest = files::sha256(&path).map_err(|error| CheckpointError::io(&path, error))?;
            sums += &format!("{digest}  {name}\n");
        }
        sums += &format!("{}  {MANIFEST}\n", files::sha256_of(&json));
        files::write(&folder.join(SUMS), sums.as_bytes())
    }

    /// Reads the manifest and compares every file with its digest.
    pub(super) fn verify(folder: &Path) -> Result<Self, CheckpointError> {
        let path = folder.join(SUMS);
        let sums = parse_sums(&read(&path)?).map_err(|r| CheckpointError::damaged(&path, r))?;
        for (name, expected) in &sums {
            let path = folder.join(name);
            let found =
                files::sha256(&path).map_err(|error| CheckpointError::damaged_by(&path, error))?;
            if &found != expected {
                let reason = format!("its SHA-256 is {found}, {SUMS} says {expected}");
                return Err(CheckpointError::damaged(&path, reason));
            }
        }
        let path = folder.join(MANIFEST);
        let manifest = Self::parse(&read(&path)?, &path)?;
        let files: BTreeSet<&str> = manifest.files.keys().map(String::as_str).collect();
        let listed = sums.keys().map(String::as_str);
        let hashed: BTreeSet<&str> = listed.filter(|&name| name != MANIFEST).collect();
        if let Some(name) = files.symmetric_difference(&hashed).next() {
            let reason = format!("`{name}` is not in both {MANIFEST} and {SUMS}");
            return Err(CheckpointError::damaged(folder.join(SUMS), reason));
        }
        Ok(manifest)
    }

    pub(super) fn parse(json: &[u8], path: &Path) -> Result<Self, CheckpointError> {
        let broken = |error: serde_json::Error| CheckpointError::damaged_by(path, error);
        let header: Header = serde_json::from_slice(json).map_err(broken)?;
        if header.format_version != FORMAT_VERSION {
            return Err(CheckpointError::UnsupportedVersion {
                path: path.into(),
                found: header.format_version,
                by: header.written_by,
                supported: FORMAT_VERSION,
            });
        }
        serde_json::from_slice(json).map_err(broken)
    }

    pub(super) fn has_file(&self, name: &str) -> bool {
        self.files.contains_key(name)
    }
}

fn read(path: &Path) -> Result<Vec<u8>, CheckpointError> {
    std::fs::read(path).map_err(|error| CheckpointError::damaged_by(path, error))
}

/// Lines of `sha256sum`: digest, two spaces, name of a file in the same folder.
fn parse_sums(text: &[u8]) -> Result<BTreeMap<String, String>, String> {
    let text = std::str::from_utf8(text).map_err(|_| "is not text".to_string())?;
    let mut sums = BTreeMap::new();
    for (index, line) in text.lines().enumerate() {
        let malformed = || format!("line {} is not `SHA-256  NAME`", index + 1);
        let (digest, name) = line.split_once("  ").ok_or_else(malformed)?;
        let hexadecimal = digest.len() == 64 && digest.bytes().all(|b| b.is_ascii_hexdigit());
        let plain = Path::new(name).file_name() == Some(name.as_ref());
        if !hexadecimal || !plain || sums.insert(name.to_string(), digest.into()).is_some() {
            return Err(malformed());
        }
    }
    match sums.contains_key(MANIFEST) {
        true => Ok(sums),
        false => Err(format!("does not list {MANIFEST}")),
    }
}
