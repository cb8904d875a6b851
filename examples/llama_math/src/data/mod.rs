//! Records of training data: problems with their answers, and conversations.

mod conversation;
mod fields;
#[cfg(feature = "parquet")]
mod parquet;
mod record;
mod row;
mod rows;
mod sources;

use std::path::{Path, PathBuf};

use serde_json::Value;

pub use fields::Fields;
pub use record::{Message, Record, Role};
pub use sources::Split;
#[cfg(feature = "hub")]
pub(crate) use sources::choose;
pub(crate) use sources::is_data_file;

use crate::Error;

/// The records of one or several files.
#[derive(Clone, Debug, Default)]
pub struct Data {
    /// The records, file by file.
    pub records: Vec<Record>,
    /// Whether any of them is a conversation.
    pub has_conversations: bool,
}

impl Data {
    /// Reads the files that `paths` stand for: JSON lines, JSON arrays, either packed with gzip, and with
    /// the feature `parquet` Parquet. Of a folder, files whose names have a word such as `test` or
    /// `validation` are held out, the others train; where there are none, all serve both splits.
    ///
    /// Without `fields`, the first record of each file decides for the file.
    ///
    /// # Errors
    ///
    /// [`Error::Io`], and [`Error::Field`] with the file and the line (of JSON lines) or the number of
    /// the record (of others) for data that is empty, malformed, or lacks a field.
    pub fn read(paths: &[PathBuf], split: Split, fields: Option<&Fields>) -> Result<Self, Error> {
        let mut data = Self::default();
        for path in paths {
            for file in sources::files_of(path, split)? {
                data.add(&file, fields.cloned())?;
            }
        }
        Ok(data)
    }

    fn add(&mut self, path: &Path, mut fields: Option<Fields>) -> Result<(), Error> {
        let rows = rows::rows(path)?;
        if rows.is_empty() {
            return Err(Error::field(path, "content", "has no records"));
        }
        self.records.reserve(rows.len());
        for (place, row) in rows {
            let fail = |reason: String| Error::field(path, place.clone(), reason);
            let Value::Object(row) = row else {
                return Err(fail("is not a JSON object".into()));
            };
            let turns = fields
                .is_none()
                .then(|| conversation::turns(&row))
                .flatten();
            let record = match turns {
                Some(turns) => {
                    self.has_conversations = true;
                    conversation::record(&row, turns)
                }
                None => {
                    if fields.is_none() {
                        fields = Fields::detect(&row);
                    }
                    let Some(fields) = &fields else {
                        let keys: Vec<&str> = row.keys().map(String::as_str).collect();
                        return Err(fail(format!(
                            "has the fields {keys:?}, not those of GSM8K (question, answer), \
                             MetaMathQA (query, response), Alpaca (instruction, output) or of \
                             conversations (messages or conversations); --fields names others"
                        )));
                    };
                    fields.record(&row)
                }
            };
            self.records.push(record.map_err(fail)?);
        }
        Ok(())
    }
}

/// The records of a file, or of a folder's files to train on. See [`Data::read`].
///
/// # Errors
///
/// Those of [`Data::read`].
pub fn read_records(path: &Path, fields: Option<&Fields>) -> Result<Vec<Record>, Error> {
    Data::read(&[path.into()], Split::Train, fields).map(|data| data.records)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

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
            answer: "4".into(),
            ..Record::default()
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

    fn packed(content: &str) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), Default::default());
        encoder.write_all(content.as_bytes()).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn packed_files_and_folders_are_read_like_others() {
        let line = |n: usize| {
            format!(
                "{{\"question\": \"{n}+{n}?\", \"answer\": \"{}\"}}\n",
                2 * n
            )
        };
        // Two archives one after the other are one file.
        let both = [packed(&line(1)), packed(&line(2))].concat();
        assert_eq!(
            read(&both, None).unwrap(),
            read((line(1) + &line(2)).as_bytes(), None).unwrap()
        );
        let error = read(&both[..both.len() - 6], None).unwrap_err();
        assert!(
            error.contains("content: is a damaged gzip archive"),
            "{error}"
        );
        let error = read(&packed(&(line(1) + "3\n")), None).unwrap_err();
        assert!(error.contains("line 2: is not a JSON object"), "{error}");

        let folder = tempfile::tempdir().unwrap();
        for (name, content) in [
            ("README.md", b"no data".to_vec()),
            ("train-b.jsonl", line(2).into_bytes()),
            ("train-a.jsonl.gz", packed(&line(1))),
            ("test.jsonl", line(3).into_bytes()),
        ] {
            std::fs::write(folder.path().join(name), content).unwrap();
        }
        let questions = |paths: &[PathBuf], split| -> Vec<String> {
            let records = Data::read(paths, split, None).unwrap().records;
            records
                .into_iter()
                .map(|record| record.instruction)
                .collect()
        };
        let whole = folder.path().to_path_buf();
        assert_eq!(
            questions(std::slice::from_ref(&whole), Split::Train),
            ["1+1?", "2+2?"]
        );
        assert_eq!(
            questions(std::slice::from_ref(&whole), Split::HeldOut),
            ["3+3?"]
        );
        // Named files are read in the order in which they are named, whatever they are called.
        let named = ["test.jsonl", "train-b.jsonl"].map(|name| whole.join(name));
        assert_eq!(questions(&named, Split::Train), ["3+3?", "2+2?"]);
    }

    #[test]
    fn conversations_end_with_the_last_answer() {
        let turn = |role, content: &str| Message::new(role, content);
        let openai = r#"{"messages": [{"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": "B", "weight": 0}, {"role": "user", "content": "c"},
            {"role": "assistant", "content": "C"}, {"role": "user", "content": "thanks"}]}"#;
        let data = |content: &str| {
            let file = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(file.path(), content.replace('\n', " ")).unwrap();
            Data::read(&[file.path().into()], Split::Train, None).map_err(|error| error.to_string())
        };
        let found = data(openai).unwrap();
        assert!(found.has_conversations);
        let mut not_learned = turn(Role::Assistant, "B");
        not_learned.is_learned = false;
        let expected = Record {
            earlier: vec![
                turn(Role::System, "Be brief."),
                turn(Role::User, "ab"),
                not_learned,
            ],
            instruction: "c".into(),
            answer: "C".into(),
            ..Record::default()
        };
        assert_eq!(found.records, [expected]);

        let sharegpt = r#"{"system": "S", "conversations": [{"from": "gpt", "value": "Hi."},
            {"from": "human", "value": "a"}, {"from": "gpt", "value": "A"}]}"#;
        let expected = Record {
            earlier: vec![turn(Role::System, "S"), turn(Role::Assistant, "Hi.")],
            instruction: "a".into(),
            answer: "A".into(),
            ..Record::default()
        };
        assert_eq!(data(sharegpt).unwrap().records, [expected]);
        // Nothing to learn: counted later, like an empty answer.
        let silent = r#"{"messages": [{"role": "user", "content": "a"}]}"#;
        assert_eq!(data(silent).unwrap().records[0].answer, "");

        for (turns, part) in [
            ("3", "turn 1: is not a JSON object"),
            (r#"{"content": "a"}"#, "turn 1: has no `role`"),
            (r#"{"role": "tool", "content": "a"}"#, "role `tool`"),
            (r#"{"role": "user", "content": null}"#, "has no text"),
            (
                r#"{"role": "assistant", "content": "", "tool_calls": [1]}"#,
                "calls a tool",
            ),
            (
                r#"{"role": "user", "content": [{"type": "image_url"}]}"#,
                "`image_url`",
            ),
        ] {
            let error = data(&format!("{{\"messages\": [{turns}]}}")).unwrap_err();
            assert!(
                error.contains("line 1: turn 1: ") && error.contains(part),
                "{error}"
            );
        }
    }
}
