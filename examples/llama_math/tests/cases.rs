//! What people ran into, as they reported it: each folder of the shared `cases` is run as its README
//! says. Their kinds are tested without that folder elsewhere.

mod common {
    pub mod case;
}

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use common::case::{STREAMS, prepare, text, this_binary};
use safetensors::SafeTensors;

#[test]
#[ignore = "the program that the other tests start"]
fn program() {
    common::case::program();
}

/// The folder of the cases: under `HD_PISSA_SHARED`, else beside the workspace.
fn cases() -> Option<PathBuf> {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared");
    let shared = std::env::var_os("HD_PISSA_SHARED").map_or(beside, PathBuf::from);
    let cases = shared.join("cases");
    cases.is_dir().then(|| cases.canonicalize().unwrap())
}

/// One folder of the shared cases, and a place to write to.
struct Reported {
    folder: PathBuf,
    root: tempfile::TempDir,
}

/// Every case that is known here. A new folder without a test is an error.
const CASES: [&str; 15] = [
    "broken-pipe",
    "custom-code-not-copied",
    "cut-answers",
    "double-bos",
    "empty-answer",
    "eos-normalized",
    "eos-not-added",
    "input-placeholder",
    "lfs-pointer",
    "nested-config",
    "number-extraction",
    "rope-type-twice",
    "sighup",
    "tied-head-differs",
    "utf8-bom",
];

impl Reported {
    /// `None`, with a message, where the folder is absent.
    fn new(name: &str) -> Option<Self> {
        assert!(CASES.contains(&name));
        let Some(cases) = cases() else {
            eprintln!("skipped: no shared case {name} (HD_PISSA_SHARED names the folder)");
            return None;
        };
        Some(Self {
            folder: cases.join(name),
            root: tempfile::tempdir().unwrap(),
        })
    }

    fn base(&self, name: &str) -> String {
        let base = self.folder.parent().unwrap().join("_base");
        base.join(name).to_str().unwrap().into()
    }

    fn own(&self, name: &str) -> String {
        self.folder.join(name).to_str().unwrap().into()
    }

    fn output(&self) -> PathBuf {
        self.root.path().join("out")
    }

    /// The command of the README: what is not given is that of the base.
    fn command(&self, given: &[(&str, &str)]) -> Command {
        let (sp, train) = (self.base("sp"), self.base("train.jsonl"));
        let output = self.output().to_str().unwrap().to_string();
        let mut arguments = vec!["llama_math".to_string()];
        let defaults = [
            ("--device", "flex"),
            ("--shards", "2"),
            ("--rank", "2"),
            ("--steps", "1"),
            ("--model", &sp),
            ("--data", &train),
            ("--output", &output),
        ];
        let is_given = |option: &str| given.iter().any(|(name, _)| *name == option);
        let all = defaults.iter().filter(|(option, _)| !is_given(option));
        for (option, value) in all.chain(given) {
            arguments.push(option.to_string());
            arguments.extend((!value.is_empty()).then(|| value.to_string()));
        }
        let mut command = this_binary();
        prepare(&mut command, &arguments);
        command
    }

    fn run(&self, given: &[(&str, &str)]) -> Output {
        let output = self.command(given).output().unwrap();
        println!("{}", text(&output));
        output
    }

    #[track_caller]
    fn says(&self, given: &[(&str, &str)], parts: &[&str]) -> String {
        let output = self.run(given);
        assert!(output.status.success());
        assert!(self.output().join("model.safetensors").is_file());
        let said = text(&output);
        for part in parts {
            assert!(said.contains(part), "`{part}` is not in: {said}");
        }
        said
    }

    #[track_caller]
    fn refuses(&self, given: &[(&str, &str)], parts: &[&str]) {
        let output = self.run(given);
        assert_eq!(output.status.code(), Some(1));
        for part in parts {
            assert!(text(&output).contains(part), "`{part}`: {}", text(&output));
        }
        assert!(!self.output().exists());
    }
}

#[test]
fn every_case_has_a_test() {
    let Some(cases) = cases() else {
        return eprintln!("skipped: no shared cases (HD_PISSA_SHARED names the folder)");
    };
    let entries = std::fs::read_dir(cases).unwrap();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name != "_base")
        .collect();
    names.sort();
    assert_eq!(names, CASES);
}

#[test]
fn broken_pipe() {
    let Some(case) = Reported::new("broken-pipe") else {
        return;
    };
    let run = |to: &str, streams: Option<&str>| {
        let _ = std::fs::remove_dir_all(case.output());
        let inner = case.command(&[("--steps", "20")]);
        let mut command = Command::new("sh");
        command.arg("-c").arg(format!("\"$0\" \"$@\" {to}"));
        command.arg(inner.get_program()).args(inner.get_args());
        command.envs(
            inner
                .get_envs()
                .filter_map(|(key, value)| Some((key, value?))),
        );
        command.envs(streams.map(|streams| (STREAMS, streams)));
        command.stdout(Stdio::null()).stderr(Stdio::null());
        command.status().unwrap();
        assert!(case.output().join("model.safetensors").is_file(), "{to}");
    };
    run("| head -1", None);
    run("2>&1 | head -2", None);
    run("", Some("/dev/full"));
}

#[test]
fn custom_code_is_carried_over() {
    let Some(case) = Reported::new("custom-code-not-copied") else {
        return;
    };
    case.says(&[("--model", &case.own("model"))], &[]);
    for name in ["modeling_mine.py", "additional_chat_templates/tool.jinja"] {
        let read = |folder: &Path| std::fs::read(folder.join(name)).unwrap();
        assert_eq!(read(&case.output()), read(&case.folder.join("model")));
    }
}

#[test]
fn cut_answers_are_counted() {
    let Some(case) = Reported::new("cut-answers") else {
        return;
    };
    let (data, prompt) = (case.own("data.jsonl"), case.base("prompt.txt"));
    let given = [
        ("--max-length", "100"),
        ("--data", &data),
        ("--prompt-template", &prompt),
    ];
    let cut = "80 records, 80 usable, 40 of them cut before the end of their answer";
    case.says(&given, &[cut]);
}

#[test]
fn a_begin_token_is_not_doubled() {
    let Some(case) = Reported::new("double-bos") else {
        return;
    };
    let (model, prompt) = (case.base("l3"), case.own("prompt.txt"));
    case.says(&[("--model", &model), ("--prompt-template", &prompt)], &[]);
    let pretrained = llama_math::Pretrained::open(Path::new(&model)).unwrap();
    let tokens = llama_math::tokenize::Tokens::of(&pretrained).unwrap();
    let prompt = std::fs::read_to_string(prompt).unwrap();
    assert_eq!(tokens.encode(&prompt).unwrap()[..2], [0, 3]);
}

#[test]
fn empty_answers_are_dropped() {
    let Some(case) = Reported::new("empty-answer") else {
        return;
    };
    let (data, prompt) = (case.own("data.jsonl"), case.base("prompt.txt"));
    let given = [("--data", &*data), ("--prompt-template", &prompt)];
    case.refuses(&given, &["a step takes 2 records", "has 0 with a target"]);
}

#[test]
fn answers_end() {
    for name in ["eos-normalized", "eos-not-added"] {
        let Some(case) = Reported::new(name) else {
            return;
        };
        let (model, data) = (case.own("model"), case.base("mem.jsonl"));
        let prompt = case.base("prompt.txt");
        let given = [
            ("--method", "full"),
            ("--lr", "3e-3"),
            ("--steps", "300"),
            ("--no-shuffle", ""),
            ("--batch-size", "4"),
            ("--data", &data),
            ("--prompt-template", &prompt),
            ("--eval", &data),
            ("--max-new-tokens", "40"),
            ("--model", &model),
        ];
        let said = case.says(&given, &["exact match: 8 of 8"]);
        assert!(!said.contains("</s"), "{said}");
    }
}

#[test]
fn the_input_of_a_template_is_filled() {
    let Some(case) = Reported::new("input-placeholder") else {
        return;
    };
    let (data, prompt) = (case.own("data.jsonl"), case.own("prompt.txt"));
    let given = [("--data", &*data), ("--prompt-template", &prompt)];
    case.says(&given, &["8 records, 8 usable"]);
    let records = llama_math::data::read_records(Path::new(&data), None).unwrap();
    let template = std::fs::read_to_string(&prompt).unwrap();
    let template = llama_math::prompt::PromptTemplate::new(template).unwrap();
    let filled = template.text(&records[0]);
    assert_eq!(filled, "Task: Add the numbers.\nGiven: 0 and 1\nReply:");
}

#[test]
fn files_and_families_are_named() {
    let Some(case) = Reported::new("lfs-pointer") else {
        return;
    };
    case.refuses(
        &[("--model", &case.own("model"))],
        &["model.safetensors", "Git LFS pointer"],
    );
    let case = Reported::new("nested-config").unwrap();
    case.refuses(
        &[("--model", &case.own("model"))],
        &["unknown architecture `gemma3`"],
    );
}

#[test]
fn numbers_are_compared_as_they_are_meant() {
    let Some(case) = Reported::new("number-extraction") else {
        return;
    };
    let answer = |folder: &str, file: &str| {
        let path = case.folder.join(folder).join(file);
        let records = llama_math::data::read_records(&path, None).unwrap();
        llama_math::score::final_answer(&records[0].answer).unwrap()
    };
    for (folder, same) in [
        ("fraction-false-positive", false),
        ("minus-dollar", true),
        ("minus-dollar-false-positive", false),
    ] {
        let is_same = answer(folder, "train.jsonl") == answer(folder, "eval.jsonl");
        assert_eq!(is_same, same, "{folder}");
    }
}

#[test]
fn both_names_of_a_rope_type() {
    for model in ["rope_parameters", "rope_scaling"] {
        let Some(case) = Reported::new("rope-type-twice") else {
            return;
        };
        case.says(&[("--model", &case.own(model))], &[]);
    }
}

#[test]
fn a_closed_terminal_saves() {
    let Some(case) = Reported::new("sighup") else {
        return;
    };
    let given = [("--steps", "100000"), ("--save-every", "100000")];
    let child = case.command(&given).spawn().unwrap();
    std::thread::sleep(std::time::Duration::from_millis(1500));
    let sent = Command::new("kill")
        .args(["-HUP", &child.id().to_string()])
        .status();
    assert!(sent.unwrap().success());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    assert!(
        text(&output).contains("stopped after step"),
        "{}",
        text(&output)
    );
}

#[test]
fn a_stored_head_is_used() {
    let Some(case) = Reported::new("tied-head-differs") else {
        return;
    };
    let (model, eval) = (case.own("model"), case.base("eval.jsonl"));
    let given = [
        ("--model", &*model),
        ("--eval", &eval),
        ("--max-new-tokens", "0"),
    ];
    case.says(&given, &["lm_head.weight differs from the embedding"]);
    let bytes = |folder: &Path| std::fs::read(folder.join("model.safetensors")).unwrap();
    let (before, after) = (bytes(Path::new(&model)), bytes(&case.output()));
    let head = |bytes: &[u8]| {
        let file = SafeTensors::deserialize(bytes).unwrap();
        file.tensor("lm_head.weight").unwrap().data().to_vec()
    };
    assert_eq!(head(&after), head(&before));
    let config = std::fs::read_to_string(case.output().join("config.json")).unwrap();
    assert!(
        config.contains("\"tie_word_embeddings\": false"),
        "{config}"
    );
}

#[test]
fn a_byte_order_mark_is_skipped() {
    let Some(case) = Reported::new("utf8-bom") else {
        return;
    };
    case.says(
        &[("--data", &case.own("data.jsonl"))],
        &["8 records, 8 usable"],
    );
}
