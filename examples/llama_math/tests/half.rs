//! Runs whose model is held and computed in bf16: they lose nothing of the update, and nothing of the
//! pretrained weights.

mod common {
    pub mod case;
    pub mod weights;
}

use std::path::Path;
use std::process::Command;

use common::case::{Case, SHARED, STEPS, assert_same, text};
use common::weights::{bf16_model, values};
use serde_json::Value;

#[test]
#[ignore = "the program that the other tests start"]
fn program() {
    common::case::program();
}

const HALF: [&str; 4] = ["--dtype", "bf16", "--output-dtype", "f32"];
const FULL: [&str; 2] = ["--output-dtype", "f32"];

/// Every tensor's name with what the run of `case` added to the values of `base`.
fn change(case: &Case, base: &Path) -> Vec<(String, Vec<f32>)> {
    let (before, after) = (values(base), values(&case.output()));
    let pairs = before.into_iter().zip(after);
    let change = pairs.map(|((name, _, before), (other, _, after))| {
        assert_eq!(name, other);
        let difference = after
            .iter()
            .zip(&before)
            .map(|(after, before)| after - before);
        (name, difference.collect())
    });
    change.collect()
}

/// Cosine of the angle between two changes, and the ratio of their lengths. Both leave what is not adapted
/// as it is, bit for bit.
fn compare(ours: &[(String, Vec<f32>)], theirs: &[(String, Vec<f32>)]) -> (f64, f64) {
    let (mut product, mut squares) = (0.0, [0.0, 0.0]);
    for ((name, ours), (_, theirs)) in ours.iter().zip(theirs) {
        let is_adapted = name.ends_with("_proj.weight");
        assert_eq!(
            ours.iter().any(|&change| change != 0.0),
            is_adapted,
            "{name}"
        );
        for (&x, &y) in ours.iter().zip(theirs) {
            let (x, y) = (f64::from(x), f64::from(y));
            product += x * y;
            squares[0] += x * x;
            squares[1] += y * y;
        }
    }
    let [ours, theirs] = squares.map(f64::sqrt);
    (product / (ours * theirs), ours / theirs)
}

/// At this learning rate, rounding to bf16 would lose nearly all of the change: a weight of 0.05 has neighbours
/// 2.4e-4 away, and a step moves it by about 1e-6.
#[test]
fn the_whole_update_is_kept() {
    for gradients in [&SHARED[..], &[]] {
        let rate = [&["--lr", "2e-5"], gradients].concat();
        let runs = [&HALF[..], &FULL].map(|own| {
            let case = Case::new();
            let base = case.root.path().join("base");
            bf16_model(&base);
            let own = [&["--model", base.to_str().unwrap()], own, &rate].concat();
            let said = case.succeeds(&own);
            assert!(!said.contains("rounded to bf16"), "{said}");
            change(&case, &base)
        });
        let (cosine, ratio) = compare(&runs[0], &runs[1]);
        println!("bf16 against f32: cosine {cosine:.4}, lengths {ratio:.4}");
        assert!(cosine > 0.99 && (ratio - 1.0).abs() < 0.01);
    }
}

/// The tiny model's own files hold f16.
#[test]
fn the_change_of_rounded_weights_is_added_to_those_of_the_files() {
    let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/tiny");
    let runs = [&HALF[..], &FULL].map(|own| {
        let case = Case::new();
        let said = case.succeeds(own);
        let is_half = own.contains(&"bf16");
        assert_eq!(said.contains("rounded to bf16"), is_half, "{said}");
        change(&case, &tiny)
    });
    let (cosine, ratio) = compare(&runs[0], &runs[1]);
    println!("bf16 against f32: cosine {cosine:.4}, lengths {ratio:.4}");
    assert!(cosine > 0.99 && (ratio - 1.0).abs() < 0.01);
}

#[test]
fn runs_that_are_stopped_or_shared_out_end_with_the_same_weights() {
    let reference = Case::new();
    reference.succeeds(&HALF);
    let reference = reference.result();

    let workers = Case::new();
    workers.succeeds(&[&HALF[..], &["--workers", "2"]].concat());
    assert_same(&workers.result(), &reference);

    for (own, other) in [(&HALF[..], &FULL[..]), (&FULL, &HALF)] {
        let case = Case::new();
        let child = case.start_until(2, &[own, &["--save-every", "2"]].concat());
        let sent = Command::new("kill").arg(child.id().to_string()).status();
        assert!(sent.unwrap().success());
        let said = text(&child.wait_with_output().unwrap());
        assert!(said.contains("stopped after step"), "{said}");
        // In another dtype the run would be another one.
        let refused = case.run(&[other, &["--resume"]].concat());
        assert!(!refused.status.success());
        assert!(text(&refused).contains("--dtype"), "{}", text(&refused));
        if own == HALF {
            case.succeeds(&[own, &["--resume"]].concat());
            assert_same(&case.result(), &reference);
        }
    }
}

/// What is measured between steps is the change with all of its bits.
#[test]
fn ranks_are_those_of_the_whole_update() {
    let ranks = [&HALF[..], &FULL].map(|own| {
        let case = Case::new();
        let every = STEPS.to_string();
        case.succeeds(&[own, &["--rank-every", &every]].concat());
        let path = case.output().join("measurements.jsonl");
        let text = std::fs::read_to_string(path).unwrap();
        let lines = text.lines().map(|line| serde_json::from_str(line).unwrap());
        let mut changes = lines.filter(|line: &Value| line["kind"] == "changes");
        let changes = changes.next_back();
        let changes = changes.unwrap_or_else(|| panic!("{text}"));
        let weights = changes["weights"].as_array().unwrap().clone();
        let rank = |weight: &Value| weight["effective_rank"].as_f64().unwrap();
        weights.iter().map(rank).collect::<Vec<f64>>()
    });
    assert_eq!(ranks[0].len(), ranks[1].len());
    for (half, full) in ranks[0].iter().zip(&ranks[1]) {
        assert!(
            *full > 10.0 && (half / full - 1.0).abs() < 0.05,
            "{half} {full}"
        );
    }
}
