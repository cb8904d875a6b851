//! Bad input gives one clear message with the file and the field, the right exit code, and no
//! output.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use clap::Parser;
use clap::error::ErrorKind;
use llama_math::cli::Cli;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

const FILES: [&str; 4] = [
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model.safetensors",
];
const PROJECTION: &str = "model.layers.0.self_attn.k_proj.weight";

/// A folder with a good checkpoint and good data, to be damaged.
struct Case {
    root: tempfile::TempDir,
}

impl Case {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let case = Self { root };
        std::fs::create_dir(case.path("model")).unwrap();
        let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/tiny");
        for name in FILES {
            std::fs::copy(tiny.join(name), case.path("model").join(name)).unwrap();
        }
        let line = r#"{"question": "Ada has 3 eggs.", "answer": "so 3"}"#;
        std::fs::write(case.path("data.jsonl"), [line; 16].join("\n")).unwrap();
        case
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        std::fs::write(self.path(name), content).unwrap();
    }

    fn edit_json(&self, name: &str, edit: impl FnOnce(&mut Value)) {
        let mut value = serde_json::from_slice(&std::fs::read(self.path(name)).unwrap()).unwrap();
        edit(&mut value);
        self.write(name, value.to_string());
    }

    /// Rewrites the weights; the edit returns `false` to drop a tensor.
    fn edit_weights(&self, edit: impl Fn(&str, &mut (Dtype, Vec<usize>, Vec<u8>)) -> bool) {
        let bytes = std::fs::read(self.path("model/model.safetensors")).unwrap();
        let mut tensors: HashMap<String, (Dtype, Vec<usize>, Vec<u8>)> =
            SafeTensors::deserialize(&bytes)
                .unwrap()
                .iter()
                .map(|(name, view)| {
                    (
                        name.to_string(),
                        (view.dtype(), view.shape().to_vec(), view.data().to_vec()),
                    )
                })
                .collect();
        tensors.retain(|name, tensor| edit(name, tensor));
        let views = tensors.iter().map(|(name, (dtype, shape, data))| {
            (name, TensorView::new(*dtype, shape.clone(), data).unwrap())
        });
        safetensors::serialize_to_file(views, None, &self.path("model/model.safetensors")).unwrap();
    }

    /// Message and exit code of a run of one step with these further arguments.
    fn run(&self, arguments: &[&str]) -> (String, u8) {
        let path = |name: &str| self.path(name).to_str().unwrap().to_string();
        let mut all: Vec<String> = vec!["llama_math".into()];
        for (option, value) in [("--model", path("model")), ("--data", path("data.jsonl"))] {
            if !arguments.contains(&option) {
                all.extend([option.into(), value]);
            }
        }
        all.extend(["--output".into(), path("out")]);
        for default in [
            ["--device", "flex"],
            ["--rank", "2"],
            ["--shards", "2"],
            ["--steps", "1"],
        ] {
            if !arguments.contains(&default[0]) {
                all.extend(default.map(String::from));
            }
        }
        all.extend(
            arguments
                .iter()
                .map(|argument| argument.replace("ROOT", &path(""))),
        );
        match Cli::try_parse_from(all) {
            Ok(cli) => match cli.run() {
                Ok(()) => (String::new(), 0),
                Err(error) => (error.to_string(), error.exit_code()),
            },
            Err(error) => (error.to_string(), u8::try_from(error.exit_code()).unwrap()),
        }
    }

    /// Runs, and checks message, exit code, and that nothing was written.
    #[track_caller]
    fn refuses(&self, arguments: &[&str], parts: &[&str]) {
        let entries = || {
            let mut names: Vec<_> = std::fs::read_dir(self.root.path())
                .unwrap()
                .map(|e| e.unwrap().path())
                .collect();
            names.sort();
            names
        };
        let before = entries();
        let (message, code) = self.run(arguments);
        println!(
            "{}",
            message.replace(self.root.path().to_str().unwrap(), "")
        );
        assert_eq!(code, 1, "{message}");
        assert_eq!(message.lines().count(), 1, "{message}");
        for part in parts {
            assert!(message.contains(part), "`{part}` is not in: {message}");
        }
        assert_eq!(entries(), before, "nothing is written");
    }
}

#[test]
fn good_input_is_accepted() {
    let case = Case::new();
    assert_eq!(case.run(&[]), (String::new(), 0));
    for name in FILES.into_iter().chain(["metrics.jsonl", "loss.svg"]) {
        assert!(case.path("out").join(name).is_file(), "{name}");
    }
    let metrics = std::fs::read_to_string(case.path("out/metrics.jsonl")).unwrap();
    let line: Value = serde_json::from_str(metrics.lines().next().unwrap()).unwrap();
    for key in [
        "step",
        "loss",
        "lr",
        "gradient_norm",
        "update_norm",
        "tokens_per_second",
    ] {
        assert!(line[key].as_f64().unwrap() > 0.0, "{key}");
    }
    case.refuses(&[], &["--output", "exists", "--overwrite"]);
    assert_eq!(case.run(&["--overwrite"]).1, 0);
}

#[test]
fn files_that_are_missing_or_broken() {
    for name in ["config.json", "tokenizer.json", "model.safetensors"] {
        let case = Case::new();
        std::fs::remove_file(case.path("model").join(name)).unwrap();
        case.refuses(&[], &[name]);
    }
    let case = Case::new();
    case.refuses(
        &["--model", "ROOT/none"],
        &["none", "config.json", "No such file"],
    );
    case.refuses(
        &["--data", "ROOT/none.jsonl"],
        &["none.jsonl", "No such file"],
    );
    case.refuses(
        &["--eval", "ROOT/none.jsonl"],
        &["none.jsonl", "No such file"],
    );

    let weights = std::fs::read(case.path("model/model.safetensors")).unwrap();
    for cut in [0, 5, 8, 100, weights.len() / 2, weights.len() - 1] {
        case.write("model/model.safetensors", &weights[..cut]);
        case.refuses(&[], &["model.safetensors", "header"]);
    }
    let mut state = 1u32;
    let noise: Vec<u8> = (0..5000)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        })
        .collect();
    case.write("model/model.safetensors", &noise);
    case.refuses(&[], &["model.safetensors", "header"]);
    case.write("model/model.safetensors", &weights);
    case.write("model/tokenizer.json", &noise);
    case.refuses(&[], &["tokenizer.json", "not a tokenizer"]);
    case.write("model/config.json", &noise);
    case.refuses(&[], &["config.json"]);
    case.write("data.jsonl", &noise);
    let case = Case::new();
    case.write("data.jsonl", &noise);
    case.refuses(&[], &["data.jsonl", "line 1", "not UTF-8"]);
    case.write(
        "model/model.safetensors.index.json",
        r#"{"weight_map": {"a": "../x"}}"#,
    );
    case.refuses(&[], &["index.json", "weight_map", "../x"]);
}

#[test]
fn configurations_that_do_not_fit() {
    for (key, value, parts) in [
        (
            "model_type",
            "gpt2".into(),
            ["model_type", "unknown architecture `gpt2`"],
        ),
        ("hidden_act", "gelu".into(), ["hidden_act", "`gelu`"]),
        ("hidden_size", "many".into(), ["content", "expected usize"]),
        ("hidden_size", Value::Null, ["content", "expected usize"]),
        (
            "num_attention_heads",
            0.into(),
            ["num_attention_heads", "is 0"],
        ),
        (
            "num_key_value_heads",
            3.into(),
            ["num_key_value_heads", "must divide"],
        ),
        ("head_dim", 31.into(), ["head_dim", "must be even"]),
        ("rope_theta", 0.into(), ["rope_theta", "above 0"]),
        (
            "vocab_size",
            100.into(),
            ["tokenizer.json: vocab", "vocab_size"],
        ),
        ("eos_token_id", Value::Null, ["", ""]),
    ] {
        let case = Case::new();
        case.edit_json("model/config.json", |config| config[key] = value);
        match parts {
            ["", ""] => assert_eq!(
                case.run(&[]).1,
                0,
                "the tokenizer's own files name the token"
            ),
            parts => case.refuses(&[], &parts),
        }
    }
    let case = Case::new();
    case.edit_json("model/config.json", |config| {
        config["rope_scaling"] = serde_json::json!({"rope_type": "yarn", "factor": 2.0});
    });
    case.refuses(&[], &["rope_scaling", "`yarn`"]);
    let case = Case::new();
    case.edit_json("model/config.json", |config| {
        config["intermediate_size"] = 300.into()
    });
    case.refuses(
        &[],
        &[
            "model.safetensors",
            "gate_proj.weight",
            "[352, 128]",
            "[300, 128]",
        ],
    );
    let case = Case::new();
    case.edit_json("model/config.json", |config| {
        config["num_hidden_layers"] = 3.into()
    });
    case.refuses(&[], &["model.layers.3.", "no such tensor"]);
    let case = Case::new();
    case.edit_json("model/config.json", |config| {
        config["num_hidden_layers"] = 5.into()
    });
    case.refuses(&[], &["model.layers.4.", "no such tensor"]);
    let case = Case::new();
    case.edit_json("model/tokenizer_config.json", |config| {
        config["eos_token"] = "<no>".into()
    });
    case.refuses(&[], &["tokenizer_config.json", "eos_token", "<no>"]);
}

#[test]
fn weights_that_cannot_be_used() {
    let case = Case::new();
    case.edit_weights(|name, _| name != PROJECTION);
    case.refuses(&[], &["model.safetensors", PROJECTION, "no such tensor"]);
    let case = Case::new();
    case.edit_weights(|name, tensor| {
        if name == PROJECTION {
            tensor.2[..2].copy_from_slice(&[0x00, 0x7e]);
        }
        true
    });
    case.refuses(&[], &["model.safetensors", PROJECTION, "1 NaN"]);
    let case = Case::new();
    case.edit_weights(|name, tensor| {
        if name == PROJECTION {
            tensor.0 = Dtype::I16;
        }
        true
    });
    case.refuses(&[], &["model.safetensors", PROJECTION, "I16"]);
}

#[test]
fn data_that_cannot_be_used() {
    for (content, parts) in [
        ("", ["content", "no records"]),
        ("\n\n", ["content", "no records"]),
        (
            "{\"question\": \"a\", \"answer\": \"b\"}\n{\"question",
            ["line 2", "not JSON"],
        ),
        (
            "{\"question\": \"a\", \"answer\": \"b\"}\n{\"x\": 1}",
            ["line 2", "no field `question`"],
        ),
        ("{\"x\": 1}", ["line 1", "--fields"]),
        ("[1]", ["record 1", "not a JSON object"]),
        (
            "{\"question\": \"a\", \"answer\": \"b\"}",
            ["--data", "a step takes 2 records"],
        ),
    ] {
        let case = Case::new();
        case.write("data.jsonl", content);
        case.refuses(&[], &parts);
    }
    let case = Case::new();
    case.refuses(
        &["--fields", "question,solution"],
        &["line 1", "no field `solution`"],
    );
    // Every record is cut before its answer.
    case.refuses(&["--max-length", "8"], &["--data", "has 0 with a target"]);
    case.refuses(
        &["--max-length", "1000"],
        &["config.json", "max_position_embeddings", "256"],
    );
    case.write("template.txt", "Solve this:");
    case.refuses(
        &["--prompt-template", "ROOT/template.txt"],
        &["template.txt", "{instruction}"],
    );
}

#[test]
fn adapters_that_do_not_fit() {
    let case = Case::new();
    case.refuses(
        &["--rank", "40"],
        &["k_proj.weight", "[128, 64]", "2 shards of rank 40"],
    );
    for method in ["lora", "pissa"] {
        case.refuses(
            &["--method", method, "--rank", "65"],
            &["k_proj.weight", "[128, 64]"],
        );
    }
    for method in ["hd-pissa", "pissa", "lora", "full"] {
        let arguments = ["--method", method, "--targets", "gpt_proj"];
        case.refuses(&arguments, &["--targets", "`gpt_proj` matches no matrix"]);
    }
    case.refuses(
        &["--targets", "(q_proj"],
        &["--targets", "`(q_proj`", "unclosed group"],
    );
    case.refuses(&["--device", "toaster"], &["--device", "toaster"]);
    case.refuses(
        &["--method", "full", "--lr", "1e30", "--steps", "3"],
        &["step ", "--lr"],
    );
}

#[test]
fn usage_errors_exit_with_2() {
    let case = Case::new();
    for (arguments, part) in [
        (vec!["--weight-decay", "0.1"], "hd-pissa"),
        (vec!["--fields", "question"], "PROMPT,ANSWER"),
        (vec!["--method", "dora"], "dora"),
        (vec!["--lr=-1"], "above 0"),
        (vec!["--lr", "NaN"], "above 0"),
        (vec!["--rank", "0"], "--rank"),
        (vec!["--warmup-ratio", "2"], "from 0 to 1"),
        (vec!["--epochs", "1"], "--steps"),
        (vec!["--nonsense"], "--nonsense"),
        (vec!["--workers", "3"], "3 workers cannot share 2 shards"),
        (vec!["--mpi", "--workers", "2"], "cannot be used with"),
        #[cfg(not(feature = "mpi"))]
        (vec!["--mpi"], "libopenmpi-dev"),
    ] {
        let (message, code) = case.run(&arguments);
        assert_eq!(code, 2, "{message}");
        assert!(message.contains(part), "{message}");
        assert!(!case.path("out").exists());
    }
    let error = Cli::try_parse_from(["llama_math", "--model", "x"]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::MissingRequiredArgument);
    assert_eq!(
        case.run(&["--method", "lora", "--weight-decay", "0.1"]).1,
        0
    );
}
