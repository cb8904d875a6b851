//! Prompts of text, by the published conventions.

use regex::Regex;

use crate::Error;
use crate::batch::Sequence;
use crate::data::Record;
use crate::tokenize::{Template, Tokens};

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

    /// The text before the answer. The context of a record follows the instruction where the template has no place for
    /// it.
    pub fn text(&self, record: &Record) -> String {
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

impl Template for PromptTemplate {
    fn key(&self) -> String {
        self.0.clone()
    }

    fn prompt(&self, tokens: &Tokens, record: &Record) -> Result<Vec<u32>, Error> {
        tokens.encode(&self.text(record))
    }

    /// Prompt and answer as one text, the answer followed by a newline and the end token. Targets start
    /// at the first token in which that differs from the prompt alone.
    fn sequence(&self, tokens: &Tokens, record: &Record) -> Result<(Sequence, bool), Error> {
        let prompt = tokens.prompt(record, self)?;
        let (end, end_text) = tokens.end();
        // An answer that spells its end out has only one too.
        let mut answer = record.answer.as_str();
        while let Some(rest) = answer.trim_end().strip_suffix(end_text) {
            answer = rest.trim_end();
        }
        let mut ids = tokens.encode(&format!("{}{answer}\n", self.text(record)))?;
        ids.push(end);
        let common = prompt.iter().zip(&ids).take_while(|(x, y)| x == y);
        let prompt_len = common.count();
        Ok((Sequence::new(ids, prompt_len), prompt_len < prompt.len()))
    }
}
