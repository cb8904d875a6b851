//! The optimizer: the effect of a step on weights, moments and clones, and its refusals.

use burn::grad_clipping::GradientClippingConfig;
use burn::lr_scheduler::module_lr_scheduler::ModuleLrSchedulerConfig;
use burn::module::{Module, ParamGroup};
use burn::nn::LinearLayout;
use burn::optim::decay::WeightDecayConfig;
use burn::optim::momentum::MomentumConfig;
use burn::optim::{
    AdaGradConfig, AdafactorConfig, AdamConfig, AdamWConfig, GradientsParams, LambConfig,
    LionConfig, ModuleOptimizer, RmsPropConfig, SgdConfig,
};
use burn::tensor::{DType, Device, Tensor};
use hd_pissa::comm::Solo;
use hd_pissa::{
    HdPissaAdapter, HdPissaConfig, HdPissaLinear, HdPissaLinearConfig, HdPissaModule,
    HdPissaOptimizerConfig, HdPissaOptimizerRecord, OptimizerError, ShardGradients,
};
use hd_pissa_tests::training::{adam, data, gradients, gradients_by, optimizer, steps};
use hd_pissa_tests::{Lean, assert_close, base, bits, normal, relative_error, values};

fn config(rank: usize, shards: usize) -> HdPissaConfig {
    HdPissaConfig::new().with_rank(rank).with_shards(shards)
}

fn adapted(config: &HdPissaConfig, device: &Device) -> Lean {
    Lean::new(device)
        .apply_hd_pissa(config, 0..config.shards)
        .unwrap()
}

/// The whole method for one layer, in `f64` on the host, written from the formulas: Adam on each
/// shard, then `W += Σ (aΔb + Δab + ΔaΔb)`.
#[test]
fn a_step_is_the_formula() {
    let device = Device::flex().autodiff();
    let (d_input, d_output, rank, shards, alpha) = (9, 7, 2, 3, 5.0);
    let layer = HdPissaLinearConfig::new(d_input, d_output)
        .with_bias(false)
        .init(&device);
    let config = config(rank, shards).with_alpha(Some(alpha));
    let mut model = layer.apply_hd_pissa(&config, 0..shards).unwrap();
    let mut optim = optimizer(adam());

    let host = |t: Tensor<2>| -> Vec<f64> { values(t).into_iter().map(f64::from).collect() };
    let adapter = model.weight.reparameterization::<HdPissaAdapter>().unwrap();
    let frames: Vec<_> = adapter
        .shards
        .iter()
        .map(|shard| (host(shard.a.val()), host(shard.b.val())))
        .collect();
    let mut w = host(base(&model.weight));
    let mut moments: Vec<_> = frames
        .iter()
        .map(|(a, b)| {
            vec![
                (vec![0.0; a.len()], vec![0.0; a.len()]),
                (vec![0.0; b.len()], vec![0.0; b.len()]),
            ]
        })
        .collect();
    let scale = alpha / rank as f64;

    for step in 1..=4 {
        let lr = 3e-3 * step as f64;
        let mut gradients = ShardGradients::new(&model);
        let mut update = vec![0.0; w.len()];
        for shard in 0..shards {
            let x = normal([4, d_input], &device);
            model = model.select_shard(shard).unwrap();
            // The loss Σ y²/2 has the gradient G = y.
            let loss = model.forward(x.clone()).square().sum() * 0.5;
            gradients.push(shard, GradientsParams::from_grads(loss.backward(), &model));

            let (x, (a, b)) = (host(x), &frames[shard]);
            let dense: Vec<f64> = (0..d_input * d_output)
                .map(|at| {
                    let (i, o) = (at / d_output, at % d_output);
                    (0..4)
                        .map(|n| {
                            let y: f64 = (0..d_input)
                                .map(|k| x[n * d_input + k] * w[k * d_output + o])
                                .sum();
                            x[n * d_input + i] * y
                        })
                        .sum()
                })
                .collect();
            let ga: Vec<f64> = (0..a.len())
                .map(|at| {
                    let (i, r) = (at / rank, at % rank);
                    scale
                        * (0..d_output)
                            .map(|o| dense[i * d_output + o] * b[r * d_output + o])
                            .sum::<f64>()
                })
                .collect();
            let gb: Vec<f64> = (0..b.len())
                .map(|at| {
                    let (r, o) = (at / d_output, at % d_output);
                    scale
                        * (0..d_input)
                            .map(|i| a[i * rank + r] * dense[i * d_output + o])
                            .sum::<f64>()
                })
                .collect();
            let deltas: Vec<Vec<f64>> = [ga, gb]
                .into_iter()
                .zip(&mut moments[shard])
                .map(|(gradient, (m, v))| {
                    gradient
                        .iter()
                        .zip(m.iter_mut().zip(v))
                        .map(|(g, (m, v))| {
                            *m = 0.9 * *m + 0.1 * g;
                            *v = 0.999 * *v + 0.001 * g * g;
                            let m_hat = *m / (1.0 - 0.9f64.powi(step));
                            let v_hat = *v / (1.0 - 0.999f64.powi(step));
                            -lr * m_hat / (v_hat.sqrt() + 1e-8)
                        })
                        .collect()
                })
                .collect();
            for (at, update) in update.iter_mut().enumerate() {
                let (i, o) = (at / d_output, at % d_output);
                for r in 0..rank {
                    let (a, da) = (a[i * rank + r], deltas[0][i * rank + r]);
                    let (b, db) = (b[r * d_output + o], deltas[1][r * d_output + o]);
                    *update += a * db + da * b + da * db;
                }
            }
        }
        for (w, update) in w.iter_mut().zip(&update) {
            *w += update;
        }
        model = optim.step(lr, model, gradients).unwrap();
        let expected: Vec<f32> = w.iter().map(|&w| w as f32).collect();
        let expected = Tensor::<1>::from_floats(&expected[..], &Device::flex());
        assert_close(base(&model.weight).flatten(0, 1), expected, 1e-5);
    }
    // The factors are frames: unchanged bit for bit.
    let adapter = model.weight.reparameterization::<HdPissaAdapter>().unwrap();
    for (shard, (a, b)) in adapter.shards.iter().zip(&frames) {
        assert_eq!((&host(shard.a.val()), &host(shard.b.val())), (a, b));
    }
}

#[test]
fn shards_with_the_same_batches_are_one_shard_of_their_rank() {
    let device = Device::flex().autodiff();
    let start = Lean::new(&device);
    let batches: Vec<Tensor<2>> = (0..5).map(|_| normal([5, 13], &device)).collect();
    let run = |rank: usize, shards: usize| {
        let model = start
            .clone()
            .apply_hd_pissa(&config(rank, shards), 0..shards)
            .unwrap();
        let data: Vec<_> = batches
            .iter()
            .map(|batch| vec![batch.clone(); shards])
            .collect();
        steps(model, &mut optimizer(adam()), &data)
    };
    let (split, whole) = (run(2, 4), run(8, 1));
    for (split, whole, start) in [
        (
            &split.first.weight,
            &whole.first.weight,
            &start.first.weight,
        ),
        (
            &split.second.weight,
            &whole.second.weight,
            &start.second.weight,
        ),
    ] {
        // Relative to the change, not to the weight.
        let start = base(start);
        assert_close(base(split) - start.clone(), base(whole) - start, 1e-4);
    }
}

#[test]
fn flipping_the_sign_of_a_component_changes_nothing() {
    struct Flip(bool);

    impl burn::module::ModuleMapper for Flip {
        fn enter_module(&mut self, name: &str, container: &str) {
            if container == "Struct:HdPissaAdapter" {
                self.0 = name == "shard_1_of_2";
            }
        }

        fn exit_module(&mut self, _: &str, container: &str) {
            if container == "Struct:HdPissaAdapter" {
                self.0 = false;
            }
        }

        fn map_float<const D: usize>(
            &mut self,
            param: burn::module::Param<Tensor<D>>,
        ) -> burn::module::Param<Tensor<D>> {
            if self.0 {
                param.map(|value| Tensor::from_inner(-value.inner()).require_grad())
            } else {
                param
            }
        }
    }

    let device = Device::flex().autodiff();
    let model = adapted(&config(3, 2), &device);
    let flipped = {
        let first = Module::map(model.first.clone(), &mut Flip(false));
        Lean {
            first,
            second: model.second.clone(),
        }
    };
    let factor = |m: &Lean| {
        let adapter = m
            .first
            .weight
            .reparameterization::<HdPissaAdapter>()
            .unwrap();
        (adapter.shards[0].a.val(), adapter.shards[1].a.val())
    };
    assert_eq!(values(factor(&flipped).0), values(factor(&model).0));
    assert_eq!(values(-factor(&flipped).1), values(factor(&model).1));

    let data = data(6, 2, &device);
    let model = steps(model, &mut optimizer(adam()), &data);
    let flipped = steps(flipped, &mut optimizer(adam()), &data);
    assert_eq!(
        bits(&base(&model.first.weight)),
        bits(&base(&flipped.first.weight))
    );
    assert_eq!(
        bits(&base(&model.second.weight)),
        bits(&base(&flipped.second.weight))
    );
}

/// Singular values of a matrix, descending, in `f64`.
fn singular_values(rows: usize, cols: usize, values: &[f32]) -> Vec<f64> {
    let matrix = faer::Mat::from_fn(rows, cols, |r, c| f64::from(values[r * cols + c]));
    matrix.singular_values().unwrap()
}

#[test]
fn the_update_has_rank_two_k_r() {
    let device = Device::flex().autodiff();
    let (rank, shards, size) = (2, 3, 40);
    let layer: HdPissaLinear = HdPissaLinearConfig::new(size, size + 5)
        .with_bias(false)
        .init(&device);
    let start = base(&layer.weight);
    let mut model = layer
        .apply_hd_pissa(&config(rank, shards), 0..shards)
        .unwrap();
    let mut optim = optimizer(adam());
    // A learning rate at which the second-order term is far below the first-order one.
    for _ in 0..3 {
        let batches = (0..shards).map(|shard| (shard, normal([64, size], &device)));
        let (selected, gradients) = gradients_by(model, HdPissaLinear::forward, batches);
        model = optim.step(1e-4, selected, gradients).unwrap();
    }
    let update = base(&model.weight) - start;
    let spectrum = singular_values(size, size + 5, &values(update));
    let full = 2 * rank * shards;
    assert!(spectrum[full - 1] > 1e-2 * spectrum[0], "{spectrum:?}");
    assert!(spectrum[full] < 1e-3 * spectrum[0], "{spectrum:?}");
}

#[test]
fn a_clone_taken_before_a_step_is_unchanged_after_it() {
    let device = Device::flex().autodiff();
    for layout in [LinearLayout::Row, LinearLayout::Col] {
        let layer = HdPissaLinearConfig::new(13, 17)
            .with_layout(layout)
            .init(&device);
        let mut model = layer.apply_hd_pissa(&config(2, 1), 0..1).unwrap();
        let mut optim = optimizer(adam());
        let before = bits(&base(&model.weight));
        let clone = model.clone();
        let valid = model.valid();
        let x = normal([4, 13], &device).require_grad();
        // A live graph holds the weight for the input's gradient.
        let live = model.forward(x.clone()).sum();

        let loss = model.forward(x.clone()).square().mean();
        let grads = GradientsParams::from_grads(loss.backward(), &model);
        model = optim.step(1e-2, model, grads).unwrap();

        assert_ne!(bits(&base(&model.weight)), before);
        assert_eq!(bits(&base(&clone.weight)), before);
        assert_eq!(bits(&base(&valid.weight)), before);
        let gradient = x.grad(&live.backward()).unwrap();
        let old = Tensor::<2>::from_data(before, &device.clone().inner());
        let expected = Tensor::<2>::ones([4, 17], &device.clone().inner()).matmul(old.transpose());
        assert_close(gradient, expected, 1e-6);
    }
}

#[test]
fn optimizers_that_read_the_parameter_are_refused() {
    let decay = || Some(WeightDecayConfig::new(1e-4));
    let refused: Vec<(&str, ModuleOptimizer)> = vec![
        ("AdamW", AdamWConfig::new().init()),
        (
            "Adam with decay",
            AdamConfig::new().with_weight_decay(decay()).init(),
        ),
        (
            "SGD with decay",
            SgdConfig::new().with_weight_decay(decay()).init(),
        ),
        (
            "RMSProp with decay",
            RmsPropConfig::new().with_weight_decay(decay()).init(),
        ),
        (
            "Lion with decay",
            LionConfig::new().with_weight_decay(1e-5).init(),
        ),
        ("Lamb", LambConfig::new().init()),
        (
            "Adafactor",
            AdafactorConfig::new().with_scale_parameter(true).init(),
        ),
    ];
    for (name, inner) in refused {
        let error = HdPissaOptimizerConfig::new().init(inner, Solo).err();
        assert_eq!(
            error,
            Some(OptimizerError::ReadsParameter { path: None }),
            "{name}"
        );
    }
    let accepted: Vec<(&str, ModuleOptimizer)> = vec![
        ("Adam", adam()),
        ("AMSGrad", AdamConfig::new().with_amsgrad(true).init()),
        (
            "AdamW without decay",
            AdamWConfig::new().with_weight_decay(0.0).init(),
        ),
        (
            "Lion without decay",
            LionConfig::new().with_weight_decay(0.0).init(),
        ),
        (
            "SGD",
            SgdConfig::new()
                .with_momentum(Some(MomentumConfig::new()))
                .init(),
        ),
        ("RMSProp", RmsPropConfig::new().init()),
        ("Adagrad", AdaGradConfig::new().init()),
        (
            "Adafactor",
            AdafactorConfig::new().with_scale_parameter(false).init(),
        ),
    ];
    let device = Device::flex().autodiff();
    let batches = data(2, 2, &device);
    for (name, inner) in accepted {
        let mut optim = HdPissaOptimizerConfig::new()
            .init(inner, Solo)
            .unwrap_or_else(|e| panic!("{name}: {e}"));
        let model = steps(adapted(&config(2, 2), &device), &mut optim, &batches);
        assert!(
            values(base(&model.first.weight))
                .iter()
                .all(|w| w.is_finite()),
            "{name}"
        );
    }

    let clipping = AdamConfig::new()
        .with_grad_clipping(Some(GradientClippingConfig::Norm(1.0)))
        .init();
    let error = HdPissaOptimizerConfig::new().init(clipping, Solo).err();
    assert_eq!(error, Some(OptimizerError::ClipsPerTensor));
}

#[test]
fn parameter_groups_are_probed_with_the_paths_of_the_model() {
    let device = Device::flex().autodiff();
    let group = ParamGroup::from_regex(r"second\.weight\.hd_pissa\..*\.b$").unwrap();
    let inner = adam().with_group(group, AdamWConfig::new().build(), None);
    let mut optim = optimizer(inner);
    let (model, gradients) = gradients(adapted(&config(2, 2), &device), &data(1, 2, &device)[0]);
    let error = optim.step(1e-3, model, gradients).unwrap_err();
    let path = Some("second.weight.hd_pissa.shard_0_of_2.b".to_string());
    assert_eq!(error.cause, OptimizerError::ReadsParameter { path });
}

#[test]
fn learning_rates_of_parameter_groups_reach_the_factors() {
    let device = Device::flex().autodiff();
    let model = adapted(&config(2, 2), &device);
    let (first, second) = (
        bits(&base(&model.first.weight)),
        bits(&base(&model.second.weight)),
    );
    let (model, gradients) = gradients(model, &data(1, 2, &device)[0]);
    let mut scheduler = ModuleLrSchedulerConfig::new(1e-3.into())
        .with_group(ParamGroup::from_predicate("second.weight"), 0.0)
        .init()
        .unwrap();
    let lr = scheduler.step();
    let model = optimizer(adam()).step(lr, model, gradients).unwrap();
    assert_ne!(bits(&base(&model.first.weight)), first);
    assert_eq!(bits(&base(&model.second.weight)), second);
}

#[test]
fn clipping_is_by_the_global_norm_of_each_shard() {
    let device = Device::flex().autodiff();
    let model = adapted(&config(2, 2), &device);
    let batches = &data(1, 2, &device)[0];
    let shift = |max_norm: Option<f64>, factors: [f64; 2]| {
        let config = HdPissaOptimizerConfig::new().with_max_grad_norm(max_norm);
        let mut optim = config.init(SgdConfig::new().init(), Solo).unwrap();
        let mut model = model.clone();
        let mut gradients = ShardGradients::new(&model);
        let mut norms = [0.0; 2];
        for (shard, batch) in batches.iter().enumerate() {
            model = model.select_shard(shard).unwrap();
            let loss = model.forward(batch.clone()).square().mean() * factors[shard];
            let grads = GradientsParams::from_grads(loss.backward(), &model);
            for weight in [&model.first.weight, &model.second.weight] {
                let shard_factors = &weight
                    .reparameterization::<HdPissaAdapter>()
                    .unwrap()
                    .shards[shard];
                for id in [shard_factors.a.id, shard_factors.b.id] {
                    let gradient = grads.get::<2>(id).unwrap();
                    norms[shard] += gradient.square().sum().into_scalar::<f32>() as f64;
                }
            }
            gradients.push(shard, grads);
        }
        let start = base(&model.first.weight);
        // So large that the rounding of the weight is small relative to the update.
        let model = optim.step(1e-1, model, gradients).unwrap();
        (base(&model.first.weight) - start, norms.map(f64::sqrt))
    };
    // Shard 1 is far above the threshold, shard 0 below it.
    let (_, norms) = shift(None, [1.0, 100.0]);
    let max_norm = norms[0] * 2.0;
    assert!(norms[1] > 2.0 * max_norm, "{norms:?}");
    let (clipped, _) = shift(Some(max_norm), [1.0, 100.0]);
    let (by_hand, _) = shift(None, [1.0, 100.0 * max_norm / norms[1]]);
    assert_close(clipped, by_hand, 1e-4);

    // A threshold above the range of `f32` never clips.
    let (free, _) = shift(Some(1e300), [1.0, 100.0]);
    let (unclipped, _) = shift(None, [1.0, 100.0]);
    assert_close(free, unclipped, 0.0);

    for bad in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        let config = HdPissaOptimizerConfig::new().with_max_grad_norm(Some(bad));
        let error = config.init(adam(), Solo).unwrap_err();
        assert!(matches!(error, OptimizerError::InvalidMaxGradNorm { .. }));
    }
}

#[test]
fn other_parameters_take_the_mean_of_the_shards() {
    let device = Device::flex().autodiff();
    let model = adapted(&config(2, 2), &device)
        .set_require_grad_group(ParamGroup::from_path("first.bias"), true);
    let bias = |m: &Lean| m.first.bias.as_ref().unwrap().val().inner();
    let before = bias(&model);
    let batches = &data(1, 2, &device)[0];
    let mut model = model;
    let mut gradients = ShardGradients::new(&model);
    let mut sum = before.zeros_like();
    for (shard, batch) in batches.iter().enumerate() {
        model = model.select_shard(shard).unwrap();
        let loss = model.forward(batch.clone()).square().mean();
        let grads = GradientsParams::from_grads(loss.backward(), &model);
        sum = sum
            + grads
                .get::<1>(model.first.bias.as_ref().unwrap().id)
                .unwrap();
        gradients.push(shard, grads);
    }
    let model = optimizer(SgdConfig::new().init())
        .step(0.5, model, gradients)
        .unwrap();
    assert_close(bias(&model) - before, sum * -0.25, 1e-5);
}

#[test]
fn the_norm_of_an_update_is_that_of_the_change() {
    let device = Device::flex().autodiff();
    let (model, gradients) = gradients(adapted(&config(2, 2), &device), &data(1, 2, &device)[0]);
    let weights = |m: &Lean| [base(&m.first.weight), base(&m.second.weight)];
    let before = weights(&model);
    let config = HdPissaOptimizerConfig::new().with_measure_norms(true);
    let mut optim = config.init(adam(), Solo).unwrap();
    assert_eq!(optim.update_norm(), None);
    let model = optim.step(1e-2, model, gradients).unwrap();
    let change: f64 = weights(&model)
        .into_iter()
        .zip(before)
        .flat_map(|(after, before)| values(after - before))
        .map(|x| f64::from(x).powi(2))
        .sum();
    let norm = optim.update_norm().unwrap();
    assert!((norm / change.sqrt() - 1.0).abs() < 1e-4, "{norm} {change}");
}

#[test]
fn micro_batches_add_up_per_shard() {
    let device = Device::flex().autodiff();
    let model = adapted(&config(2, 2), &device);
    let parts: Vec<Vec<Tensor<2>>> = data(3, 2, &device);
    let run = |mean: bool| {
        let mut model = model.clone();
        let mut gradients = ShardGradients::new(&model);
        for shard in 0..2 {
            model = model.select_shard(shard).unwrap();
            if mean {
                for part in &parts {
                    let loss = model.forward(part[shard].clone()).square().mean();
                    gradients.push(shard, GradientsParams::from_grads(loss.backward(), &model));
                }
            } else {
                let whole = Tensor::cat(parts.iter().map(|part| part[shard].clone()).collect(), 0);
                let loss = model.forward(whole).square().mean();
                gradients.push(shard, GradientsParams::from_grads(loss.backward(), &model));
            }
        }
        let gradients = if mean {
            gradients.into_mean()
        } else {
            gradients
        };
        let start = base(&model.first.weight);
        let model = optimizer(SgdConfig::new().init())
            .step(0.1, model, gradients)
            .unwrap();
        base(&model.first.weight) - start
    };
    assert_close(run(true), run(false), 1e-4);
}

#[test]
fn records_resume_bit_for_bit() {
    let device = Device::flex().autodiff();
    let data = data(6, 2, &device);
    let start = adapted(&config(3, 2), &device);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("optimizer.bpk");

    let mut optim = optimizer(adam());
    let half = steps(start.clone(), &mut optim, &data[..3]);
    optim.to_record().unwrap().save(&file).unwrap();
    let record = half.clone().into_record().into_bytes().unwrap();
    let whole = steps(half, &mut optim, &data[3..]);

    // One that takes no step passes the state on as it is.
    let mut between = optimizer(adam());
    between
        .load_record(HdPissaOptimizerRecord::load(&file).unwrap())
        .unwrap();
    let mut optim = optimizer(adam());
    optim.load_record(between.to_record().unwrap()).unwrap();
    let loaded = adapted(&config(3, 2), &device)
        .load_record(burn::store::ModuleRecord::from_bytes(record).unwrap());
    let resumed = steps(loaded, &mut optim, &data[3..]);
    assert_eq!(
        bits(&base(&resumed.first.weight)),
        bits(&base(&whole.first.weight))
    );
    assert_eq!(
        bits(&base(&resumed.second.weight)),
        bits(&base(&whole.second.weight))
    );
    // Without the moments the run would differ.
    let mut fresh = optimizer(adam());
    let half = steps(start, &mut optimizer(adam()), &data[..3]);
    let other = steps(half, &mut fresh, &data[3..]);
    assert!(relative_error(base(&other.first.weight), base(&whole.first.weight)) > 1e-4);
}

#[test]
fn damaged_records_are_typed_errors() {
    let device = Device::flex().autodiff();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("optimizer.bpk");
    let mut optim = optimizer(adam());
    steps(
        adapted(&config(2, 2), &device),
        &mut optim,
        &data(1, 2, &device),
    );
    optim.to_record().unwrap().save(&file).unwrap();
    let bytes = std::fs::read(&file).unwrap();

    let missing = HdPissaOptimizerRecord::load(folder.path().join("absent.bpk")).unwrap_err();
    assert!(matches!(&missing, OptimizerError::Io { path, .. } if path.ends_with("absent.bpk")));
    for damaged in [
        Vec::new(),
        bytes[..bytes.len() / 2].to_vec(),
        vec![0xab; 512],
    ] {
        std::fs::write(&file, damaged).unwrap();
        let error = HdPissaOptimizerRecord::load(&file).unwrap_err();
        assert!(
            matches!(error, OptimizerError::InvalidRecord { .. }),
            "{error}"
        );
    }
    // A record of Burn's own optimizer does not have our version.
    let foreign = adam().into_bytes().unwrap();
    let error = HdPissaOptimizerRecord::from_bytes(foreign).unwrap_err();
    assert!(
        error.to_string().contains("hd_pissa.format_version"),
        "{error}"
    );
    // A folder that does not exist: nothing is left behind.
    let record = optim.to_record().unwrap();
    let error = record.save(folder.path().join("no/such/file")).unwrap_err();
    assert!(matches!(error, OptimizerError::Io { .. }));
}

#[test]
fn half_precision_weights_take_the_rounded_sum() {
    let device = Device::flex().autodiff();
    for dtype in [DType::F16, DType::BF16] {
        let mut layer = HdPissaLinearConfig::new(13, 17)
            .with_bias(false)
            .init(&device);
        layer.weight = layer
            .weight
            .map(|w| Tensor::from_inner(w.inner().cast(dtype)));
        let full = {
            let mut full = layer.clone();
            full.weight = full
                .weight
                .map(|w| Tensor::from_inner(w.inner().cast(DType::F32)));
            full.apply_hd_pissa(&config(2, 1), 0..1).unwrap()
        };
        let half = layer.apply_hd_pissa(&config(2, 1), 0..1).unwrap();
        let gradient = |model: &HdPissaLinear| {
            let shard = &model
                .weight
                .reparameterization::<HdPissaAdapter>()
                .unwrap()
                .shards[0];
            let mut grads = GradientsParams::new();
            // The same gradients for both, so that only the merge differs.
            for (param, seed) in [(&shard.a, 0.25), (&shard.b, -0.5)] {
                grads.register(param.id, param.val().inner() * seed + 0.01);
            }
            grads
        };
        let (half_grads, full_grads) = (gradient(&half), gradient(&full));
        let half = optimizer(adam()).step(0.1, half, half_grads).unwrap();
        let full = optimizer(adam()).step(0.1, full, full_grads).unwrap();
        assert_eq!(base(&half.weight).dtype(), dtype);
        assert_eq!(
            bits(&base(&half.weight)),
            bits(&base(&full.weight).cast(dtype))
        );
    }
}
