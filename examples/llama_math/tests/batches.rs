//! How records are put into micro-batches changes no loss and no gradient: packed and padded rows against
//! single ones, and steps of many micro-batches against steps of one.

use std::path::Path;

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Device, Tensor};
use hd_pissa::{FrameScale, GradientMode, Windows};
use llama_math::batch::{MicroBatch, Sequence};
use llama_math::loss::LossMean;
use llama_math::method::{Adaptation, Method, SvdOption};
use llama_math::train::{OptimizerSettings, StepReport, Trainer};
use llama_math::{Llama, Pretrained};

/// A tiny checkpoint of a family, with gradients.
fn model(family: &str) -> Llama {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let pretrained = Pretrained::open(&folder.join(family)).unwrap();
    pretrained.load(&Device::flex().autodiff()).unwrap()
}

/// Records of very different lengths; the second one has targets in two places.
fn sequences() -> Vec<Sequence> {
    let tokens = |start: u32, len: u32| (0..len).map(|i| (start + 7 * i * i) % 40).collect();
    vec![
        Sequence::new(tokens(3, 13), 4),
        Sequence::with_targets(tokens(11, 9), vec![2..4, 6..9]),
        Sequence::new(tokens(5, 2), 1),
        Sequence::new(tokens(29, 17), 1),
    ]
}

/// Every parameter's gradient of a micro-batch's loss, after that loss.
fn loss_and_gradients(model: &Llama, batch: &MicroBatch) -> (f64, Vec<f32>) {
    struct Collect<'a>(&'a burn::tensor::Gradients, Vec<f32>);

    impl ModuleVisitor for Collect<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let gradient = param.val().grad(self.0).expect("every parameter has one");
            self.1.extend(gradient.into_data().iter::<f32>());
        }
    }

    let loss = batch.loss(model, &Device::flex().autodiff());
    let value = loss.clone().into_scalar();
    let gradients = loss.backward();
    let mut collect = Collect(&gradients, Vec::new());
    model.visit(&mut collect);
    (value, collect.1)
}

/// Largest difference, relative to the largest value.
fn error(ours: &[f32], theirs: &[f32]) -> f32 {
    assert_eq!(ours.len(), theirs.len());
    let differences = ours.iter().zip(theirs).map(|(x, y)| (x - y).abs());
    let largest = theirs
        .iter()
        .fold(0.0, |largest: f32, x| largest.max(x.abs()));
    differences.fold(0.0, f32::max) / largest
}

#[test]
fn rows_in_one_batch_have_the_losses_and_gradients_of_each_alone() {
    let sequences = sequences();
    let rows: Vec<&Sequence> = sequences.iter().collect();
    // A window shorter than the records, layers without rotary, frequencies that depend on the length.
    for family in [
        "llama3",
        "mistral",
        "smollm3",
        "phi3",
        "qwen3",
        "llama_dynamic",
    ] {
        let model = model(family);
        let alone = rows
            .iter()
            .map(|&row| loss_and_gradients(&model, &MicroBatch::new(&[row])));
        let alone = alone.reduce(|(loss, sum), (next, gradients)| {
            let sum = sum.iter().zip(gradients).map(|(x, y)| x + y);
            (loss + next, sum.collect())
        });
        let alone = alone.expect("there are rows");
        let mut batches = vec![("packed", MicroBatch::packed(&rows))];
        // In a padded batch all rows have the frequencies of the longest one, as in transformers.
        if family != "llama_dynamic" {
            batches.push(("padded", MicroBatch::new(&rows)));
        }
        for (form, batch) in batches {
            let (loss, gradients) = loss_and_gradients(&model, &batch);
            let of_loss = (loss / alone.0 - 1.0).abs();
            let of_gradients = error(&gradients, &alone.1);
            println!("{family}, {form}: loss {of_loss:.1e}, gradients {of_gradients:.1e}");
            assert!(
                of_loss < 1e-5 && of_gradients < 1e-5,
                "{family}, {form}: {of_loss:e} {of_gradients:e}"
            );
        }
        // Sequences that could see each other would have another loss.
        let joined: Vec<u32> = rows.iter().flat_map(|row| row.tokens.clone()).collect();
        let joined = MicroBatch::new(&[&Sequence::new(joined, 1)]);
        let one_text = loss_and_gradients(&model, &joined).0 / joined.targets().len() as f64;
        let apart = alone.0 / MicroBatch::new(&rows).targets().len() as f64;
        assert!((one_text / apart - 1.0).abs() > 1e-3, "{family}");
    }
}

/// Two steps of full fine-tuning, or of HD-PiSSA with two shards, which share gradients unless both have
/// micro-batches.
fn trained(
    method: Method,
    mean: LossMean,
    micro_batches: &[Vec<MicroBatch>],
) -> (Vec<StepReport>, Vec<f32>) {
    let adaptation = Adaptation {
        method,
        rank: 2,
        shards: 2,
        windows: Windows::Leading,
        frame_scale: FrameScale::Balanced,
        alpha: None,
        targets: None,
        gradients: match micro_batches.len() {
            1 => GradientMode::Shared,
            _ => GradientMode::PerShard,
        },
        svd: SvdOption::Exact,
        svd_cache: None,
    };
    let settings = OptimizerSettings {
        loss_mean: mean,
        ..OptimizerSettings::default()
    };
    let mut trainer = Trainer::new(model("llama_biases"), &adaptation, settings).unwrap();
    let step = |step| trainer.step(step, 1e-3, micro_batches.to_vec()).unwrap();
    let reports = (1..=2).map(step).collect();
    let model = trainer.into_model().valid().materialize();
    let mut all = Vec::new();
    for (_, weight) in model.matrices() {
        all.extend(weight.val().into_data().iter::<f32>());
    }
    (reports, all)
}

#[test]
fn a_step_of_many_micro_batches_is_that_of_a_large_one() {
    // On a CPU, HD-PiSSA takes the large ones in several passes.
    let sequences: Vec<Sequence> = (0..8).flat_map(|_| sequences()).collect();
    let rows: Vec<&Sequence> = sequences.iter().collect();
    let large = vec![MicroBatch::new(&rows)];
    let single: Vec<_> = rows.iter().map(|row| MicroBatch::new(&[row])).collect();
    let two = vec![
        MicroBatch::packed(&rows[..24]),
        MicroBatch::new(&rows[24..]),
    ];
    for (method, shards) in [
        (Method::Full, 1),
        (Method::HdPissa, 1),
        (Method::HdPissa, 2),
    ] {
        let [one, many, two] = [&large, &single, &two].map(|batches| vec![batches.clone(); shards]);
        let large = trained(method, LossMean::Tokens, &one);
        let of = |mean, batches: &[Vec<MicroBatch>]| {
            let (reports, weights) = trained(method, mean, batches);
            let relative = |x: f64, y: f64| (x / y - 1.0).abs();
            let pairs = reports.iter().zip(&large.0);
            let differences = pairs.flat_map(|(ours, theirs)| {
                [
                    relative(ours.loss, theirs.loss),
                    relative(ours.gradient_norm, theirs.gradient_norm),
                ]
            });
            (differences.fold(0.0, f64::max), error(&weights, &large.1))
        };
        for batches in [&many, &two] {
            let (of_reports, of_weights) = of(LossMean::Tokens, batches);
            println!("{method}: loss and norm {of_reports:.1e}, weights {of_weights:.1e}");
            assert!(
                of_reports < 1e-4 && of_weights < 1e-5,
                "{of_reports:e} {of_weights:e}"
            );
        }
        // The published mean weighs short answers more.
        let (published, _) = of(LossMean::MicroBatches, &many);
        assert!(published > 1e-2, "{published:e}");
    }
}
