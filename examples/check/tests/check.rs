//! `check` on Flex, and on WGPU if a test requires it: everything is within its bounds, and a
//! damaged result is not.

use clap::Parser;
use hd_pissa_check::report::{Outcome, Report, Spoil};
use hd_pissa_check::{CheckError, Options, run, run_with};

/// The options of a command line without timing.
fn options(device: &str, more: &[&str]) -> Options {
    let program = ["check", "--device", device, "--seconds", "0"];
    Options::parse_from([&program, more].concat())
}

/// Flex, and WGPU if the build has it and a test requires it.
fn devices() -> Vec<&'static str> {
    let required = std::env::var_os("HD_PISSA_REQUIRE_WGPU").is_some_and(|value| value == "1");
    match cfg!(feature = "wgpu") && required {
        true => vec!["flex", "wgpu"],
        false => vec!["flex"],
    }
}

fn operations(report: &Report) -> Vec<&str> {
    let rows = report.rows.iter();
    let mut names: Vec<&str> = rows.map(|row| row.case.operation.as_str()).collect();
    names.sort();
    names.dedup();
    names
}

#[test]
fn everything_is_within_its_bounds() {
    for device in devices() {
        let report = run(&options(device, &[])).unwrap();
        assert!(report.passed(), "{device}: {}", report.verdict());
        assert!(report.verdict().starts_with("PASSED"));
        assert_eq!(
            operations(&report)
                .into_iter()
                .filter(|name| *name != "everything")
                .collect::<Vec<_>>(),
            [
                "adapter_linear",
                "adapter_weight",
                "factor_product",
                "fingerprint",
                "fingerprint_int",
                "max_abs",
                "merge",
                "recorded run",
                "row_statistics",
                "step",
                "step, Compensated",
                "step, Nearest",
                "step, Stochastic",
            ],
        );
        // Bounds far above the measured errors would hide a fault.
        let largest = |operation: &str| {
            let rows = report
                .rows
                .iter()
                .filter(|row| row.case.operation == operation);
            let worst = rows.filter_map(|row| row.worst.as_ref());
            worst.map(|worst| worst.share).fold(0.0, f64::max)
        };
        for operation in ["adapter_linear", "merge", "step", "recorded run"] {
            assert!(largest(operation) > 1e-3, "{device}, {operation}");
        }
    }
}

/// Each result in turn has an error a little above its bound, is NaN, or is unchanged.
#[test]
fn every_broken_result_is_reported() {
    let beyond: Spoil = Box::new(|compared| {
        let [row, column] = compared.expected[0].place;
        let off = 3.0 * compared.expected[0].bound + 1e-3 * compared.expected[0].value.abs();
        let value = compared.expected[0].value + off.max(f64::from(f32::MIN_POSITIVE));
        let place = row * compared.found.columns + column;
        compared.found.values[place] = value as f32;
    });
    let nan: Spoil = Box::new(|compared| *compared.found.values.last_mut().unwrap() = f32::NAN);
    for (name, spoil) in [("beyond", beyond), ("NaN", nan)] {
        let report = run_with(&options("flex", &[]), Some(spoil)).unwrap();
        assert!(!report.passed());
        assert!(report.verdict().starts_with("FAILED"));
        for row in &report.rows {
            assert_eq!(row.outcome, Outcome::Beyond, "{name}: {row}");
        }
    }
}

#[test]
fn the_json_file_holds_the_report() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("report.json");
    let report = run(&options("flex", &["--json", file.to_str().unwrap()])).unwrap();
    let text = std::fs::read_to_string(&file).unwrap();
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(json["passed"], true);
    assert_eq!(json["environment"]["device"], "flex");
    assert_eq!(json["rows"].as_array().unwrap().len(), report.rows.len());
    assert!(json["rows"][0]["worst"]["bound"].is_number());
}

#[test]
fn what_cannot_run_says_what_to_do() {
    let error = run(&options("tpu", &[])).err().unwrap();
    assert!(error.to_string().contains("no such backend"), "{error}");

    let lacking = hd_pissa_check::measure::BACKENDS
        .into_iter()
        .find(|name| !hd_pissa_check::measure::backends().contains(name))
        .unwrap();
    let error = run(&options(lacking, &[])).err().unwrap();
    let advice = format!("--features {lacking}");
    assert!(error.to_string().contains(&advice), "{error}");

    let folder = tempfile::tempdir().unwrap();
    let empty = folder.path().to_str().unwrap();
    let error = run(&options("flex", &["--data", empty])).err().unwrap();
    assert!(matches!(error, CheckError::Data { .. }), "{error}");
    let missing = folder.path().join("no/such/report.json");
    let error = run(&options("flex", &["--json", missing.to_str().unwrap()]));
    assert!(matches!(error.err(), Some(CheckError::Json { .. })));
}
