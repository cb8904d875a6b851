//! Downloads from the Hub, or from the server that `HF_ENDPOINT` names, into the cache in `HF_HOME`.

use std::collections::BTreeSet;
use std::io::IsTerminal;
use std::path::{Component, Path, PathBuf};

use hf_hub::api::sync::{ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};

use super::name::Name;
use crate::console::complain;
use crate::data::{Split, choose};
use crate::pretrained::is_weights;
use crate::weights::{INDEX, SINGLE, names_of_index};

/// The folder of a model, with its weights in safetensors and all that is no weights.
pub(super) fn model(name: &Name) -> Result<PathBuf, String> {
    let snapshot = Snapshot::of(name, RepoType::Model)?;
    let has = |file: &str| snapshot.files.iter().any(|known| known == file);
    let mut wanted: BTreeSet<String> = snapshot.files.iter().cloned().collect();
    wanted
        .retain(|file| !file.contains('/') && !file.starts_with('.') && !is_weights(file.as_ref()));
    if has(INDEX) {
        let path = snapshot.get(INDEX)?;
        wanted.extend(names_of_index(&path).map_err(|error| error.to_string())?);
    } else if has(SINGLE) {
        wanted.insert(SINGLE.into());
    } else {
        return Err(format!("has neither {SINGLE} nor {INDEX}"));
    }
    for file in &wanted {
        snapshot.get(file)?;
    }
    Ok(snapshot.folder)
}

/// The files of a split of a data set.
pub(super) fn data(name: &Name, split: Split) -> Result<Vec<PathBuf>, String> {
    let snapshot = Snapshot::of(name, RepoType::Dataset)?;
    let mut files = snapshot.files.clone();
    if !name.folder.is_empty() {
        let folder = format!("{}/", name.folder);
        files.retain(|file| file.starts_with(&folder));
    }
    let chosen = choose(&files, split)?;
    chosen.into_iter().map(|file| snapshot.get(file)).collect()
}

/// A repository at one commit.
struct Snapshot {
    /// What downloads; `None` where the server did not answer and the cache must do.
    remote: Option<ApiRepo>,
    /// Its folder in the cache.
    folder: PathBuf,
    /// The names of its files, as far as they are known.
    files: Vec<String>,
}

impl Snapshot {
    fn of(name: &Name, kind: RepoType) -> Result<Self, String> {
        let repo = |revision: &str| {
            Repo::with_revision(name.repository.clone(), kind, revision.to_string())
        };
        let cache = Cache::from_env();
        let builder = ApiBuilder::from_env().with_progress(std::io::stderr().is_terminal());
        let api = builder.build().map_err(|error| error.to_string())?;
        let named = cache.repo(repo(&name.revision));
        match api.repo(repo(&name.revision)).info() {
            Ok(info) => {
                // What Python finds by the name of the revision too.
                let noted = named.create_ref(&info.sha);
                noted.map_err(|error| format!("the cache cannot be written: {error}"))?;
                let files = info.siblings.into_iter().map(|file| file.rfilename);
                Ok(Self {
                    remote: Some(api.repo(repo(&info.sha))),
                    folder: named.pointer_path(&info.sha),
                    files: files.filter(|file| is_below(file)).collect(),
                })
            }
            Err(error) => {
                let reason = shown(&error);
                let cached = Self::cached(&cache, &repo(&name.revision)).ok_or(reason.clone())?;
                complain!(
                    "{}: {reason}; the copy in the cache is used",
                    name.repository
                );
                Ok(cached)
            }
        }
    }

    /// What an earlier run or another program has left.
    fn cached(cache: &Cache, repo: &Repo) -> Option<Self> {
        let root = cache.path().join(repo.folder_name());
        let commit = std::fs::read_to_string(root.join("refs").join(repo.revision())).ok()?;
        let folder = cache.repo(repo.clone()).pointer_path(commit.trim());
        let mut files = Vec::new();
        list(&folder, Path::new(""), &mut files).ok()?;
        Some(Self {
            remote: None,
            folder,
            files,
        })
    }

    /// The path of a file, downloaded unless it is there.
    fn get(&self, file: &str) -> Result<PathBuf, String> {
        let path = self.folder.join(file);
        match &self.remote {
            Some(remote) if !path.exists() => {
                let path = remote.download(file);
                path.map_err(|error| format!("{file}: {}", shown(&error)))
            }
            _ if path.exists() => Ok(path),
            _ => Err(format!("{file}: is not in the cache")),
        }
    }
}

/// Whether a name that the server sent stays below the folder it is put in.
fn is_below(file: &str) -> bool {
    let mut parts = Path::new(file).components();
    parts.all(|part| matches!(part, Component::Normal(_)))
}

fn list(root: &Path, folder: &Path, files: &mut Vec<String>) -> std::io::Result<()> {
    for entry in std::fs::read_dir(root.join(folder))? {
        let entry = entry?;
        let relative = folder.join(entry.file_name());
        match entry.file_type()?.is_dir() {
            true => list(root, &relative, files)?,
            false => files.extend(relative.to_str().map(String::from)),
        }
    }
    Ok(())
}

/// What went wrong, in the words of people.
fn shown(error: &ApiError) -> String {
    let text = error.to_string();
    let hint = if text.contains("401") || text.contains("403") {
        " (no such name, or one that takes a token: `hf auth login`)"
    } else if text.contains("404") {
        " (no such name, revision or file)"
    } else {
        ""
    };
    format!("{text}{hint}")
}
