//! An exported adapter in Python: PEFT opens it on the base model, and its logits are those of the merged
//! model within the error that the export states.

mod common {
    pub mod case;
}

use std::path::Path;
use std::process::Command;

use common::case::{Case, SHARED, prepare, text, this_binary};
use serde_json::Value;

#[test]
#[ignore = "the program that the other tests start"]
fn program() {
    common::case::program();
}

/// Python with torch, transformers and peft, as `HD_PISSA_PYTHON` names it.
fn python() -> Option<String> {
    let python = std::env::var("HD_PISSA_PYTHON").ok();
    if python.is_none() {
        eprintln!("skipped: HD_PISSA_PYTHON names no Python with torch, transformers and peft");
    }
    python
}

#[test]
fn peft_opens_an_adapter_on_the_base_model() {
    let Some(python) = python() else {
        return;
    };
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    let tiny = package.join("assets/tiny");
    let tiny = tiny.to_str().unwrap();
    let random = ["--windows", "random", "--frame-scale", "unit"];
    let random = [&random[..], &SHARED].concat();
    for further in [&[][..], &random] {
        let case = Case::new();
        case.succeeds(&[&["--output-dtype", "f32", "--steps", "12"], further].concat());
        // As it is, and with ranks that differ.
        for limit in [&[][..], &["--energy", "0.9"]] {
            let mut command = this_binary();
            let own = [
                "llama_math",
                "export",
                "out",
                "--format",
                "lora",
                "--model",
                tiny,
                "--output",
                "adapter",
                "--overwrite",
                "--device",
                "flex",
            ];
            let arguments: Vec<String> = own.iter().chain(limit).map(|&a| a.into()).collect();
            prepare(&mut command, &arguments);
            let output = command.current_dir(case.root.path()).output().unwrap();
            let said = text(&output);
            assert!(output.status.success(), "{said}");

            let mut check = Command::new(&python);
            check.arg(package.join("tests/fixtures/peft_check.py"));
            check
                .args([tiny, "adapter", "out"])
                .env("HF_HUB_OFFLINE", "1");
            let output = check.current_dir(case.root.path()).output().unwrap();
            assert!(output.status.success(), "{}", text(&output));
            let found: Value = serde_json::from_slice(&output.stdout).unwrap();
            println!("{found:#}");
            let errors = found["relative_errors"].as_object().unwrap();
            // Seven projections in each of four layers.
            assert_eq!(errors.len(), 28);
            for (weight, error) in errors {
                let line = said.lines().find(|line| line.starts_with(weight.as_str()));
                let stated: f64 = line
                    .and_then(|line| line.rsplit(' ').next())
                    .and_then(|number| number.parse().ok())
                    .unwrap();
                let error = error.as_f64().unwrap();
                // Three digits are printed, and sums are rounded to f32.
                assert!(
                    (error - stated).abs() < 0.01 * stated + 1e-4,
                    "{weight}: {error} {stated}"
                );
            }
            let number = |key: &str| found[key].as_f64().unwrap();
            let (apart, trained) = (number("adapter_and_merged"), number("base_and_merged"));
            let largest = errors.values().map(|error| error.as_f64().unwrap());
            let largest = largest.fold(0.0, f64::max);
            assert!(
                apart < 2.0 * largest * trained + 1e-4,
                "{apart} {trained} {largest}"
            );
        }
    }
}
