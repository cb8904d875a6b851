//! Refusals of an optimizer step, which change nothing.

use burn::module::{Module, ParamGroup};
use burn::optim::{GradientsParams, LionConfig, SgdConfig};
use burn::tensor::{DType, Device, Tensor};
use hd_pissa::comm::Solo;
use hd_pissa::{
    HdPissaAdapter, HdPissaConfig, HdPissaLinear, HdPissaLinearConfig, HdPissaModule,
    HdPissaOptimizerConfig, OptimizerError, ShardGradients,
};
use hd_pissa_tests::training::{adam, data, gradients, optimizer, steps};
use hd_pissa_tests::{Dense, Lean, base, bits, normal, resumed, state, values};

fn adapted(rank: usize, shards: usize, device: &Device) -> Lean {
    let config = HdPissaConfig::new().with_rank(rank).with_shards(shards);
    Lean::new(device)
        .apply_hd_pissa(&config, 0..shards)
        .unwrap()
}

#[test]
fn refused_steps_change_nothing() {
    let device = Device::flex().autodiff();
    let model = adapted(2, 2, &device);
    let mut optim = optimizer(adam());
    let good = data(3, 2, &device);
    let mut model = steps(model, &mut optim, &good[..1]);

    // The moments after a refused step are those before it: the next step is the same either way.
    let reference = {
        let mut optim = resumed(optimizer(adam()), state(&optim)).unwrap();
        steps(model.clone(), &mut optim, &good[1..])
    };
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let before = bits(&base(&model.first.weight));
        let mut batches = good[1].clone();
        batches[1] = batches[1].clone() * bad;
        let (selected, gradients) = gradients(model, &batches);
        let error = optim.step(1e-2, selected, gradients).unwrap_err();
        match &error.cause {
            OptimizerError::NonFiniteGradient { path, count } => {
                assert_eq!(path, "first.weight.hd_pissa.shard_1_of_2");
                assert!(*count > 0);
            }
            other => panic!("{other}"),
        }
        model = error.model;
        assert_eq!(bits(&base(&model.first.weight)), before);
    }
    // An update that is too large for f32, from finite gradients.
    let mut sgd = optimizer(SgdConfig::new().init());
    let (selected, gradients) = gradients(model, &good[1]);
    let error = sgd.step(1e300, selected, gradients).unwrap_err();
    assert!(matches!(
        error.cause,
        OptimizerError::NonFiniteUpdate { .. }
    ));
    model = error.model;

    let model = steps(model, &mut optim, &good[1..]);
    assert_eq!(
        bits(&base(&model.first.weight)),
        bits(&base(&reference.first.weight))
    );
    assert_eq!(
        bits(&base(&model.second.weight)),
        bits(&base(&reference.second.weight))
    );
}

/// Lion hides a bad gradient that Adam would show. Gradients are therefore checked too.
#[test]
fn non_finite_gradients_are_refused_even_if_the_update_is_finite() {
    let device = Device::flex().autodiff();
    let model = adapted(2, 1, &device);
    let mut grads = GradientsParams::new();
    for weight in [&model.first.weight, &model.second.weight] {
        let shard = &weight
            .reparameterization::<HdPissaAdapter>()
            .unwrap()
            .shards[0];
        for factor in [&shard.a, &shard.b] {
            grads.register(factor.id, factor.val().inner().zeros_like());
        }
    }
    let adapter = model.first.weight.reparameterization::<HdPissaAdapter>();
    let a = &adapter.unwrap().shards[0].a;
    grads.register(a.id, a.val().inner().zeros_like() + f32::INFINITY);
    // Lion steps by the sign of its momentum.
    let mut lion = optimizer(LionConfig::new().with_weight_decay(0.0).init());
    let error = lion.step(1e-3, model, grads).unwrap_err();
    assert_eq!(
        error.cause.to_string(),
        "`first.weight.hd_pissa.shard_0_of_1`: the gradient holds 26 NaN or infinite values; skip \
         this batch, and lower the learning rate if this happens again"
    );
}

#[test]
fn gradients_must_fit_the_hosted_shards() {
    let device = Device::flex().autodiff();
    let model = adapted(2, 2, &device);
    let mut optim = optimizer(adam());
    let batch = normal([5, 13], &device);
    let gradient_of = |model: &Lean| {
        GradientsParams::from_grads(model.forward(batch.clone()).sum().backward(), model)
    };

    let (model, mut all) = gradients(model, &vec![batch.clone(); 2]);
    all.push(5, GradientsParams::new());
    let error = optim.step(1e-3, model, all).unwrap_err();
    let hosted = vec![0, 1];
    assert_eq!(
        error.cause,
        OptimizerError::UnknownShard { shard: 5, hosted }
    );

    let model = error.model.select_shard(1).unwrap();
    let grads = gradient_of(&model);
    let error = optim.step(1e-3, model, grads).unwrap_err();
    assert_eq!(error.cause, OptimizerError::MissingShard { shard: 0 });

    let model = error.model;
    let mut wrong = ShardGradients::new(&model);
    wrong.push(0, gradient_of(&model));
    wrong.push(1, gradient_of(&model));
    let error = optim.step(1e-3, model, wrong).unwrap_err();
    assert_eq!(
        error.cause,
        OptimizerError::WrongShard { shard: 0, found: 1 }
    );

    let error = optim
        .step(1e-3, error.model, GradientsParams::new())
        .unwrap_err();
    assert_eq!(
        error.cause,
        OptimizerError::AmbiguousShard { shards: vec![] }
    );

    let plain = Dense::new(&device);
    let error = optim.step(1e-3, plain, GradientsParams::new()).unwrap_err();
    assert_eq!(error.cause, OptimizerError::NoAdapter);

    // One worker that hosts one of two shards would train half of the method.
    let half = Lean::new(&device)
        .apply_hd_pissa(&HdPissaConfig::new().with_rank(2).with_shards(2), [1])
        .unwrap();
    let grads = gradient_of(&half);
    let error = optimizer(adam()).step(1e-3, half, grads).unwrap_err();
    let (hosted, shards) = (vec![1], 2);
    assert_eq!(
        error.cause,
        OptimizerError::IncompleteShards { hosted, shards }
    );
}

#[test]
fn an_unfrozen_adapted_weight_is_refused() {
    let device = Device::flex().autodiff();
    let model = adapted(2, 2, &device).unfreeze();
    let before = bits(&base(&model.first.weight));
    let (model, grads) = gradients(model, &vec![normal([5, 13], &device); 2]);
    let error = optimizer(adam()).step(1e-2, model, grads).unwrap_err();
    assert!(error.to_string().contains("`first.weight`"), "{error}");
    assert_eq!(bits(&base(&error.model.first.weight)), before);
}

#[test]
fn a_shard_without_gradients_is_named() {
    let device = Device::flex().autodiff();
    let model = adapted(2, 2, &device);
    let mut grads = ShardGradients::new(&model);
    // Shard 1 was not selected: the second set lacks its gradients.
    for shard in 0..2 {
        let frozen = model.clone().freeze();
        let x = normal([5, 13], &device).require_grad();
        let loss = frozen.forward(x).square().mean();
        grads.push(shard, GradientsParams::from_grads(loss.backward(), &model));
    }
    let error = optimizer(adam()).step(1e-2, model, grads).unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("first.weight.hd_pissa.shard_0_of_2"),
        "{text}"
    );
}

/// One NaN in the gradient of the second weight: the second weight is named, with clipping and
/// without.
#[test]
fn clipping_does_not_spread_a_nan() {
    let device = Device::flex().autodiff();
    for max_norm in [None, Some(1.0)] {
        let model = adapted(2, 1, &device);
        let config = HdPissaOptimizerConfig::new().with_max_grad_norm(max_norm);
        let mut optim = config.init(adam(), Solo).unwrap();
        let loss = model.forward(normal([5, 13], &device)).square().mean();
        let mut grads = GradientsParams::from_grads(loss.backward(), &model);
        let adapter = model.second.weight.reparameterization::<HdPissaAdapter>();
        let id = adapter.unwrap().shards[0].b.id;
        let gradient = grads.remove::<2>(id).unwrap();
        let nan = Tensor::from_floats([[f32::NAN]], &device.clone().inner());
        grads.register(id, gradient.slice_assign([1..2, 3..4], nan));
        let error = optim.step(1e-2, model, grads).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("second.weight.hd_pissa.shard_0_of_1"),
            "{text}"
        );
        assert!(text.contains(" 1 "), "one value is bad: {text}");
    }
}

/// Gradients whose sum of squares exceeds `f32` are clipped to the threshold like any others.
#[test]
fn huge_gradients_are_clipped_and_not_dropped() {
    let device = Device::flex().autodiff();
    let model = adapted(2, 1, &device);
    let run = |factor: f64| {
        let loss = model
            .forward(normal([5, 13], &device) * 0.0 + 0.3)
            .square()
            .mean();
        let mut grads = GradientsParams::from_grads(loss.backward(), &model);
        let weights = [&model.first.weight, &model.second.weight];
        for weight in weights {
            let shard = &weight
                .reparameterization::<HdPissaAdapter>()
                .unwrap()
                .shards[0];
            for id in [shard.a.id, shard.b.id] {
                let gradient = grads.remove::<2>(id).unwrap();
                grads.register(id, gradient * factor);
            }
        }
        let config = HdPissaOptimizerConfig::new().with_max_grad_norm(Some(1e-3));
        let mut optim = config.init(SgdConfig::new().init(), Solo).unwrap();
        let start = base(&model.first.weight);
        let stepped = optim.step(1.0, model.clone(), grads).unwrap();
        values(base(&stepped.first.weight) - start)
    };
    let (usual, huge) = (run(1.0), run(1e30));
    assert!(usual.iter().any(|&x| x != 0.0));
    for (usual, huge) in usual.iter().zip(&huge) {
        assert!((usual - huge).abs() < 1e-6, "{usual} {huge}");
    }
}

/// A parameter outside the adapters, driven to infinity by the learning rate of its group.
#[test]
fn an_infinite_update_of_a_dense_parameter_is_refused() {
    let device = Device::flex().autodiff();
    let model =
        adapted(2, 1, &device).set_require_grad_group(ParamGroup::from_path("first.bias"), true);
    let mut scheduler =
        burn::lr_scheduler::module_lr_scheduler::ModuleLrSchedulerConfig::new(1e-3.into())
            .with_group(ParamGroup::from_predicate("first.bias"), 1e300)
            .init()
            .unwrap();
    let before = bits(&model.first.bias.as_ref().unwrap().val());
    let (model, grads) = gradients(model, &[normal([5, 13], &device)]);
    let error = optimizer(SgdConfig::new().init())
        .step(scheduler.step(), model, grads)
        .unwrap_err();
    assert!(error.to_string().contains("`first.bias`"), "{error}");
    assert_eq!(
        bits(&error.model.first.bias.as_ref().unwrap().val()),
        before
    );
}

/// The merged weight would not be finite, though every delta is: in each dtype and precision.
#[test]
fn an_update_beyond_the_range_of_the_weight_is_refused() {
    use hd_pissa::MergePrecision;
    let device = Device::flex().autodiff();
    for (dtype, precision, size) in [
        (DType::F16, MergePrecision::Compensated, 6e4),
        (DType::F16, MergePrecision::Nearest, 6e4),
        (DType::F16, MergePrecision::Stochastic { seed: 1 }, 6e4),
        (DType::BF16, MergePrecision::Compensated, 1e30),
        (DType::F32, MergePrecision::Compensated, 1e30),
    ] {
        let mut layer = HdPissaLinearConfig::new(13, 17)
            .with_bias(false)
            .init(&device);
        layer.weight = layer
            .weight
            .map(|w| Tensor::from_inner(w.inner().cast(dtype)));
        let config = HdPissaConfig::new()
            .with_rank(2)
            .with_shards(1)
            .with_precision(precision);
        let model: HdPissaLinear = layer.apply_hd_pissa(&config, 0..1).unwrap();
        let shard = &model
            .weight
            .reparameterization::<HdPissaAdapter>()
            .unwrap()
            .shards[0];
        let mut grads = GradientsParams::new();
        for factor in [&shard.a, &shard.b] {
            grads.register(factor.id, factor.val().inner().zeros_like() + size);
        }
        let before = bits(&base(&model.weight));
        let error = optimizer(SgdConfig::new().init())
            .step(1.0, model, grads)
            .unwrap_err();
        assert!(
            error.to_string().contains("`weight`"),
            "{dtype:?} {precision:?}: {error}"
        );
        assert_eq!(bits(&base(&error.model.weight)), before);
    }
}

/// The same optimizer, then another model, then the first one with other frames.
#[test]
fn an_optimizer_serves_another_model() {
    let device = Device::flex().autodiff();
    let batches = vec![normal([5, 13], &device); 2];
    let mut optim = optimizer(SgdConfig::new().init());
    let (model, grads) = gradients(adapted(2, 2, &device), &batches);
    optim.step(1e-2, model, grads).unwrap();
    // Of another rank.
    let other = adapted(3, 2, &device);
    let expected = {
        let (model, grads) = gradients(other.clone(), &batches);
        let stepped = optimizer(SgdConfig::new().init())
            .step(1e-2, model, grads)
            .unwrap();
        bits(&base(&stepped.first.weight))
    };
    let (model, grads) = gradients(other, &batches);
    let stepped = optim.step(1e-2, model, grads).unwrap();
    assert_eq!(bits(&base(&stepped.first.weight)), expected);
}
