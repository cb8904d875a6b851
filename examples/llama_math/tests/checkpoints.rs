//! Runs that are killed, stopped, refused or spread over workers end with the weights of an
//! uninterrupted run.

mod common {
    pub mod case;
}

use std::collections::BTreeSet;

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::case::{Case, Mount, SHARED, STEPS, assert_same, prepare, reference, text, wait};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::Value;
use sha2::{Digest, Sha256};

#[test]
#[ignore = "the program that the other tests start"]
fn program() {
    common::case::program();
}

/// `HD_PISSA_KILLS` sets the number of kills, `HD_PISSA_KILL_SEED` their moments.
#[test]
fn killed_runs_end_with_the_same_weights() {
    let number = |name: &str, default: u64| {
        std::env::var(name).map_or(default, |value| value.parse().unwrap())
    };
    let kills = number("HD_PISSA_KILLS", 8);
    let mut rng = StdRng::seed_from_u64(number("HD_PISSA_KILL_SEED", 1));
    let start = Instant::now();
    let reference = reference();
    let undisturbed = start.elapsed();

    let (mut killed, mut while_writing, mut finished) = (0, 0, 0);
    let mut resumed_at = BTreeSet::new();
    let mut case = Case::new();
    loop {
        let workers = ["1", "2", "4", "8"][rng.random_range(0..4)];
        let arguments = ["--save-every", "1", "--keep-last", "2", "--resume"];
        let arguments = [&arguments[..], &["--workers", workers]].concat();
        let mut command = case.command(&arguments);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn().unwrap();
        let limit = match killed < kills {
            true => undisturbed.mul_f64(rng.random_range(0.0..1.5)),
            false => Duration::from_secs(300),
        };
        match wait(child, limit) {
            None => {
                killed += 1;
                let entries = std::fs::read_dir(case.checkpoints().folder());
                let partial = entries.into_iter().flatten().any(|entry| {
                    let name = entry.unwrap().file_name();
                    name.to_string_lossy().contains(".partial-")
                });
                while_writing += u64::from(partial);
                let steps = case.checkpoints().steps().unwrap();
                resumed_at.extend(steps.last().copied());
                let found = case.checkpoints().latest().unwrap();
                assert_eq!(found.damaged, [], "a kill damages nothing");
            }
            Some(status) => assert!(status.success(), "{status}"),
        }
        // The output is complete or absent, for every moment of the kill.
        if case.output().exists() {
            assert_same(&case.result(), &reference);
            finished += 1;
            if killed >= kills {
                break;
            }
            case = Case::new();
        }
    }
    println!(
        "{killed} kills, {while_writing} of them while a checkpoint was written; {} different \
         steps to go on from; {finished} runs finished, each with the weights and losses of the \
         run without kills; {:.0} s",
        resumed_at.len(),
        start.elapsed().as_secs_f64()
    );
    assert!(killed == kills);
    assert!(while_writing > 0 || kills < 50);
}

#[test]
fn a_signal_saves_and_ends_the_run() {
    let reference = reference();
    for (signal, save) in [
        ("-TERM", &["--save-every", "2"][..]),
        ("-INT", &["--save-every", "3"]),
    ] {
        let case = Case::new();
        let child = case.start_until(2, save);
        let sent = Command::new("kill")
            .arg(signal)
            .arg(child.id().to_string())
            .status();
        assert!(sent.unwrap().success());
        let output = child.wait_with_output().unwrap();
        let message = text(&output);
        assert!(output.status.success(), "{message}");
        let step = case.checkpoints().steps().unwrap().pop().unwrap();
        let stopped = format!("stopped after step {step} of {STEPS}; saved: ");
        assert!(message.contains(&stopped), "{message}");
        assert!(message.contains("--resume"), "{message}");
        assert!(!case.output().exists());

        let message = case.succeeds(&["--resume"]);
        let resumed = format!("resumed: {step} of {STEPS} steps are taken");
        assert!(message.contains(&resumed), "{message}");
        assert!(message.contains("removed: the checkpoints"), "{message}");
        assert!(!case.checkpoints().folder().exists());
        assert_same(&case.result(), &reference);
    }
}

#[test]
fn every_method_resumes() {
    for method in ["lora", "pissa", "full"] {
        let method = ["--method", method, "--steps", "6"];
        let whole = Case::new();
        whole.succeeds(&method);
        let case = Case::new();
        let save = [&method[..], &["--save-every", "2"]].concat();
        let mut child = case.start_until(2, &save);
        child.kill().unwrap();
        child.wait().unwrap();
        let resume = [&method[..], &["--resume"]].concat();
        case.succeeds(&resume);
        assert_same(&case.result(), &whole.result());
    }
}

#[test]
fn any_number_of_workers_gives_the_same_weights() {
    let shared = Case::new();
    shared.succeeds(&SHARED);
    let shared = shared.result();
    let per_shard = reference();
    assert!(shared.weights != per_shard.weights);
    for (options, reference) in [(&[][..], &per_shard), (&SHARED[..], &shared)] {
        for workers in ["2", "4", "8"] {
            let case = Case::new();
            case.succeeds(&[options, &["--workers", workers]].concat());
            assert_same(&case.result(), reference);
        }
    }
    let case = Case::new();
    let uneven = [
        "--gradients",
        "shared",
        "--accumulation",
        "6",
        "--workers",
        "4",
    ];
    let output = case.command(&uneven).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    for part in [
        "--workers",
        "4 workers",
        "micro-batches",
        "6 micro-batches of a step",
    ] {
        assert!(text(&output).contains(part), "{}", text(&output));
    }
}

#[test]
fn shared_gradients_resume_on_other_workers() {
    const OPTIONS: [&str; 4] = ["--gradients", "shared", "--accumulation", "4"];
    let whole = Case::new();
    whole.succeeds(&OPTIONS);
    let case = Case::new();
    let save = [&OPTIONS[..], &["--save-every", "2", "--workers", "4"]].concat();
    let mut child = case.start_until(2, &save);
    child.kill().unwrap();
    child.wait().unwrap();
    let other = case.command(&["--accumulation", "4", "--resume"]);
    case.fails(other, &["--gradients", "shared", "per-shard"]);
    case.succeeds(&[&OPTIONS[..], &["--resume", "--workers", "2"]].concat());
    assert_same(&case.result(), &whole.result());
}

/// A checkpoint of `step`, left by a run that was killed.
fn killed_at(step: u64) -> Case {
    let case = Case::new();
    let mut child = case.start_until(step, &["--save-every", "1", "--keep-last", "3"]);
    child.kill().unwrap();
    child.wait().unwrap();
    case
}

#[test]
fn a_damaged_checkpoint_gives_way_to_the_one_before() {
    let reference = reference();
    let case = killed_at(4);
    let steps = case.checkpoints().steps().unwrap();
    let [.., before, newest] = steps[..] else {
        panic!("{steps:?}");
    };
    let folder = case.checkpoints().folder().to_path_buf();
    let file = folder
        .join(format!("step-{newest:09}"))
        .join("moments-5-of-8.bpk");
    let mut bytes = std::fs::read(&file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&file, bytes).unwrap();

    let message = case.succeeds(&["--resume", "latest"]);
    assert!(
        message.contains("skipped a damaged checkpoint"),
        "{message}"
    );
    assert!(message.contains(file.to_str().unwrap()), "{message}");
    assert!(
        message.contains(&format!("resumed: {before} of")),
        "{message}"
    );
    assert_same(&case.result(), &reference);
    // Kept, so a user can find out what happened to it.
    assert!(folder.join(format!("damaged-step-{newest:09}")).is_dir());
}

#[test]
fn what_cannot_be_resumed_is_refused() {
    let case = killed_at(2);
    let folder = case.checkpoints().folder().to_path_buf();
    let before = case.checkpoints().steps().unwrap();
    let newest = before.last().unwrap();

    case.fails(
        case.command(&[]),
        &["--checkpoints", &format!("up to step {newest}"), "--resume"],
    );
    for (option, value, name, saved) in [
        ("--rank", "3", "--rank", "2"),
        ("--shards", "4", "--shards", "8"),
        ("--windows", "trailing", "--windows", "leading"),
        ("--frame-scale", "unit", "--frame-scale", "balanced"),
        ("--lr", "2e-3", "--lr", "0.001"),
        ("--steps", "30", "--steps", "24"),
        ("--seed", "5", "--seed", "1"),
        ("--batch-size", "2", "--batch-size", "1"),
        (
            "--schedule",
            "linear",
            "--schedule",
            "cosine after 0.2 of the steps",
        ),
        ("--max-length", "100", "--max-length", "256"),
        ("--method", "lora", "--method", "hd-pissa"),
    ] {
        let command = case.command(&["--resume", option, value]);
        case.fails(
            command,
            &["step-0", name, &format!("made with {name}"), saved],
        );
    }
    let data = case.root.path().join("data.jsonl");
    let lines = std::fs::read_to_string(&data).unwrap();
    std::fs::write(&data, lines.replace("Ada", "Eva")).unwrap();
    case.fails(
        case.command(&["--resume"]),
        &["--data, as tokens (SHA-256)"],
    );
    std::fs::write(&data, lines).unwrap();

    let empty = case.root.path().join("empty");
    std::fs::create_dir(&empty).unwrap();
    case.fails(
        case.command(&["--resume", empty.to_str().unwrap()]),
        &["--resume", "holds no checkpoint"],
    );
    assert_eq!(case.checkpoints().steps().unwrap(), before);

    for step in &before {
        let manifest = folder.join(format!("step-{step:09}/manifest.json"));
        std::fs::write(manifest, "{}").unwrap();
    }
    let output = case.run(&["--resume"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        text(&output).contains("every checkpoint in"),
        "{}",
        text(&output)
    );
    let exact = folder.join(format!("step-{newest:09}"));
    case.fails(
        case.command(&["--resume", exact.to_str().unwrap()]),
        &["manifest.json", "SHA-256"],
    );
}

#[test]
fn a_choice_of_frames_is_resumed_on_any_number_of_workers() {
    let choice = ["--windows", "random", "--frame-scale", "unit"];
    let whole = Case::new();
    whole.succeeds(&choice);
    let case = Case::new();
    let stopped = [&choice[..], &["--workers", "2", "--save-every", "1"]].concat();
    let mut child = case.start_until(2, &stopped);
    child.kill().unwrap();
    child.wait().unwrap();
    let published = case.command(&["--resume"]);
    case.fails(
        published,
        &["made with --frame-scale unit, this run has balanced"],
    );
    let resumed = [&choice[..], &["--workers", "4", "--resume"]].concat();
    case.succeeds(&resumed);
    assert_same(&case.result(), &whole.result());
    assert!(whole.result().weights != reference().weights);
}

/// On trained weights, whose trailing singular values are small.
#[test]
fn every_choice_of_frames_trains() {
    for windows in ["leading", "spread", "trailing", "random"] {
        for scale in ["balanced", "unit"] {
            if (windows, scale) == ("random", "balanced") {
                continue;
            }
            let case = Case::new();
            case.succeeds(&["--windows", windows, "--frame-scale", scale]);
            let steps = case.result().steps;
            let loss = |step: usize| f64::from_bits(steps[step].1[0]);
            let (first, last) = (loss(0), loss(steps.len() - 1));
            println!("{windows}, {scale}: {first} to {last}");
            assert!(last < first, "{windows}, {scale}: {first} to {last}");
        }
    }
}

#[test]
fn a_checkpoint_from_before_there_was_a_choice_of_frames() {
    let case = killed_at(2);
    let newest = case.checkpoints().latest().unwrap().checkpoint.unwrap();
    let [manifest, sums] = ["manifest.json", "SHA256SUMS"].map(|name| newest.path().join(name));
    let digest = |bytes: &[u8]| -> String {
        let digest = Sha256::digest(bytes);
        digest.iter().map(|byte| format!("{byte:02x}")).collect()
    };
    let before = std::fs::read(&manifest).unwrap();
    let mut json: Value = serde_json::from_slice(&before).unwrap();
    json.as_object_mut().unwrap().remove("frames").unwrap();
    for setting in ["--windows", "--frame-scale"] {
        let settings = json["settings"].as_object_mut().unwrap();
        settings.remove(setting).unwrap();
    }
    let after = serde_json::to_vec(&json).unwrap();
    std::fs::write(&manifest, &after).unwrap();
    let text = std::fs::read_to_string(&sums).unwrap();
    std::fs::write(&sums, text.replace(&digest(&before), &digest(&after))).unwrap();

    let other = case.command(&["--resume", "--windows", "spread"]);
    case.fails(other, &["--windows", "this run has spread"]);
    case.succeeds(&["--resume"]);
    assert_same(&case.result(), &reference());
}

#[test]
fn a_full_disk_ends_in_an_error_and_leaves_the_last_checkpoint() {
    let mut case = Case::new();
    let place = case.root.path().join("small");
    std::fs::create_dir(&place).unwrap();
    // Room for one checkpoint and a part of the next.
    let Some(_mount) = Mount::new(&place, "tmpfs", "size=9m") else {
        println!("skipped: this process may not mount a tmpfs");
        return;
    };
    case.place = place;
    let save = ["--save-every", "3", "--keep-last", "2"];
    case.fails(
        case.command(&save),
        &["out.checkpoints/.step-000000006.partial-", "os error 28"],
    );
    assert_eq!(case.checkpoints().steps().unwrap(), [3]);
    assert_eq!(case.checkpoints().latest().unwrap().damaged, []);
    let entries = std::fs::read_dir(case.checkpoints().folder()).unwrap();
    assert_eq!(
        entries.count(),
        1,
        "what was written of the second is deleted"
    );
}

#[test]
fn a_limit_on_files_ends_in_an_error_and_leaves_the_last_checkpoint() {
    let case = killed_at(2);
    let before = case.checkpoints().steps().unwrap();
    // Files of at most 1 MiB. Its signal is ignored, so the program sees a full disk.
    let mut command = Command::new("sh");
    command
        .args(["-c", "trap '' XFSZ; ulimit -f 2048; exec \"$0\" \"$@\""])
        .arg(std::env::current_exe().unwrap());
    prepare(
        &mut command,
        &case.arguments(&["--save-every", "1", "--resume"]),
    );
    case.fails(
        command,
        &["out.checkpoints/.step-0", "model.bpk", "os error 27"],
    );
    assert_eq!(case.checkpoints().steps().unwrap(), before);
    assert_eq!(case.checkpoints().latest().unwrap().damaged, []);
    case.succeeds(&["--resume"]);
    assert_same(&case.result(), &reference());
}

#[test]
fn a_read_only_folder_ends_in_an_error_and_leaves_the_last_checkpoint() {
    let mut case = Case::new();
    let place = case.root.path().join("small");
    std::fs::create_dir(&place).unwrap();
    let Some(mount) = Mount::new(&place, "tmpfs", "size=64m") else {
        println!("skipped: this process may not mount a tmpfs");
        return;
    };
    case.place = place;
    let mut child = case.start_until(2, &["--save-every", "1"]);
    child.kill().unwrap();
    child.wait().unwrap();
    let before = case.checkpoints().steps().unwrap();
    mount.read_only();
    // The output is checked before anything is computed.
    case.fails(case.command(&["--resume"]), &["Read-only file system"]);
    // An output in another place, so the checkpoint fails.
    let folder = case.checkpoints().folder().to_str().unwrap().to_string();
    let output = case.root.path().join("out").to_str().unwrap().to_string();
    let save = [
        "--save-every",
        "1",
        "--resume",
        "--checkpoints",
        &folder,
        "--output",
        &output,
    ];
    case.fails(
        case.command(&save),
        &["out.checkpoints", "Read-only file system"],
    );
    assert_eq!(case.checkpoints().steps().unwrap(), before);
    assert_eq!(case.checkpoints().latest().unwrap().damaged, []);
}
