//! Answers of GSM8K, and the inputs that people reported.

mod common;

use std::path::Path;

use llama_math::data::read_records;
use llama_math::score::final_answer;

use common::recorded;

#[test]
fn every_reference_answer_is_found() {
    for (name, count) in [("test", 1319), ("train", 7473)] {
        let Some(path) = recorded(&format!("../data/gsm8k/{name}.jsonl")) else {
            return;
        };
        let records = read_records(&path, None).unwrap();
        assert_eq!(records.len(), count);
        for record in &records {
            // By the data set's own rule.
            let marked = record.answer.rsplit("#### ").next().unwrap();
            let expected: f64 = marked.trim().replace(',', "").parse().unwrap();
            let found = final_answer(&record.answer);
            assert_eq!(found, Some(expected.to_string()), "{}", record.answer);
        }
        println!("{count} answers of {name}.jsonl");
    }
}

/// The reported cases: answers that must not count as correct.
#[test]
fn reported_answers_do_not_match_others() {
    for (found, reference) in [
        (r"\frac{1}{2}", r"The answer is: \frac{3}{2}"),
        ("34", "(3,4)"),
        ("#### 5", "He lost it\n#### -5"),
        ("#### -$5", "He won it\n#### 5"),
    ] {
        assert_ne!(final_answer(found), final_answer(reference), "{found}");
    }
    assert_eq!(final_answer("#### -$5"), final_answer("#### \u{2212}5"));
}

#[test]
fn a_missing_file_is_named() {
    let error = read_records(Path::new("no/such.jsonl"), None).unwrap_err();
    assert!(error.to_string().contains("no/such.jsonl"), "{error}");
}
