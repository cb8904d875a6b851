//! What is measured after the training is what was written, in the dtype it was written in, and every
//! file of the checkpoint is carried over or named.

mod common {
    pub mod case;
    pub mod weights;
}

use std::path::{Path, PathBuf};

use burn::tensor::Device;
use common::case::{Case, text};
use common::weights::{bf16_model, values};
use llama_math::Pretrained;
use llama_math::data::read_records;
use llama_math::evaluate::mean_loss;
use llama_math::prompt::PromptTemplate;
use llama_math::tokenize::Tokens;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

#[test]
#[ignore = "the program that the other tests start"]
fn program() {
    common::case::program();
}

const SHORT: [&str; 10] = [
    "--steps",
    "4",
    "--shards",
    "2",
    "--rank",
    "2",
    "--lr",
    "2e-5",
    "--warmup-ratio",
    "0",
];

/// The number behind `text`.
fn number(said: &str, behind: &str) -> f64 {
    let rest = said
        .split(behind)
        .nth(1)
        .unwrap_or_else(|| panic!("no `{behind}`: {said}"));
    let digits = |c: char| c.is_ascii_digit() || c == '.' || c == '-';
    let end = rest.find(|c| !digits(c)).unwrap_or(rest.len());
    rest[..end].trim_end_matches('.').parse().unwrap()
}

fn dtypes(folder: &Path) -> Vec<Dtype> {
    let bytes = std::fs::read(folder.join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut dtypes: Vec<Dtype> = file.iter().map(|(_, view)| view.dtype()).collect();
    dtypes.dedup();
    dtypes
}

/// The length of what was written along the update, relative to the update.
fn survived(before: &Path, exact: &Path, written: &Path) -> f64 {
    let [before, exact, written] = [before, exact, written].map(values);
    let (mut along, mut square) = (0.0, 0.0);
    for ((before, exact), written) in before.iter().zip(&exact).zip(&written) {
        for ((&b, &e), &w) in before.2.iter().zip(&exact.2).zip(&written.2) {
            along += f64::from(w - b) * f64::from(e - b);
            square += f64::from(e - b).powi(2);
        }
    }
    along / square
}

#[test]
fn the_loss_is_that_of_the_written_weights_and_the_share_that_of_the_update() {
    let case = Case::new();
    let model = case.root.path().join("bf16");
    bf16_model(&model);
    let path = |name: &str| case.root.path().join(name).to_str().unwrap().to_string();
    let run = |name: &str, further: &[&str]| -> (PathBuf, String) {
        let (model, output, eval) = (path("bf16"), path(name), path("data.jsonl"));
        let own = [
            "--model",
            &model,
            "--output",
            &output,
            "--eval",
            &eval,
            "--eval-samples",
            "8",
            "--max-new-tokens",
            "0",
        ];
        let said = case.succeeds(&[&SHORT[..], &own, further].concat());
        (output.into(), said)
    };
    let (exact, said) = run("f32", &["--output-dtype", "f32"]);
    assert!(!said.contains("survives"), "{said}");
    assert_eq!(dtypes(&exact), [Dtype::F32]);
    let config = std::fs::read_to_string(exact.join("config.json")).unwrap();
    assert!(config.contains("\"torch_dtype\": \"float32\""), "{config}");

    let mut shares = Vec::new();
    for (name, further, dtype) in [
        ("same", &[][..], Dtype::BF16),
        ("bf16", &["--output-dtype", "bf16"], Dtype::BF16),
        ("f16", &["--output-dtype", "f16"], Dtype::F16),
        ("random", &["--rounding", "stochastic"], Dtype::BF16),
    ] {
        let (output, said) = run(&format!("out-{name}"), further);
        assert_eq!(dtypes(&output), [dtype], "{name}");
        let printed = said.lines().find(|line| line.contains("survives")).unwrap();
        let share: f64 = printed.split(" %").next().unwrap().trim().parse().unwrap();
        let expected = survived(&model, &exact, &output);
        assert!(
            (share / 100.0 - expected).abs() < 1e-3,
            "{name}: {share} {expected}"
        );
        shares.push(expected);

        // The printed loss, and that of the folder as anybody reads it.
        let pretrained = Pretrained::open(&output).unwrap();
        let tokens = Tokens::of(&pretrained).unwrap();
        let mut records = read_records(Path::new(&path("data.jsonl")), None).unwrap();
        records.truncate(8);
        let template = std::fs::read_to_string(path("template.txt")).unwrap();
        let template = PromptTemplate::new(template).unwrap();
        let sequences = tokens.sequences(&records, &template, 256).unwrap().usable;
        let model = pretrained.load(&Device::flex()).unwrap();
        let loss = mean_loss(&model, &sequences, || ());
        assert!(
            (number(&said, "held-out loss after: ") - loss).abs() < 1e-4,
            "{name}: {loss}"
        );
    }
    let [same, bf16, f16, random] = shares[..] else {
        panic!("{shares:?}");
    };
    println!("survive in bf16 {same:.3}, in f16 {f16:.3}, rounded at random {random:.3}");
    assert_eq!(same, bf16);
    assert!(
        same < 0.7 && f16 > same,
        "most is lost, which is why it is said"
    );
    assert!((random - 1.0).abs() < 0.1);
}

#[test]
fn every_other_file_is_carried_over_or_named() {
    let case = Case::new();
    let model = case.root.path().join("model");
    bf16_model(&model);
    let write = |name: &str, content: &str| {
        let path = model.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    };
    let carried = [
        "modeling_mine.py",
        "additional_chat_templates/a/tool.jinja",
        "LICENSE",
        ".gitattributes",
        "generation_config.json",
        "vocab.json",
    ];
    let named = [
        "pytorch_model.bin",
        "model.fp16.safetensors",
        "original/consolidated.00.pth",
        ".git/HEAD",
        "checkpoint-5/optimizer.pt",
    ];
    for name in carried.iter().chain(&named) {
        write(name, &format!("{{\"this\": \"{name}\"}}"));
    }
    // Files of an earlier output, which this one writes itself.
    for name in ["metrics.jsonl", "loss.svg", "llama_math.json"] {
        write(name, "old");
    }
    #[cfg(unix)]
    std::os::unix::fs::symlink("../data.jsonl", model.join("README.md")).unwrap();
    let model = model.to_str().unwrap();
    let said = case.succeeds(&[&SHORT[..], &["--model", model]].concat());
    for name in carried {
        let read = |folder: &Path| std::fs::read(folder.join(name)).unwrap();
        assert_eq!(read(&case.output()), read(Path::new(model)), "{name}");
    }
    #[cfg(unix)]
    assert_eq!(
        std::fs::read(case.output().join("README-base.md")).unwrap(),
        std::fs::read(case.root.path().join("data.jsonl")).unwrap(),
        "a link is followed, and the page has another name"
    );
    let line = said
        .lines()
        .find(|line| line.contains("not carried over"))
        .unwrap();
    for name in named {
        // A folder that holds weights is named as a whole.
        let shown = name.split_once('/').map_or(name, |(folder, _)| folder);
        assert!(line.contains(shown), "{name}: {line}");
        assert!(!case.output().join(name).exists(), "{name}");
    }
    let metrics = std::fs::read_to_string(case.output().join("metrics.jsonl")).unwrap();
    assert_eq!(metrics.lines().count(), 4);
}

#[test]
fn a_stored_head_beside_a_tied_embedding_is_used_if_it_differs() {
    for (differs, shape) in [(false, None), (true, None), (true, Some(0))] {
        let case = Case::new();
        let model = case.root.path().join("model");
        bf16_model(&model);
        let mut tensors = values(&model);
        let embedding = tensors
            .iter()
            .find(|(name, ..)| name.ends_with("embed_tokens.weight"));
        let mut head = embedding.unwrap().clone();
        head.0 = "lm_head.weight".into();
        if differs {
            head.2[7] += 0.5;
        }
        if shape.is_some() {
            head.1.reverse();
        }
        tensors.push(head);
        let bytes: Vec<Vec<u8>> = tensors
            .iter()
            .map(|(_, _, values)| {
                values
                    .iter()
                    .flat_map(|value| value.to_le_bytes())
                    .collect()
            })
            .collect();
        let views = tensors.iter().zip(&bytes).map(|((name, shape, _), bytes)| {
            (
                name,
                TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap(),
            )
        });
        safetensors::serialize_to_file(views, None, &model.join("model.safetensors")).unwrap();
        let arguments = [&SHORT[..], &["--model", model.to_str().unwrap()]].concat();
        let output = case.run(&arguments);
        let said = text(&output);
        if shape.is_some() {
            assert_eq!(output.status.code(), Some(1));
            assert!(said.contains("lm_head.weight: has shape"), "{said}");
            continue;
        }
        assert!(output.status.success());
        assert_eq!(said.contains("lm_head.weight differs"), differs, "{said}");
        let written = values(&case.output());
        let head = written.iter().find(|(name, ..)| name == "lm_head.weight");
        assert_eq!(head.is_some(), differs);
    }
}
