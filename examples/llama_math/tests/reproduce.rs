//! The reproduction: planted changes against closed forms, its settings, and what a report says.

use std::path::{Path, PathBuf};
use std::sync::Mutex;

use burn::tensor::Device;
use clap::Parser;
use llama_math::cli::Cli;
use llama_math::evidence::children::{Children, this_program};
use llama_math::evidence::planted::{Direction, Planted};
use llama_math::evidence::reproduce::Settings;
use llama_math::evidence::row::Row;
use llama_math::evidence::task::{Kind, Task};
use llama_math::evidence::trial::{Measured, Outcome, Trial, TrialResult};
use llama_math::evidence::{report, search::Entry};
use llama_math::recipe::Recipe;

fn in_example(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn trial(task: Task, row: Row, lr: f64, items: usize) -> Trial {
    Trial {
        task,
        row,
        lr,
        seed: 3,
        steps: 150,
        items,
        rank: 4,
        shards: 8,
        loss_only: false,
    }
}

/// Random numbers of a device have one state for the whole process.
static RANDOM: Mutex<()> = Mutex::new(());

fn trained(trial: &Trial) -> Measured {
    let _alone = RANDOM.lock();
    match trial.run(&Device::flex(), None).unwrap().outcome {
        Outcome::Trained(measured) => *measured,
        Outcome::Diverged(reason) => panic!("{}: {reason}", trial.name()),
    }
}

/// The closed form, computed in another way: what is left of a flat change once the parts within
/// reach are taken out, by counting directions.
fn counted(reach: usize, of: usize) -> f64 {
    let outside = (of - reach) * (of - reach);
    outside as f64 / (of * of) as f64
}

#[test]
fn a_planted_change_is_learned_up_to_what_is_out_of_reach() {
    let (random, aligned) = (Task::PlantedRandom, Task::PlantedAligned);
    let of_layer = counted(32, 128);
    for (task, row, lr, change, expected) in [
        (random, Row::Lora, 1e-2, 8, 0.5),
        (random, Row::LoraWide, 5e-3, 64, 0.5),
        (random, Row::SharedRandom, 1e-3, 32, of_layer),
        (random, Row::SharedRandom, 1e-3, 64, of_layer),
        (random, Row::SharedLeading, 1e-3, 64, of_layer),
        (random, Row::Published, 1e-3, 64, of_layer),
        (random, Row::Pissa, 2e-3, 32, counted(4, 128)),
        (random, Row::Full, 1e-3, 64, 0.0),
        (aligned, Row::SharedLeading, 1e-3, 8, 0.0),
        (aligned, Row::SharedLeading, 1e-3, 64, counted(32, 64)),
        (aligned, Row::SharedRandom, 1e-3, 64, of_layer),
    ] {
        let Kind::Layer(planted) = task.kind() else {
            panic!("{task} is no layer");
        };
        let form = planted.missed(&row.adaptation(4, 8, 0), change).unwrap();
        assert!((form - expected).abs() < 1e-12, "{task} {row}: {form}");
        let measured = trained(&trial(task, row, lr, change));
        // Nothing can miss less, but for what a random change has in a random reach by chance, and
        // for the second-order terms. Few steps miss a little more.
        assert!(
            measured.loss > form - 0.04 && measured.loss < form + 0.08,
            "{task} {row} {change}: misses {} of {form}",
            measured.loss
        );
    }
    let aligned = Planted {
        size: 128,
        direction: Direction::Aligned,
    };
    let spread = Row::SharedSpread.adaptation(4, 8, 0);
    assert_eq!(aligned.missed(&spread, 8), None);
}

#[test]
fn every_method_sees_the_same_rows_and_starts_at_the_same_weight() {
    let rows = [
        Row::Lora,
        Row::Pissa,
        Row::Published,
        Row::SharedRandom,
        Row::Full,
    ];
    let first = rows.map(|row| {
        let short = Trial {
            steps: 2,
            ..trial(Task::PlantedRandom, row, 1e-3, 16)
        };
        // The first step of the warm-up has a rate of 0 or the first of all: the loss is that of the
        // start.
        trained(&short).losses[0]
    });
    for loss in first {
        assert!((loss - first[0]).abs() < 1e-4 * first[0], "{first:?}");
    }
    // A row of unit deviation meets the whole change.
    assert!((first[0] - 1.0).abs() < 0.2, "{first:?}");
}

#[test]
fn an_update_has_the_rank_that_its_method_allows() {
    let numeric = |row| {
        let short = Trial {
            steps: 20,
            ..trial(Task::PlantedRandom, row, 1e-3, 64)
        };
        let measured = trained(&short);
        assert_eq!(measured.ranks.len(), 10);
        assert!(measured.ranks.iter().all(|&(_, rank)| rank > 1.0));
        measured.effective_rank
    };
    assert!(numeric(Row::Lora) <= 4.01);
    assert!(numeric(Row::Pissa) <= 8.01);
    // At most 64 to first order.
    let published = numeric(Row::Published);
    assert!(published > 20.0 && published < 70.0, "{published}");
}

#[test]
fn the_settings_of_the_repository_can_be_run() {
    let settings = Settings::read(&in_example("reproduce.json")).unwrap();
    for experiment in &settings.experiments {
        assert!(!experiment.rows.is_empty() && !experiment.parts.is_empty());
        for part in &experiment.parts {
            for &row in &experiment.rows {
                let entry = Entry {
                    task: part.task,
                    row,
                    steps: part.steps,
                    items: part.items,
                    rank: settings.rank,
                    shards: part.shards,
                };
                // Panics for shards that do not divide a step.
                entry.trial(1e-3, 1).config();
            }
        }
    }
}

#[test]
fn settings_that_cannot_be_run_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("settings.json");
    let good = std::fs::read_to_string(in_example("reproduce.json")).unwrap();
    for (from, to, expected) in [
        (
            "\"tuning_seeds\": [1]",
            "\"tuning_seeds\": []",
            "tuning_seeds",
        ),
        (
            "\"seeds\": [2,",
            "\"seeds\": [1, 2,",
            "one of the tuning seeds",
        ),
        ("\"shards\": 8", "\"shards\": 7", "7 does not divide"),
        ("\"shards\": 8", "\"shards\": 0", "0 does not divide"),
        ("\"planted-random\"", "\"unheard-of\"", "unknown variant"),
        ("\"rank\": 4", "\"ranks\": 4", "unknown field"),
    ] {
        std::fs::write(&path, good.replacen(from, to, 1)).unwrap();
        let error = Settings::read(&path).unwrap_err().to_string();
        assert!(
            error.contains("settings.json") && error.contains(expected),
            "{error}"
        );
    }
}

/// A small reproduction.
const SMALL: &str = r#"{
  "tuning_seeds": [1], "seeds": [2, 3], "rank": 2,
  "experiments": [{
    "name": "small", "title": "A small experiment", "rows": ["lora", "shared-random"],
    "axis": "rank of the change", "picture": "missed", "tables": ["missed", "rank-by-steps", "score"],
    "parts": [
      {"label": "first", "task": "planted-random", "items": 4, "steps": 20, "shards": 4, "at": 4},
      {"label": "second", "task": "planted-random", "items": 16, "steps": 20, "shards": 4, "at": 16}
    ]
  }]
}"#;

#[test]
fn a_report_says_what_has_not_been_run() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("settings.json");
    std::fs::write(&path, SMALL).unwrap();
    let settings = Settings::read(&path).unwrap();
    let children = Children {
        folder: folder.path().join("trials"),
        processes: 1,
        device: None,
        files: None,
        record: false,
        until: Some(std::time::Instant::now()),
        program: this_program,
    };
    let report = || {
        let answers = settings.run(&children).unwrap();
        report::write(folder.path(), &settings, &answers).unwrap();
        std::fs::read_to_string(folder.path().join(report::CHAPTER)).unwrap()
    };
    let empty = report();
    assert!(
        empty.contains("not complete") && empty.contains("first: all methods"),
        "{empty}"
    );
    assert!(!folder.path().join("reproduce_small.svg").exists());

    // Results of the first part alone, as an interrupted run leaves them.
    let first = &settings.experiments[0].parts[0];
    for &row in &settings.experiments[0].rows {
        let entry = Entry {
            task: first.task,
            row,
            steps: first.steps,
            items: first.items,
            rank: 2,
            shards: first.shards,
        };
        let rates = [2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1];
        let tuning = rates.map(|lr| entry.trial(lr, 1));
        let fresh = rates
            .iter()
            .flat_map(|&lr| [2, 3].map(|seed| entry.trial(lr, seed)));
        for trial in tuning.into_iter().chain(fresh) {
            let measured = Measured {
                losses: vec![],
                // Best at 2e-3.
                loss: (trial.lr.ln() - 2e-3f64.ln()).abs() / 10.0 + 0.01 * trial.seed as f64,
                correct: 0,
                numeric_rank: 3.0,
                effective_rank: 3.0,
                ranks: vec![(10, 2.0), (20, if row == Row::Lora { 2.0 } else { 8.0 })],
                text_loss: None,
                trainable: 100,
                seconds: 6.0,
                tokens_per_second: 1.0,
                peak_memory: None,
                used: None,
                answers: vec![],
                record: None,
            };
            let outcome = Outcome::Trained(Box::new(measured));
            let result = TrialResult { trial, outcome };
            let name = format!("{}.json", trial.name());
            result.write(&children.folder.join(name)).unwrap();
        }
    }
    let partial = report();
    assert!(partial.contains("second: all methods"), "{partial}");
    assert!(!partial.contains("first: all methods"), "{partial}");
    // LoRA r 2 misses 1 − 2/4 at best; 8 directions of 128 leave (1 − 8/128)².
    assert!(
        partial.contains("| LoRA r 2 | 2.5 ± 6.4 % (50.0) | not run |"),
        "{partial}"
    );
    assert!(
        partial.contains("2.5 ± 6.4 % (87.9) | not run |"),
        "{partial}"
    );
    assert!(
        partial.contains("times LoRA r 2 | 1.0 | 4.0 |"),
        "{partial}"
    );
    // Both have the same losses.
    assert!(
        partial.contains("1 without a difference shown, 0 ahead"),
        "{partial}"
    );
    let picture = std::fs::read_to_string(folder.path().join("reproduce_small.svg")).unwrap();
    assert!(picture.contains("A small experiment"));
    let numbers = std::fs::read_to_string(folder.path().join(report::NUMBERS)).unwrap();
    let numbers: serde_json::Value = serde_json::from_str(&numbers).unwrap();
    assert_eq!(numbers["findings"][0]["fresh"][1]["seed"], 3);
}

#[test]
fn a_recipe_is_a_command_line_and_its_dry_run_needs_no_model() {
    let path = in_example("recipes/metamathqa_llama_3_2_3b.json");
    let recipe = Recipe::read(&path).unwrap();
    let arguments = recipe.arguments();
    let has = |words: [&str; 2]| arguments.windows(2).any(|pair| pair == words);
    assert!(has(["--rank", "4"]) && has(["--lr", "0.0002"]) && arguments.contains(&"--mpi".into()));
    let dry = ["llama_math", "recipe", path.to_str().unwrap(), "--dry-run"];
    Cli::parse_from(dry).run().unwrap();
}
