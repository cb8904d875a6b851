//! The record of a run and its report: what they hold, and that they survive a kill.

#![cfg(target_os = "linux")]

mod common {
    pub mod case;
}

use common::case::{self, Case};
use llama_math::history::{MEASUREMENTS, Measurement, Measures};
use serde_json::json;

#[test]
#[ignore = "the program that the other tests start"]
fn program() {
    case::program();
}

/// A question that is no text of a page.
const BAD: &str = "<script>document.title = 'bad'</script> & <b>2 + 3</b>";

/// A run with held-out data whose first question is [`BAD`].
fn measured(further: &[&str]) -> (Case, Vec<String>) {
    let case = Case::new();
    let path = case.root.path().join("held <out>.jsonl");
    let lines = [
        json!({"question": BAD, "answer": "#### 5"}),
        json!({"question": "1 + 1", "answer": "#### 2"}),
        json!({"question": "1 + 2", "answer": "#### 3"}),
    ];
    std::fs::write(&path, lines.map(|line| line.to_string()).join("\n")).unwrap();
    let mut arguments = vec!["--eval".to_string(), path.to_str().unwrap().into()];
    for argument in [
        "--eval-every",
        "5",
        "--rank-every",
        "8",
        "--log-samples",
        "2",
        "--max-new-tokens",
        "4",
    ]
    .iter()
    .chain(further)
    {
        arguments.push((*argument).into());
    }
    (case, arguments)
}

fn texts(arguments: &[String]) -> Vec<&str> {
    arguments.iter().map(|argument| &**argument).collect()
}

/// The measurements of an output.
fn measurements(case: &Case) -> Vec<Measurement> {
    let text = std::fs::read_to_string(case.output().join(MEASUREMENTS)).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str(line).unwrap());
    lines.collect()
}

/// What was measured, with the numbers as bits.
fn outline(measurements: &[Measurement]) -> Vec<(usize, String, Vec<u64>)> {
    let entry = |measurement: &Measurement| {
        let (kind, numbers) = match &measurement.measures {
            Measures::HeldOut {
                loss, of_output, ..
            } => (format!("loss {of_output}"), vec![loss.to_bits()]),
            Measures::Changes { weights, spectrum } => {
                assert!(spectrum.is_some());
                let numbers = weights
                    .iter()
                    .flat_map(|change| [change.effective_rank, change.relative].map(f64::to_bits));
                ("changes".into(), numbers.collect())
            }
            Measures::Answers { answers, of_output } => {
                let texts: Vec<&str> = answers.iter().map(|answer| &*answer.text).collect();
                (
                    format!("answers {of_output} {}", texts.join("|")),
                    Vec::new(),
                )
            }
        };
        (measurement.step, kind, numbers)
    };
    measurements.iter().map(entry).collect()
}

#[test]
fn a_record_goes_on_after_a_kill_and_is_that_of_an_undisturbed_run() {
    let (case, arguments) = measured(&["--save-every", "3"]);
    let mut killed = case.start_until(9, &texts(&arguments));
    killed.kill().unwrap();
    killed.wait().unwrap();
    assert!(!case.output().exists());
    let resume = [&texts(&arguments)[..], &["--resume"]].concat();
    case.succeeds(&resume);
    let resumed = outline(&measurements(&case));

    let (undisturbed, arguments) = measured(&[]);
    undisturbed.succeeds(&texts(&arguments));
    assert_eq!(resumed, outline(&measurements(&undisturbed)));
    let steps = |start: &str| -> Vec<usize> {
        let of_kind = resumed
            .iter()
            .filter(|(_, kind, _)| kind.starts_with(start));
        of_kind.map(|(step, ..)| *step).collect()
    };
    assert_eq!(steps("loss false"), [0, 5, 10, 15, 20, 24]);
    assert_eq!(steps("answers false"), [0, 5, 10, 15, 20, 24]);
    assert_eq!(steps("changes"), [8, 16, 24]);
    assert_eq!(
        (steps("loss true"), steps("answers true")),
        (vec![24], vec![24])
    );
}

#[test]
fn workers_that_wait_for_the_first_measure_the_same() {
    let numbers = |workers: &str| {
        let (case, arguments) = measured(&["--workers", workers]);
        case.succeeds(&texts(&arguments));
        (case.result(), outline(&measurements(&case)))
    };
    let (one, two) = (numbers("1"), numbers("2"));
    case::assert_same(&one.0, &two.0);
    assert_eq!(one.1, two.1);
}

#[test]
fn a_report_shows_the_run_and_texts_from_outside_as_texts() {
    let (case, arguments) = measured(&["--report-layer", "model.layers.1.self_attn.o_proj"]);
    case.succeeds(&texts(&arguments));
    let html = std::fs::read_to_string(case.output().join("report.html")).unwrap();
    for part in [
        "<h2>Curves</h2>",
        ">Gradient norm</text>",
        "Effective rank by layer over time",
        "of layers.1.self_attn.o_proj",
        "before",
        "step 15",
        "after, as written",
        "--shards",
        "processor",
        "exact match",
        "&lt;script&gt;document.title",
    ] {
        assert!(html.contains(part), "{part}");
    }
    assert!(!html.contains("<script"));
    // Rewritten after the evaluation, and nothing beside it.
    for entry in std::fs::read_dir(case.output()).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(!name.contains("partial"), "{name}");
    }
    // Digests are those of what is final, and all match.
    let sums = std::fs::read_to_string(case.output().join("SHA256SUMS")).unwrap();
    assert!(sums.contains("metrics.jsonl") && !sums.contains("report.html"));
    let output = case.output().to_str().unwrap().to_string();
    let mut command = case::this_binary();
    case::prepare(
        &mut command,
        &["llama_math".into(), "verify".into(), output],
    );
    let verified = command.output().unwrap();
    assert!(verified.status.success(), "{}", case::text(&verified));
}

#[test]
fn the_defaults_measure_the_change_once_and_nothing_is_measured_without_rank_every() {
    let changes = |further: &[&str]| {
        let case = Case::new();
        case.succeeds(&[&["--steps", "2"], further].concat());
        let measured = measurements(&case);
        let steps = measured.iter().map(|measurement| measurement.step);
        (steps.collect::<Vec<_>>(), measured.len())
    };
    assert_eq!(changes(&[]), (vec![2], 1));
    assert_eq!(changes(&["--rank-every", "0"]), (vec![], 0));
}

#[test]
fn a_layer_that_is_not_adapted_is_refused() {
    let case = Case::new();
    let command = case.command(&["--report-layer", "model.layers.99.mlp.up_proj"]);
    case.fails(command, &["--report-layer", "no adapted weight"]);
}

#[test]
fn quiet_runs_say_what_they_have_come_to_and_nothing_else() {
    let (case, arguments) = measured(&["--quiet"]);
    let output = case.run(&texts(&arguments));
    assert!(output.status.success());
    let lines = String::from_utf8(output.stdout).unwrap();
    let starts = [
        "hd-pissa: 24 steps in",
        "training loss:",
        "written:",
        "held-out loss after:",
        "exact match:",
    ];
    // The test harness prints lines of its own.
    let own = lines.lines().filter(|line| {
        !line.is_empty() && !line.starts_with("running ") && !line.starts_with("test program")
    });
    let own: Vec<&str> = own
        .filter(|line| !line.contains("survives the rounding"))
        .collect();
    assert_eq!(own.len(), starts.len(), "{lines}");
    for (line, start) in own.iter().zip(starts) {
        assert!(line.starts_with(start), "{line}");
    }
    assert_eq!(String::from_utf8(output.stderr).unwrap(), "");
    // Without it there is more, and the variable adds what libraries say.
    let (case, arguments) = measured(&["--save-every", "24"]);
    let mut command = case.command(&texts(&arguments));
    let output = command.env("RUST_LOG", "llama_math=off").output().unwrap();
    assert!(output.status.success() && !case::text(&output).contains("written:"));
    let mut command = case.command(&[&texts(&arguments)[..], &["--overwrite"]].concat());
    let output = command.env("RUST_LOG", "hd_pissa=loud").output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(
        case::text(&output).contains("RUST_LOG"),
        "{}",
        case::text(&output)
    );
}
