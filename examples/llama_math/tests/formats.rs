//! Whole runs on data as people have them: several packed files, folders, conversations.

#[path = "common/case.rs"]
mod case;

use std::io::Write;

use case::Case;
use serde_json::json;

#[test]
#[ignore = "what the other tests run"]
fn program() {
    case::program();
}

fn packed(content: &[u8]) -> Vec<u8> {
    use flate2::{Compression, write::GzEncoder};

    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(content).unwrap();
    encoder.finish().unwrap()
}

/// Arguments without the prompt template of other runs.
fn arguments(case: &Case, further: &[&str]) -> Vec<String> {
    let mut arguments = case.arguments(further);
    let template = arguments
        .iter()
        .position(|argument| argument == "--prompt-template")
        .unwrap();
    arguments.drain(template..template + 2);
    arguments
}

fn run(case: &Case, arguments: &[String]) -> (String, bool) {
    let mut command = case::this_binary();
    case::prepare(&mut command, arguments);
    let output = command.current_dir(case.root.path()).output().unwrap();
    println!("{}", case::text(&output));
    (case::text(&output), output.status.success())
}

#[test]
fn a_folder_of_packed_files_is_the_same_as_one_file() {
    let case = Case::new();
    let path = |name: &str| case.root.path().join(name).to_str().unwrap().to_string();
    let all = std::fs::read_to_string(path("data.jsonl")).unwrap();
    let (first, second) = all.split_at(all[..all.len() / 2].rfind('\n').unwrap() + 1);
    std::fs::create_dir(path("set")).unwrap();
    std::fs::write(path("set/train-1.jsonl.gz"), packed(first.as_bytes())).unwrap();
    std::fs::write(path("set/train-2.jsonl"), second).unwrap();
    let held_out = first.lines().next().unwrap();
    std::fs::write(path("set/test.jsonl"), held_out).unwrap();
    let folder = path("set");
    let steps = ["--steps", "2", "--overwrite"];
    let with = |further: &[&str]| {
        let said = case.succeeds(&[&steps[..], further].concat());
        (
            said,
            std::fs::read(case.output().join("model.safetensors")).unwrap(),
        )
    };
    let (said, one) = with(&[]);
    assert!(said.contains("40 records, 40 usable"), "{said}");
    let (said, of_folder) = with(&[
        "--data",
        &folder,
        "--eval",
        &folder,
        "--max-new-tokens",
        "0",
    ]);
    assert!(said.contains("set: 40 records, 40 usable"), "{said}");
    assert!(said.contains("(1 records)"), "{said}");
    assert!(one == of_folder, "the weights differ");
    let files = [path("set/train-1.jsonl.gz"), path("set/train-2.jsonl")];
    let (said, of_files) = with(&["--data", &files[0], &files[1]]);
    assert!(
        said.contains("train-1.jsonl.gz and 1 more: 40 records"),
        "{said}"
    );
    assert!(one == of_files, "the weights differ");
}

#[test]
fn conversations_are_learned_in_whole_runs() {
    let case = Case::new();
    let path = |name: &str| case.root.path().join(name).to_str().unwrap().to_string();
    let turn = |from: &str, value: &str| json!({"from": from, "value": value});
    let conversation = |n: usize| {
        let count = format!("Ada has {n} eggs.");
        json!({"conversations": [turn("human", &count), turn("gpt", "How many eggs?"),
            turn("human", &format!("{n} eggs.")), turn("gpt", &format!("#### {n}"))]})
        .to_string()
    };
    let lines: Vec<String> = (0..40).map(conversation).collect();
    std::fs::write(path("chats.jsonl"), lines.join("\n")).unwrap();
    let chats = path("chats.jsonl");
    let further = [
        "--data",
        &chats,
        "--eval",
        &chats,
        "--eval-samples",
        "2",
        "--steps",
        "2",
    ];
    let further = [&further[..], &["--max-new-tokens", "4"]].concat();
    let (said, is_done) = run(&case, &arguments(&case, &further));
    assert!(is_done && said.contains("40 records, 40 usable"), "{said}");
    assert!(said.contains("has no chat template"), "{said}");
    assert!(said.contains("exact match: "), "{said}");

    // A prompt template has no place for turns.
    let mut command = case.command(&["--data", &chats, "--overwrite"]);
    let output = command.output().unwrap();
    let said = case::text(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.contains("--prompt-template: the data has conversations"),
        "{said}"
    );

    // Problems by the same template.
    let (said, is_done) = run(
        &case,
        &arguments(&case, &["--chat", "--steps", "1", "--overwrite"]),
    );
    assert!(is_done && said.contains("has no chat template"), "{said}");
}

#[test]
fn packing_changes_nothing_but_the_rounding() {
    let losses = |further: &[&str]| {
        let case = Case::new();
        let steps = ["--steps", "3", "--batch-size", "2", "--shards", "4"];
        let output = case.run(&[&steps[..], further].concat());
        assert!(output.status.success());
        let run = case.result();
        let numbers = run.steps.into_iter().flat_map(|(_, numbers)| numbers);
        numbers.map(f64::from_bits).collect::<Vec<f64>>()
    };
    let plain = losses(&[]);
    for option in ["--packing", "--group-by-length"] {
        let other = losses(&[option]);
        let pairs = plain.iter().zip(&other).filter(|(x, _)| **x != 0.0);
        let error = pairs.map(|(x, y)| (x / y - 1.0).abs()).fold(0.0, f64::max);
        println!("{option}: largest difference {error:.1e}");
        assert_eq!(error < 1e-4, option == "--packing", "{option}: {error:e}");
    }
    // The published mean is another one.
    let published = losses(&["--loss-mean", "micro-batches", "--accumulation", "2"]);
    let tokens = losses(&["--accumulation", "2"]);
    assert!((published[0] / tokens[0] - 1.0).abs() > 1e-4);
}

#[test]
fn a_run_that_resumes_keeps_its_mean() {
    let case = Case::new();
    let mut child = case.start_until(2, &["--save-every", "1", "--steps", "4000"]);
    child.kill().unwrap();
    child.wait().unwrap();
    let mut command = case.command(&[
        "--resume",
        "--steps",
        "4000",
        "--loss-mean",
        "micro-batches",
    ]);
    let output = command.output().unwrap();
    let said = case::text(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("--loss-mean"), "{said}");
}
