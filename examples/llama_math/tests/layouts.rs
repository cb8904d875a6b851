//! With any distribution of shards over processes, a run ends with the bits of a run on one worker.
//! No process keeps waiting when another ends.
//!
//! `HD_PISSA_REQUIRE_MPI=1` makes a missing `mpirun`, or a build without the feature `mpi`, an error.

mod common {
    pub mod case;
}

#[test]
#[ignore = "the program that the other tests start"]
fn program() {
    common::case::program();
}

#[cfg(not(feature = "mpi"))]
#[test]
fn mpi() {
    eprintln!("skipped: MPI processes; they need the feature `mpi`");
    assert!(
        std::env::var_os("HD_PISSA_REQUIRE_MPI").is_none(),
        "HD_PISSA_REQUIRE_MPI is set, but the feature `mpi` is off"
    );
}

#[cfg(feature = "mpi")]
mod mpi {
    use std::path::Path;
    use std::process::{Child, Command, Output, Stdio};
    use std::time::{Duration, Instant};

    use super::common::case::{ARGUMENTS, Case, PROGRAM, SHARED, assert_same, text};

    /// A run that is long enough to be stopped in its middle.
    const SHORT: [&str; 2] = ["--steps", "8"];

    /// A program, its arguments, and the number of processes that mpirun starts of it.
    type Part = (usize, Vec<String>);

    fn part(workers: usize, case: &Case, further: &[&str]) -> Part {
        let arguments = case.arguments(&[further, &["--mpi"]].concat());
        let arguments = serde_json::to_string(&arguments).unwrap();
        let test = std::env::current_exe().unwrap();
        let mut command = vec!["env".into(), format!("{ARGUMENTS}={arguments}")];
        command.push(test.to_str().unwrap().into());
        command.extend(PROGRAM.map(String::from));
        (workers, command)
    }

    /// Starts processes; `None`, with a message, if there is no `mpirun` and none is required.
    fn start(flags: &[&str], parts: &[Part]) -> Option<Child> {
        let mut command = Command::new("mpirun");
        command.args(["--allow-run-as-root", "--oversubscribe"]);
        command.args(["--bind-to", "none"]).args(flags);
        for (index, (workers, program)) in parts.iter().enumerate() {
            command.args((index > 0).then_some(":"));
            command.args(["-np", &workers.to_string()]).args(program);
        }
        match command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
        {
            Ok(child) => Some(child),
            Err(error) => {
                assert!(
                    std::env::var_os("HD_PISSA_REQUIRE_MPI").is_none(),
                    "HD_PISSA_REQUIRE_MPI is set, but mpirun does not start: {error}"
                );
                eprintln!("skipped: MPI processes; mpirun does not start: {error}");
                None
            }
        }
    }

    fn end(child: Child) -> Output {
        let output = child.wait_with_output().unwrap();
        println!("{}", text(&output));
        output
    }

    /// Runs to the end; `false` if there is no `mpirun`.
    #[track_caller]
    fn succeeds(workers: usize, case: &Case, further: &[&str]) -> bool {
        let Some(child) = start(&[], &[part(workers, case, further)]) else {
            return false;
        };
        let output = end(child);
        let message = text(&output);
        assert!(output.status.success(), "{message}");
        // One process prints for all.
        assert_eq!(message.matches("usable within").count(), 1, "{message}");
        assert_eq!(message.matches("written: ").count(), 1, "{message}");
        true
    }

    /// Checks that it ends soon, with one error that holds `parts`, an exit code that is not 0, and
    /// no output.
    #[track_caller]
    fn refused(case: &Case, programs: &[Part], parts: &[&str]) {
        let begin = Instant::now();
        let Some(child) = start(&[], programs) else {
            return;
        };
        let output = end(child);
        let message = text(&output);
        assert!(!output.status.success(), "{message}");
        assert_eq!(message.matches("error: ").count(), 1, "{message}");
        let error = message.lines().find(|line| line.starts_with("error: "));
        for part in parts {
            assert!(
                error.unwrap().contains(part),
                "`{part}` is not in: {error:?}"
            );
        }
        // Far from the limit of 20 s that workers wait for each other.
        assert!(begin.elapsed() < Duration::from_secs(15));
        assert!(!case.output().join("model.safetensors").exists());
    }

    /// Makes each process write its id to a file in `folder` that has the worker's index for a
    /// name, and say how it ended.
    fn watched((workers, program): Part, folder: &Path) -> Part {
        let script = r#"
            "$@" & echo $! > "$0/$OMPI_COMM_WORLD_RANK"
            wait $!; echo "process $OMPI_COMM_WORLD_RANK: exit code $?"
        "#;
        let shell = ["sh", "-c", script, folder.to_str().unwrap()];
        let shell = shell.map(String::from).into_iter();
        (workers, shell.chain(program).collect())
    }

    /// Starts watched processes, and sends `signal` to the one of `worker` when they have saved
    /// twice.
    fn interrupted(case: &Case, workers: usize, worker: usize, signal: &str) -> Option<Output> {
        // Leaves the other processes alone when one ends.
        let flags = [
            "--enable-recovery",
            "--mca",
            "orte_abort_on_non_zero_status",
            "0",
        ];
        let save = [&SHORT[..], &["--save-every", "1", "--timeout", "5"]].concat();
        let folder = tempfile::tempdir().unwrap();
        let part = watched(part(workers, case, &save), folder.path());
        let mut child = start(&flags, &[part])?;
        let begin = Instant::now();
        while case.checkpoints().steps().unwrap().last() < Some(&2) {
            assert_eq!(child.try_wait().unwrap(), None, "ended early");
            assert!(begin.elapsed() < Duration::from_secs(120));
            std::thread::sleep(Duration::from_millis(2));
        }
        let process = std::fs::read_to_string(folder.path().join(worker.to_string())).unwrap();
        let sent = Command::new("kill").args([signal, process.trim()]).status();
        assert!(sent.unwrap().success());
        Some(end(child))
    }

    /// The output of a run of [`SHORT`] with further options on one worker.
    fn on_one_worker(options: &[&str]) -> super::common::case::Run {
        let case = Case::new();
        case.succeeds(&[&SHORT[..], options].concat());
        case.result()
    }

    #[test]
    fn any_number_of_processes_gives_the_same_weights() {
        for options in [&[][..], &SHARED[..]] {
            let expected = on_one_worker(options);
            for workers in [1, 2, 4, 8] {
                let case = Case::new();
                if succeeds(workers, &case, &[&SHORT[..], options].concat()) {
                    assert_same(&case.result(), &expected);
                }
            }
        }
    }

    #[test]
    fn a_checkpoint_of_four_processes_resumes_on_any_layout() {
        let saved = Case::new();
        let Some(output) = interrupted(&saved, 4, 2, "-TERM") else {
            return;
        };
        let message = text(&output);
        assert!(output.status.success(), "{message}");
        for worker in 0..4 {
            let ended = format!("process {worker}: exit code 0");
            assert!(message.contains(&ended), "{message}");
        }
        assert_eq!(
            message.matches("stopped after step").count(),
            1,
            "{message}"
        );
        assert!(!saved.output().exists());

        let expected = on_one_worker(&[]);
        for (workers, processes) in [(1, false), (2, false), (8, true)] {
            let case = Case::new();
            let mut copy = Command::new("cp");
            copy.arg("-r").arg(saved.checkpoints().folder());
            let copied = copy.arg(case.checkpoints().folder()).status();
            assert!(copied.unwrap().success());
            let resume = [&SHORT[..], &["--resume"]].concat();
            if processes {
                succeeds(workers, &case, &resume);
            } else {
                case.succeeds(&[&resume[..], &["--workers", &workers.to_string()]].concat());
            }
            assert_same(&case.result(), &expected);
            assert!(!case.checkpoints().folder().exists());
        }
    }

    #[test]
    fn a_killed_process_is_named_by_the_others_and_the_run_resumes() {
        let case = Case::new();
        let Some(output) = interrupted(&case, 4, 2, "-KILL") else {
            return;
        };
        let message = text(&output);
        let named = "timed out after 5s waiting for workers [2]";
        for worker in [0, 1, 3] {
            let own = |line: &&str| match worker {
                0 => line.starts_with("error: ") && !line.contains("error: worker"),
                _ => line.starts_with(&format!("error: worker {worker}: ")),
            };
            let error = message.lines().find(own);
            assert!(
                error.is_some_and(|error| error.contains(named)),
                "{message}"
            );
            let ended = format!("process {worker}: exit code 1");
            assert!(message.contains(&ended), "{message}");
        }
        assert!(message.contains("process 2: exit code 137"), "{message}");
        assert!(!case.output().exists());

        let resume = [&SHORT[..], &["--resume"]].concat();
        succeeds(4, &case, &resume);
        assert_same(&case.result(), &on_one_worker(&[]));
    }

    #[test]
    fn what_any_process_finds_ends_all() {
        let case = Case::new();
        let run = |workers, further: &[&str]| [part(workers, &case, further)];
        refused(&case, &run(3, &[]), &["--mpi", "3 workers", "8 shards"]);
        let lora = ["--method", "lora"];
        refused(&case, &run(2, &lora), &["--mpi", "lora has no shards"]);
        let none = ["--data", "none.jsonl"];
        refused(
            &case,
            &run(4, &none),
            &["error: none.jsonl", "No such file"],
        );
        let none = ["--resume", "none"];
        refused(&case, &run(4, &none), &["--resume", "holds no checkpoint"]);

        // A worker on a machine where something else lies, or is said.
        let pair = |further: &[&str]| [part(1, &case, &[]), part(1, &case, further)];
        let none = ["--data", "none.jsonl"];
        refused(
            &case,
            &pair(&none),
            &["worker 1: none.jsonl", "No such file"],
        );
        let other = ["--lr", "2e-3"];
        let both = "--lr is 0.002 here and 0.001 on worker 0";
        refused(&case, &pair(&other), &["worker 1: ", both]);

        std::fs::create_dir(case.output()).unwrap();
        std::fs::write(case.output().join("something"), "").unwrap();
        refused(&case, &run(4, &[]), &["--output", "exists"]);
    }
}
