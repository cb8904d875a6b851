//! Sweeps: their state after a kill, and the measurements of a trial.

mod common {
    pub mod case;
}

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use burn::tensor::Device;
use common::case::{prepare, this_binary};
use llama_math::evaluate::Solver;
use llama_math::evidence::children::Children;
use llama_math::evidence::results;
use llama_math::evidence::row::Row;
use llama_math::evidence::sweep::Sweep;
use llama_math::evidence::task::Task;
use llama_math::evidence::trial::{Outcome, Trial, TrialResult};
use llama_math::problems::problems;
use llama_math::tiny;
use llama_math::tokenize::Tokens;

/// Environment variable with the folder of [`the_sweep`].
const FOLDER: &str = "LLAMA_MATH_SWEEP";

#[test]
#[ignore = "the program that the other tests start"]
fn program() {
    common::case::program();
}

/// The program, as a child of a sweep.
fn child(arguments: &[OsString]) -> std::io::Result<Command> {
    let name = [OsString::from("llama_math")];
    let arguments = name.iter().chain(arguments);
    let arguments: Vec<String> = arguments
        .map(|argument| argument.to_str().unwrap().to_string())
        .collect();
    let mut command = this_binary();
    prepare(&mut command, &arguments);
    Ok(command)
}

fn sweep() -> Sweep {
    Sweep {
        tasks: vec![Task::Facts],
        rows: vec![Row::Lora, Row::Published],
        tuning_seeds: vec![1],
        seeds: vec![2, 3],
        rank: 2,
        shards: 4,
        quick: true,
    }
}

fn run(folder: &Path) {
    let children = Children {
        folder: folder.into(),
        processes: 2,
        device: Some("flex".into()),
        files: None,
        record: false,
        until: None,
        program: child,
    };
    let findings = sweep().run(&children).unwrap();
    let base = sweep().base(Task::Facts, &Device::flex()).unwrap();
    results::write(folder, &sweep(), &findings, &[(Task::Facts, base)]).unwrap();
}

#[test]
#[ignore = "the sweep that another test starts and kills"]
fn the_sweep() {
    if let Some(folder) = std::env::var_os(FOLDER) {
        run(Path::new(&folder));
    }
}

/// The results in a folder with the times at which they were written.
fn trials(folder: &Path) -> BTreeMap<String, (TrialResult, SystemTime)> {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return BTreeMap::new();
    };
    let mut found = BTreeMap::new();
    for entry in entries {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        if name.starts_with("facts-") && name.ends_with(".json") {
            let text = std::fs::read_to_string(entry.path()).unwrap();
            let time = entry.metadata().unwrap().modified().unwrap();
            found.insert(name, (serde_json::from_str(&text).unwrap(), time));
        }
    }
    found
}

/// The parts of a result that do not depend on time.
fn numbers(result: &TrialResult) -> (Vec<u64>, u64, usize) {
    match &result.outcome {
        Outcome::Trained(measured) => (
            measured.losses.iter().map(|loss| loss.to_bits()).collect(),
            measured.loss.to_bits(),
            measured.correct,
        ),
        Outcome::Diverged(reason) => panic!("{reason}"),
    }
}

#[test]
fn a_killed_sweep_goes_on_where_it_stopped() {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path().join("sweep");
    let mut killed = Command::new(std::env::current_exe().unwrap())
        .args(["the_sweep", "--exact", "--ignored"])
        .env(FOLDER, &folder)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let start = Instant::now();
    while trials(&folder).len() < 3 {
        assert_eq!(killed.try_wait().unwrap(), None, "ended early");
        assert!(start.elapsed() < Duration::from_secs(120));
        std::thread::sleep(Duration::from_millis(2));
    }
    killed.kill().unwrap();
    killed.wait().unwrap();
    let before = trials(&folder);
    assert!(!folder.join(results::TABLE).exists());

    run(&folder);
    let after = trials(&folder);
    // Four rates and two seeds of each row at least.
    assert!(after.len() >= 12, "{:?}", after.keys());
    for (name, (_, time)) in &before {
        assert_eq!(after[name].1, *time, "{name} was run twice");
    }
    let undisturbed = root.path().join("undisturbed");
    run(&undisturbed);
    let reference = trials(&undisturbed);
    assert!(after.keys().eq(reference.keys()));
    for (name, (result, _)) in &after {
        assert_eq!(numbers(result), numbers(&reference[name].0), "{name}");
    }
    for name in [results::TABLE, results::RATES, results::PICTURE] {
        let read = |folder: &Path| std::fs::read_to_string(folder.join(name)).unwrap();
        assert_eq!(read(&folder), read(&undisturbed), "{name}");
    }
    let table = std::fs::read_to_string(folder.join(results::TABLE)).unwrap();
    assert!(table.contains("| LoRA r 2 |") && table.contains("| HD-PiSSA, published |"));
}

#[test]
fn a_result_of_other_settings_is_refused() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("result.json");
    let trial = Trial {
        task: Task::Facts,
        row: Row::Full,
        lr: 1e-3,
        seed: 1,
        steps: 2,
        items: 32,
        rank: 4,
        shards: 8,
        loss_only: false,
    };
    assert!(TrialResult::read(&path, &trial).unwrap().is_none());
    trial
        .run(&Device::flex(), None)
        .unwrap()
        .write(&path)
        .unwrap();
    assert!(TrialResult::read(&path, &trial).unwrap().is_some());
    let longer = Trial { steps: 3, ..trial };
    let error = TrialResult::read(&path, &longer).unwrap_err().to_string();
    assert!(
        error.contains("result.json") && error.contains("other settings"),
        "{error}"
    );
    std::fs::write(&path, "{").unwrap();
    let error = TrialResult::read(&path, &trial).unwrap_err().to_string();
    assert!(error.contains("no result of a trial"), "{error}");
}

#[test]
fn a_child_that_fails_ends_the_sweep_with_what_it_said() {
    let root = tempfile::tempdir().unwrap();
    let children = Children {
        folder: root.path().into(),
        processes: 2,
        device: Some("no such device".into()),
        files: None,
        record: false,
        until: None,
        program: child,
    };
    let error = sweep().run(&children).unwrap_err().to_string();
    assert!(
        error.contains("facts-lora-lr") && error.contains("no such device"),
        "{error}"
    );
}

#[test]
fn facts_are_learned_and_recall_is_counted() {
    let trial = Trial {
        task: Task::Facts,
        row: Row::Full,
        lr: 5e-3,
        seed: 9,
        steps: 60,
        items: 32,
        rank: 4,
        shards: 8,
        loss_only: false,
    };
    let result = trial.run(&Device::flex(), None).unwrap();
    let Outcome::Trained(measured) = &result.outcome else {
        panic!("{:?}", result.outcome);
    };
    assert_eq!(measured.correct, 32, "loss {}", measured.loss);
    assert!(measured.loss < 0.1);
    assert_eq!(
        numbers(&trial.run(&Device::flex(), None).unwrap()),
        numbers(&result)
    );
    // What the model knew suffers, compared with the model before any step.
    let untrained = Trial { steps: 0, ..trial };
    let untrained = untrained.run(&Device::flex(), None).unwrap();
    let Outcome::Trained(untrained) = &untrained.outcome else {
        panic!("{:?}", untrained.outcome);
    };
    assert_eq!(untrained.correct, 0);
    let (before, after) = (untrained.text_loss.unwrap(), measured.text_loss.unwrap());
    assert!(before < 1.0 && after > 1.5 * before, "{before} {after}");
    let before = Sweep {
        seeds: vec![9],
        ..sweep()
    };
    assert_eq!(before.base(Task::Facts, &Device::flex()).unwrap(), 0.0);
}

#[test]
fn a_training_that_diverges_is_a_result() {
    let trial = Trial {
        task: Task::Facts,
        row: Row::Full,
        lr: 1e30,
        seed: 1,
        steps: 4,
        items: 32,
        rank: 4,
        shards: 8,
        loss_only: false,
    };
    let result = trial.run(&Device::flex(), None).unwrap();
    assert!(matches!(result.outcome, Outcome::Diverged(_)));
    assert_eq!((result.score(), result.loss()), (0.0, f64::INFINITY));
}

#[test]
fn answers_in_batches_are_those_of_one_by_one() {
    let pretrained = tiny::pretrained().unwrap();
    let model = pretrained.load(&Device::flex()).unwrap();
    let (tokens, template) = (Tokens::of(&pretrained).unwrap(), tiny::template());
    let solver = Solver {
        model: &model,
        tokens: &tokens,
        template: &template,
        max_new_tokens: 24,
    };
    // More than are decoded at once.
    let (_, records) = problems(5, 0, 200);
    let together = solver.answers(&records, || ()).unwrap();
    let mut lengths = BTreeSet::new();
    for (record, batched) in records.iter().zip(&together) {
        let alone = solver.answer(record).unwrap();
        assert_eq!(batched.text, alone.text);
        assert_eq!(batched.correct, alone.correct);
        lengths.insert(tokens.prompt(record, &template).unwrap().len());
    }
    // Prompts have different lengths, and their answers end at different places.
    assert!(lengths.len() > 2, "{lengths:?}");
    let ends: Vec<usize> = together.iter().map(|answer| answer.text.len()).collect();
    assert!(ends.iter().max() > ends.iter().min());
}
