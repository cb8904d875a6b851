//! The tokenizer of a checkpoint, and what becomes of records.

use std::fmt::{self, Debug, Display, Formatter};
use std::ops::Range;
use std::path::PathBuf;

use rayon::prelude::*;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};
use tokenizers::normalizers::NormalizerWrapper;
use tokenizers::pre_tokenizers::metaspace::{Metaspace, PrependScheme};
use tokenizers::{AddedToken, Tokenizer};

use crate::batch::Sequence;
use crate::config::Family;
use crate::data::Record;
use crate::{Error, Pretrained, files, panics};

/// How records become tokens.
pub trait Template: Debug + Send + Sync {
    /// All that the tokens depend on besides tokenizer and record.
    fn key(&self) -> String;

    /// Tokens of what comes before the answer.
    ///
    /// # Errors
    ///
    /// Those of the tokenizer, and [`Error::Field`] for a record that the template refuses.
    fn prompt(&self, tokens: &Tokens, record: &Record) -> Result<Vec<u32>, Error>;

    /// The whole record, and whether a token joins the beginning of an answer with what comes before
    /// it; that token is a target.
    ///
    /// # Errors
    ///
    /// Those of [`prompt`](Self::prompt).
    fn sequence(&self, tokens: &Tokens, record: &Record) -> Result<(Sequence, bool), Error>;
}

/// The tokenizer of a pretrained model with what training and decoding need of it.
pub struct Tokens {
    tokenizer: Tokenizer,
    path: PathBuf,
    /// The token that ends every answer, and its text.
    end: u32,
    end_text: String,
    /// What the tokenizer puts before and behind a text.
    before: Vec<u32>,
    behind: Vec<u32>,
    /// Number of tokens that the model knows.
    vocab_size: usize,
    /// Tokens that end a generated answer.
    end_ids: Vec<u32>,
    /// See [`digest`](Self::digest).
    digest: Vec<u8>,
}

impl Tokens {
    /// Reads `tokenizer.json` and finds the end-of-text token: that of `tokenizer_config.json`,
    /// else of `special_tokens_map.json`, else of `config.json`.
    ///
    /// # Errors
    ///
    /// [`Error::Field`] for a file that cannot be read, and an end token that is not in the
    /// vocabulary.
    pub fn of(pretrained: &Pretrained) -> Result<Self, Error> {
        let path = pretrained.path("tokenizer.json");
        let fail = |field: &str, reason: String| Error::field(&path, field, reason);
        let Some(bytes) = pretrained.known_files.get("tokenizer.json") else {
            return Err(fail("content", "the checkpoint has no such file".into()));
        };
        let mut tokenizer = parse(files::as_text(bytes, &path)?)
            .map_err(|reason| fail("content", format!("not a tokenizer: {reason}")))?;
        // Lengths are this program's business.
        tokenizer.with_padding(None);
        tokenizer
            .with_truncation(None)
            .map_err(|error| fail("truncation", error.to_string()))?;
        let settings = settings_of(pretrained)?;
        as_transformers(&mut tokenizer, pretrained, &settings).map_err(|r| fail("content", r))?;

        let configured = pretrained.config.eos_tokens.first().copied();
        let end = match (named_end(pretrained, &settings), configured) {
            (Some(end), _) => end,
            (None, Some(id)) => tokenizer.id_to_token(id).ok_or_else(|| {
                let path = pretrained.path("config.json");
                Error::field(
                    path,
                    "eos_token_id",
                    format!("{id} is not in the vocabulary"),
                )
            })?,
            (None, None) => {
                let reason = "is missing, and so is eos_token in tokenizer_config.json";
                return Err(Error::field(
                    pretrained.path("config.json"),
                    "eos_token_id",
                    reason,
                ));
            }
        };
        let Some(end_id) = tokenizer.token_to_id(&end) else {
            let path = pretrained.path("tokenizer_config.json");
            let reason = format!("`{end}` is not in the vocabulary of tokenizer.json");
            return Err(Error::field(path, "eos_token", reason));
        };
        let mut end_ids = pretrained.config.eos_tokens.clone();
        end_ids.push(end_id);
        end_ids.extend(ends_of_generation(pretrained));
        let mut tokens = Self {
            tokenizer,
            path,
            end: end_id,
            end_text: end,
            before: Vec::new(),
            behind: Vec::new(),
            vocab_size: pretrained.config.vocab_size,
            end_ids,
            digest: digest_of(pretrained),
        };
        tokens.check(&[end_id])?;
        // Around any text.
        let [plain, whole] = [false, true].map(|special| tokens.raw("a", special));
        let (plain, whole) = (plain?, whole?);
        let found = whole
            .windows(plain.len().max(1))
            .position(|ids| ids == plain);
        if let Some(start) = found {
            tokens.before = whole[..start].to_vec();
            tokens.behind = whole[start + plain.len()..].to_vec();
        }
        Ok(tokens)
    }

    fn raw(&self, text: &str, special: bool) -> Result<Vec<u32>, Error> {
        match self.tokenizer.encode_fast(text, special) {
            Ok(encoding) => Ok(encoding.get_ids().to_vec()),
            Err(error) => Err(Error::field(&self.path, "content", error.to_string())),
        }
    }

    /// Refuses tokens that the model does not know. A tokenizer may have more than texts use.
    fn check(&self, ids: &[u32]) -> Result<(), Error> {
        let Some(id) = ids.iter().find(|&&id| id as usize >= self.vocab_size) else {
            return Ok(());
        };
        let token = self.tokenizer.id_to_token(*id).unwrap_or_default();
        let reason = format!(
            "a text has token {id}, `{token}`, but vocab_size in config.json is {}",
            self.vocab_size
        );
        Err(Error::field(&self.path, "vocab", reason))
    }

    /// Tokens of a text, with those that the tokenizer puts before it and without those that it puts
    /// behind. A begin token that the text spells out already is not doubled.
    ///
    /// # Errors
    ///
    /// [`Error::Field`] if the tokenizer refuses the text, or if the model does not know one of its
    /// tokens.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, Error> {
        let mut ids = self.raw(text, true)?;
        if ids.ends_with(&self.behind) {
            ids.truncate(ids.len() - self.behind.len());
        }
        let length = self.before.len();
        if length > 0 && ids[length.min(ids.len())..].starts_with(&self.before) {
            ids.drain(..length);
        }
        self.check(&ids)?;
        Ok(ids)
    }

    /// Text of tokens, special ones left out.
    ///
    /// # Errors
    ///
    /// [`Error::Field`] if the tokenizer refuses the tokens.
    pub fn decode(&self, tokens: &[u32]) -> Result<String, Error> {
        self.tokenizer
            .decode(tokens, true)
            .map_err(|error| Error::field(&self.path, "decoder", error.to_string()))
    }

    /// A hash of everything that encoding depends on.
    pub(crate) fn digest(&self) -> &[u8] {
        &self.digest
    }

    /// Whether `token` ends an answer.
    pub fn is_end(&self, token: u32) -> bool {
        self.end_ids.contains(&token)
    }

    /// Tokens of a text with nothing put around it, and the bytes of the text that each stands for.
    ///
    /// # Errors
    ///
    /// Those of [`encode`](Self::encode).
    pub fn encode_with_places(&self, text: &str) -> Result<(Vec<u32>, Vec<Range<usize>>), Error> {
        let encoding = self.tokenizer.encode(text, false);
        let encoding =
            encoding.map_err(|error| Error::field(&self.path, "content", error.to_string()))?;
        let ids = encoding.get_ids().to_vec();
        self.check(&ids)?;
        let places = encoding.get_offsets().iter();
        Ok((ids, places.map(|&(start, end)| start..end).collect()))
    }

    /// The token that ends every answer, and its text.
    pub fn end(&self) -> (u32, &str) {
        (self.end, &self.end_text)
    }

    /// Tokens of a record's prompt.
    ///
    /// # Errors
    ///
    /// Those of the template, and [`Error::Field`] for a prompt without a token.
    pub fn prompt(&self, record: &Record, template: &dyn Template) -> Result<Vec<u32>, Error> {
        let ids = template.prompt(self, record)?;
        match ids.is_empty() {
            true => {
                let instruction = &record.instruction;
                let reason = format!("makes no token of the prompt {instruction:?}");
                Err(Error::field(&self.path, "content", reason))
            }
            false => Ok(ids),
        }
    }

    /// The record as a sequence of at most `max_length` tokens; what exceeds them is cut.
    ///
    /// # Errors
    ///
    /// Those of [`prompt`](Self::prompt).
    pub fn sequence(
        &self,
        record: &Record,
        template: &dyn Template,
        max_length: usize,
    ) -> Result<Sequence, Error> {
        let (mut sequence, _) = template.sequence(self, record)?;
        sequence.truncate(max_length);
        Ok(sequence)
    }

    /// The sequences of all records that have an answer and keep a target token, encoded on all cores.
    ///
    /// # Errors
    ///
    /// Those of [`encode`](Self::encode).
    pub fn sequences(
        &self,
        records: &[Record],
        template: &dyn Template,
        max_length: usize,
    ) -> Result<Sequences, Error> {
        let mut all = Sequences {
            records: records.len(),
            ..Sequences::default()
        };
        let encode = |record: &Record| match record.answer.trim().is_empty() {
            true => Ok(None),
            false => template.sequence(self, record).map(Some),
        };
        // Errors come in the order of the records.
        let encoded: Vec<Result<_, Error>> = records.par_iter().map(encode).collect();
        for record in encoded {
            let Some((mut sequence, is_joined)) = record? else {
                all.empty += 1;
                continue;
            };
            let is_cut = sequence.truncate(max_length);
            if sequence.num_targets() == 0 {
                all.too_long += 1;
                continue;
            }
            all.joined += usize::from(is_joined);
            all.cut += usize::from(is_cut);
            all.usable.push(sequence);
        }
        Ok(all)
    }
}

/// What became of the records of a file.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sequences {
    /// The sequences to train on.
    pub usable: Vec<Sequence>,
    /// Number of records.
    pub records: usize,
    /// How many of the usable sequences lose the end of their answer to the longest length.
    pub cut: usize,
    /// How many of the usable sequences have a token that joins the end of the prompt with the
    /// beginning of the answer; it is a target.
    pub joined: usize,
    /// How many records have an empty answer.
    pub empty: usize,
    /// How many records have a prompt that leaves no room for a target.
    pub too_long: usize,
}

impl Display for Sequences {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let (records, usable) = (self.records, self.usable.len());
        write!(f, "{records} records, {usable} usable")?;
        for (count, what) in [
            (self.cut, "of them cut before the end of their answer"),
            (
                self.joined,
                "of them with a token that joins prompt and answer",
            ),
            (self.empty, "without an answer"),
            (
                self.too_long,
                "with a prompt that leaves no room for an answer",
            ),
        ] {
            if count > 0 {
                write!(f, ", {count} {what}")?;
            }
        }
        Ok(())
    }
}

/// A hash of the files of the tokenizer, and of what the model's configuration says of tokens.
fn digest_of(pretrained: &Pretrained) -> Vec<u8> {
    let mut hash = Sha256::new();
    for name in [
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "generation_config.json",
    ] {
        let content = pretrained.known_files.get(name);
        hash.update(
            content
                .map_or(u64::MAX, |bytes| bytes.len() as u64)
                .to_le_bytes(),
        );
        hash.update(content.map_or(&[][..], |bytes| bytes));
    }
    // The class of a tokenizer may follow from the family of the model.
    let config = &pretrained.config;
    let of_model = (config.vocab_size, &config.eos_tokens, config.family);
    hash.update(format!("{of_model:?}"));
    hash.finalize().to_vec()
}

/// `tokenizer_config.json`; empty where there is none.
pub(crate) fn settings_of(pretrained: &Pretrained) -> Result<Map<String, Value>, Error> {
    let name = "tokenizer_config.json";
    let path = pretrained.path(name);
    match pretrained.known_files.get(name) {
        None => Ok(Map::new()),
        Some(bytes) => serde_json::from_str(files::as_text(bytes, &path)?)
            .map_err(|error| Error::field(&path, "content", error.to_string())),
    }
}

/// The text of a token, which stands for itself or has properties.
pub(crate) fn text_of(token: &Value) -> Option<&str> {
    token.as_str().or_else(|| token.get("content")?.as_str())
}

/// The end token that the tokenizer's own files name.
fn named_end(pretrained: &Pretrained, settings: &Map<String, Value>) -> Option<String> {
    let own = settings
        .get("eos_token")
        .and_then(text_of)
        .map(String::from);
    own.or_else(|| {
        let bytes = pretrained.known_files.get("special_tokens_map.json")?;
        let map: Value = serde_json::from_slice(bytes).ok()?;
        Some(text_of(map.get("eos_token")?)?.to_string())
    })
}

/// The tokens with which a generated text ends. A chat model may have more of them than its
/// configuration names.
fn ends_of_generation(pretrained: &Pretrained) -> Vec<u32> {
    let bytes = pretrained.known_files.get("generation_config.json");
    let settings = bytes.and_then(|bytes| serde_json::from_slice::<Value>(bytes).ok());
    let ids = settings.and_then(|mut settings| settings.get_mut("eos_token_id").map(Value::take));
    let all = match ids {
        Some(Value::Array(ids)) => ids,
        one => one.into_iter().collect(),
    };
    let id = |id: &Value| u32::try_from(id.as_u64()?).ok();
    all.iter().filter_map(id).collect()
}

/// Changes what transformers changes when it reads these files (5.24, as recorded in the tests): the
/// class that a Llama's `tokenizer_config.json` names puts spaces into tokens in its own way, and named
/// tokens are found in texts whether `tokenizer.json` adds them or not.
fn as_transformers(
    tokenizer: &mut Tokenizer,
    pretrained: &Pretrained,
    settings: &Map<String, Value>,
) -> Result<(), String> {
    let class = settings.get("tokenizer_class").and_then(Value::as_str);
    let is_llama = class.is_some_and(|class| class.trim_end_matches("Fast") == "LlamaTokenizer");
    let content = pretrained.known_files.get("tokenizer.json");
    let has_bytes = content.is_some_and(|bytes| {
        let name = b"\"ByteLevel\"";
        bytes.windows(name.len()).any(|window| window == name)
    });
    if is_llama && pretrained.config.family == Family::Llama && !has_bytes {
        let flag = |name: &str| settings.get(name).and_then(Value::as_bool);
        let scheme = match (flag("add_prefix_space"), flag("legacy")) {
            (Some(false), _) => PrependScheme::Never,
            (_, Some(true)) => PrependScheme::Always,
            _ => PrependScheme::First,
        };
        let failed = |error: tokenizers::Error| error.to_string();
        tokenizer
            .with_normalizer(None::<NormalizerWrapper>)
            .map_err(failed)?;
        tokenizer.with_pre_tokenizer(Some(Metaspace::new('\u{2581}', scheme, false)));
    }
    let names = ["bos_token", "eos_token", "unk_token", "pad_token"];
    let named = names.iter().filter_map(|name| settings.get(*name));
    let lists = ["additional_special_tokens", "extra_special_tokens"];
    let listed = lists
        .iter()
        .filter_map(|name| settings.get(*name)?.as_array());
    let decoder = settings
        .get("added_tokens_decoder")
        .and_then(Value::as_object);
    let known = tokenizer.get_added_tokens_decoder();
    let is_known = |text: &str| known.values().any(|token| token.content == text);
    let missing: Vec<AddedToken> = named
        .chain(listed.flatten())
        .chain(decoder.iter().flat_map(|tokens| tokens.values()))
        .filter_map(text_of)
        // Those that the vocabulary lacks would be new.
        .filter(|text| !is_known(text) && tokenizer.token_to_id(text).is_some())
        .map(|text| AddedToken::from(text, true))
        .collect();
    tokenizer
        .add_special_tokens(missing)
        .map(drop)
        .map_err(|error| error.to_string())
}

/// The library panics on some malformed decoders (tokenizers 0.23.2) instead of refusing them.
fn parse(text: &str) -> Result<Tokenizer, String> {
    match panics::caught(|| Tokenizer::from_bytes(text)) {
        Ok(tokenizer) => tokenizer.map_err(|error| error.to_string()),
        Err(_) => Err("a part of it is malformed".into()),
    }
}
