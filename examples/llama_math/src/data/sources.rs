//! Which files a path stands for: a file, or a folder of data as data sets are published.

use std::path::{Path, PathBuf};

use crate::{Error, files};

/// What records are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// To train on.
    Train,
    /// To measure with.
    HeldOut,
}

/// Endings of data files; `.gz` may follow.
const ENDINGS: [&str; 4] = ["json", "jsonl", "ndjson", "parquet"];
/// Files of these names describe data.
const DESCRIPTIONS: [&str; 3] = ["dataset_info.json", "dataset_infos.json", "state.json"];
/// Words in names of files that are held out.
const HELD_OUT: [&str; 7] = [
    "test",
    "validation",
    "valid",
    "val",
    "dev",
    "eval",
    "evaluation",
];

/// The files of `path`: itself, or of a folder those that [`choose`] takes.
///
/// # Errors
///
/// [`Error::Io`], and [`Error::Field`] for a folder without data or with several data sets.
pub(super) fn files_of(path: &Path, split: Split) -> Result<Vec<PathBuf>, Error> {
    if !path.is_dir() {
        files::size(path)?;
        return Ok(vec![path.into()]);
    }
    let mut names = Vec::new();
    look_into(path, Path::new(""), &mut names)?;
    let fail = |reason| Error::field(path, "content", format!("is a directory that {reason}"));
    let chosen = choose(&names, split).map_err(fail)?;
    Ok(chosen.into_iter().map(|name| path.join(name)).collect())
}

/// The data files below `root`, with names relative to it. Hidden files and folders are left out.
fn look_into(root: &Path, folder: &Path, names: &mut Vec<String>) -> Result<(), Error> {
    let path = root.join(folder);
    for entry in std::fs::read_dir(&path).map_err(Error::io(&path))? {
        let name = entry.map_err(Error::io(&path))?.file_name();
        let relative = folder.join(&name);
        let path = root.join(&relative);
        match name.to_string_lossy().starts_with('.') {
            true => {}
            // A link to a folder could lead back.
            false if path.is_dir() && !path.is_symlink() => look_into(root, &relative, names)?,
            false if path.is_file() => names.extend(relative.to_str().map(String::from)),
            false => {}
        }
    }
    Ok(())
}

/// Of the files of a data set, by names relative to its folder, those of a split, in order. A file whose
/// name or folder has a word such as `test` or `validation` is held out; where none has, every file
/// serves both splits. Files of the same folder, those words left aside, are one data set.
///
/// # Errors
///
/// That there is no data file, that there are several data sets, or files of several formats, which
/// could hold the same records.
pub(crate) fn choose(names: &[String], split: Split) -> Result<Vec<&String>, String> {
    let mut data: Vec<&String> = names
        .iter()
        .filter(|name| format_of(name).is_some())
        .collect();
    data.sort_unstable();
    let mut sets: Vec<String> = data.iter().map(|name| set_of(name)).collect();
    sets.sort_unstable();
    sets.dedup();
    if let [first, second, ..] = &sets[..] {
        let shown = |name: &String| match name.is_empty() {
            true => "the folder itself".into(),
            false => format!("{name}/"),
        };
        let more = if sets.len() > 2 { ", ..." } else { "" };
        let (first, second) = (shown(first), shown(second));
        return Err(format!(
            "has several data sets ({first}, {second}{more}); name the folder of one"
        ));
    }
    if data.iter().any(|name| is_held_out(name)) {
        data.retain(|name| is_held_out(name) == (split == Split::HeldOut));
    }
    let (Some(first), Some(last)) = (data.first(), data.last()) else {
        return Err(match split {
            Split::Train => "has no file to train on that ends in .jsonl, .json or .parquet",
            Split::HeldOut => "has no file of held-out data that ends in .jsonl, .json or .parquet",
        }
        .into());
    };
    let first_format = format_of(first);
    match data.iter().find(|name| format_of(name) != first_format) {
        Some(other) => Err(format!(
            "has files of several formats, which may hold the same records ({first}, {other}); name \
             the files that are meant, from {first} to {last}"
        )),
        None => Ok(data),
    }
}

/// Whether a name is that of a data file.
pub(crate) fn is_data_file(name: &str) -> bool {
    format_of(name).is_some()
}

/// The ending of a data file, without `.gz`; `None` for other files.
fn format_of(name: &str) -> Option<&'static str> {
    let name = name.to_ascii_lowercase();
    let file = name.rsplit('/').next().unwrap_or_default();
    let plain = file.strip_suffix(".gz").unwrap_or(file);
    let is_of = |ending: &&&str| {
        plain
            .strip_suffix(**ending)
            .is_some_and(|rest| rest.ends_with('.'))
    };
    let ending = ENDINGS.iter().find(is_of)?;
    (!DESCRIPTIONS.contains(&plain)).then_some(*ending)
}

/// Whether one of the words of a name says so.
fn is_held_out(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    let mut words = name.split(|c: char| !c.is_ascii_alphanumeric());
    words.any(|word| HELD_OUT.contains(&word))
}

/// The folder of a file without the parts that name a split.
fn set_of(name: &str) -> String {
    let folders = name.rsplit_once('/').map_or("", |(folders, _)| folders);
    let is_of_set = |folder: &&str| !is_held_out(folder) && *folder != "train";
    folders
        .split('/')
        .filter(is_of_set)
        .collect::<Vec<_>>()
        .join("/")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(names: &[&str], split: Split) -> Result<Vec<String>, String> {
        let names: Vec<String> = names.iter().map(|name| name.to_string()).collect();
        choose(&names, split).map(|names| names.into_iter().cloned().collect())
    }

    #[test]
    fn a_folder_is_read_as_data_sets_are_published() {
        let hub = [
            "README.md",
            "dataset_infos.json",
            "data/train-00001-of-00002.parquet",
            "data/train-00000-of-00002.parquet",
            "data/test-00000-of-00001.parquet",
        ];
        let expected = [
            "data/train-00000-of-00002.parquet",
            "data/train-00001-of-00002.parquet",
        ];
        assert_eq!(chosen(&hub, Split::Train).unwrap(), expected);
        let expected = ["data/test-00000-of-00001.parquet"];
        assert_eq!(chosen(&hub, Split::HeldOut).unwrap(), expected);
        let folders = ["train/a.jsonl.gz", "validation/a.jsonl.gz"];
        assert_eq!(chosen(&folders, Split::Train).unwrap(), folders[..1]);
        assert_eq!(chosen(&folders, Split::HeldOut).unwrap(), folders[1..]);
        // Words are whole words, and without any the files serve both.
        let plain = ["contest.JSONL", "latest.jsonl"];
        for split in [Split::Train, Split::HeldOut] {
            assert_eq!(chosen(&plain, split).unwrap(), plain);
        }
    }

    #[test]
    fn what_is_not_clear_is_refused() {
        for (names, split, part) in [
            (&["a.txt"][..], Split::Train, "no file to train on"),
            (&["test.jsonl"], Split::Train, "no file to train on"),
            (
                &["main/train.parquet", "socratic/train.parquet"],
                Split::Train,
                "(main/, socratic/)",
            ),
            (
                &["a.json", "more/a.json", "x/a.json"],
                Split::Train,
                "the folder itself, more/, ...",
            ),
            (&["a.jsonl", "a.parquet"], Split::Train, "several formats"),
        ] {
            let error = chosen(names, split).unwrap_err();
            assert!(error.contains(part), "{names:?}: {error}");
        }
        // Of the other split a second format says nothing.
        assert!(chosen(&["train.jsonl", "test.json"], Split::Train).is_ok());
    }
}
