//! Names on the Hub, told from paths.

use std::path::Path;

/// What stands on the command line where a path may stand too.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Name {
    /// Owner and repository.
    pub(super) repository: String,
    /// The folder in it; empty for all of it.
    pub(super) folder: String,
    /// Branch, tag or commit.
    pub(super) revision: String,
}

impl Name {
    /// `OWNER/NAME`, with `/FOLDER` and `@REVISION` if wanted; `None` for anything else, and for paths
    /// that exist.
    pub(super) fn parse(path: &Path) -> Option<Self> {
        let text = path.to_str().filter(|_| !path.exists())?;
        let (text, revision) = text.split_once('@').unwrap_or((text, "main"));
        let parts: Vec<&str> = text.split('/').collect();
        let is_plain = |part: &str| {
            let letter = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
            !part.is_empty() && !part.starts_with('.') && part.chars().all(letter)
        };
        let is_name = parts.len() >= 2 && parts.iter().copied().all(is_plain);
        (is_name && !revision.is_empty()).then(|| Self {
            repository: parts[..2].join("/"),
            folder: parts[2..].join("/"),
            revision: revision.into(),
        })
    }
}
