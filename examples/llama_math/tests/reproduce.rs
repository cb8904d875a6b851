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
use llama_math::evidence::task::{Files, Kind, Task};
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
        (
            "\"task\": \"planted-aligned\"",
            "\"task\": \"gsm8k\"",
            "compared by something else",
        ),
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

/// What a training might have measured.
fn made_up() -> Measured {
    Measured {
        losses: vec![],
        loss: 1.0,
        correct: 0,
        numeric_rank: 3.0,
        effective_rank: 3.0,
        ranks: vec![],
        text_loss: None,
        trainable: 100,
        seconds: 6.0,
        tokens_per_second: 1.0,
        peak_memory: None,
        used: None,
        answers: vec![],
        record: None,
    }
}

fn write(folder: &Path, trial: Trial, measured: Measured) {
    let outcome = Outcome::Trained(Box::new(measured));
    let result = TrialResult { trial, outcome };
    let name = format!("{}.json", trial.name());
    result.write(&folder.join(name)).unwrap();
}

/// A run that reads the results in the folder `trials`, and trains nothing.
fn nothing_trained(folder: &Path, until: Option<std::time::Instant>) -> Children {
    Children {
        folder: folder.join("trials"),
        processes: 1,
        device: None,
        files: None,
        record: false,
        until,
        program: this_program,
    }
}

#[test]
fn a_report_says_what_has_not_been_run() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("settings.json");
    std::fs::write(&path, SMALL).unwrap();
    let settings = Settings::read(&path).unwrap();
    let children = nothing_trained(folder.path(), Some(std::time::Instant::now()));
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
                // Best at 2e-3.
                loss: (trial.lr.ln() - 2e-3f64.ln()).abs() / 10.0 + 0.01 * trial.seed as f64,
                ranks: vec![(10, 2.0), (20, if row == Row::Lora { 2.0 } else { 8.0 })],
                ..made_up()
            };
            write(&children.folder, trial, measured);
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
    // Tuned, 99 % of the change is learned, and afterwards 97.5 %.
    assert!(!partial.contains("did not carry over"), "{partial}");
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
fn a_report_names_rates_that_were_good_with_the_tuning_seed_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("settings.json");
    std::fs::write(&path, SMALL).unwrap();
    let settings = Settings::read(&path).unwrap();
    let children = nothing_trained(folder.path(), Some(std::time::Instant::now()));
    std::fs::create_dir(&children.folder).unwrap();
    for part in &settings.experiments[0].parts {
        for &row in &settings.experiments[0].rows {
            let entry = Entry {
                task: part.task,
                row,
                steps: part.steps,
                items: part.items,
                rank: 2,
                shards: part.shards,
            };
            for lr in [2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2] {
                for seed in [1, 2, 3] {
                    let is_missed = seed > 1 && row == Row::Lora && part.items == 16;
                    let measured = Measured {
                        loss: match (is_missed, lr == 2e-3) {
                            (true, _) => 0.7,
                            (false, true) => 0.2,
                            (false, false) => 0.9,
                        },
                        ..made_up()
                    };
                    write(&children.folder, entry.trial(lr, seed), measured);
                }
            }
        }
    }
    let answers = settings.run(&children).unwrap();
    report::write(folder.path(), &settings, &answers).unwrap();
    let chapter = std::fs::read_to_string(folder.path().join(report::CHAPTER)).unwrap();
    let line = "The rate of LoRA r 2 did not carry over, second: 80.0 % with the tuning seeds, 30.0 % \
                with the others.";
    assert!(chapter.contains(line), "{chapter}");
    assert_eq!(chapter.matches("did not carry over").count(), 1);
}

/// A small reproduction with records.
const RECORDS: &str = r#"{
  "tuning_seeds": [1], "seeds": [2, 3, 4], "rank": 4,
  "experiments": [{
    "name": "gsm8k", "title": "Records", "rows": ["lora", "published", "full"],
    "tables": ["loss", "score", "rate"],
    "parts": [{"label": "first", "task": "gsm8k", "items": 200, "steps": 20, "shards": 8}]
  }]
}"#;

/// Writes results about records, with the loss of each row, and returns the chapter.
fn chapter_on_records(base: f64, losses: [(Row, f64); 3]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("settings.json");
    std::fs::write(&path, RECORDS).unwrap();
    let settings = Settings::read(&path).unwrap();
    // Without the files nothing is trained, however much time there is.
    let children = nothing_trained(folder.path(), None);
    std::fs::create_dir(&children.folder).unwrap();
    let part = &settings.experiments[0].parts[0];
    let entry = |row, steps| Entry {
        task: part.task,
        row,
        steps,
        items: part.items,
        rank: 4,
        shards: part.shards,
    };
    let untrained = Measured {
        loss: base,
        used: Some((5, 9)),
        ..made_up()
    };
    let trial = entry(Row::Full, 0).trial(1e-3, 2);
    write(&children.folder, trial, untrained);
    for (row, loss) in losses {
        for (place, lr) in [5e-5_f64, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2]
            .into_iter()
            .enumerate()
        {
            let tuning = Measured {
                // Best at 2e-3, where the answers are the fewest.
                loss: 1.0 + (lr.ln() - 2e-3f64.ln()).abs(),
                ..made_up()
            };
            write(&children.folder, entry(row, 20).tuning(lr, 1), tuning);
            for seed in [2, 3, 4] {
                let fresh = Measured {
                    loss: if lr == 2e-3 {
                        loss + 0.1 * seed as f64
                    } else {
                        9.0
                    },
                    correct: place,
                    ..made_up()
                };
                write(&children.folder, entry(row, 20).trial(lr, seed), fresh);
            }
        }
    }
    let answers = settings.run(&children).unwrap();
    report::write(folder.path(), &settings, &answers).unwrap();
    std::fs::read_to_string(folder.path().join(report::CHAPTER)).unwrap()
}

#[test]
fn methods_are_compared_by_loss_on_records() {
    let rows = [Row::Lora, Row::Published, Row::Full];
    let chapter = chapter_on_records(1.5, [(rows[0], 0.8), (rows[1], 0.9), (rows[2], 0.9)]);
    for part in [
        "Records, HD-PiSSA, published: behind LoRA r 4 (first). Of 2 comparisons: 1 behind, 1 without \
         a difference shown, 0 ahead",
        "| untrained | 1.500 |",
        "| LoRA r 4 | 1.100 ± 0.248 |",
        "| LoRA r 4 | 2.5 ± 0.0 % |",
        "| full | 2e-3 |",
        "### HD-PiSSA, published: by how much its loss is lower than that of others",
        "| LoRA r 4 | **-0.100 ± 0.000** |",
        "| full | +0.000 ± 0.000 |",
        "5 of 9 to train on",
    ] {
        assert!(chapter.contains(part), "{part} is not in {chapter}");
    }
    assert!(!chapter.contains("Thrown out"), "{chapter}");

    let unfit = chapter_on_records(1.1, [(rows[0], 0.8), (rows[1], 0.9), (rows[2], 0.9)]);
    assert!(
        unfit.contains("Thrown out: first, because full fine-tuning does not lower the loss"),
        "{unfit}"
    );
    assert!(!unfit.contains("behind"), "{unfit}");
}

/// Lines of JSON: short records, and long ones between them.
fn records(path: &Path, numbers: impl Iterator<Item = usize>) {
    let mut text = String::new();
    for number in numbers {
        let answer = format!("{} + {number} = {}\n#### {}", 3, 3 + number, 3 + number);
        let long = "1 + ".repeat(200) + &answer;
        let question = format!("How much is 3 + {number}?");
        for answer in [answer, long] {
            let line = serde_json::json!({"question": question, "answer": answer});
            text += &format!("{line}\n");
        }
    }
    std::fs::write(path, text).unwrap();
}

#[test]
fn a_rate_is_chosen_without_answers_on_other_records_than_the_test_problems() {
    let folder = tempfile::tempdir().unwrap();
    let [train, test, others] =
        ["train.jsonl", "test.jsonl", "others.jsonl"].map(|name| folder.path().join(name));
    records(&train, 10..50);
    records(&test, 50..57);
    records(&others, (54..57).chain(50..54));
    let files = |test: &Path| Files {
        model: in_example("assets/tiny"),
        train: train.clone(),
        test: test.into(),
    };
    let run = |trial: &Trial, test: &Path| {
        let _alone = RANDOM.lock();
        let result = trial.run(&Device::flex(), Some(&files(test)));
        result.map(|result| match result.outcome {
            Outcome::Trained(measured) => *measured,
            Outcome::Diverged(reason) => panic!("{reason}"),
        })
    };
    let entry = Entry {
        task: Task::Gsm8k,
        row: Row::Full,
        steps: 3,
        items: 4,
        rank: 4,
        shards: 8,
    };
    let tuning = entry.tuning(1e-3, 1);
    assert!(tuning.loss_only && !entry.trial(1e-3, 1).loss_only);
    let tuned = run(&tuning, &test).unwrap();
    assert_eq!((tuned.correct, tuned.answers.len()), (0, 0));
    assert_eq!(tuned.used, Some((40, 80)));

    let graded = run(&entry.trial(1e-3, 1), &test).unwrap();
    assert_eq!(graded.losses, tuned.losses);
    assert_ne!(graded.loss, tuned.loss);
    assert!(!graded.answers.is_empty());
    // The records after the first four, tested on as the first of another file.
    let of_others = Entry { items: 3, ..entry };
    let graded = run(&of_others.trial(1e-3, 1), &others).unwrap();
    assert_eq!(graded.loss, tuned.loss);

    let too_many = Entry { items: 7, ..entry };
    let error = run(&too_many.tuning(1e-3, 1), &test)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("--test") && error.contains("7 records of at most"),
        "{error}"
    );
}

#[test]
fn a_result_without_answers_is_none_of_the_test_problems() {
    let folder = tempfile::tempdir().unwrap();
    let whole = trial(Task::Gsm8k, Row::Lora, 1e-2, 200);
    let tuning = Trial {
        loss_only: true,
        ..whole
    };
    assert_eq!(whole.name(), "gsm8k-lora-lr1e-2-seed3-of200-steps150-k8-r4");
    assert_ne!(tuning.name(), whole.name());
    write(folder.path(), tuning, made_up());
    let path = folder.path().join(format!("{}.json", tuning.name()));
    assert!(TrialResult::read(&path, &tuning).unwrap().is_some());
    assert!(TrialResult::read(&path, &whole).is_err());

    // A result from before there were such trials is one with answers.
    let before = r#"{"task":"gsm8k","row":"lora","lr":0.01,"seed":3,"steps":150,"items":200,"rank":4,"shards":8}"#;
    assert_eq!(serde_json::from_str::<Trial>(before).unwrap(), whole);
    assert_eq!(serde_json::to_string(&whole).unwrap(), before);
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
