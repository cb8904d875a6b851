//! Models and data by their names on the Hugging Face Hub, kept in the cache that Python shares.

#[cfg_attr(not(feature = "hub"), path = "without.rs")]
mod fetch;
mod name;

use std::path::{Path, PathBuf};

use crate::Error;
use crate::data::Split;
use name::Name;

/// The folder of a model: `path` itself, or where the model of this name was downloaded to.
///
/// # Errors
///
/// [`Error::Option`] for a name that cannot be fetched. A path that is neither there nor a name is
/// returned as it is.
pub fn model(path: &Path) -> Result<PathBuf, Error> {
    match Name::parse(path) {
        Some(name) if name.folder.is_empty() => {
            fetch::model(&name).map_err(|reason| failed("model", path, reason))
        }
        _ => Ok(path.into()),
    }
}

/// Each path itself, or the files of the data set of this name, downloaded.
///
/// # Errors
///
/// [`Error::Option`] for a name that cannot be fetched.
pub fn data(option: &'static str, paths: &[PathBuf], split: Split) -> Result<Vec<PathBuf>, Error> {
    let mut all = Vec::new();
    for path in paths {
        match Name::parse(path) {
            // With an ending it is the name of a file that is missing.
            Some(name) if !crate::data::is_data_file(&path.to_string_lossy()) => {
                let found = fetch::data(&name, split);
                all.extend(found.map_err(|reason| failed(option, path, reason))?);
            }
            _ => all.push(path.clone()),
        }
    }
    Ok(all)
}

fn failed(option: &'static str, path: &Path, reason: String) -> Error {
    Error::Option {
        option,
        reason: format!("{}: {reason}", path.display()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_told_from_paths() {
        let name = |text: &str| Name::parse(Path::new(text));
        let parts = |text: &str| {
            let name = name(text).unwrap();
            [name.repository, name.folder, name.revision]
        };
        assert_eq!(parts("openai/gsm8k"), ["openai/gsm8k", "", "main"]);
        assert_eq!(parts("openai/gsm8k/main"), ["openai/gsm8k", "main", "main"]);
        assert_eq!(parts("a/b.c_1@v2"), ["a/b.c_1", "", "v2"]);
        for other in [
            "model",
            "./a/b",
            "../a/b",
            "/a/b",
            "a//b",
            "a/b@",
            "a b/c",
            "src/lib.rs",
        ] {
            assert_eq!(name(other), None, "{other}");
        }
        // Paths that are there, or cannot be names, stay what they are.
        assert_eq!(model(Path::new("src")).unwrap(), Path::new("src"));
        let missing = [PathBuf::from("no/such.jsonl")];
        assert_eq!(data("data", &missing, Split::Train).unwrap(), missing);
    }
}
