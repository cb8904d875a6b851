//! Records of instruction data, from JSON lines or a JSON array.

use std::path::Path;

use serde_json::{Map, Value};

use crate::{Error, files};

/// A problem and its answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    /// What the model is asked.
    pub instruction: String,
    /// Alpaca's context of the instruction; empty if there is none.
    pub input: String,
    /// What it is to answer.
    pub answer: String,
}

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
    fn detect(record: &Map<String, Value>) -> Option<Self> {
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
}

/// Reads all records of a file. Without `fields`, the style of the first record decides for all.
///
/// # Errors
///
/// [`Error::Io`], and [`Error::Field`] with the line (of JSON lines) or the number of the record
/// (of an array) for data that is empty, malformed, or lacks a field.
pub fn read_records(path: &Path, fields: Option<&Fields>) -> Result<Vec<Record>, Error> {
    let text = &files::text(path)?;
    let values = match text.trim_start().starts_with('[') {
        true => array(text, path)?,
        false => lines(text, path)?,
    };
    if values.is_empty() {
        return Err(Error::field(path, "content", "has no records"));
    }
    let mut fields = fields.cloned();
    values
        .into_iter()
        .map(|(place, value)| {
            let Value::Object(record) = value else {
                return Err(Error::field(path, place, "is not a JSON object"));
            };
            if fields.is_none() {
                fields = Fields::detect(&record);
            }
            let Some(fields) = &fields else {
                let keys: Vec<&str> = record.keys().map(String::as_str).collect();
                let reason = format!(
                    "has the fields {keys:?}, not those of GSM8K (question, answer), MetaMathQA \
                     (query, response) or Alpaca (instruction, output); --fields names others"
                );
                return Err(Error::field(path, place, reason));
            };
            let text = |name: &str| match record.get(name) {
                Some(Value::String(text)) => Ok(text.clone()),
                Some(_) => Err(Error::field(
                    path,
                    place.clone(),
                    format!("field `{name}` is no text"),
                )),
                None => Err(Error::field(
                    path,
                    place.clone(),
                    format!("has no field `{name}`"),
                )),
            };
            let instruction = text(&fields.instruction)?;
            if instruction.trim().is_empty() {
                let reason = format!("field `{}` is empty", fields.instruction);
                return Err(Error::field(path, place.clone(), reason));
            }
            let input = match record.get(CONTEXT) {
                Some(Value::String(context)) if fields.instruction == "instruction" => {
                    context.clone()
                }
                _ => String::new(),
            };
            Ok(Record {
                instruction,
                input,
                answer: text(&fields.answer)?,
            })
        })
        .collect()
}

fn array(text: &str, path: &Path) -> Result<Vec<(String, Value)>, Error> {
    let values: Vec<Value> = serde_json::from_str(text)
        .map_err(|error| Error::field(path, format!("line {}", error.line()), error.to_string()))?;
    let place = |index: usize| format!("record {}", index + 1);
    Ok(values
        .into_iter()
        .enumerate()
        .map(|(index, value)| (place(index), value))
        .collect())
}

fn lines(text: &str, path: &Path) -> Result<Vec<(String, Value)>, Error> {
    text.lines()
        .enumerate()
        .filter(|(_, line)| !line.trim().is_empty())
        .map(|(index, line)| {
            let place = format!("line {}", index + 1);
            match serde_json::from_str(line) {
                Ok(value) => Ok((place, value)),
                Err(error) => {
                    let message = error.to_string();
                    let reason = message.split(" at line").next().unwrap_or_default();
                    let reason = format!("is not JSON: {reason} at column {}", error.column());
                    Err(Error::field(path, place, reason))
                }
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(content: &[u8], fields: Option<&str>) -> Result<Vec<Record>, String> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), content).unwrap();
        let fields = fields.map(|fields| Fields::parse(fields).unwrap());
        read_records(file.path(), fields.as_ref()).map_err(|error| error.to_string())
    }

    #[test]
    fn published_styles_are_found() {
        let expected = [Record {
            instruction: "2+2?".into(),
            input: String::new(),
            answer: "4".into(),
        }];
        for content in [
            r#"{"question": "2+2?", "answer": "4"}"#,
            r#"{"query": "2+2?", "response": "4", "type": "x"}"#,
            r#"[{"instruction": "2+2?", "input": "", "output": "4"}]"#,
        ] {
            assert_eq!(
                read(content.as_bytes(), None).unwrap(),
                expected,
                "{content}"
            );
        }
        let context = br#"{"instruction": "Add.", "input": "2 2", "output": "4"}"#;
        let record = &read(context, None).unwrap()[0];
        assert_eq!((&*record.instruction, &*record.input), ("Add.", "2 2"));
        let marked = b"\xef\xbb\xbf{\"question\": \"2+2?\", \"answer\": \"4\"}\r\n\r\n";
        assert_eq!(read(marked, None).unwrap(), expected);
        let named = br#"{"q": "2+2?", "a": "4"}"#;
        assert_eq!(read(named, Some("q, a")).unwrap(), expected);
    }

    #[test]
    fn bad_data_is_refused_with_its_place() {
        let good = "{\"question\": \"a\", \"answer\": \"b\"}\n";
        for (content, part) in [
            (String::new(), "content: has no records"),
            ("[]".into(), "content: has no records"),
            (format!("{good}\n{{\"question\": "), "line 3: is not JSON"),
            (format!("{good}3\n"), "line 2: is not a JSON object"),
            (
                format!("{good}{{\"question\": \"a\"}}"),
                "line 2: has no field `answer`",
            ),
            (
                format!("{good}{{\"question\": 1, \"answer\": \"b\"}}"),
                "`question` is no text",
            ),
            ("{\"x\": 1}".into(), "line 1: has the fields [\"x\"]"),
            ("[{\"question\": \"a\",\n".into(), "line 2"),
        ] {
            let error = read(content.as_bytes(), None).unwrap_err();
            assert!(error.contains(part), "{content:?}: {error}");
        }
        for (content, part) in [
            (&b"\x1f\x8b\x08\x00"[..], "gzip"),
            (b"PAR1\x15", "parquet"),
            (b"\xff\xfe{\x00", "UTF-16"),
            (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
            (
                b"{\"question\": \" \", \"answer\": \"b\"}",
                "`question` is empty",
            ),
        ] {
            let error = read(content, None).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
        let error = read(b"{}\n\xff\xfe", None).unwrap_err();
        assert!(error.contains("line 2: is not UTF-8"), "{error}");
    }
}
