//! SmolLM2-135M against recorded outputs and four recorded steps of the published method.

mod common;

use std::collections::HashMap;
use std::path::Path;
use std::time::Instant;

use burn::module::{Module, ParamGroup};
use burn::tensor::Device;
use hd_pissa::{
    Decomposition, FrameScale, GradientMode, HdPissa, HdPissaAdapter, HdPissaConfig, SvdMethod,
    SvdPrecision, Windows,
};
use llama_math::batch::{MicroBatch, Sequence};
use llama_math::data::{Record, read_records};
use llama_math::evaluate::{greedy, mean_loss};
use llama_math::loss::LossMean;
use llama_math::method::{Adaptation, DEFAULT_TARGETS, Method, SvdOption};
use llama_math::prompt::PromptTemplate;
use llama_math::schedule::{Decay, Schedule};
use llama_math::tokenize::Tokens;
use llama_math::train::{OptimizerSettings, Trainer};
use llama_math::{Continued, Pretrained};
use serde_json::Value;

use common::{recorded, smollm2};

fn read(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn numbers(value: &Value) -> Vec<f64> {
    value
        .as_array()
        .unwrap()
        .iter()
        .map(|x| x.as_f64().unwrap())
        .collect()
}

fn ids(value: &Value) -> Vec<i64> {
    value
        .as_array()
        .unwrap()
        .iter()
        .map(|x| x.as_i64().unwrap())
        .collect()
}

#[test]
fn logits_and_greedy_tokens_are_the_recorded_ones() {
    let (Some(folder), Some(path)) = (smollm2(), recorded("smollm2_outputs.json")) else {
        return;
    };
    let device = Device::flex();
    let pretrained = Pretrained::open(&folder).unwrap();
    let model = pretrained.load(&device).unwrap();
    for (name, case) in read(&path).as_object().unwrap() {
        if case.get("greedy20").is_none() {
            continue;
        }
        let prompt: Vec<u32> = ids(&case["input_ids"])
            .iter()
            .map(|&id| id as u32)
            .collect();
        let logits: Vec<f32> = model
            .next_logits(&mut [Continued::new(prompt.clone())])
            .into_data()
            .iter()
            .collect();
        let largest = common::largest(&logits);
        let expected = numbers(&case["top5_logits"]);
        let top = ids(&case["top5_ids"]);
        let error = top
            .iter()
            .zip(&expected)
            .map(|(&id, logit)| (f64::from(logits[id as usize]) - logit).abs())
            .fold(0.0, f64::max);
        println!(
            "{name}: largest error {:.1e} of the largest logit",
            error / largest
        );
        assert!(error <= 1e-4 * largest);
        let norm = logits
            .iter()
            .map(|&x| f64::from(x).powi(2))
            .sum::<f64>()
            .sqrt();
        let mean = logits.iter().map(|&x| f64::from(x)).sum::<f64>() / logits.len() as f64;
        let (norm0, mean0) = (
            case["logits_l2"].as_f64().unwrap(),
            case["logits_mean"].as_f64().unwrap(),
        );
        assert!(
            (norm - norm0).abs() <= 1e-4 * norm0,
            "norm {norm}, recorded {norm0}"
        );
        assert!(
            (mean - mean0).abs() <= 1e-4 * largest,
            "mean {mean}, recorded {mean0}"
        );

        // A prompt fed in two parts through the cache gives the tokens of one fed whole.
        let recorded = ids(&case["greedy20"]);
        let ours = greedy(&model, &[&prompt], recorded.len(), |_| false, || ()).remove(0);
        assert_eq!(
            ours.iter().map(|&id| i64::from(id)).collect::<Vec<_>>(),
            recorded,
            "{name}"
        );
    }
}

#[test]
fn four_recorded_steps() {
    let (Some(folder), Some(path)) = (smollm2(), recorded("smollm2_hdpissa_k2_r16_4steps.json"))
    else {
        return;
    };
    let case = read(&path);
    let shards = case["K"].as_u64().unwrap() as usize;
    let sequence = |step: usize, shard: usize| {
        let tokens = ids(&case["input_ids_step_rank"][step][shard]);
        let labels = ids(&case["labels_step_rank"][step][shard]);
        let prompt_len = labels.iter().take_while(|&&label| label == -100).count();
        assert_eq!(labels[prompt_len..], tokens[prompt_len..]);
        Sequence::new(tokens.iter().map(|&id| id as u32).collect(), prompt_len)
    };

    let device = Device::flex().autodiff();
    let pretrained = Pretrained::open(&folder).unwrap();
    let model = pretrained.load(&device).unwrap();
    let before: Vec<(String, _)> = model
        .matrices()
        .into_iter()
        .map(|(name, weight)| (name, weight.val().inner()))
        .collect();
    let adaptation = Adaptation {
        method: Method::HdPissa,
        rank: case["r"].as_u64().unwrap() as usize,
        shards,
        windows: Windows::Leading,
        frame_scale: FrameScale::Balanced,
        alpha: case["alpha"].as_f64(),
        targets: None,
        gradients: GradientMode::PerShard,
        svd: SvdOption::Exact,
        svd_cache: None,
    };
    let settings = OptimizerSettings {
        loss_mean: LossMean::MicroBatches,
        ..OptimizerSettings::default()
    };
    let mut trainer = Trainer::new(model, &adaptation, settings).unwrap();
    let losses = numbers(&case["official_losses"]);
    let schedule = Schedule {
        peak: case["lr"].as_f64().unwrap(),
        decay: Decay::Cosine,
        warmup: 0,
        total: losses.len(),
    };
    for (step, recorded) in losses.into_iter().enumerate() {
        let batches: Vec<Vec<MicroBatch>> = (0..shards)
            .map(|shard| vec![MicroBatch::new(&[&sequence(step, shard)])])
            .collect();
        let report = trainer.step(step + 1, schedule.at(step), batches).unwrap();
        println!(
            "step {step}: loss {:.6}, recorded {recorded:.6}",
            report.loss
        );
        assert!((report.loss - recorded).abs() <= 1e-4 * recorded);
    }

    let norms = case["layer_update_norms"].as_object().unwrap();
    let model = trainer.into_model();
    let (mut compared, mut worst) = (0, 0.0f64);
    for ((name, before), (_, after)) in before.into_iter().zip(model.matrices()) {
        let layer = name.strip_suffix(".weight").unwrap();
        let change = after.base().inner() - before;
        let norm: f64 = change.square().sum().sqrt().into_scalar();
        match norms.get(layer) {
            Some(recorded) => {
                let recorded = recorded["fro"].as_f64().unwrap();
                compared += 1;
                worst = worst.max((norm - recorded).abs() / recorded);
            }
            None => assert_eq!(norm, 0.0, "{name} is frozen"),
        }
    }
    println!("{compared} update norms, largest relative error {worst:.1e}");
    assert_eq!(compared, norms.len());
    assert!(worst <= 0.01);
}

/// All 210 projections: the block Krylov method against the exact one in double precision.
#[test]
fn krylov_frames_are_the_exact_ones() {
    let Some(folder) = smollm2() else {
        return;
    };
    let device = Device::flex().autodiff();
    let pretrained = Pretrained::open(&folder).unwrap();
    let model = pretrained.load(&device).unwrap();
    // Both factors of every weight, with components as rows.
    let adapted = |svd: SvdMethod, rank: usize| {
        let config = HdPissaConfig::new()
            .with_rank(rank)
            .with_shards(2)
            .with_svd(svd)
            .with_targets(Some(ParamGroup::from_regex(DEFAULT_TARGETS).unwrap()));
        let mut decompositions = HashMap::new();
        let start = Instant::now();
        let adapters = HdPissa::prepare(&model, &config, 0..2, |weight| {
            decompositions.insert(weight.path, weight.decomposition);
        });
        let seconds = start.elapsed().as_secs_f64();
        let model = model.clone().apply_reparameterization(adapters.unwrap());
        let factors = model.matrices().into_iter().filter_map(|(path, weight)| {
            let adapter = weight.reparameterization::<HdPissaAdapter>()?;
            let rows = adapter.shards.iter().flat_map(|shard| {
                let a = shard.a.val().inner().transpose();
                [a, shard.b.val().inner()].map(|rows| {
                    let width = rows.dims()[1];
                    let values: Vec<f64> = rows.into_data().iter().collect();
                    values
                        .chunks(width)
                        .map(<[f64]>::to_vec)
                        .collect::<Vec<_>>()
                })
            });
            Some((path, rows.flatten().collect::<Vec<_>>()))
        });
        (factors.collect::<Vec<_>>(), decompositions, seconds)
    };
    let product = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>();
    for rank in [8, 16] {
        let (exact, _, _) = adapted(SvdMethod::Exact(SvdPrecision::F64), rank);
        let (_, _, exact_seconds) = adapted(SvdMethod::Exact(SvdPrecision::F32), rank);
        let (krylov, decompositions, seconds) = adapted(SvdMethod::Krylov, rank);
        assert_eq!(krylov.len(), 210);
        let mut smallest = (1.0, String::new());
        for ((path, ours), (_, exact)) in krylov.iter().zip(&exact) {
            for (x, y) in ours.iter().zip(exact) {
                // Two entries of about the same size can decide the sign.
                let cosine = product(x, y).abs() / (product(x, x) * product(y, y)).sqrt();
                if cosine < smallest.0 {
                    smallest = (cosine, path.clone());
                }
            }
        }
        let by = |is: fn(&Decomposition) -> bool| decompositions.values().filter(|d| is(d)).count();
        println!(
            "{} components: smallest cosine {:.7} ({}); {} weights by Krylov, {} fell back, {} exact; \
             {seconds:.1} s, exact {exact_seconds:.1} s",
            2 * rank,
            smallest.0,
            smallest.1,
            by(|d| matches!(d, Decomposition::Krylov { .. })),
            by(|d| matches!(d, Decomposition::Fallback(_))),
            by(|d| matches!(d, Decomposition::Exact)),
        );
        for (path, decomposition) in &decompositions {
            if let Decomposition::Fallback(failure) = decomposition {
                println!("{path}: {failure}");
            }
        }
        assert!(smallest.0 >= 0.999, "{smallest:?}");
    }
}

#[test]
fn the_first_problem_of_gsm8k_has_the_recorded_tokens_and_loss() {
    let (Some(folder), Some(path), Some(data)) = (
        smollm2(),
        recorded("smollm2_outputs.json"),
        recorded("../data/gsm8k/train.jsonl"),
    ) else {
        return;
    };
    let pretrained = Pretrained::open(&folder).unwrap();
    let record = &read_records(&data, None).unwrap()[0];
    let tokens = Tokens::of(&pretrained).unwrap();
    let sequence = tokens
        .sequence(record, &PromptTemplate::default(), 512)
        .unwrap();
    let case = &read(&path)["gsm8k_train_0"];
    let ours: Vec<i64> = sequence.tokens.iter().map(|&id| i64::from(id)).collect();
    assert_eq!(ours, ids(&case["input_ids"]));
    assert_eq!(
        sequence.targets[0].start as u64,
        case["source_len"].as_u64().unwrap()
    );

    let model = pretrained.load(&Device::flex()).unwrap();
    let loss = mean_loss(&model, &[sequence], || ());
    let recorded = case["loss_fp32"].as_f64().unwrap();
    println!("loss {loss:.6}, recorded {recorded:.6}");
    assert!((loss - recorded).abs() <= 1e-4 * recorded);
}

#[test]
fn tokenization_is_the_recorded_one() {
    let (Some(folder), Some(path), Some(data)) = (
        smollm2(),
        recorded("smollm2_hdpissa_k2_r16_4steps.json"),
        recorded("../data/gsm8k/test.jsonl"),
    ) else {
        return;
    };
    let pretrained = Pretrained::open(&folder).unwrap();
    let tokenizer = Tokens::of(&pretrained).unwrap();
    let template = PromptTemplate::default();
    let mut records = read_records(&data, None).unwrap();
    records.extend(read_records(&data.with_file_name("train.jsonl"), None).unwrap());
    let case = read(&path);
    let mut found = 0;
    for (step, shards) in case["input_ids_step_rank"]
        .as_array()
        .unwrap()
        .iter()
        .enumerate()
    {
        for (shard, tokens) in shards.as_array().unwrap().iter().enumerate() {
            let tokens: Vec<u32> = ids(tokens).iter().map(|&id| id as u32).collect();
            let labels = ids(&case["labels_step_rank"][step][shard]);
            let text = tokenizer.decode(&tokens).unwrap();
            let same = |record: &&Record| text.contains(&record.instruction);
            let record = records
                .iter()
                .find(same)
                .expect("the recorded problem is in the data");
            let ours = tokenizer.sequence(record, &template, tokens.len()).unwrap();
            // Short records are filled up to one length in the recording, where ours end.
            let length = match ours.tokens.last() {
                Some(&end) if tokenizer.is_end(end) => ours.tokens.len() - 1,
                _ => tokens.len(),
            };
            assert_eq!(ours.tokens[..length], tokens[..length]);
            assert_eq!(
                ours.targets[0].start,
                labels.iter().take_while(|&&label| label == -100).count()
            );
            found += 1;
        }
    }
    println!("{found} recorded sequences");
}
