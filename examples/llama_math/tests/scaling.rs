//! The simulations of `llama_math scaling`, in their short form.

use clap::Parser;
use llama_math::cli::Cli;
use serde_json::Value;

fn numbers(rows: &Value, of: &str) -> Vec<f64> {
    let rows = rows.as_array().unwrap().iter();
    rows.map(|row| row[of].as_f64().unwrap()).collect()
}

#[track_caller]
fn assert_grows(values: &[f64]) {
    assert!(
        values.windows(2).all(|pair| pair[0] < pair[1]),
        "{values:?}"
    );
}

#[test]
fn more_shards_reach_more_directions() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("out");
    let arguments = [
        "llama_math",
        "scaling",
        "--device",
        "flex",
        "--quick",
        "--output",
    ];
    let arguments = arguments.into_iter().chain(output.to_str());
    let arguments = arguments.chain(["--workers", "16", "--shards", "32", "--rank", "8"]);
    Cli::parse_from(arguments).run().unwrap();
    let read = |name: &str| std::fs::read_to_string(output.join(name)).unwrap();
    let report: Value = serde_json::from_str(&read("scaling.json")).unwrap();

    let llama = &report["llama"]["rows"];
    assert_eq!(numbers(llama, "shards"), [1.0, 2.0, 4.0, 8.0]);
    assert_grows(&numbers(llama, "numeric_rank"));
    assert_grows(&numbers(llama, "effective_rank"));
    let base = report["llama"]["base_loss"].as_f64().unwrap();
    assert!(numbers(llama, "test_loss").iter().all(|&loss| loss < base));

    let layer = &report["layer"]["rows"];
    assert_eq!(numbers(layer, "shards"), [1.0, 4.0, 16.0, 64.0]);
    assert_grows(&numbers(layer, "effective_rank"));
    let losses = numbers(layer, "loss");
    assert!(
        losses.windows(2).all(|pair| pair[0] > pair[1]),
        "{losses:?}"
    );
    // The part outside the shards' windows stays, and most of the rest is learned.
    for (loss, floor) in losses.iter().zip(numbers(layer, "out_of_reach")) {
        assert!(
            (floor - 0.02..floor + 0.25).contains(loss),
            "{loss} {floor}"
        );
    }

    // The samples that the constants were not fitted to.
    assert_eq!(
        numbers(&report["llama_fit"]["checks"], "shards"),
        [2.0, 8.0]
    );
    assert_eq!(
        numbers(&report["layer_fit"]["checks"], "shards"),
        [4.0, 64.0]
    );

    let predictions = report["predictions"].as_array().unwrap();
    assert_eq!(predictions.len(), 5);
    for row in predictions {
        let parts = ["forward_backward", "optimizer", "exchange", "merge"];
        let sum: f64 = parts
            .map(|part| row["step"][part].as_f64().unwrap())
            .iter()
            .sum();
        assert!((sum / row["total"].as_f64().unwrap() - 1.0).abs() < 1e-12);
    }
    // Two of 32 shards stay; the others' deltas, of rank 8 and 4 bytes each, come at 25 GB/s.
    let values = 128 * (4096 + 4096) + 96 * (4096 + 11008);
    let bytes = f64::from(30 * 8 * 4) * f64::from(values);
    let exchange = predictions[4]["step"]["exchange"].as_f64().unwrap();
    assert!((exchange / (bytes / 25e9) - 1.0).abs() < 1e-12);

    assert!(read("table.txt").contains("Prediction for Llama 2 7B: 32 shards of rank 8"));
    let picture = read("scaling.svg");
    assert!(picture.contains("256 × 256 layer, r = 4") && picture.contains("held-out loss"));
}

#[test]
fn what_cannot_be_predicted_is_refused() {
    for (arguments, part) in [
        (
            ["--workers", "3", "--shards", "8"],
            "3 workers cannot share 8 shards",
        ),
        (["--workers", "4", "--rank", "2000"], "at most 2"),
        (["--shapes", "64x64", "--rank", "2"], "ROWSxCOLUMNSxCOUNT"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let output = folder.path().join("out");
        let fixed = ["llama_math", "scaling", "--quick", "--output"];
        let fixed = fixed.into_iter().chain(output.to_str());
        let error = Cli::parse_from(fixed.chain(arguments)).run().unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains(part), "{error}");
        assert!(!output.exists());
    }
}
