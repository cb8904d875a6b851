//! What stands for downloads in a build without the feature `hub`.

use std::path::PathBuf;

use super::name::Name;
use crate::data::Split;

pub(super) fn model(name: &Name) -> Result<PathBuf, String> {
    Err(reason(name))
}

pub(super) fn data(name: &Name, _split: Split) -> Result<Vec<PathBuf>, String> {
    Err(reason(name))
}

fn reason(name: &Name) -> String {
    let Name {
        repository,
        folder,
        revision,
    } = name;
    let below = if folder.is_empty() { "" } else { "/" };
    format!(
        "there is no such path; to fetch {repository}{below}{folder} ({revision}) from the Hugging Face \
         Hub, build with `--features hub`"
    )
}
