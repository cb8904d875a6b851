//! From records to token sequences, by the published conventions.

use std::path::PathBuf;

use serde_json::Value;
use tokenizers::Tokenizer;

use crate::batch::Sequence;
use crate::data::Record;
use crate::{Checkpoint, Error};

/// The published prompt. Nothing is added between it and the answer.
pub const ALPACA: &str = "Below is an instruction that describes a task. Write a response that \
                          appropriately completes the request.\n\n### Instruction:\n\
                          {instruction}\n\n### Response:";
const PLACE: &str = "{instruction}";

/// A prompt with a place for the instruction.
#[derive(Clone, Debug)]
pub struct PromptTemplate(String);

impl PromptTemplate {
    /// A template, which must contain `{instruction}`.
    pub fn new(text: impl Into<String>) -> Option<Self> {
        let text = text.into();
        text.contains(PLACE).then_some(Self(text))
    }

    /// The prompt of an instruction.
    pub fn prompt(&self, instruction: &str) -> String {
        self.0.replace(PLACE, instruction)
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
    /// Text of the token that ends every answer.
    end: String,
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
        Ok(Self {
            tokenizer,
            path,
            end,
            end_ids,
        })
    }

    /// Tokens of a text, with those that the tokenizer puts around it.
    ///
    /// # Errors
    ///
    /// [`Error::Field`] if the tokenizer refuses the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, Error> {
        match self.tokenizer.encode_fast(text, true) {
            Ok(encoding) => Ok(encoding.get_ids().to_vec()),
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

    /// Prompt and answer as one text, the answer followed by a newline and the end token. As many
    /// leading tokens as the prompt alone has are no targets. What exceeds `max_length` is cut.
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
        let prompt = template.prompt(&record.instruction);
        let mut tokens = self.encode(&format!("{prompt}{}\n{}", record.answer, self.end))?;
        tokens.truncate(max_length);
        let prompt_len = self.encode(&prompt)?.len().min(tokens.len());
        Ok(Sequence { tokens, prompt_len })
    }

    /// The sequences of all records that keep a target token.
    ///
    /// # Errors
    ///
    /// Those of [`encode`](Self::encode).
    pub fn sequences(
        &self,
        records: &[Record],
        template: &PromptTemplate,
        max_length: usize,
    ) -> Result<Vec<Sequence>, Error> {
        let mut sequences = Vec::with_capacity(records.len());
        for record in records {
            let sequence = self.sequence(record, template, max_length)?;
            if sequence.num_targets() > 0 {
                sequences.push(sequence);
            }
        }
        Ok(sequences)
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
