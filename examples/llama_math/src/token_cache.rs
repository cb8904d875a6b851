//! Encoded records on disk, so that a run on data that was encoded before starts at once.

use std::path::PathBuf;

use hd_pissa::cache::{FileCache, Lookup};
use sha2::{Digest, Sha256};

use crate::batch::Sequence;
use crate::console::complain;
use crate::data::Record;
use crate::tokenize::{Sequences, Template, Tokens};
use crate::weights::hexadecimal;
use crate::{Error, user_cache};

/// Fewer records are encoded faster than anyone notices.
const FEWEST: usize = 2_000;
/// What all files may take together, in bytes.
const MAX_BYTES: u64 = 1 << 30;
/// First bytes of a file. Another way to encode or to write takes another number.
const MAGIC: &[u8] = b"llama_math tokens 3\n";

/// A folder of encoded records. The name of a file is a hash of all that its content depends on.
#[derive(Clone, Debug)]
pub struct TokenCache(Option<FileCache>);

impl TokenCache {
    /// Keeps nothing.
    pub fn none() -> Self {
        Self(None)
    }

    /// That of this user, where there is one.
    pub fn of_user() -> Self {
        user_cache::folder().map_or_else(Self::none, Self::at)
    }

    /// That in `folder`, which is made when first needed.
    pub fn at(folder: impl Into<PathBuf>) -> Self {
        Self(Some(FileCache::new(folder, "tokens", MAX_BYTES)))
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
        let cache = match &self.0 {
            Some(cache) if records.len() >= FEWEST => cache,
            _ => return encode(),
        };
        let key = key(tokens, records, template, max_length);
        match cache.read(&key) {
            Lookup::Found(bytes) => {
                if let Some(found) = decode(&bytes) {
                    return Ok(found);
                }
            }
            Lookup::Absent => {}
            Lookup::Damaged => {
                let path = cache.path(&key);
                complain!("{} is damaged; the data is encoded again", path.display());
            }
        }
        let sequences = encode()?;
        if let Err(error) = cache.write(&key, &self::encode(&sequences)) {
            let folder = cache.folder().display();
            complain!("the encoded data is not kept in {folder}: {error}");
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

/// The first bytes, six numbers of 8 bytes, and in 4 bytes each for every sequence the number of its tokens,
/// that of its ranges of targets, the tokens and the ends of the ranges.
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
    bytes
}

/// `None` for what [`encode`] does not write.
fn decode(bytes: &[u8]) -> Option<Sequences> {
    let (numbers, rest) = bytes.strip_prefix(MAGIC)?.split_at_checked(6 * 8)?;
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
    use crate::prompt::PromptTemplate;
    use crate::tiny;
    use std::path::Path;

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
        let expected = encode(&TokenCache::none());
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
        let key = path.file_stem().unwrap().to_str().unwrap();
        let kept = cache.0.as_ref().unwrap();
        let good = std::fs::read(path).unwrap();
        kept.write(key, &super::encode(&other)).unwrap();
        assert_eq!(encode(&cache), other);
        // Content of another form is not.
        kept.write(key, &super::encode(&other)[1..]).unwrap();
        assert_eq!(encode(&cache), expected);

        // Damage of any kind is mended.
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
    fn two_writers_and_a_folder_that_cannot_be_made() {
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
        // A folder that cannot be made keeps nobody from encoding.
        let file = tempfile::NamedTempFile::new().unwrap();
        let cache = TokenCache::at(file.path().join("below"));
        cache.sequences(&tokens, &records, &template, 90).unwrap();
    }
}
