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

use common::case::{self, ARGUMENTS, Case, Mount, PROGRAM, prepare, text, wait};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

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
    complete && llama_math::Pretrained::open(output).is_ok()
}

/// Somebody deletes or moves the pretrained model while a run trains.
#[test]
fn a_pretrained_model_that_is_gone_loses_nothing() {
    let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/tiny");
    for dtype in ["f32", "bf16"] {
        let case = Case::new();
        let base = case.root.path().join("base");
        std::fs::create_dir(&base).unwrap();
        for entry in std::fs::read_dir(&tiny).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), base.join(entry.file_name())).unwrap();
        }
        let own = ["--model", base.to_str().unwrap(), "--dtype", dtype];
        let child = case.start_until(2, &[&own[..], &["--save-every", "2"]].concat());
        std::fs::remove_dir_all(&base).unwrap();
        let output = child.wait_with_output().unwrap();
        let said = text(&output);
        assert!(output.status.success(), "{said}");
        assert!(
            said.contains("cannot be read again") == (dtype == "bf16"),
            "{said}"
        );
        assert!(
            said.contains("the share of the update that survives ("),
            "{said}"
        );
        assert!(is_complete(&case.output()), "{said}");
    }
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
    // Like `| head -1`, after the first line of the program.
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
    // The lock of a killed process does not count.
    let third = case.run(&["--save-every", "1", "--steps", "2", "--resume"]);
    assert!(!text(&third).contains("in use"), "{}", text(&third));
}

#[test]
fn every_signal_that_ends_programs_saves_first() {
    for signal in ["HUP", "TERM", "INT"] {
        let case = Case::new();
        // Steps are running once there is a checkpoint.
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
    // A job with another dtype is another job.
    let other = case.run(&[&SHORT[..], &["--resume", "--output-dtype", "bf16"]].concat());
    assert_eq!(other.status.code(), Some(1));
    let differs = "made with --output-dtype same where this run has bf16";
    assert!(text(&other).contains(differs), "{}", text(&other));
    // With --overwrite a finished job is finished too, and another one replaces it.
    let again = ["--resume", "--overwrite"];
    let said = case.succeeds(&[&SHORT[..], &again].concat());
    assert!(said.contains("finished already"), "{said}");
    let said = case.succeeds(&[&SHORT[..], &again, &["--output-dtype", "bf16"]].concat());
    assert!(said.contains("written: "), "{said}");
    case.succeeds(&[&SHORT[..], &["--overwrite"]].concat());
    // Another job's output is not this job's.
    let other = case.run(&[&SHORT[..], &["--resume", "--lr", "2e-3"]].concat());
    assert_eq!(other.status.code(), Some(1));
    assert!(
        text(&other).contains("made with --lr 0.001"),
        "{}",
        text(&other)
    );
}

/// Runs the short job under `strace`, which tampers with one call.
fn tampered(case: &Case, calls: &str, how: &str) -> Output {
    let trace = case.root.path().join("trace");
    let arguments = serde_json::to_string(&case.arguments(&SHORT)).unwrap();
    // Faster, but it hides what is done to a killed process.
    let fast = (!how.contains("SIGKILL")).then_some("--seccomp-bpf");
    Command::new("strace")
        .args(fast)
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

/// Calls that change the disk, except writes. Each has its own count.
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

/// Runs the short job once for each of its calls, and tampers with that call.
fn each_call(how: impl Fn(usize) -> String, check: impl Fn(&Case, &Output, &str)) -> usize {
    let mut runs = 0;
    for call in CHANGES {
        for number in 1.. {
            let case = Case::new();
            let output = tampered(&case, call, &format!("{}:when={number}", how(runs)));
            let trace = std::fs::read_to_string(case.root.path().join("trace")).unwrap();
            // strace writes nothing about a killed process.
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

/// The left-overs of a run: the output, or a checkpoint.
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
            // The first checkpoint exists once it has its name.
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
            // The job continues from there, and leaves nothing else.
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

/// Calls of the thread that works, up to the end of the last step and in all.
fn calls_of_last_phase(call: &str) -> (usize, usize) {
    let case = Case::new();
    let trace = case.root.path().join("trace");
    let arguments = serde_json::to_string(&case.arguments(&SHORT)).unwrap();
    let output = Command::new("strace")
        .args(["-f", "--seccomp-bpf", "-o"])
        .arg(&trace)
        .args(["-e", &format!("trace={call},write")])
        .arg(std::env::current_exe().unwrap())
        .args(PROGRAM)
        .env(ARGUMENTS, arguments)
        .current_dir(case.root.path())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", text(&output));
    let trace = std::fs::read_to_string(trace).unwrap();
    let marker = |line: &&str| line.contains("write(1, \"hd-pissa: 2 steps");
    let worker = trace.lines().find(marker).expect("the summary is printed");
    let worker = worker.split_whitespace().next().unwrap();
    let (mut before, mut all) = (0, 0);
    for line in trace.lines().filter(|line| line.starts_with(worker)) {
        if marker(&line) {
            before = all;
        }
        all += usize::from(line.contains(&format!(" {call}(")));
    }
    (before, all)
}

/// After the last step, at a randomly drawn call, the disk is full, a folder is closed, a stream is
/// closed or the process is killed. The model or the newest checkpoint is there, and the message
/// says where. `HD_PISSA_FAULTS` sets how many of each call are drawn, `HD_PISSA_KILL_SEED` which.
#[test]
fn faults_in_the_last_phase() {
    if !has_strace() {
        return;
    }
    let number = |name: &str, default: u64| {
        std::env::var(name).map_or(default, |value| value.parse().unwrap())
    };
    let faults = number("HD_PISSA_FAULTS", 5) as usize;
    let mut rng = StdRng::seed_from_u64(number("HD_PISSA_KILL_SEED", 1));
    let (mut runs, mut written, mut elsewhere, mut resumable) = (0, 0, 0, 0);
    for call in [
        "write",
        "openat",
        "read",
        "statx",
        "getdents64",
        "mkdir",
        "fsync",
        "rename",
    ] {
        let (before, all) = calls_of_last_phase(call);
        assert!(all > before, "{call}: {before} {all}");
        for _ in 0..faults.min(all - before) {
            let when = rng.random_range(before + 1..=all);
            let how = [
                "error=ENOSPC",
                "error=EACCES",
                "error=EIO",
                "error=EPIPE",
                "signal=SIGKILL",
            ];
            let how = how[rng.random_range(0..how.len())];
            let case = Case::new();
            let output = tampered(&case, call, &format!("{how}:when={when}"));
            let said = text(&output);
            let place = format!("{call} number {when}, {how}: {said}");
            assert!(!said.contains("panicked"), "{place}");
            runs += 1;
            let is_written = is_complete(&case.output());
            let kept = said.split("the complete output is in ").nth(1);
            let kept = kept.and_then(|rest| rest.split(", move it").next());
            let is_kept = kept.is_some_and(|kept| is_complete(Path::new(kept)));
            let is_resumable = case.checkpoints().latest().unwrap().checkpoint.is_some();
            assert!(is_written || is_kept || is_resumable, "{place}");
            written += usize::from(is_written);
            elsewhere += usize::from(!is_written && is_kept);
            resumable += usize::from(!is_written && !is_kept);
            match output.status.code() {
                Some(0) => assert!(is_written, "{place}"),
                Some(1) => {
                    let says = ["complete output is", "the checkpoint of step", "written: "];
                    assert!(says.iter().any(|says| said.contains(says)), "{place}");
                }
                _ => assert!(how.contains("KILL"), "{place}"),
            }
        }
    }
    println!(
        "{runs} faults: {written} outputs in place, {elsewhere} elsewhere, {resumable} resumable"
    );
    assert!(runs > 5 * faults);
}

#[test]
fn a_mount_point_is_filled_and_replaced_inside() {
    let case = Case::new();
    std::fs::create_dir(case.output()).unwrap();
    let Some(_mount) = Mount::new(&case.output(), "tmpfs", "size=16m") else {
        println!("skipped: this process may not mount a tmpfs");
        return;
    };
    case.succeeds(&SHORT);
    assert!(is_complete(&case.output()));
    std::fs::write(case.output().join("old"), "of the first run").unwrap();
    case.succeeds(&[&SHORT[..], &["--overwrite", "--lr", "2e-3"]].concat());
    assert!(is_complete(&case.output()));
    let record = std::fs::read_to_string(case.output().join("llama_math.json")).unwrap();
    assert!(record.contains("\"--lr\": \"0.002\""), "{record}");
    let mut names: Vec<String> = std::fs::read_dir(case.output())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert!(
        names
            .iter()
            .all(|name| !name.starts_with('.') && name != "old"),
        "{names:?}"
    );
}

/// An entry in a lower layer cannot be renamed, as in a container whose image has an earlier
/// output.
#[test]
fn an_output_in_the_lower_layer_of_an_overlay_is_replaced() {
    let mut case = Case::new();
    let layers = ["lower", "upper", "merged"].map(|name| case.root.path().join(name));
    for layer in &layers {
        std::fs::create_dir(layer).unwrap();
    }
    let [lower, upper, merged] = layers;
    case.place = lower.clone();
    case.succeeds(&SHORT);
    std::fs::write(case.output().join("old"), "of the first run").unwrap();
    // The upper layer of an overlay must not be an overlay itself, as in a container.
    let Some(_upper) = Mount::new(&upper, "tmpfs", "size=32m") else {
        println!("skipped: this process may not mount a tmpfs");
        return;
    };
    let [top, work] = ["top", "work"].map(|name| upper.join(name));
    std::fs::create_dir(&top).unwrap();
    std::fs::create_dir(&work).unwrap();
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        lower.display(),
        top.display(),
        work.display()
    );
    let Some(_merged) = Mount::new(&merged, "overlay", &options) else {
        println!("skipped: this process may not mount an overlay");
        return;
    };
    case.place = merged;
    case.succeeds(&[&SHORT[..], &["--overwrite", "--lr", "2e-3"]].concat());
    assert!(is_complete(&case.output()));
    let record = std::fs::read_to_string(case.output().join("llama_math.json")).unwrap();
    assert!(record.contains("\"--lr\": \"0.002\""), "{record}");
    assert!(!case.output().join("old").exists());
}

#[test]
fn a_file_system_without_room_is_refused_before_the_training() {
    let mut case = Case::new();
    let place = case.root.path().join("small");
    std::fs::create_dir(&place).unwrap();
    let Some(_mount) = Mount::new(&place, "tmpfs", "size=1m") else {
        println!("skipped: this process may not mount a tmpfs");
        return;
    };
    let checkpoints = case.root.path().join("kept").to_str().unwrap().to_string();
    case.place = place;
    let arguments = [&SHORT[..], &["--checkpoints", &checkpoints]].concat();
    case.fails(
        case.command(&arguments),
        &["--output: takes 2 MiB", "MiB left"],
    );
}

/// Somebody else's folder, which already holds this user's output.
#[test]
fn a_parent_that_cannot_be_written_to_is_no_hindrance() {
    use std::os::unix::fs::{PermissionsExt, chown};
    use std::os::unix::process::CommandExt;

    const NOBODY: u32 = 65534;
    let case = Case::new();
    let root = case.root.path();
    let kept = root.join("kept");
    for folder in [&case.output(), &kept] {
        std::fs::create_dir(folder).unwrap();
        if chown(folder, Some(NOBODY), Some(NOBODY)).is_err() {
            println!("skipped: this process may not give folders away");
            return;
        }
    }
    std::fs::set_permissions(root, std::fs::Permissions::from_mode(0o755)).unwrap();
    // The program itself lies where others may not look.
    let program = root.join("program");
    std::fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/tiny");
    let model = root.join("model");
    std::fs::create_dir(&model).unwrap();
    for entry in std::fs::read_dir(tiny).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), model.join(entry.file_name())).unwrap();
    }
    let paths = [&model, &kept].map(|path| path.to_str().unwrap());
    let own = ["--model", paths[0], "--checkpoints", paths[1]];
    for further in [&[][..], &["--overwrite"]] {
        let mut command = Command::new(&program);
        prepare(
            &mut command,
            &case.arguments(&[&SHORT[..], &own, further].concat()),
        );
        command.current_dir(root).uid(NOBODY).gid(NOBODY);
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", text(&output));
        assert!(is_complete(&case.output()));
    }
}

#[test]
fn a_signal_while_the_model_is_written_waits_for_it() {
    if !has_strace() {
        return;
    }
    let case = Case::new();
    let eval = case
        .root
        .path()
        .join("data.jsonl")
        .to_str()
        .unwrap()
        .to_string();
    let long = [
        "--steps", "2", "--shards", "2", "--rank", "2", "--eval", &eval,
    ];
    let arguments = serde_json::to_string(&case.arguments(&long)).unwrap();
    // Each file takes half a second to reach the disk.
    let child = Command::new("strace")
        .args([
            "-f",
            "--seccomp-bpf",
            "-o",
            "/dev/null",
            "-e",
            "trace=fsync",
        ])
        .args(["-e", "inject=fsync:delay_enter=500000"])
        .arg(std::env::current_exe().unwrap())
        .args(PROGRAM)
        .env(ARGUMENTS, arguments)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let process = loop {
        let hidden = std::fs::read_dir(case.root.path())
            .unwrap()
            .find_map(|entry| {
                let name = entry.unwrap().file_name().into_string().unwrap();
                name.strip_prefix(".out.partial-").map(String::from)
            });
        // The first check of the place makes such a folder too, and removes it.
        match hidden {
            Some(process) => {
                let folder = case.root.path().join(format!(".out.partial-{process}"));
                if folder.join("metrics.jsonl").exists() {
                    break process;
                }
            }
            None => std::thread::sleep(Duration::from_millis(2)),
        }
    };
    let sent = Command::new("kill").args(["-TERM", &process]).status();
    assert!(sent.unwrap().success());
    let output = child.wait_with_output().unwrap();
    let said = text(&output);
    assert!(output.status.success(), "{said}");
    assert!(
        said.contains("stopping: the model is written first"),
        "{said}"
    );
    assert!(said.contains("stopped before the evaluation"), "{said}");
    assert!(is_complete(&case.output()));
}

#[test]
fn a_signal_in_the_evaluation_ends_it_and_leaves_the_model() {
    let case = Case::new();
    let eval = case
        .root
        .path()
        .join("data.jsonl")
        .to_str()
        .unwrap()
        .to_string();
    let long = [
        "--eval",
        &eval,
        "--eval-samples",
        "40",
        "--max-new-tokens",
        "100000",
    ];
    let mut child = case.command(&[&SHORT[..], &long].concat()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let written = lines.find(|line| line.as_ref().unwrap().starts_with("written: "));
    written
        .expect("it is written before it is evaluated")
        .unwrap();
    let pid = child.id().to_string();
    Command::new("kill").args(["-INT", &pid]).status().unwrap();
    let status = wait(child, Duration::from_secs(20)).expect("it ends");
    assert!(!status.success());
    assert!(is_complete(&case.output()));
}
