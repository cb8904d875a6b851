//! Left-overs of interrupted programs.

use std::fs;
use std::io;
use std::path::Path;

use super::disk::entries;
use super::place::{PARTIAL, Place, REPLACED, RETIRING};
use super::record::{RECORD, fill};
use crate::Error;
use crate::console::{complain, say};

impl Place {
    /// Finishes or undoes the work of an interrupted program.
    pub(super) fn tidy(&self) -> Result<(), Error> {
        for folder in [&self.parent, &self.target] {
            let Ok(names) = entries(folder) else {
                continue;
            };
            // Complete folders first, because they decide about the folders that they replace.
            for what in [RETIRING, PARTIAL, REPLACED] {
                for name in &names {
                    match self.maker(name, what) {
                        // Its program is running.
                        Some(process) if is_alive(process) => {}
                        Some(_) => self
                            .tidy_one(&folder.join(name), what)
                            .map_err(Error::io(folder.join(name)))?,
                        None => {}
                    }
                }
            }
        }
        Ok(())
    }

    fn tidy_one(&self, left: &Path, what: &str) -> io::Result<()> {
        let target = &self.target;
        let is_inside = left.starts_with(target);
        let is_there = target.join(RECORD).is_file();
        if what == RETIRING {
            return fill(left, target);
        }
        if what == REPLACED {
            return match (is_there, target.exists()) {
                (true, _) => fs::remove_dir_all(left),
                (false, false) => fs::rename(left, target),
                (false, true) => fill(left, target),
            };
        }
        if !left.join(RECORD).is_file() {
            return fs::remove_dir_all(left);
        }
        if !target.exists() {
            fs::rename(left, target)?;
        } else if !is_there && (is_inside || self.is_empty()?) {
            fill(left, target)?;
        } else {
            complain!(
                "a complete output of an earlier run is in {}; move or delete it",
                left.display()
            );
            return Ok(());
        }
        say!(
            "recovered: {}, which an earlier run has written",
            target.display()
        );
        Ok(())
    }
}

/// Whether another process with this number is running, if the system reports it.
fn is_alive(process: u32) -> bool {
    process != std::process::id() && Path::new("/proc").join(process.to_string()).exists()
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::super::staged::Staged;
    use super::*;

    /// Larger than every process number.
    const GONE: u32 = 4_200_000_000;

    #[test]
    fn left_overs_are_finished_restored_or_removed() {
        let make = |folder: PathBuf, names: &[&str]| {
            fs::create_dir_all(&folder).unwrap();
            for name in names {
                fs::write(folder.join(name), folder.to_str().unwrap()).unwrap();
            }
        };
        // The left-overs of a killed program next to the output, and the program whose file is then
        // in the output.
        for (left, expected) in [
            (&["partial"][..], None),
            (&["replaced"], Some("replaced")),
            (&["partial", "replaced"], Some("replaced")),
            (&["partial+"], Some("partial")),
            (&["partial+", "replaced"], Some("partial")),
            (&["partial+", "retiring"], Some("retiring")),
        ] {
            for inside in [false, true] {
                if !inside && left.contains(&RETIRING) {
                    continue;
                }
                let root = tempfile::tempdir().unwrap();
                let target = root.path().join("out");
                let folder = match inside {
                    true => &target,
                    false => root.path(),
                };
                fs::create_dir_all(folder).unwrap();
                for what in left {
                    let name = what.trim_end_matches('+');
                    let complete = what.ends_with('+') || name != PARTIAL;
                    let names: &[&str] = if complete { &["a", RECORD] } else { &["a"] };
                    make(folder.join(format!(".out.{name}-{GONE}")), names);
                }
                for other in [".other.partial-1", ".out.partial-x", ".out.partial-1"] {
                    make(root.path().join(other), &["a"]);
                }
                Staged::tidy(&target).unwrap();
                let found = fs::read_to_string(target.join("a")).ok();
                let case = format!("{left:?} inside {inside}");
                assert_eq!(found.is_some(), expected.is_some(), "{case}");
                if let (Some(found), Some(expected)) = (found, expected) {
                    assert!(found.contains(expected), "{case}: {found}");
                    assert!(target.join(RECORD).is_file(), "{case}");
                }
                let hidden = |folder: &Path| {
                    let mut names = entries(folder).unwrap_or_default();
                    names.retain(|name| name.starts_with('.'));
                    names.sort();
                    names
                };
                // A folder of somebody else, and one of a running process.
                let others = [".other.partial-1", ".out.partial-1", ".out.partial-x"];
                assert_eq!(hidden(root.path()), others, "{case}");
                // The old output is back, and the new one has no place.
                let stays = usize::from(left.contains(&RETIRING));
                assert_eq!(hidden(&target).len(), stays, "{case}");
            }
        }
    }

    #[test]
    fn a_complete_output_without_a_place_is_left_alone() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("out");
        let left = root.path().join(format!(".out.partial-{GONE}"));
        for folder in [&target, &left] {
            fs::create_dir(folder).unwrap();
            fs::write(folder.join(RECORD), folder.to_str().unwrap()).unwrap();
        }
        Staged::tidy(&target).unwrap();
        assert!(left.join(RECORD).is_file());
        let record = fs::read_to_string(target.join(RECORD)).unwrap();
        assert_eq!(record, target.to_str().unwrap());
    }
}
