//! Runs of the program on the tiny model, and what they leave.

#![allow(dead_code, reason = "every test binary uses its own part")]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use clap::Parser;
use hd_pissa::checkpoint::Checkpoints;
use llama_math::cli::Cli;
use llama_math::history::StepMetrics;
use llama_math::problems::problems;
use serde_json::json;

/// Environment variable with the arguments of [`program`], as JSON.
pub const ARGUMENTS: &str = "LLAMA_MATH_ARGUMENTS";
/// Environment variable with a file that gets standard output and standard error of [`program`].
pub const STREAMS: &str = "LLAMA_MATH_STREAMS";
pub const STEPS: u64 = 24;

/// What the ignored test `program` of a test binary does: `main.rs`, so that the other tests run
/// what they were compiled with.
pub fn program() {
    let Ok(arguments) = std::env::var(ARGUMENTS) else {
        return;
    };
    let arguments: Vec<String> = serde_json::from_str(&arguments).unwrap();
    // Here and not in the parent, because the test harness prints before.
    #[cfg(unix)]
    if let Some(path) = std::env::var_os(STREAMS) {
        let stream = std::fs::File::options().write(true).open(path).unwrap();
        rustix::stdio::dup2_stdout(&stream).unwrap();
        rustix::stdio::dup2_stderr(&stream).unwrap();
    }
    let code = match Cli::parse_from(arguments).run() {
        Ok(()) => 0,
        Err(error) => error.report(),
    };
    std::process::exit(code.into());
}

/// A folder with data, and runs that write into it.
pub struct Case {
    pub root: tempfile::TempDir,
    /// Where the output goes, which may be elsewhere.
    pub place: PathBuf,
}

impl Case {
    pub fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let (records, _) = problems(3, 40, 0);
        let line = |record: &llama_math::data::Record| {
            json!({"question": record.instruction, "answer": record.answer}).to_string()
        };
        let lines: Vec<String> = records.iter().map(line).collect();
        std::fs::write(root.path().join("data.jsonl"), lines.join("\n")).unwrap();
        let template = "Question:\n{instruction}\nAnswer:\n";
        std::fs::write(root.path().join("template.txt"), template).unwrap();
        let place = root.path().to_path_buf();
        Self { root, place }
    }

    pub fn output(&self) -> PathBuf {
        self.place.join("out")
    }

    pub fn checkpoints(&self) -> Checkpoints {
        Checkpoints::new(self.place.join("out.checkpoints"))
    }

    pub fn arguments(&self, further: &[&str]) -> Vec<String> {
        let text = |path: PathBuf| path.to_str().unwrap().to_string();
        let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/tiny");
        let input = |name: &str| text(self.root.path().join(name));
        let mut arguments: Vec<String> = vec!["llama_math".into()];
        for (option, value) in [
            ("--model", text(tiny)),
            ("--data", input("data.jsonl")),
            ("--prompt-template", input("template.txt")),
            ("--output", text(self.output())),
            // Whatever else the build has: on Flex runs agree bit for bit.
            ("--device", "flex".into()),
            ("--steps", STEPS.to_string()),
            ("--rank", "2".into()),
            ("--shards", "8".into()),
            ("--lr", "1e-3".into()),
            ("--warmup-ratio", "0.2".into()),
            ("--timeout", "20".into()),
        ] {
            if !further.contains(&option) {
                arguments.extend([option.into(), value]);
            }
        }
        // Every run computes what it needs.
        arguments.push("--no-cache".into());
        // The published form, but for what is chosen.
        let other = ["lora", "pissa", "full"];
        if !further.iter().any(|argument| other.contains(argument)) {
            for (option, value) in [
                ("--gradients", "per-shard"),
                ("--windows", "leading"),
                ("--frame-scale", "balanced"),
            ] {
                if !further.contains(&option) {
                    arguments.extend([option.into(), value.into()]);
                }
            }
        }
        arguments.extend(further.iter().map(|&argument| argument.to_string()));
        arguments
    }

    pub fn command(&self, further: &[&str]) -> Command {
        let mut command = this_binary();
        prepare(&mut command, &self.arguments(further));
        // Where an output is written whose place fails.
        command.current_dir(self.root.path());
        command
    }

    /// Runs to the end.
    pub fn run(&self, further: &[&str]) -> Output {
        let output = self.command(further).output().unwrap();
        println!("{}", text(&output));
        output
    }

    #[track_caller]
    pub fn succeeds(&self, further: &[&str]) -> String {
        let output = self.run(further);
        assert!(output.status.success(), "{}", text(&output));
        text(&output)
    }

    /// Fails with one line on standard error that holds `parts`, exit code 1, and no output.
    #[track_caller]
    pub fn fails(&self, mut command: Command, parts: &[&str]) {
        let output = command.output().unwrap();
        let errors = String::from_utf8(output.stderr.clone()).unwrap();
        println!("{errors}");
        assert_eq!(output.status.code(), Some(1), "{}", text(&output));
        assert_eq!(errors.lines().count(), 1, "{errors}");
        for part in parts {
            assert!(errors.contains(part), "`{part}` is not in: {errors}");
        }
        assert!(!self.output().exists());
    }

    /// The weights, and what every step computed.
    pub fn result(&self) -> Run {
        let metrics = std::fs::read_to_string(self.output().join("metrics.jsonl")).unwrap();
        let numbers = |line: &str| {
            let step: StepMetrics = serde_json::from_str(line).unwrap();
            let numbers = [step.loss, step.lr, step.gradient_norm, step.update_norm];
            (step.step, numbers.map(f64::to_bits))
        };
        Run {
            weights: std::fs::read(self.output().join("model.safetensors")).unwrap(),
            steps: metrics.lines().map(numbers).collect(),
        }
    }

    /// Starts a run and waits until it has a checkpoint of `step`.
    pub fn start_until(&self, step: u64, further: &[&str]) -> Child {
        let mut child = self.command(further).spawn().unwrap();
        let start = Instant::now();
        while self.checkpoints().steps().unwrap().last() < Some(&step) {
            assert_eq!(child.try_wait().unwrap(), None, "ended early");
            assert!(start.elapsed() < Duration::from_secs(120));
            std::thread::sleep(Duration::from_millis(2));
        }
        child
    }
}

/// Options of a run whose shards all learn from its 8 micro-batches per step.
pub const SHARED: [&str; 4] = ["--gradients", "shared", "--accumulation", "8"];

#[derive(PartialEq)]
pub struct Run {
    pub weights: Vec<u8>,
    pub steps: Vec<(usize, [u64; 4])>,
}

#[track_caller]
pub fn assert_same(run: &Run, reference: &Run) {
    assert_eq!(run.steps, reference.steps);
    assert!(run.weights == reference.weights, "the weights differ");
}

/// This binary, with the signals that end programs in force: under `nohup` a hang-up is ignored, and
/// child processes inherit that.
pub fn this_binary() -> Command {
    let mut command = Command::new("env");
    command
        .arg("--default-signal=HUP,INT,TERM")
        .arg(std::env::current_exe().unwrap());
    command
}

/// The arguments after which this binary is `program`.
pub const PROGRAM: [&str; 4] = ["program", "--exact", "--ignored", "--nocapture"];

/// Makes `command` this binary's `program`, or a shell that becomes it.
pub fn prepare(command: &mut Command, arguments: &[String]) {
    command
        .args(PROGRAM)
        .env(ARGUMENTS, serde_json::to_string(arguments).unwrap())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
}

pub fn text(output: &Output) -> String {
    let parts = [&output.stdout, &output.stderr];
    parts
        .map(|bytes| String::from_utf8_lossy(bytes).into_owned())
        .join("\n")
}

/// A run that nobody disturbs, and that saves nothing.
pub fn reference() -> Run {
    let case = Case::new();
    case.succeeds(&[]);
    assert!(case.checkpoints().steps().unwrap().is_empty());
    let run = case.result();
    assert_eq!(run.steps.len() as u64, STEPS);
    run
}

pub fn wait(mut child: Child, at_most: Duration) -> Option<ExitStatus> {
    let end = Instant::now() + at_most;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return Some(status);
        }
        if Instant::now() >= end {
            child.kill().unwrap();
            child.wait().unwrap();
            return None;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A file system at a place of the case's, if this process may mount one.
pub struct Mount(PathBuf);

impl Mount {
    pub fn new(place: &Path, kind: &str, options: &str) -> Option<Self> {
        let mut command = Command::new("mount");
        command.args(["-t", kind, "-o", options, kind]).arg(place);
        let status = command.stderr(Stdio::null()).status();
        status
            .is_ok_and(|status| status.success())
            .then(|| Self(place.into()))
    }

    pub fn read_only(&self) {
        let mut command = Command::new("mount");
        let status = command.args(["-o", "remount,ro"]).arg(&self.0).status();
        assert!(status.unwrap().success());
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}
