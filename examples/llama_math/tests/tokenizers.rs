//! Ids are those of transformers, recorded for tiny tokenizers of every supported kind by
//! `tests/fixtures/make_tokenizers.py`.

use std::path::Path;

use llama_math::Pretrained;
use llama_math::data::Record;
use llama_math::prompt::PromptTemplate;
use llama_math::tokenize::Tokens;
use serde_json::{Value, json};

/// One of the recorded variants.
struct Variant(Value);

fn variants() -> Vec<Variant> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokenizers");
    let recorded = std::fs::read(folder.join("expected.json")).unwrap();
    let recorded: Vec<Value> = serde_json::from_slice(&recorded).unwrap();
    assert_eq!(recorded.len(), 5 * 9);
    recorded.into_iter().map(Variant).collect()
}

impl Variant {
    fn name(&self) -> String {
        format!("{} {}", self.0["kind"], self.0["variant"])
    }

    fn tokens(&self) -> Tokens {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokenizers");
        let kind = self.0["kind"].as_str().unwrap();
        let content = std::fs::read(folder.join(format!("{kind}.json"))).unwrap();
        let mut content: Value = serde_json::from_slice(&content).unwrap();
        for (key, value) in self.0["changed"].as_object().unwrap() {
            let added = content["added_tokens"].as_array_mut().unwrap();
            match key.as_str() {
                "normalized" => added
                    .iter_mut()
                    .for_each(|token| token[key] = value.clone()),
                "dropped" => added.retain(|token| token["content"] != *value),
                _ => content[key] = value.clone(),
            }
        }
        let config = json!({
            "model_type": self.0["model_type"], "vocab_size": self.0.get("vocab_size").unwrap_or(&json!(600)), "hidden_size": 4,
            "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2,
            "eos_token_id": self.end(),
        });
        let texts = [config, content, self.0["tokenizer_config"].clone()].map(|v| v.to_string());
        let names = ["config.json", "tokenizer.json", "tokenizer_config.json"];
        let files: Vec<_> = names
            .into_iter()
            .zip(texts.iter().map(|t| t.as_bytes()))
            .collect();
        // Weights of nothing: a header without tensors.
        let weights: &'static [u8] = b"\x02\0\0\0\0\0\0\0{}";
        let pretrained = Pretrained::embedded(&self.name(), weights, &files).unwrap();
        Tokens::of(&pretrained).unwrap()
    }

    fn end(&self) -> u32 {
        self.0["eos_token_id"].as_u64().unwrap() as u32
    }

    /// Texts with the ids that transformers gives them.
    fn texts(&self) -> Vec<(&str, Vec<u32>)> {
        let texts = self.0["texts"].as_array().unwrap().iter();
        let ids = |text: &Value| -> Vec<u32> {
            let ids = text["ids"].as_array().unwrap().iter();
            ids.map(|id| id.as_u64().unwrap() as u32).collect()
        };
        texts
            .map(|text| (text["text"].as_str().unwrap(), ids(text)))
            .collect()
    }
}

#[test]
fn ids_are_those_of_transformers() {
    let mut compared = 0;
    for variant in variants() {
        let tokens = variant.tokens();
        let texts = variant.texts();
        // What the tokenizer puts around nothing.
        let around = &texts[0].1;
        assert_eq!(texts[0].0, "");
        let appends = around.last() == Some(&variant.end());
        let begin = around.first().filter(|&&id| id != variant.end());
        for (text, mut expected) in texts.clone() {
            if appends {
                assert_eq!(expected.pop(), Some(variant.end()));
            }
            // A begin token that the text has already is not doubled.
            if begin.is_some() && expected.len() > 1 && begin == Some(&expected[1]) {
                expected.remove(0);
            }
            let ours = tokens.encode(text).unwrap();
            assert_eq!(ours, expected, "{}: {text:?}", variant.name());
            compared += 1;
        }
    }
    println!("{compared} texts");
    assert_eq!(compared, 45 * 10);
}

#[test]
fn every_sequence_ends_with_exactly_one_end() {
    let record = |answer: &str| Record {
        instruction: "How many eggs?".into(),
        answer: answer.into(),
        ..Record::default()
    };
    let templates = [
        "{instruction}\nA:",
        "{instruction} ",
        "Q: {instruction}\n\n### Response:",
    ];
    for variant in variants() {
        let (tokens, end) = (variant.tokens(), variant.end());
        for template in templates.map(|text| PromptTemplate::new(text).unwrap()) {
            let plain = record("He has 3 eggs\n#### 3");
            let sequence = tokens.sequence(&plain, &template, 500).unwrap();
            let ends = sequence.tokens.iter().filter(|&&id| id == end).count();
            let name = variant.name();
            assert_eq!((ends, sequence.tokens.last()), (1, Some(&end)), "{name}");
            // All of the answer is a target, and the end is: what is decoded from there holds it.
            let targets = &sequence.tokens[sequence.targets[0].start..];
            let text = tokens.decode(targets).unwrap();
            assert!(text.contains("He has 3 eggs\n#### 3"), "{name}: {text:?}");
            // Nothing but the prompt comes before.
            let prompt = tokens.prompt(&plain, &template).unwrap();
            assert_eq!(
                sequence.tokens[..sequence.targets[0].start],
                prompt[..sequence.targets[0].start]
            );
            assert!(prompt.last() != Some(&end), "{name}");
            assert!(prompt.len() - sequence.targets[0].start <= 1, "{name}");
        }
        // An answer that spells the end out.
        let spelled = variant.0["tokenizer_config"]["eos_token"].as_str().unwrap();
        let template = PromptTemplate::new(templates[0]).unwrap();
        let sequence = |answer: &str| tokens.sequence(&record(answer), &template, 500).unwrap();
        assert_eq!(
            sequence(&format!("It is 3{spelled}\n")),
            sequence("It is 3")
        );
    }
}

#[test]
fn a_token_that_joins_prompt_and_answer_is_a_target_and_counted() {
    let variants = variants();
    let tokens = variants[9].tokens();
    let records = [Record {
        instruction: "How many".into(),
        answer: "eggs are there now".into(),
        ..Record::default()
    }];
    let count = |template: &str| {
        let template = PromptTemplate::new(template).unwrap();
        tokens.sequences(&records, &template, 100).unwrap().joined
    };
    assert_eq!((count("{instruction}:"), count("{instruction} ")), (0, 1));
}

#[test]
fn tokens_beyond_the_vocabulary_are_refused_where_they_are_used() {
    let variant = &variants()[0];
    let mut small = variant.0.clone();
    // One more than the model has; the tokenizer gives it the next id.
    let unused = json!({"id": 520, "content": "<unused>", "single_word": false, "lstrip": false,
        "rstrip": false, "normalized": false, "special": true});
    small["changed"] = json!({"added_tokens": [unused]});
    small["vocab_size"] = json!(520);
    let tokens = Variant(small).tokens();
    tokens.encode("Ann").unwrap();
    let error = tokens.encode("Ann <unused>").unwrap_err().to_string();
    assert!(
        error.contains("`<unused>`") && error.contains("vocab_size"),
        "{error}"
    );
}
