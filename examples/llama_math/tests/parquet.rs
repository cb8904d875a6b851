//! Data in Parquet files, with the feature `parquet`.
#![cfg(feature = "parquet")]

mod common;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use llama_math::data::{Data, Record, Role, Split, read_records};
use parquet::basic::{Compression, ZstdLevel};
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::{SerializedFileWriter, SerializedRowGroupWriter};
use parquet::schema::parser::parse_message_type;

/// A file whose row groups `fill` writes, one for each of `0..groups`.
fn table(
    schema: &str,
    compression: Compression,
    groups: usize,
    fill: impl Fn(usize, &mut SerializedRowGroupWriter<'_, &mut Vec<u8>>),
) -> Vec<u8> {
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let properties = WriterProperties::builder().set_compression(compression);
    let mut bytes = Vec::new();
    let properties = Arc::new(properties.build());
    let mut writer = SerializedFileWriter::new(&mut bytes, schema, properties).unwrap();
    for index in 0..groups {
        let mut group = writer.next_row_group().unwrap();
        fill(index, &mut group);
        group.close().unwrap();
    }
    writer.close().unwrap();
    bytes
}

/// The next column, of texts.
fn column(
    group: &mut SerializedRowGroupWriter<'_, &mut Vec<u8>>,
    texts: &[&str],
    levels: Option<(&[i16], &[i16])>,
) {
    let texts: Vec<ByteArray> = texts.iter().map(|text| ByteArray::from(*text)).collect();
    let mut column = group.next_column().unwrap().unwrap();
    let (definition, repetition) = levels.unzip();
    let typed = column.typed::<ByteArrayType>();
    typed.write_batch(&texts, definition, repetition).unwrap();
    column.close().unwrap();
}

fn problems(records: &[Record], compression: Compression) -> Vec<u8> {
    let schema = "message schema { REQUIRED BYTE_ARRAY question (UTF8);
        REQUIRED BYTE_ARRAY answer (UTF8); }";
    let parts: Vec<&[Record]> = records.chunks(1000).collect();
    table(schema, compression, parts.len(), |index, group| {
        let texts = |text: fn(&Record) -> &str| parts[index].iter().map(text).collect::<Vec<_>>();
        column(group, &texts(|record| &record.instruction), None);
        column(group, &texts(|record| &record.answer), None);
    })
}

fn read(bytes: &[u8]) -> Result<Data, String> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("train-00000-of-00001.parquet");
    std::fs::write(&path, bytes).unwrap();
    let whole = [PathBuf::from(folder.path())];
    Data::read(&whole, Split::Train, None).map_err(|error| error.to_string())
}

fn compressions() -> [Compression; 4] {
    let zstd = Compression::ZSTD(ZstdLevel::default());
    let gzip = Compression::GZIP(Default::default());
    [Compression::UNCOMPRESSED, Compression::SNAPPY, gzip, zstd]
}

#[test]
fn problems_are_read_whatever_packs_them() {
    let record = |n: usize| Record {
        instruction: format!("{n} + \u{1F642}?"),
        answer: format!("so\n#### {n}"),
        ..Record::default()
    };
    let records: Vec<Record> = (0..2500).map(record).collect();
    for compression in compressions() {
        let data = read(&problems(&records, compression)).unwrap();
        assert_eq!(data.records, records, "{compression:?}");
        assert!(!data.has_conversations);
    }
}

#[test]
fn gsm8k_as_it_is_distributed() {
    let Some(path) = common::recorded("../data/gsm8k/train.jsonl") else {
        return;
    };
    let records = read_records(&path, None).unwrap();
    let data = read(&problems(&records, Compression::SNAPPY)).unwrap();
    assert_eq!(data.records, records);
}

#[test]
fn conversations_are_lists_of_messages() {
    let schema = "message schema {
        OPTIONAL group messages (LIST) { REPEATED group list { OPTIONAL group element {
            OPTIONAL BYTE_ARRAY content (UTF8); OPTIONAL BYTE_ARRAY role (UTF8); } } } }";
    let bytes = table(schema, Compression::SNAPPY, 2, |_, group| {
        // Two messages in the first row of each group, one in the second.
        let levels: (&[i16], &[i16]) = (&[4, 4, 4], &[0, 1, 0]);
        column(group, &["Wie geht's?", "gut", "x"], Some(levels));
        column(group, &["user", "assistant", "user"], Some(levels));
    });
    let data = read(&bytes).unwrap();
    assert!(data.has_conversations);
    assert_eq!(data.records.len(), 4);
    let [first, second, ..] = &data.records[..] else {
        unreachable!("four");
    };
    let texts = |record: &Record| [record.instruction.clone(), record.answer.clone()];
    assert_eq!(texts(first), ["Wie geht's?", "gut"]);
    assert_eq!(texts(second), ["x", ""]);

    let bytes = table(schema, Compression::SNAPPY, 1, |_, group| {
        let levels: (&[i16], &[i16]) = (&[4, 4], &[0, 0]);
        column(group, &["x", "y"], Some(levels));
        column(group, &[Role::User.name(), "tool"], Some(levels));
    });
    let error = read(&bytes).unwrap_err();
    assert!(error.contains("record 2: turn 1: role `tool`"), "{error}");
}

#[test]
fn damage_is_an_error_that_names_the_file() {
    let record = Record {
        instruction: "2 + 2?".into(),
        answer: "4".into(),
        ..Record::default()
    };
    let whole = problems(&vec![record; 40], Compression::SNAPPY);
    let path = Path::new("train-00000-of-00001.parquet");
    let mut refused = 0;
    for at in 0..whole.len() {
        let mut damaged = whole.clone();
        damaged[at] ^= 0xff;
        if let Err(error) = read(&damaged) {
            refused += 1;
            assert!(error.contains(path.to_str().unwrap()), "{error}");
        }
    }
    println!("{refused} of {} damaged files are refused", whole.len());
    // Other bytes are letters, or say what nobody reads.
    assert!(refused > whole.len() / 3, "{refused} of {}", whole.len());
    let error = read(&whole[..whole.len() - 9]).unwrap_err();
    assert!(
        error.contains("content: is a damaged parquet file"),
        "{error}"
    );
}
