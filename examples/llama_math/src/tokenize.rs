//! From records to token sequences, by the published conventions.

use std::fmt::{self, Display, Formatter};
use std::path::PathBuf;

use regex::Regex;
use serde_json::Value;
use tokenizers::Tokenizer;

use crate::batch::Sequence;
use crate::data::Record;
use crate::{Checkpoint, Error};

/// The published prompt. Nothing is added between it and the answer.
pub const ALPACA: &str = "Below is an instruction that describes a task. Write a response that \
                          appropriately completes the request.\n\n### Instruction:\n\
                          {instruction}\n\n### Response:";
const INSTRUCTION: &str = "instruction";
/// Alpaca's context of an instruction.
const INPUT: &str = "input";

/// A prompt with a place for the instruction, and perhaps one for its context.
#[derive(Clone, Debug)]
pub struct PromptTemplate(String);

impl PromptTemplate {
    /// A template, which must contain `{instruction}`, may contain `{input}`, and no other name in
    /// braces.
    ///
    /// # Errors
    ///
    /// What is wrong with it.
    pub fn new(text: impl Into<String>) -> Result<Self, String> {
        let text = text.into();
        let names = Regex::new(r"\{([A-Za-z_][A-Za-z0-9_]*)\}").expect("the pattern is valid");
        let mut found = names.captures_iter(&text).map(|found| found[1].to_string());
        if let Some(name) = found.find(|name| ![INSTRUCTION, INPUT].contains(&name.as_str())) {
            return Err(format!(
                "has {{{name}}}; only {{instruction}} and {{input}} are filled"
            ));
        }
        match text.contains("{instruction}") {
            true => Ok(Self(text)),
            false => Err("has no {instruction} to replace".into()),
        }
    }

    /// The prompt of a record. Its context follows the instruction where the template has no place for
    /// it.
    pub fn prompt(&self, record: &Record) -> String {
        let Record {
            instruction, input, ..
        } = record;
        // In one pass, so that braces in the data stay as they are.
        let mut parts = self.0.split("{input}");
        let first = parts.next().unwrap_or_default();
        let rest: Vec<&str> = parts.collect();
        let instruction = match rest.is_empty() && !input.is_empty() {
            true => format!("{instruction}\n\n{input}"),
            false => instruction.clone(),
        };
        let fill = |part: &str| {
            part.split("{instruction}")
                .collect::<Vec<_>>()
                .join(&instruction)
        };
        rest.into_iter()
            .fold(fill(first), |text, part| text + input + &fill(part))
    }
}

impl Default for PromptTemplate {
    fn default() -> Self {
        Self(ALPACA.into())
    }
}

/// The tokenizer of a checkpoint with what training and decoding need of it.
pub struct Tokens {
    tokenizer: Tokenizer,
    path: PathBuf,
    /// The token that ends every answer.
    end: u32,
    /// The token that begins a text, if the tokenizer puts one there.
    begin: Option<u32>,
    /// Tokens that end a generated answer.
    end_ids: Vec<u32>,
}

impl Tokens {
    /// Reads `tokenizer.json` and finds the end-of-text token: that of `tokenizer_config.json`,
    /// else of `special_tokens_map.json`, else of `config.json`.
    ///
    /// # Errors
    ///
    /// [`Error::Field`] for a file that cannot be read, an end token that is not in the
    /// vocabulary, and a vocabulary larger than the model's.
    pub fn of(checkpoint: &Checkpoint) -> Result<Self, Error> {
        let path = checkpoint.path("tokenizer.json");
        let fail = |field: &str, reason: String| Error::field(&path, field, reason);
        let Some(bytes) = checkpoint.companions.get("tokenizer.json") else {
            return Err(fail("content", "the checkpoint has no such file".into()));
        };
        let mut tokenizer =
            parse(bytes).map_err(|reason| fail("content", format!("not a tokenizer: {reason}")))?;
        // Lengths are this program's business.
        tokenizer.with_padding(None);
        tokenizer
            .with_truncation(None)
            .map_err(|error| fail("truncation", error.to_string()))?;
        let largest = tokenizer.get_vocab(true).into_values().max().unwrap_or(0);
        let vocab_size = checkpoint.config.vocab_size;
        if largest as usize >= vocab_size {
            let reason = format!(
                "holds token {largest}, but vocab_size in {} is {vocab_size}",
                checkpoint.path("config.json").display()
            );
            return Err(fail("vocab", reason));
        }

        let configured = checkpoint.config.eos_tokens.first().copied();
        let end = match (named_end(checkpoint), configured) {
            (Some(end), _) => end,
            (None, Some(id)) => tokenizer.id_to_token(id).ok_or_else(|| {
                let path = checkpoint.path("config.json");
                Error::field(
                    path,
                    "eos_token_id",
                    format!("{id} is not in the vocabulary"),
                )
            })?,
            (None, None) => {
                let reason = "is missing, and so is eos_token in tokenizer_config.json";
                return Err(Error::field(
                    checkpoint.path("config.json"),
                    "eos_token_id",
                    reason,
                ));
            }
        };
        let Some(end_id) = tokenizer.token_to_id(&end) else {
            let path = checkpoint.path("tokenizer_config.json");
            let reason = format!("`{end}` is not in the vocabulary of tokenizer.json");
            return Err(Error::field(path, "eos_token", reason));
        };
        let mut end_ids = checkpoint.config.eos_tokens.clone();
        end_ids.push(end_id);
        let mut tokens = Self {
            tokenizer,
            path,
            end: end_id,
            begin: None,
            end_ids,
        };
        // What the tokenizer puts around nothing, but for the end.
        tokens.begin = tokens.encode("")?.first().copied();
        Ok(tokens)
    }

    /// Tokens of a text, with the one that the tokenizer puts before it and without end tokens that it
    /// puts behind. A begin token that the text spells out already is not doubled.
    ///
    /// # Errors
    ///
    /// [`Error::Field`] if the tokenizer refuses the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, Error> {
        match self.tokenizer.encode_fast(text, true) {
            Ok(encoding) => {
                let mut ids = encoding.get_ids().to_vec();
                while ids.last().is_some_and(|&id| id == self.end) {
                    ids.pop();
                }
                let begins_twice =
                    |begin| ids.first_chunk::<2>().is_some_and(|two| *two == [begin; 2]);
                if self.begin.is_some_and(begins_twice) {
                    ids.remove(0);
                }
                Ok(ids)
            }
            Err(error) => Err(Error::field(&self.path, "content", error.to_string())),
        }
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

    /// Whether `token` ends an answer.
    pub fn is_end(&self, token: u32) -> bool {
        self.end_ids.contains(&token)
    }

    /// Tokens of a record's prompt.
    ///
    /// # Errors
    ///
    /// Those of [`encode`](Self::encode).
    pub fn prompt(&self, record: &Record, template: &PromptTemplate) -> Result<Vec<u32>, Error> {
        self.encode(&template.prompt(record))
    }

    /// Prompt and answer as one text, the answer followed by a newline and the end token. Targets start
    /// at the first token in which that differs from the prompt alone. What exceeds `max_length` is
    /// cut.
    ///
    /// # Errors
    ///
    /// Those of [`encode`](Self::encode).
    pub fn sequence(
        &self,
        record: &Record,
        template: &PromptTemplate,
        max_length: usize,
    ) -> Result<Sequence, Error> {
        let prompt = template.prompt(record);
        let mut tokens = self.encode(&format!("{prompt}{}\n", record.answer))?;
        tokens.push(self.end);
        tokens.truncate(max_length);
        let prompt = self.encode(&prompt)?;
        let common = prompt.iter().zip(&tokens).take_while(|(x, y)| x == y);
        let prompt_len = common.count();
        Ok(Sequence { tokens, prompt_len })
    }

    /// The sequences of all records that have an answer and keep a target token.
    ///
    /// # Errors
    ///
    /// Those of [`encode`](Self::encode).
    pub fn sequences(
        &self,
        records: &[Record],
        template: &PromptTemplate,
        max_length: usize,
    ) -> Result<Sequences, Error> {
        let mut all = Sequences {
            records: records.len(),
            ..Sequences::default()
        };
        for record in records {
            if record.answer.trim().is_empty() {
                all.empty += 1;
                continue;
            }
            let sequence = self.sequence(record, template, max_length)?;
            if sequence.num_targets() == 0 {
                all.too_long += 1;
                continue;
            }
            all.cut += usize::from(sequence.tokens.last() != Some(&self.end));
            all.usable.push(sequence);
        }
        Ok(all)
    }
}

/// What became of the records of a file.
#[derive(Clone, Debug, Default)]
pub struct Sequences {
    /// The sequences to train on.
    pub usable: Vec<Sequence>,
    /// Number of records.
    pub records: usize,
    /// How many of the usable sequences lose the end of their answer to the longest length.
    pub cut: usize,
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

/// The end token that the tokenizer's own files name.
fn named_end(checkpoint: &Checkpoint) -> Option<String> {
    ["tokenizer_config.json", "special_tokens_map.json"]
        .into_iter()
        .find_map(|name| {
            let value: Value = serde_json::from_slice(checkpoint.companions.get(name)?).ok()?;
            let token = value.get("eos_token")?;
            let token = token.as_str().or_else(|| token.get("content")?.as_str())?;
            Some(token.to_string())
        })
}
/// The library panics on some malformed decoders (tokenizers 0.23.2) instead of refusing them.
fn parse(bytes: &[u8]) -> Result<Tokenizer, String> {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| ()));
    let parsed = std::panic::catch_unwind(|| Tokenizer::from_bytes(bytes));
    std::panic::set_hook(hook);
    match parsed {
        Ok(tokenizer) => tokenizer.map_err(|error| error.to_string()),
        Err(_) => Err("a part of it is malformed".into()),
    }
}
