//! Conditions outside a run's control: environment variables, limits, ignored signals, ended
//! parents, and a training that diverges.

#![cfg(unix)]

mod common {
    pub mod case;
}

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::case::{ARGUMENTS, Case, PROGRAM, prepare, text, wait};
use serde_json::json;

#[test]
#[ignore = "the program that the other tests start"]
fn program() {
    common::case::program();
}

const SHORT: [&str; 6] = ["--steps", "2", "--shards", "2", "--rank", "2"];

#[test]
fn a_device_that_burn_does_not_know_is_an_error() {
    for (value, code) in [("nonsense", Some(1)), ("tch", Some(1)), ("flex", Some(0))] {
        let case = Case::new();
        let mut arguments = case.arguments(&SHORT);
        let device = arguments.iter().position(|argument| argument == "--device");
        arguments.drain(device.unwrap()..device.unwrap() + 2);
        let mut command = Command::new(std::env::current_exe().unwrap());
        prepare(&mut command, &arguments);
        let output = command.env("BURN_DEVICE", value).output().unwrap();
        assert_eq!(output.status.code(), code, "{}", text(&output));
        if code == Some(1) {
            let error = String::from_utf8(output.stderr).unwrap();
            assert_eq!(error.lines().count(), 1, "{error}");
            assert!(
                error.contains("BURN_DEVICE: ") && error.contains(value),
                "{error}"
            );
            assert!(error.contains("flex"), "{error}");
            assert!(!case.output().exists());
        }
        // Burn reads its default for any value of the option.
        let case = Case::new();
        let output = case
            .command(&SHORT)
            .env("BURN_DEVICE", value)
            .output()
            .unwrap();
        assert_eq!(output.status.code(), code, "{}", text(&output));
    }
}

#[test]
fn a_limit_on_the_address_space_is_an_error_or_enough() {
    let mut refused = 0;
    // In MiB.
    for limit in [250, 400, 600, 800, 1000, 2000, 4000] {
        let case = Case::new();
        let mut command = Command::new("sh");
        let script = format!("ulimit -v {}; exec \"$0\" \"$@\"", limit * 1024);
        command
            .arg("-c")
            .arg(script)
            .arg(std::env::current_exe().unwrap());
        prepare(&mut command, &case.arguments(&SHORT));
        let output = command.env("RUST_TEST_THREADS", "1").output().unwrap();
        let said = text(&output);
        match output.status.code() {
            Some(0) => assert!(case.output().join("model.safetensors").is_file()),
            Some(1) => {
                refused += 1;
                assert!(
                    said.contains("error: memory: the limit of `ulimit -v`"),
                    "{limit}: {said}"
                );
            }
            other => panic!("{limit} MiB: {other:?}: {said}"),
        }
    }
    assert!((1..6).contains(&refused), "{refused}");
}

#[test]
fn an_ignored_signal_stays_ignored() {
    // As `nohup` starts it.
    let case = Case::new();
    let mut command = Command::new("sh");
    command.args(["-c", "trap '' HUP; exec \"$0\" \"$@\""]);
    command.arg(std::env::current_exe().unwrap());
    let save = ["--save-every", "1", "--steps", "12"];
    prepare(&mut command, &case.arguments(&save));
    let child = command.spawn().unwrap();
    let start = Instant::now();
    while case.checkpoints().steps().unwrap().is_empty() {
        assert!(start.elapsed() < Duration::from_secs(60));
        std::thread::sleep(Duration::from_millis(2));
    }
    let sent = Command::new("kill")
        .args(["-HUP", &child.id().to_string()])
        .status();
    assert!(sent.unwrap().success());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    assert!(case.output().join("model.safetensors").is_file());
    assert!(!text(&output).contains("stopping"), "{}", text(&output));
}

#[test]
fn a_child_of_the_comparison_ends_with_its_parent() {
    let root = tempfile::tempdir().unwrap();
    let result = root.path().join("result.json");
    let settings = json!({
        "task": "problems", "row": "full", "lr": 1e-3, "seed": 1, "steps": 100_000, "items": 2,
        "rank": 2, "shards": 2,
    });
    let arguments = [
        "llama_math",
        "trial",
        "--settings",
        &settings.to_string(),
        "--result",
        result.to_str().unwrap(),
        "--device",
        "flex",
    ];
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(PROGRAM)
        .env(ARGUMENTS, serde_json::to_string(&arguments).unwrap())
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    // The parent holds this end and writes nothing. The system closes it when the parent ends in
    // any way.
    let alive = child.stdin.take();
    std::thread::sleep(Duration::from_millis(700));
    assert_eq!(child.try_wait().unwrap(), None, "it is at work");
    drop(alive);
    let status = wait(child, Duration::from_secs(10)).expect("it ends");
    assert!(!status.success() && !result.exists());
}

#[test]
fn a_run_that_diverges_saves_nothing_of_it_and_goes_on_at_another_rate() {
    for method in ["full", "lora", "pissa", "hd-pissa"] {
        let case = Case::new();
        let run = [
            "--method",
            method,
            "--save-every",
            "1",
            "--steps",
            "6",
            "--keep-last",
            "9",
        ];
        let wild = [&run[..], &["--lr", "1e30", "--warmup-ratio", "0.4"]].concat();
        let output = case.command(&wild).output().unwrap();
        let said = text(&output);
        assert_eq!(output.status.code(), Some(1), "{method}: {said}");
        assert!(!said.contains("nothing was written"), "{said}");
        // The first steps of a warm-up have small rates; the very first has the rate 0.
        let steps = case.checkpoints().steps().unwrap();
        let newest = *steps.last().unwrap();
        let left = format!("the checkpoint of step {newest} is in");
        assert!(
            said.contains(&left) && said.contains("--change lr"),
            "{method}: {said}"
        );
        assert_eq!(case.checkpoints().latest().unwrap().damaged, []);

        // Refused unless allowed, with the option that allows it.
        let tame = [
            &run[..],
            &["--lr", "1e-4", "--warmup-ratio", "0.4", "--resume"],
        ]
        .concat();
        let refused = case.run(&tame);
        assert_eq!(refused.status.code(), Some(1));
        let hint = "allow the change with --change lr";
        assert!(text(&refused).contains(hint), "{}", text(&refused));
        let said = case.succeeds(&[&tame[..], &["--change", "lr,steps"]].concat());
        assert!(said.contains("changed: --lr from"), "{said}");
        assert!(case.output().join("model.safetensors").is_file());
    }
}

#[test]
fn steps_may_be_changed_but_not_taken_back() {
    let case = Case::new();
    let mut child = case.start_until(4, &["--save-every", "1", "--steps", "1000"]);
    child.kill().unwrap();
    child.wait().unwrap();
    let resume = [
        "--save-every",
        "1",
        "--resume",
        "--change",
        "steps",
        "--steps",
    ];
    let few = case.run(&[&resume[..], &["2"]].concat());
    assert_eq!(few.status.code(), Some(1));
    assert!(text(&few).contains("steps already"), "{}", text(&few));
    let newest = case.checkpoints().steps().unwrap().pop().unwrap();
    let total = (newest + 2).to_string();
    let said = case.succeeds(&[&resume[..], &[&total]].concat());
    assert!(
        said.contains(&format!("changed: --steps from 1000 to {total}")),
        "{said}"
    );
    assert_eq!(case.result().steps.len() as u64, newest + 2);
    // The same line again: nothing is left to do.
    let said = case.succeeds(&[&resume[..], &[&total]].concat());
    assert!(said.contains("finished already"), "{said}");
}

#[test]
fn others_may_read_what_is_written_as_the_mask_allows() {
    use std::os::unix::fs::PermissionsExt;

    for mask in ["022", "077", "002"] {
        let case = Case::new();
        let mut command = Command::new("sh");
        let script = format!("umask {mask}; exec \"$0\" \"$@\"");
        command
            .arg("-c")
            .arg(script)
            .arg(std::env::current_exe().unwrap());
        let kept = case.root.path().join("kept").to_str().unwrap().to_string();
        let arguments = [&SHORT[..], &["--save-every", "1", "--checkpoints", &kept]].concat();
        prepare(&mut command, &case.arguments(&arguments));
        assert!(command.output().unwrap().status.success());
        let expected = 0o777 & !u32::from_str_radix(mask, 8).unwrap();
        let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&case.output()), expected, "{mask}");
        for entry in std::fs::read_dir(case.output()).unwrap() {
            let path = entry.unwrap().path();
            assert_eq!(mode(&path), expected & 0o666, "{mask}: {}", path.display());
        }
    }
}
