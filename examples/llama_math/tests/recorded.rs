//! A tiny Llama against the recorded outputs and the recorded training of the published method.

mod common;

use std::collections::HashMap;
use std::path::Path;

use burn::tensor::Device;
use hd_pissa::{FrameScale, GradientMode, Windows};
use llama_math::Pretrained;
use llama_math::batch::{MicroBatch, Sequence};
use llama_math::export::ExportConfig;
use llama_math::loss::LossMean;
use llama_math::method::{Adaptation, Method, SvdOption};
use llama_math::schedule::{Decay, Schedule};
use llama_math::train::{OptimizerSettings, Trainer};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

use common::{floats, integers, largest, largest_difference, tokens};

/// The recorded run, which the repository holds.
fn run() -> Vec<u8> {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    std::fs::read(data.join("tiny_llama_k2_r4.safetensors")).unwrap()
}

/// Writes the recorded initial model as a checkpoint.
fn write_checkpoint(file: &SafeTensors, case: &Value, folder: &Path) {
    let mut config = case["config"].clone();
    config["model_type"] = "llama".into();
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let tensors: Vec<(String, TensorView)> = file
        .iter()
        .filter_map(|(name, view)| Some((name.strip_prefix("init.")?.to_string(), view)))
        .collect();
    safetensors::serialize_to_file(tensors, None, &folder.join("model.safetensors")).unwrap();
}

fn case(bytes: &[u8]) -> Value {
    let (_, metadata) = SafeTensors::read_metadata(bytes).unwrap();
    serde_json::from_str(&metadata.metadata().as_ref().unwrap()["case"]).unwrap()
}

fn size(case: &Value, key: &str) -> usize {
    case[key].as_u64().unwrap() as usize
}

#[test]
fn logits_of_the_recorded_model() {
    let bytes = run();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let folder = tempfile::tempdir().unwrap();
    write_checkpoint(&file, &case(&bytes), folder.path());

    let device = Device::flex();
    let model = Pretrained::open(folder.path())
        .unwrap()
        .load(&device)
        .unwrap();
    let (expected, shape) = floats(&file, "logits0");
    let (rows, width) = (shape[0], shape[1]);
    let ids = &integers(&file, "input_ids")[..rows * width];
    let mask = &integers(&file, "attention_mask")[..rows * width];
    let logits: Vec<f32> = model
        .forward(tokens(ids, [rows, width], &device))
        .into_data()
        .iter()
        .collect();

    // Logits in the padding have no meaning.
    let vocabulary = shape[2];
    let real = |values: &[f32]| -> Vec<f32> {
        let positions = values.chunks(vocabulary).zip(mask);
        positions
            .filter(|(_, mask)| **mask == 1)
            .flat_map(|(row, _)| row.to_vec())
            .collect()
    };
    let error = largest_difference(&real(&logits), &real(&expected)) / largest(&expected);
    println!("largest error {error:.1e} of the largest logit");
    assert!(error <= 1e-4, "{error:e}");
}

#[test]
fn training_reaches_the_recorded_weights() {
    for svd in [SvdOption::Exact, SvdOption::Krylov] {
        training_reaches_the_recorded_weights_by(svd);
    }
}

fn training_reaches_the_recorded_weights_by(svd: SvdOption) {
    let bytes = run();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let case = case(&bytes);
    let folder = tempfile::tempdir().unwrap();
    write_checkpoint(&file, &case, folder.path());

    let [steps, accumulation, shards, rows, width] =
        ["T", "M", "K", "n", "L"].map(|key| size(&case, key));
    let ids = integers(&file, "input_ids");
    let labels = integers(&file, "labels");
    let mask = integers(&file, "attention_mask");
    let sequence = |index: usize| {
        let range = index * width..(index + 1) * width;
        let length = mask[range.clone()]
            .iter()
            .filter(|&&real| real == 1)
            .count();
        let tokens: Vec<u32> = ids[range.clone()][..length]
            .iter()
            .map(|&id| id as u32)
            .collect();
        let labels = &labels[range][..length];
        let prompt_len = labels.iter().take_while(|&&label| label == -100).count();
        // The recorded labels have the shape that a prompt length can express.
        assert!(
            labels[prompt_len..]
                .iter()
                .zip(&tokens[prompt_len..])
                .all(|(&l, &t)| l == i64::from(t))
        );
        Sequence::new(tokens, prompt_len)
    };
    let micro_batch = |step: usize, micro_batch: usize, shard: usize| {
        let first = ((step * accumulation + micro_batch) * shards + shard) * rows;
        let sequences: Vec<Sequence> = (first..first + rows).map(sequence).collect();
        MicroBatch::new(&sequences.iter().collect::<Vec<_>>())
    };

    let device = Device::flex().autodiff();
    let pretrained = Pretrained::open(folder.path()).unwrap();
    let adaptation = Adaptation {
        method: Method::HdPissa,
        rank: size(&case, "r"),
        shards,
        windows: Windows::Leading,
        frame_scale: FrameScale::Balanced,
        alpha: case["alpha"].as_f64(),
        targets: None,
        gradients: GradientMode::PerShard,
        svd,
        svd_cache: None,
    };
    let model = pretrained.load(&device).unwrap();
    let settings = OptimizerSettings {
        loss_mean: LossMean::MicroBatches,
        ..OptimizerSettings::default()
    };
    let mut trainer = Trainer::new(model, &adaptation, settings).unwrap();
    let schedule = Schedule {
        peak: case["lr"].as_f64().unwrap(),
        decay: Decay::Cosine,
        warmup: size(&case, "warmup_steps"),
        total: steps,
    };
    for step in 0..steps {
        let batches: Vec<Vec<MicroBatch>> = (0..shards)
            .map(|shard| {
                (0..accumulation)
                    .map(|m| micro_batch(step, m, shard))
                    .collect()
            })
            .collect();
        let report = trainer.step(step + 1, schedule.at(step), batches).unwrap();
        let recorded: f64 = case["losses"][step]
            .as_array()
            .unwrap()
            .iter()
            .map(|x| x.as_f64().unwrap())
            .sum();
        let recorded = recorded / shards as f64;
        println!(
            "step {step}: loss {:.6}, recorded {recorded:.6}",
            report.loss
        );
        assert!((report.loss - recorded).abs() <= 1e-4 * recorded);
    }

    let output = tempfile::tempdir().unwrap();
    pretrained
        .export(
            &trainer.into_model(),
            output.path(),
            &ExportConfig::default(),
        )
        .unwrap();
    let ours = std::fs::read(output.path().join("model.safetensors")).unwrap();
    let ours = SafeTensors::deserialize(&ours).unwrap();
    let trained: HashMap<String, [Vec<f32>; 3]> = file
        .iter()
        .filter_map(|(name, _)| name.strip_prefix("final."))
        .map(|name| {
            assert_eq!(ours.tensor(name).unwrap().dtype(), Dtype::F32);
            let initial = floats(&file, &format!("init.{name}")).0;
            let expected = floats(&file, &format!("final.{name}")).0;
            (name.to_string(), [initial, expected, floats(&ours, name).0])
        })
        .collect();
    assert_eq!(trained.len(), 14);
    let largest_change = trained
        .values()
        .map(|[initial, expected, _]| largest_difference(initial, expected))
        .fold(0.0, f64::max);
    let error = trained
        .values()
        .map(|[_, expected, ours]| largest_difference(ours, expected))
        .fold(0.0, f64::max);
    println!(
        "{svd:?}: largest error {:.1e} of the largest change {largest_change:.4}",
        error / largest_change
    );
    assert!(error <= 1e-3 * largest_change);

    // What was not trained is as before.
    for name in [
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.norm.weight",
    ] {
        assert_eq!(
            floats(&ours, name).0,
            floats(&file, &format!("init.{name}")).0,
            "{name}"
        );
    }
}
