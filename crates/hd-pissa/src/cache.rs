//! Files that are kept from run to run: each is complete and unchanged, or not there.

use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use sha2::{Digest, Sha256};

/// Bytes of a SHA-256, with which every file ends.
const DIGEST: usize = 32;
/// First bytes of the name of a file that is being written.
const PARTIAL: &str = ".partial-";
/// After this time nobody writes any more.
const ABANDONED: Duration = Duration::from_secs(24 * 3600);

/// A folder of files that can be computed again. The key of a file names everything that its content
/// depends on.
///
/// Any number of processes may use a folder at a time: a file gets its name when it is complete. Files
/// are not synchronized to the disk, because a lost one is only computed again.
///
/// ```
/// use hd_pissa::cache::{FileCache, Lookup};
///
/// # fn main() -> std::io::Result<()> {
/// # let folder = tempfile::tempdir()?;
/// let cache = FileCache::new(folder.path(), "squares", 1_000_000);
/// assert_eq!(cache.read("7"), Lookup::Absent);
/// cache.write("7", b"49")?;
/// assert_eq!(cache.read("7"), Lookup::Found(b"49".to_vec()));
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileCache {
    folder: PathBuf,
    extension: &'static str,
    max_bytes: u64,
}

/// What is found under a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Lookup {
    /// The content.
    Found(Vec<u8>),
    /// Nothing that can be read.
    Absent,
    /// A file that has changed since it was written.
    Damaged,
}

impl FileCache {
    /// The files with this extension in `folder`, together at most `max_bytes`. The first write makes
    /// the folder.
    pub fn new(folder: impl Into<PathBuf>, extension: &'static str, max_bytes: u64) -> Self {
        Self {
            folder: folder.into(),
            extension,
            max_bytes,
        }
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The file of a key, which need not exist.
    ///
    /// # Panics
    ///
    /// If `key` has other characters than ASCII letters, digits, `-` and `_`, or none.
    pub fn path(&self, key: &str) -> PathBuf {
        let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
        let is_name = !key.is_empty() && key.bytes().all(is_plain);
        assert!(is_name, "`{key}` is no key of a cache");
        self.folder.join(key).with_extension(self.extension)
    }

    /// What is kept under a key. It counts as used now.
    ///
    /// # Panics
    ///
    /// Those of [`path`](Self::path).
    pub fn read(&self, key: &str) -> Lookup {
        let path = self.path(key);
        let Ok(mut bytes) = std::fs::read(&path) else {
            return Lookup::Absent;
        };
        let content = bytes.len().saturating_sub(DIGEST);
        if digest(key, &bytes[..content])[..] != bytes[content..] {
            return Lookup::Damaged;
        }
        // Where that is refused, it only counts as older.
        let _ = File::open(&path).and_then(|file| file.set_modified(SystemTime::now()));
        bytes.truncate(content);
        Lookup::Found(bytes)
    }

    /// Keeps `content` under `key`, in place of earlier content. Deletes the least recently used files
    /// if all together are too large. Content above the limit is not kept.
    ///
    /// # Errors
    ///
    /// Those of the file system, and [`ErrorKind::FileTooLarge`]. Earlier content then stays.
    ///
    /// # Panics
    ///
    /// Those of [`path`](Self::path).
    pub fn write(&self, key: &str, content: &[u8]) -> io::Result<()> {
        let path = self.path(key);
        let size = (content.len() + DIGEST) as u64;
        if size > self.max_bytes {
            let max_bytes = self.max_bytes;
            let reason = format!("{size} bytes are more than the limit of {max_bytes}");
            return Err(io::Error::new(ErrorKind::FileTooLarge, reason));
        }
        std::fs::create_dir_all(&self.folder)?;
        let mut file = tempfile::Builder::new();
        let mut file = file.prefix(PARTIAL).tempfile_in(&self.folder)?;
        file.write_all(content)?;
        file.write_all(&digest(key, content))?;
        file.persist(path).map_err(|error| error.error)?;
        self.forget_old()
    }

    fn forget_old(&self) -> io::Result<()> {
        let mut files = Vec::new();
        let mut total = 0;
        for entry in std::fs::read_dir(&self.folder)? {
            let entry = entry?;
            let path = entry.path();
            let is_partial = entry.file_name().to_string_lossy().starts_with(PARTIAL);
            let is_kept = path.extension().is_some_and(|it| it == self.extension);
            if !is_partial && !is_kept {
                continue;
            }
            let metadata = match entry.metadata() {
                // Another process may delete files too.
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                metadata => metadata?,
            };
            let used = metadata.modified()?;
            if is_kept {
                total += metadata.len();
                files.push((used, metadata.len(), path));
            } else if used.elapsed().is_ok_and(|time| time > ABANDONED) {
                remove(&path)?;
            }
        }
        files.sort_unstable();
        for (_, size, path) in files {
            if total <= self.max_bytes {
                break;
            }
            remove(&path)?;
            total -= size;
        }
        Ok(())
    }
}

fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// The key is part of it: a file under another name counts as damaged.
fn digest(key: &str, content: &[u8]) -> [u8; DIGEST] {
    let mut hash = Sha256::new();
    hash.update((key.len() as u64).to_le_bytes());
    hash.update(key);
    hash.update(content);
    hash.finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn damage_of_any_kind_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let cache = FileCache::new(folder.path().join("new"), "kind", 1000);
        assert_eq!(cache.read("key"), Lookup::Absent);
        let content: Vec<u8> = (0..100).collect();
        cache.write("key", &content).unwrap();
        let whole = std::fs::read(cache.path("key")).unwrap();
        assert_eq!(cache.read("key"), Lookup::Found(content.clone()));

        let mut damaged: Vec<Vec<u8>> = (0..whole.len()).map(|end| whole[..end].into()).collect();
        for byte in 0..whole.len() {
            let mut flipped = whole.clone();
            flipped[byte] ^= 1 << (byte % 8);
            damaged.push(flipped);
        }
        damaged.push([&whole[..], &[0]].concat());
        for bytes in damaged {
            std::fs::write(cache.path("key"), &bytes).unwrap();
            assert_eq!(cache.read("key"), Lookup::Damaged, "{bytes:?}");
        }
        cache.write("key", &content).unwrap();
        assert_eq!(cache.read("key"), Lookup::Found(content));
        // The file of another key is none of this one.
        std::fs::copy(cache.path("key"), cache.path("other")).unwrap();
        assert_eq!(cache.read("other"), Lookup::Damaged);
        // So is one of no bytes, which may be empty content as well.
        cache.write("empty", b"").unwrap();
        assert_eq!(cache.read("empty"), Lookup::Found(Vec::new()));
    }

    #[test]
    fn the_files_used_last_are_kept() {
        let folder = tempfile::tempdir().unwrap();
        // Room for three files of 100 bytes and their digests.
        let cache = FileCache::new(folder.path(), "kind", 3 * 132 + 10);
        let foreign = folder.path().join("foreign.txt");
        std::fs::write(&foreign, [0; 1000]).unwrap();
        let abandoned = folder.path().join(".partial-old");
        let writing = folder.path().join(".partial-new");
        for (path, hours) in [(&abandoned, 25), (&writing, 23)] {
            let file = File::create(path).unwrap();
            let age = Duration::from_secs(hours * 3600);
            file.set_modified(SystemTime::now() - age).unwrap();
        }
        let age = |key: &str, hours: u64| {
            let file = File::options().write(true).open(cache.path(key)).unwrap();
            let age = Duration::from_secs(hours * 3600);
            file.set_modified(SystemTime::now() - age).unwrap();
        };
        for (hours, key) in [(5, "a"), (4, "b"), (3, "c")] {
            cache.write(key, &[0; 100]).unwrap();
            age(key, hours);
        }
        assert!(matches!(cache.read("a"), Lookup::Found(_)));
        cache.write("d", &[0; 100]).unwrap();
        let kept = ["a", "b", "c", "d"].map(|key| cache.path(key).exists());
        assert_eq!(kept, [true, false, true, true]);
        assert!(foreign.exists() && writing.exists() && !abandoned.exists());

        let error = cache.write("large", &[0; 1000]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::FileTooLarge);
        let kept = ["a", "c", "d", "large"].map(|key| cache.path(key).exists());
        assert_eq!(kept, [true, true, true, false]);
    }

    #[test]
    fn writers_and_readers_of_one_file_see_one_of_the_contents() {
        let folder = tempfile::tempdir().unwrap();
        let cache = FileCache::new(folder.path(), "kind", 1 << 30);
        let contents: Vec<Vec<u8>> = (0..4u8).map(|i| vec![i; 50_000 + i as usize]).collect();
        cache.write("key", &contents[0]).unwrap();
        std::thread::scope(|scope| {
            for content in &contents {
                scope.spawn(|| (0..50).for_each(|_| cache.write("key", content).unwrap()));
                scope.spawn(|| {
                    for _ in 0..50 {
                        let Lookup::Found(found) = cache.read("key") else {
                            panic!("there always is a complete file");
                        };
                        assert!(contents.contains(&found));
                    }
                });
            }
        });
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_folder_that_cannot_be_made_is_an_error() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let cache = FileCache::new(file.path().join("below"), "kind", 1000);
        assert_eq!(cache.read("key"), Lookup::Absent);
        assert!(cache.write("key", b"content").is_err());
    }

    #[test]
    #[should_panic(expected = "is no key")]
    fn a_path_is_no_key() {
        FileCache::new("folder", "kind", 1000).read("../elsewhere");
    }
}
