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
        all.extend(["--output".into(), path("out"), "--no-cache".into()]);
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
        let forms = ["--method", "--published", "--windows", "--frame-scale"];
        if !arguments.iter().any(|argument| forms.contains(argument)) {
            all.push("--published".into());
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
    case.refuses(&[], &["tokenizer.json", "not UTF-8"]);
    case.write("model/tokenizer.json", "{}");
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
            ["model_type", "unsupported, unknown architecture `gpt2`"],
        ),
        ("hidden_act", "gelu".into(), ["hidden_act", "`gelu`"]),
        (
            "hidden_size",
            "many".into(),
            ["hidden_size: is \"many\"", "expected usize"],
        ),
        ("hidden_size", Value::Null, ["hidden_size", "is missing"]),
        (
            "hidden_size",
            1.5.into(),
            ["hidden_size: is 1.5", "expected usize"],
        ),
        (
            "eos_token_id",
            (-1).into(),
            ["eos_token_id: is -1", "expected u32"],
        ),
        (
            "eos_token_id",
            vec![1, -1].into(),
            ["eos_token_id: is [1,-1]", "expected u32"],
        ),
        (
            "rope_theta",
            "10000".into(),
            ["rope_theta: is \"10000\"", "expected f64"],
        ),
        (
            "tie_word_embeddings",
            "yes".into(),
            ["tie_word_embeddings", "expected a boolean"],
        ),
        (
            "rope_scaling",
            "linear".into(),
            ["rope_scaling: is \"linear\"", "not an object"],
        ),
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
            "partial_rotary_factor",
            0.5.into(),
            ["partial_rotary_factor", "0.5 is not supported"],
        ),
        (
            "rope_scaling",
            serde_json::json!({"rope_type": "yarn"}),
            ["rope_scaling.factor", "is missing"],
        ),
        (
            "rope_scaling",
            serde_json::json!({"rope_type": "dynamic", "factor": -2.0}),
            ["rope_scaling.factor", "above 0"],
        ),
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
        config["rope_scaling"] = serde_json::json!({"rope_type": "longrope", "factor": 2.0});
    });
    case.refuses(&[], &["rope_scaling", "`longrope`"]);
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
        (vec!["--windows", "middle"], "middle"),
        (
            vec!["--windows", "random", "--frame-scale", "balanced"],
            "no singular values to balance",
        ),
        (vec!["--published", "--windows", "leading"], "--windows"),
        (
            vec!["--method", "lora", "--published"],
            "--published: lora has no form of its own",
        ),
        (
            vec!["--method", "lora", "--windows", "spread"],
            "--windows: lora has no shards",
        ),
        (
            vec!["--method", "pissa", "--frame-scale", "unit"],
            "--frame-scale: pissa has no frames",
        ),
        (
            vec!["--method", "lora", "--svd", "krylov"],
            "--svd: lora has no principal components",
        ),
        (
            vec!["--windows", "spread", "--svd", "krylov"],
            "--svd: takes --windows leading",
        ),
        (
            vec!["--method", "full", "--dtype", "bf16"],
            "--dtype: full has no residual bits",
        ),
        (vec!["--dtype", "f16"], "f16"),
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

/// UTF-16 of either byte order, with or without a mark.
fn utf16(text: &str, big: bool, mark: bool) -> Vec<u8> {
    let mark = mark.then_some(0xfeff);
    let units = mark.into_iter().chain(text.encode_utf16());
    let bytes = units.flat_map(|unit| match big {
        true => unit.to_be_bytes(),
        false => unit.to_le_bytes(),
    });
    bytes.collect()
}

const FILES_THAT_ARE_READ: [&str; 6] = [
    "model/config.json",
    "model/tokenizer.json",
    "model/tokenizer_config.json",
    "model/model.safetensors",
    "data.jsonl",
    "template.txt",
];

#[test]
fn files_of_another_kind_are_named() {
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n";
    let line = r#"{"question": "a", "answer": "b"} {instruction}"#;
    let kinds: [(Vec<u8>, &str); 11] = [
        (pointer.into(), "Git LFS pointer"),
        (b"\x1f\x8b\x08\0\0\0\0\0\0\x03".into(), "gzip"),
        (b"PK\x03\x04\x14\0\0\0\x08\0".into(), "zip archive"),
        (b"\x28\xb5\x2f\xfd\0\0\0\0\0".into(), "zstandard"),
        (b"BZh91AY&SY".into(), "bzip2"),
        (b"\xfd7zXZ\0\0\x04".into(), "xz archive"),
        (b"PAR1\x15\x04\x15\0\0\0".into(), "parquet"),
        (utf16(line, false, true), "UTF-16"),
        (utf16(line, true, true), "UTF-16"),
        (utf16(line, false, false), "UTF-16"),
        (utf16(line, true, false), "UTF-16"),
    ];
    for name in FILES_THAT_ARE_READ {
        let case = Case::new();
        case.write("template.txt", "{instruction}");
        for (content, kind) in &kinds {
            // Weights have no text to begin with.
            if name.ends_with("safetensors") && *kind == "UTF-16" {
                continue;
            }
            case.write(name, content);
            let file = name.rsplit('/').next().unwrap();
            case.refuses(&["--prompt-template", "ROOT/template.txt"], &[file, kind]);
        }
    }
    let case = Case::new();
    std::fs::write(case.path("eval.jsonl"), pointer).unwrap();
    let eval = ["--eval", "ROOT/eval.jsonl"];
    case.refuses(&eval, &["eval.jsonl", "Git LFS pointer"]);
}

#[test]
fn marks_and_line_ends_of_other_systems_are_fine() {
    let case = Case::new();
    case.write("template.txt", "{instruction}\n");
    for name in FILES_THAT_ARE_READ {
        if name.ends_with("safetensors") {
            continue;
        }
        let mut content = b"\xef\xbb\xbf".to_vec();
        content.extend(std::fs::read(case.path(name)).unwrap());
        case.write(name, content);
    }
    let lines = String::from_utf8(std::fs::read(case.path("data.jsonl")).unwrap()).unwrap();
    case.write("data.jsonl", lines.replace('\n', "\r\n") + "\r\n");
    let template = ["--prompt-template", "ROOT/template.txt"];
    assert_eq!(case.run(&template), (String::new(), 0));
}

#[cfg(unix)]
#[test]
fn what_is_no_file_keeps_nobody_waiting() {
    for name in FILES_THAT_ARE_READ {
        for what in ["fifo", "folder", "device"] {
            let case = Case::new();
            case.write("template.txt", "{instruction}");
            let path = case.path(name);
            std::fs::remove_file(&path).unwrap();
            let expected = match what {
                "fifo" => {
                    let made = std::process::Command::new("mkfifo").arg(&path).status();
                    assert!(made.unwrap().success());
                    "pipe or device"
                }
                "folder" => {
                    std::fs::create_dir(&path).unwrap();
                    "directory"
                }
                _ => {
                    std::os::unix::fs::symlink("/dev/zero", &path).unwrap();
                    "pipe or device"
                }
            };
            let file = name.rsplit('/').next().unwrap();
            case.refuses(
                &["--prompt-template", "ROOT/template.txt"],
                &[file, expected],
            );
        }
    }
}

/// Makes a sparse file of `size` bytes, with `content` at its start.
fn sparse(path: &Path, content: &[u8], size: u64) -> bool {
    std::fs::write(path, content).unwrap();
    let file = std::fs::File::options().write(true).open(path).unwrap();
    file.set_len(size).is_ok()
}

#[test]
fn gigantic_files_end_in_an_error() {
    const SIZE: u64 = 1 << 43;
    for name in FILES_THAT_ARE_READ {
        let case = Case::new();
        case.write("template.txt", "{instruction}");
        let content = std::fs::read(case.path(name)).unwrap();
        // A header as long as the file.
        let content = match name.ends_with("safetensors") {
            true => (SIZE - 8).to_le_bytes().to_vec(),
            false => content,
        };
        if !sparse(&case.path(name), &content, SIZE) {
            return println!("skipped: this file system has no files of {SIZE} bytes");
        }
        let file = name.rsplit('/').next().unwrap();
        let expected = match name.ends_with("safetensors") {
            true => "safetensors allows 100000000",
            false => "of memory",
        };
        case.refuses(
            &["--prompt-template", "ROOT/template.txt"],
            &[file, expected],
        );
    }
    // A valid header of a tensor that is too large for any machine, with the shape of config.json.
    let case = Case::new();
    case.edit_json("model/config.json", |config| {
        (config["vocab_size"], config["hidden_size"]) = (16_000_000.into(), 32_768.into());
    });
    let len = 16_000_000u64 * 32_768 * 4;
    let header = serde_json::json!({"model.embed_tokens.weight": {
        "dtype": "F32", "shape": [16_000_000, 32_768], "data_offsets": [0, len]}});
    let header = header.to_string();
    let start = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat();
    let size = start.len() as u64 + len;
    if sparse(&case.path("model/model.safetensors"), &start, size) {
        case.refuses(&[], &["model", "of memory"]);
    }
}

#[test]
fn weights_that_disagree_with_each_other() {
    let tensors = |case: &Case| {
        let bytes = std::fs::read(case.path("model/model.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        file.names()
            .into_iter()
            .map(String::from)
            .collect::<Vec<_>>()
    };
    let index = "model/model.safetensors.index.json";
    let with_index = |edit: &dyn Fn(&mut serde_json::Map<String, Value>)| {
        let case = Case::new();
        let part = "model-00001-of-00001.safetensors";
        let mut map: serde_json::Map<String, Value> = tensors(&case)
            .into_iter()
            .map(|name| (name, part.into()))
            .collect();
        edit(&mut map);
        let single = case.path("model/model.safetensors");
        std::fs::copy(&single, case.path("model").join(part)).unwrap();
        std::fs::remove_file(single).unwrap();
        case.write(index, serde_json::json!({"weight_map": map}).to_string());
        case
    };
    // The index and its files.
    assert_eq!(with_index(&|_| ()).run(&[]).1, 0);
    let case = with_index(&|map| drop(map.remove(PROJECTION)));
    case.refuses(&[], &["index.json", "does not list", PROJECTION]);
    let case = with_index(&|map| {
        map.insert("x".into(), map[PROJECTION].clone());
    });
    case.refuses(&[], &["index.json", "`x` is not in"]);
    // A single file next to it: the same, another value, another tensor.
    for (edit, expected) in [
        ("same", None),
        ("value", Some(PROJECTION)),
        ("tensor", Some("extra")),
    ] {
        let case = with_index(&|_| ());
        let part = case.path("model/model-00001-of-00001.safetensors");
        std::fs::copy(part, case.path("model/model.safetensors")).unwrap();
        match edit {
            "value" => case.edit_weights(|name, tensor| {
                tensor.2[0] ^= u8::from(name == PROJECTION);
                true
            }),
            "tensor" => {
                let bytes = std::fs::read(case.path("model/model.safetensors")).unwrap();
                let file = SafeTensors::deserialize(&bytes).unwrap();
                let one = [0; 4];
                let mut all = file.tensors();
                all.push((
                    "extra".into(),
                    TensorView::new(Dtype::F32, vec![1], &one).unwrap(),
                ));
                let path = case.path("model/model.safetensors");
                safetensors::serialize_to_file(all, None, &path).unwrap();
            }
            _ => {}
        }
        match expected {
            None => assert_eq!(case.run(&[]).1, 0),
            Some(tensor) => case.refuses(&[], &["model.safetensors", tensor, "not the same"]),
        }
    }
}

#[test]
fn the_family_comes_before_its_fields() {
    for (config, name) in [
        (
            r#"{"model_type": "gemma3", "text_config": {"hidden_size": 3}}"#,
            "gemma3",
        ),
        (
            r#"{"architectures": ["PhiForCausalLM"], "hidden_size": "x"}"#,
            "PhiForCausalLM",
        ),
        (r#"{"model_type": "llava", "vocab_size": null}"#, "llava"),
    ] {
        let case = Case::new();
        case.write("model/config.json", config);
        let expected = format!("unknown architecture `{name}`");
        case.refuses(&[], &["model_type", &expected]);
    }
    let case = Case::new();
    case.write("model/config.json", "{}");
    case.refuses(&[], &["model_type", "is missing"]);
}

#[test]
fn both_names_of_a_rope_type_are_fine_if_they_agree() {
    for key in ["rope_scaling", "rope_parameters"] {
        let run = |old: &str, new: Option<&str>| {
            let case = Case::new();
            case.edit_json("model/config.json", |config| {
                config[key] = serde_json::json!({"type": old, "factor": 2.0, "rope_theta": 1e4});
                if let Some(new) = new {
                    config[key]["rope_type"] = new.into();
                }
            });
            case.run(&[])
        };
        assert_eq!(run("linear", Some("linear")).1, 0);
        assert_eq!(run("linear", None).1, 0);
        let (message, code) = run("dynamic", Some("linear"));
        assert_eq!(code, 1);
        let place = format!("{key}.rope_type: is `linear`, and type beside it is `dynamic`");
        assert!(message.contains(&place), "{message}");
    }
}

#[test]
fn templates_and_prompts_that_cannot_be_filled() {
    for (template, parts) in [
        (
            "{instruction} {context}",
            ["{context}", "only {instruction}"],
        ),
        ("{input}", ["no {instruction}", ""]),
        (
            "Instruction: {Instruction}",
            ["{Instruction}", "only {instruction}"],
        ),
    ] {
        let case = Case::new();
        case.write("template.txt", template);
        let arguments = ["--prompt-template", "ROOT/template.txt"];
        case.refuses(&arguments, &[&["template.txt"], &parts[..]].concat());
    }
    for empty in ["", "   ", "\\n"] {
        let case = Case::new();
        let line = format!(r#"{{"question": "{empty}", "answer": "so 3"}}"#);
        case.write("data.jsonl", format!("{line}\n").repeat(8));
        case.refuses(&[], &["data.jsonl", "line 1", "`question` is empty"]);
    }
    // A prompt that gives no tokens: here the normalizer removes all of it.
    for option in ["--data", "--eval"] {
        let case = Case::new();
        case.edit_json("model/tokenizer.json", |tokenizer| {
            let pattern = serde_json::json!({ "Regex": "~" });
            tokenizer["normalizer"] =
                serde_json::json!({ "type": "Replace", "pattern": pattern, "content": "" });
        });
        case.write("template.txt", "{instruction}");
        let line = r#"{"question": "~~", "answer": "so 3"}"#;
        case.write("none.jsonl", [line; 16].join("\n"));
        let arguments = [
            "--prompt-template",
            "ROOT/template.txt",
            option,
            "ROOT/none.jsonl",
        ];
        case.refuses(
            &arguments,
            &["tokenizer.json", "makes no token of the prompt \"~~\""],
        );
    }
    // If all answers of the held-out records are empty, nothing can be measured.
    let case = Case::new();
    case.write("eval.jsonl", r#"{"question": "a", "answer": " "}"#);
    let arguments = ["--eval", "ROOT/eval.jsonl"];
    case.refuses(
        &arguments,
        &["eval.jsonl", "1 without an answer", "no target"],
    );
}
