//! Chat templates: ids and learned tokens are those of transformers, recorded by
//! `tests/fixtures/make_chats.py`.

use std::path::Path;

use llama_math::Pretrained;
use llama_math::chat::{ChatTemplate, DEFAULT};
use llama_math::data::{Data, Record, Split};
use llama_math::tokenize::{Template, Tokens};
use serde_json::{Value, json};

fn read(name: &str) -> String {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    std::fs::read_to_string(folder.join(name)).unwrap()
}

/// A checkpoint of nothing but these files.
fn checkpoint(case: &Value, settings: &Value, template: Option<&str>) -> Pretrained {
    let config = json!({
        "model_type": case["model_type"], "vocab_size": 600, "hidden_size": 4,
        "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2,
        "eos_token_id": case["eos_token_id"],
    });
    let tokenizer = read(&format!(
        "tokenizers/{}.json",
        case["kind"].as_str().unwrap()
    ));
    let generation = case["generation_config"].to_string();
    let (config, settings) = (config.to_string(), settings.to_string());
    let mut files = vec![
        ("config.json", config.as_bytes()),
        ("tokenizer.json", tokenizer.as_bytes()),
        ("tokenizer_config.json", settings.as_bytes()),
        ("generation_config.json", generation.as_bytes()),
    ];
    files.extend(template.map(|text| ("chat_template.jinja", text.as_bytes())));
    // Weights of nothing: a header without tensors.
    Pretrained::embedded("<chat>", b"\x02\0\0\0\0\0\0\0{}", &files).unwrap()
}

fn cases() -> Vec<Value> {
    serde_json::from_str(&read("chats/expected.json")).unwrap()
}

/// The records of conversations, read as from a file.
fn records(conversations: &[Value]) -> Vec<Record> {
    let file = tempfile::NamedTempFile::new().unwrap();
    let lines = conversations.iter().map(Value::to_string);
    std::fs::write(file.path(), lines.collect::<Vec<_>>().join("\n")).unwrap();
    let data = Data::read(&[file.path().into()], Split::Train, None).unwrap();
    assert!(data.has_conversations);
    data.records
}

fn ids(value: &Value) -> Vec<u32> {
    let ids = value.as_array().unwrap().iter();
    ids.map(|id| id.as_u64().unwrap() as u32).collect()
}

#[test]
fn ids_and_learned_tokens_are_those_of_transformers() {
    let (mut compared, mut refused) = (0, 0);
    let cases = cases();
    assert_eq!(cases.len(), 7);
    for case in &cases {
        let name = case["template"].as_str().unwrap();
        let template = read(&format!("chats/{name}.jinja"));
        let settings = &case["tokenizer_config"];
        // In a file of its own, in the configuration, and there as one of several.
        let several = json!([{"name": "tool_use", "template": "x"},
            {"name": "default", "template": template}]);
        let mut inside = [settings.clone(), settings.clone()];
        inside[0]["chat_template"] = template.clone().into();
        inside[1]["chat_template"] = several;
        for pretrained in [
            checkpoint(case, settings, Some(&template)),
            checkpoint(case, &inside[0], None),
            checkpoint(case, &inside[1], None),
        ] {
            let tokens = Tokens::of(&pretrained).unwrap();
            let template = ChatTemplate::of(&pretrained).unwrap();
            assert!(!template.is_default());
            let conversations = case["conversations"].as_array().unwrap();
            for (case, record) in conversations.iter().zip(records(conversations)) {
                let found = template.sequence(&tokens, &record);
                if let Some(reason) = case.get("refused") {
                    let error = found.unwrap_err().to_string();
                    assert!(error.contains(reason.as_str().unwrap()), "{name}: {error}");
                    refused += 1;
                    continue;
                }
                let (sequence, _) = found.unwrap();
                let message = &case["messages"];
                assert_eq!(sequence.tokens, ids(&case["ids"]), "{name}: {message}");
                let prompt = template.prompt(&tokens, &record).unwrap();
                assert_eq!(prompt, ids(&case["prompt"]), "{name}: {message}");
                let learned: Vec<usize> = sequence.targets.into_iter().flatten().collect();
                let expected: Vec<usize> = ids(&case["learned"])
                    .into_iter()
                    .map(|i| i as usize)
                    .collect();
                assert_eq!(learned, expected, "{name}: {message}");
                compared += 1;
            }
        }
    }
    println!("{compared} conversations, and {refused} that templates refuse");
    assert!(
        compared >= 3 * 35 && refused >= 3 * 3,
        "{compared} and {refused}"
    );
}

#[test]
fn a_checkpoint_without_a_template_has_the_default_one() {
    let case = &cases()[2];
    let settings = &case["tokenizer_config"];
    let pretrained = checkpoint(case, settings, None);
    let (tokens, template) = (
        Tokens::of(&pretrained).unwrap(),
        ChatTemplate::of(&pretrained).unwrap(),
    );
    assert!(template.is_default());
    let conversation = json!({"messages": [{"role": "system", "content": "S"},
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "A"},
        {"role": "user", "content": "b"}, {"role": "assistant", "content": "B"}]});
    let record = &records(&[conversation])[0];
    let (sequence, is_joined) = template.sequence(&tokens, record).unwrap();
    let text =
        "<|system|>\nS\n<|user|>\na\n<|assistant|>\nA</s>\n<|user|>\nb\n<|assistant|>\nB</s>\n";
    assert_eq!(sequence.tokens, tokens.encode_with_places(text).unwrap().0);
    assert!(!is_joined);
    let learned: Vec<String> = sequence
        .targets
        .iter()
        .map(|range| tokens.decode(&sequence.tokens[range.clone()]).unwrap())
        .collect();
    assert_eq!(learned, ["A", "B"]);
    // Each with its end.
    assert!(
        sequence
            .targets
            .iter()
            .all(|range| tokens.is_end(sequence.tokens[range.end - 1]))
    );
    // A turn that is not to be learned is none.
    let mut record = record.clone();
    record.earlier[2].is_learned = false;
    let (sequence, _) = template.sequence(&tokens, &record).unwrap();
    assert_eq!(sequence.targets.len(), 1);
    assert!(DEFAULT.contains("eos_token"));
}

#[test]
fn a_template_that_cannot_be_used_is_named() {
    let case = &cases()[0];
    let settings = &case["tokenizer_config"];
    let error = |template: &str| {
        let pretrained = checkpoint(case, settings, Some(template));
        let tokens = Tokens::of(&pretrained).unwrap();
        let conversation = &case["conversations"][2];
        let used = ChatTemplate::of(&pretrained).and_then(|template| {
            template.sequence(&tokens, &records(std::slice::from_ref(conversation))[0])
        });
        used.unwrap_err().to_string()
    };
    for (template, part) in [
        ("{% for x in %}", "line 1"),
        ("a\n{{ nothing.at.all }}", "line 2"),
        ("{{ messages[0].content.unheard() }}", "unheard"),
        // Turns are counted backwards: nothing begins as it did before.
        (
            "{% for m in messages[::-1] %}{{ m.content + m.role }};{% endfor %}",
            "turn 2 in another way",
        ),
    ] {
        let error = error(template);
        assert!(
            error.starts_with("<chat>/chat_template.jinja: chat_template: "),
            "{error}"
        );
        assert!(error.contains(part), "{error}");
    }
}
