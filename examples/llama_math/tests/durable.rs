//! A trained model is never thrown away: closed streams, kills and failing calls at the end of a run,
//! and outputs that must not be replaced.

#![cfg(target_os = "linux")]

mod common {
    pub mod case;
}

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use common::case::{self, ARGUMENTS, Case, PROGRAM, text, wait};

#[test]
#[ignore = "the program that the other tests start"]
fn program() {
    case::program();
}

/// A run of two steps that saves after the first.
const SHORT: [&str; 8] = [
    "--steps",
    "2",
    "--save-every",
    "1",
    "--shards",
    "2",
    "--rank",
    "2",
];

fn is_complete(output: &Path) -> bool {
    let files = [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "metrics.jsonl",
    ];
    let complete = files.iter().all(|name| output.join(name).is_file());
    complete && llama_math::Checkpoint::open(output).is_ok()
}

#[test]
fn a_closed_stream_loses_nothing() {
    let case = Case::new();
    let full = std::fs::File::options()
        .write(true)
        .open("/dev/full")
        .unwrap();
    let mut command = case.command(&SHORT);
    let mut child = command.stderr(full).spawn().unwrap();
    // As `| head -1` does, after the first line of the program.
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let first = lines.find(|line| line.as_ref().unwrap().contains("records"));
    first.unwrap().unwrap();
    drop(lines);
    let status = child.wait().unwrap();
    assert!(status.success(), "{status}");
    assert!(is_complete(&case.output()));
}

#[test]
fn a_trailing_separator_an_empty_folder_and_a_link_are_fine() {
    let case = Case::new();
    let path = |name: &str| case.root.path().join(name).to_str().unwrap().to_string();
    let run = |output: &str| {
        case.succeeds(&[&SHORT[..], &["--output", output]].concat());
    };
    run(&(path("slash") + "/"));
    assert!(is_complete(Path::new(&path("slash"))));
    assert!(!Path::new(&path("slash.checkpoints")).exists());

    std::fs::create_dir(path("empty")).unwrap();
    run(&path("empty"));
    assert!(is_complete(Path::new(&path("empty"))));

    std::fs::create_dir(path("place")).unwrap();
    std::os::unix::fs::symlink(path("place"), path("link")).unwrap();
    run(&path("link"));
    assert!(is_complete(Path::new(&path("place"))));
    assert!(Path::new(&path("link")).is_symlink());
    // Others may read the weights.
    use std::os::unix::fs::PermissionsExt;
    let weights = Path::new(&path("place")).join("model.safetensors");
    let probe = case.root.path().join("probe");
    std::fs::write(&probe, "").unwrap();
    let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&weights), mode(&probe));
}

#[test]
fn only_earlier_outputs_are_replaced() {
    let case = Case::new();
    let folder = |name: &str| {
        let folder = case.root.path().join(name);
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("precious"), "1").unwrap();
        folder
    };
    let refuse = |output: &Path, further: &[&str], part: &str| {
        let output = output.to_str().unwrap();
        let arguments = [&SHORT[..], &["--overwrite", "--output", output], further].concat();
        let mut command = case.command(&arguments);
        let result = command.current_dir(case.root.path()).output().unwrap();
        assert_eq!(result.status.code(), Some(1), "{}", text(&result));
        assert!(text(&result).contains(part), "{}", text(&result));
        assert!(
            !text(&result).contains("in the first step"),
            "refused before training"
        );
    };
    let other = folder("other");
    refuse(&other, &[], "no llama_math.json");
    assert!(other.join("precious").exists());
    // The working directory, which holds the data too, under several names.
    for name in [".", "", "other/../"] {
        let part = match name.contains("..") {
            true => "names no folder",
            false => "contains",
        };
        refuse(&case.root.path().join(name), &[], part);
    }
    let checkpoints = case.output().join("inside");
    refuse(
        &case.output(),
        &["--checkpoints", checkpoints.to_str().unwrap()],
        "contains",
    );
    // What this program has made is replaced.
    case.succeeds(&SHORT);
    case.succeeds(&[&SHORT[..], &["--overwrite"]].concat());
    assert!(is_complete(&case.output()));
}

#[test]
fn two_runs_in_one_folder() {
    let case = Case::new();
    let mut first = case.start_until(1, &["--save-every", "1", "--steps", "100000"]);
    let second = case.run(&["--save-every", "1", "--resume"]);
    let holder = format!("is in use by process {}", first.id());
    assert!(text(&second).contains(&holder), "{}", text(&second));
    assert_eq!(second.status.code(), Some(1));
    first.kill().unwrap();
    first.wait().unwrap();
    // The lock of a killed process is none.
    let third = case.run(&["--save-every", "1", "--steps", "2", "--resume"]);
    assert!(!text(&third).contains("in use"), "{}", text(&third));
}

#[test]
fn every_signal_that_ends_programs_saves_first() {
    for signal in ["HUP", "TERM", "INT"] {
        let case = Case::new();
        // Steps are being taken once there is a checkpoint.
        let child = case.start_until(1, &["--save-every", "1", "--steps", "100000"]);
        // Two at once, as `timeout` sends.
        let pid = child.id().to_string();
        let signals = [&format!("-{signal}"), &pid, &pid];
        Command::new("kill").args(signals).status().unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{signal}: {}", text(&output));
        assert!(
            text(&output).contains("stopping"),
            "{signal}: {}",
            text(&output)
        );
        let last = case.checkpoints().steps().unwrap().pop().unwrap();
        let said = format!("stopped after step {last} of 100000");
        assert!(text(&output).contains(&said), "{signal}: {}", text(&output));
    }
}

#[test]
fn a_finished_job_that_is_started_again_is_finished() {
    let case = Case::new();
    case.succeeds(&SHORT);
    let before = case.result().weights;
    let said = case.succeeds(&[&SHORT[..], &["--resume"]].concat());
    assert!(said.contains("finished already"), "{said}");
    assert!(case.result().weights == before);
    assert!(!case.checkpoints().folder().exists());
    // Another job's output is not this job's.
    let other = case.run(&[&SHORT[..], &["--resume", "--lr", "2e-3"]].concat());
    assert_eq!(other.status.code(), Some(1));
    assert!(
        text(&other).contains("made with --lr 0.001"),
        "{}",
        text(&other)
    );
}

/// Runs the short job under `strace` with one call tampered with.
fn tampered(case: &Case, calls: &str, how: &str) -> Output {
    let trace = case.root.path().join("trace");
    let arguments = serde_json::to_string(&case.arguments(&SHORT)).unwrap();
    Command::new("strace")
        .args(["-f", "-o"])
        .arg(trace)
        .args(["-e", &format!("trace={calls}")])
        .args(["-e", &format!("inject={calls}:{how}")])
        .arg(std::env::current_exe().unwrap())
        .args(PROGRAM)
        .env(ARGUMENTS, arguments)
        .current_dir(case.root.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .output()
        .unwrap()
}

fn has_strace() -> bool {
    let found = Command::new("strace")
        .arg("-V")
        .stdout(Stdio::null())
        .status();
    let required = std::env::var_os("HD_PISSA_REQUIRE_STRACE").is_some_and(|v| v == "1");
    assert!(
        found.is_ok() || !required,
        "HD_PISSA_REQUIRE_STRACE=1, but strace is missing"
    );
    if found.is_err() {
        eprintln!("skipped: strace does not start");
    }
    found.is_ok()
}

/// Calls that change what is on disk, but for writes. Each has a count of its own.
const CHANGES: [&str; 9] = [
    "rename",
    "renameat",
    "renameat2",
    "unlink",
    "unlinkat",
    "rmdir",
    "mkdir",
    "fsync",
    "ftruncate",
];

/// Runs the short job with each of its calls tampered with in turn, until none is left.
fn each_call(how: impl Fn(usize) -> String, check: impl Fn(&Case, &Output, &str)) -> usize {
    let mut runs = 0;
    for call in CHANGES {
        for number in 1.. {
            let case = Case::new();
            let output = tampered(&case, call, &format!("{}:when={number}", how(runs)));
            let trace = std::fs::read_to_string(case.root.path().join("trace")).unwrap();
            // A killed process is not written about.
            let happened = trace.contains("INJECTED") || trace.contains("killed by SIGKILL");
            if !happened {
                assert!(output.status.success() && is_complete(&case.output()));
                break;
            }
            runs += 1;
            check(&case, &output, &format!("{call} number {number}"));
        }
    }
    runs
}

/// What is left of a run: the output, or a checkpoint.
fn something_is_left(case: &Case) -> bool {
    let found = case.checkpoints().latest().unwrap();
    is_complete(&case.output()) || found.checkpoint.is_some()
}

#[test]
fn killed_before_any_call() {
    if !has_strace() {
        return;
    }
    let calls = std::cell::Cell::new(0);
    let runs = each_call(
        |_| "signal=SIGKILL".into(),
        |case, output, call| {
            // Nothing half-written under the name of the output.
            let is_there = case.output().exists();
            assert!(!is_there || is_complete(&case.output()), "{call}");
            // The first checkpoint is there once it has its name.
            let trace = std::fs::read_to_string(case.root.path().join("trace")).unwrap();
            let saved = trace.lines().any(|line| {
                let renamed = line.contains("rename(") && line.ends_with("= 0");
                renamed && line.contains("/step-000000001\"")
            });
            assert!(
                !saved || something_is_left(case),
                "{call}: {}",
                text(output)
            );
            if calls.replace(calls.get() + 1) % 5 != 0 {
                return;
            }
            // The job goes on from there, and leaves nothing else.
            case.succeeds(&[&SHORT[..], &["--resume"]].concat());
            assert!(is_complete(&case.output()), "{call}");
            let names = std::fs::read_dir(case.root.path()).unwrap();
            let names = names.map(|entry| entry.unwrap().file_name());
            let hidden = names.filter(|name| name.to_string_lossy().starts_with(".out"));
            assert_eq!(hidden.count(), 0, "{call}");
        },
    );
    println!("killed before each of {runs} calls");
    assert!(runs > 40, "{runs}");
}

#[test]
fn any_call_fails() {
    if !has_strace() {
        return;
    }
    let counts = std::cell::Cell::new((0, 0));
    let runs = each_call(
        |run| format!("error={}", ["ENOSPC", "EACCES", "EIO"][run % 3]),
        |case, output, call| {
            let said = text(output);
            println!(
                "{call}: {}",
                said.lines().rfind(|line| !line.is_empty()).unwrap_or("")
            );
            assert!(!said.contains("panicked"), "{call}: {said}");
            let (succeeded, kept) = counts.get();
            if output.status.success() {
                counts.set((succeeded + 1, kept));
                return assert!(is_complete(&case.output()), "{call}: {said}");
            }
            assert_eq!(output.status.code(), Some(1), "{call}: {said}");
            assert!(said.contains("error: "), "{call}: {said}");
            if said.contains("training loss") {
                // After the last step the model is there, and the message says where.
                let place = said.split("the complete output is in ").nth(1);
                let place = place.and_then(|rest| rest.split(", move it").next());
                let kept_in = place.is_some_and(|place| is_complete(Path::new(place)));
                counts.set((succeeded, kept + usize::from(kept_in)));
                assert!(kept_in || something_is_left(case), "{call}: {said}");
            }
        },
    );
    let (succeeded, kept) = counts.get();
    println!("{runs} failures: {succeeded} runs succeeded, {kept} kept the output elsewhere");
    assert!(
        runs > 40 && succeeded > 5 && kept > 5,
        "{runs} {succeeded} {kept}"
    );
}

#[test]
fn a_signal_before_the_first_step_ends_the_run_at_once() {
    let case = Case::new();
    let child = case.command(&["--steps", "100000"]).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(1));
    let pid = child.id().to_string();
    Command::new("kill").args(["-TERM", &pid]).status().unwrap();
    let status = wait(child, Duration::from_secs(20)).expect("it ends");
    assert!(!status.success());
    assert!(!case.output().exists());
}
