//! Records of one problem and its answer: the names of their fields.

use serde_json::{Map, Value};

use super::record::Record;
use crate::Error;

/// Names of the two fields of a record.
#[derive(Clone, Debug, PartialEq)]
pub struct Fields {
    /// The field of the instruction.
    pub instruction: String,
    /// The field of the answer.
    pub answer: String,
}

/// The published styles: GSM8K, MetaMathQA, Alpaca.
const STYLES: [(&str, &str); 3] = [
    ("question", "answer"),
    ("query", "response"),
    ("instruction", "output"),
];
/// Alpaca's context, which follows the instruction.
const CONTEXT: &str = "input";

impl Fields {
    /// Reads `PROMPT,ANSWER`.
    ///
    /// # Errors
    ///
    /// A message for the command line.
    pub fn parse(text: &str) -> Result<Self, Error> {
        match text.split(',').map(str::trim).collect::<Vec<_>>()[..] {
            [instruction, answer] if !instruction.is_empty() && !answer.is_empty() => Ok(Self {
                instruction: instruction.into(),
                answer: answer.into(),
            }),
            _ => Err(Error::Usage {
                option: "fields",
                reason: format!("`{text}` is not of the form PROMPT,ANSWER"),
            }),
        }
    }

    /// The style whose fields `record` has.
    pub(super) fn detect(record: &Map<String, Value>) -> Option<Self> {
        STYLES
            .into_iter()
            .find(|(instruction, answer)| {
                record.contains_key(*instruction) && record.contains_key(*answer)
            })
            .map(|(instruction, answer)| Self {
                instruction: instruction.into(),
                answer: answer.into(),
            })
    }

    /// The record of a row.
    ///
    /// # Errors
    ///
    /// What is wrong with which field.
    pub(super) fn record(&self, row: &Map<String, Value>) -> Result<Record, String> {
        let text = |name: &str| match row.get(name) {
            Some(Value::String(text)) => Ok(text.clone()),
            Some(_) => Err(format!("field `{name}` is no text")),
            None => Err(format!("has no field `{name}`")),
        };
        let instruction = text(&self.instruction)?;
        if instruction.trim().is_empty() {
            return Err(format!("field `{}` is empty", self.instruction));
        }
        let input = match row.get(CONTEXT) {
            Some(Value::String(context)) if self.instruction == "instruction" => context.clone(),
            _ => String::new(),
        };
        Ok(Record {
            earlier: Vec::new(),
            instruction,
            input,
            answer: text(&self.answer)?,
        })
    }
}
