//! Encoded records on disk, so that a run on data that was encoded before starts at once.

use std::io::Write;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::Error;
use crate::batch::Sequence;
use crate::console::complain;
use crate::data::Record;
use crate::tokenize::{Sequences, Template, Tokens};
use crate::weights::hexadecimal;

/// Fewer records are encoded faster than anyone notices.
const FEWEST: usize = 2_000;
/// Files that are kept, the newest ones.
const KEPT: usize = 8;
/// First bytes of a file. Another way to encode or to write takes another number.
const MAGIC: &[u8] = b"llama_math tokens 2\n";
const EXTENSION: &str = "tokens";
/// Bytes of a SHA-256.
const DIGEST: usize = 32;

/// A folder of encoded records. The name of a file is a hash of all that its content depends on.
#[derive(Clone, Debug)]
pub struct TokenCache(Option<PathBuf>);

impl TokenCache {
    /// That of this user, `llama_math` in `XDG_CACHE_HOME` or in `~/.cache`; none where neither is set.
    pub fn of_user() -> Self {
        let folder = |variable, below: &str| {
            let folder = std::env::var_os(variable).map(PathBuf::from);
            let folder = folder.filter(|folder| folder.is_absolute());
            folder.map(|folder| folder.join(below).join("llama_math"))
        };
        Self(folder("XDG_CACHE_HOME", "").or_else(|| folder("HOME", ".cache")))
    }

    /// That in `folder`, which is made when first needed.
    pub fn at(folder: impl Into<PathBuf>) -> Self {
        Self(Some(folder.into()))
    }

    /// What [`Tokens::sequences`] returns, read from the cache or encoded and written to it. Few records
    /// are never looked for. A file that is damaged is replaced; a folder that cannot be written to
    /// costs a message.
    ///
    /// # Errors
    ///
    /// Those of [`Tokens::sequences`].
    pub fn sequences(
        &self,
        tokens: &Tokens,
        records: &[Record],
        template: &dyn Template,
        max_length: usize,
    ) -> Result<Sequences, Error> {
        let encode = || tokens.sequences(records, template, max_length);
        let folder = match &self.0 {
            Some(folder) if records.len() >= FEWEST => folder,
            _ => return encode(),
        };
        let key = key(tokens, records, template, max_length);
        let path = folder.join(key).with_extension(EXTENSION);
        if let Some(found) = std::fs::read(&path).ok().and_then(|bytes| decode(&bytes)) {
            return Ok(found);
        }
        let sequences = encode()?;
        if let Err(error) = write(folder, &path, &sequences) {
            complain!(
                "the encoded data is not kept in {}: {error}",
                folder.display()
            );
        }
        Ok(sequences)
    }
}

/// A hash of everything that the sequences depend on.
fn key(tokens: &Tokens, records: &[Record], template: &dyn Template, max_length: usize) -> String {
    let mut hash = Sha256::new();
    let mut add = |bytes: &[u8]| {
        hash.update((bytes.len() as u64).to_le_bytes());
        hash.update(bytes);
    };
    add(MAGIC);
    add(env!("CARGO_PKG_VERSION").as_bytes());
    add(tokens.digest());
    add(template.key().as_bytes());
    add(&(max_length as u64).to_le_bytes());
    for record in records {
        for turn in &record.earlier {
            add(turn.role.name().as_bytes());
            add(turn.content.as_bytes());
            add(&[u8::from(turn.is_learned)]);
        }
        for text in [&record.instruction, &record.input, &record.answer] {
            add(text.as_bytes());
        }
    }
    hexadecimal(&hash.finalize())
}

/// Two writers of one file write the same, each a file of its own that takes the name at once.
fn write(folder: &Path, path: &Path, sequences: &Sequences) -> std::io::Result<()> {
    std::fs::create_dir_all(folder)?;
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    file.write_all(&encode(sequences))?;
    file.persist(path).map_err(|error| error.error)?;
    forget_old(folder)
}

fn forget_old(folder: &Path) -> std::io::Result<()> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        if entry.path().extension().is_some_and(|ext| ext == EXTENSION) {
            files.push((entry.metadata()?.modified()?, entry.path()));
        }
    }
    files.sort_unstable();
    let surplus = files.len().saturating_sub(KEPT);
    for (_, path) in &files[..surplus] {
        std::fs::remove_file(path)?;
    }
    Ok(())
}

/// The first bytes, six numbers of 8 bytes, and in 4 bytes each for every sequence the number of its tokens,
/// that of its ranges of targets, the tokens and the ends of the ranges; and a digest of all that.
fn encode(sequences: &Sequences) -> Vec<u8> {
    let Sequences {
        usable,
        records,
        cut,
        joined,
        empty,
        too_long,
    } = sequences;
    let mut bytes = MAGIC.to_vec();
    for number in [usable.len(), *records, *cut, *joined, *empty, *too_long] {
        bytes.extend((number as u64).to_le_bytes());
    }
    let mut add = |number: u32| bytes.extend(number.to_le_bytes());
    for Sequence { tokens, targets } in usable {
        add(tokens.len() as u32);
        add(targets.len() as u32);
        tokens.iter().for_each(|&token| add(token));
        for range in targets {
            add(range.start as u32);
            add(range.end as u32);
        }
    }
    let digest = Sha256::digest(&bytes);
    bytes.extend_from_slice(&digest);
    bytes
}

/// The sequences of a file; `None` unless it is complete and unchanged.
fn decode(bytes: &[u8]) -> Option<Sequences> {
    let (content, digest) = bytes.split_at_checked(bytes.len().checked_sub(DIGEST)?)?;
    if Sha256::digest(content)[..] != *digest {
        return None;
    }
    let (numbers, rest) = content.strip_prefix(MAGIC)?.split_at_checked(6 * 8)?;
    let numbers = numbers.as_chunks::<8>().0.iter();
    let mut numbers = numbers.map(|&number| u64::from_le_bytes(number) as usize);
    let mut next = || numbers.next();
    let (usable, records, cut) = (next()?, next()?, next()?);
    let (joined, empty, too_long) = (next()?, next()?, next()?);
    let (numbers, []) = rest.as_chunks::<4>() else {
        return None;
    };
    let mut numbers = numbers.iter().map(|&bytes| u32::from_le_bytes(bytes));
    let sequence = |_| {
        let (len, ranges) = (numbers.next()? as usize, numbers.next()? as usize);
        let tokens: Vec<u32> = numbers.by_ref().take(len).collect();
        let ends: Vec<usize> = numbers
            .by_ref()
            .take(2 * ranges)
            .map(|end| end as usize)
            .collect();
        let is_whole = tokens.len() == len && ends.len() == 2 * ranges;
        is_whole.then(|| Sequence {
            tokens,
            targets: ends
                .as_chunks()
                .0
                .iter()
                .map(|&[start, end]| start..end)
                .collect(),
        })
    };
    Some(Sequences {
        usable: (0..usable).map(sequence).collect::<Option<_>>()?,
        records,
        cut,
        joined,
        empty,
        too_long,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tiny;

    fn sample() -> (Tokens, Vec<Record>) {
        let tokens = Tokens::of(&tiny::pretrained().unwrap()).unwrap();
        let record = |i: usize| Record {
            earlier: Vec::new(),
            instruction: format!("How many are {i} and 2?"),
            input: String::new(),
            answer: match i % 100 {
                0 => String::new(),
                _ => format!("{} are #### {}", i + 2, i + 2),
            },
        };
        (tokens, (0..FEWEST).map(record).collect())
    }

    fn files(folder: &Path) -> Vec<PathBuf> {
        let files = std::fs::read_dir(folder).unwrap();
        files.map(|file| file.unwrap().path()).collect()
    }

    #[test]
    fn what_is_read_is_what_was_encoded() {
        let (tokens, records) = sample();
        let template = PromptTemplate::default();
        let encode =
            |cache: &TokenCache| cache.sequences(&tokens, &records, &template, 90).unwrap();
        let expected = encode(&TokenCache(None));
        assert!(expected.usable.len() > 1900 && expected.empty == 20);
        let folder = tempfile::tempdir().unwrap();
        let cache = TokenCache::at(folder.path().join("new"));
        assert_eq!(encode(&cache), expected);
        let [path] = &files(&folder.path().join("new"))[..] else {
            panic!("one file");
        };
        assert_eq!(encode(&cache), expected);

        // Another file of the right form shows that it was read.
        let mut other = expected.clone();
        other.usable.truncate(7);
        std::fs::write(path, super::encode(&other)).unwrap();
        assert_eq!(encode(&cache), other);

        // Damage of any kind is mended.
        let good = super::encode(&expected);
        let mut changed = good.clone();
        changed[100] ^= 1;
        for damaged in [&changed[..], &good[..good.len() - 1], &good[..10], &[]] {
            std::fs::write(path, damaged).unwrap();
            assert_eq!(encode(&cache), expected);
            assert_eq!(std::fs::read(path).unwrap(), good);
        }
    }

    #[test]
    fn whatever_changes_the_sequences_changes_the_name() {
        let (tokens, records) = sample();
        let template = PromptTemplate::default();
        let base = key(&tokens, &records, &template, 90);
        let mut other = records.clone();
        other[5].answer.push('!');
        // Texts that only move from one field to the next are others too.
        let mut moved = records.clone();
        moved[5].input = std::mem::take(&mut moved[5].instruction);
        let question = PromptTemplate::new("{instruction}?").unwrap();
        let names = [
            key(&tokens, &other, &template, 90),
            key(&tokens, &moved, &template, 90),
            key(&tokens, &records, &question, 90),
            key(&tokens, &records, &template, 91),
            key(&tokens, &records[1..], &template, 90),
        ];
        for (index, name) in names.iter().enumerate() {
            assert!(*name != base && !names[..index].contains(name), "{index}");
        }
    }

    #[test]
    fn two_writers_and_many_files() {
        let (tokens, records) = sample();
        let folder = tempfile::tempdir().unwrap();
        let cache = TokenCache::at(folder.path());
        let template = PromptTemplate::default();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| cache.sequences(&tokens, &records, &template, 90).unwrap());
            }
        });
        assert_eq!(files(folder.path()).len(), 1);
        for length in 60..60 + KEPT + 3 {
            cache
                .sequences(&tokens, &records, &template, length)
                .unwrap();
        }
        assert_eq!(files(folder.path()).len(), KEPT);
        // A folder that cannot be made keeps nobody from encoding.
        let file = tempfile::NamedTempFile::new().unwrap();
        let cache = TokenCache::at(file.path().join("below"));
        cache.sequences(&tokens, &records, &template, 90).unwrap();
    }
}
