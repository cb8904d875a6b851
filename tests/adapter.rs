//! Attaching adapters: targets, errors, values, records, lifecycle.

use burn::module::{DisplaySettings, Lora, Module, ModuleDisplay, ParamGroup};
use burn::nn::{Linear, LinearConfig, LinearLayout};
use burn::optim::GradientsParams;
use burn::store::ModuleRecord;
use burn::tensor::{DType, Device, Tensor};
use hd_pissa::{
    GradientMode, HdPissa, HdPissaAdapter, HdPissaConfig, HdPissaError, HdPissaLinear,
    HdPissaLinearConfig, HdPissaModule, LeftOut, LeftOutReason, PissaConfig, PissaModule,
    TargetRank,
};
use hd_pissa_tests::{Dense, Lean, assert_close, base, bits, normal, values};

fn config() -> HdPissaConfig {
    HdPissaConfig::new().with_rank(2).with_shards(3)
}

/// A model with a head and a layer that the default targets leave out.
#[derive(Module, Debug)]
struct Classifier {
    body: Dense,
    lm_head: Linear,
    norm: burn::nn::RmsNorm,
}

impl Classifier {
    fn new(device: &Device) -> Self {
        Self {
            body: Dense::new(device),
            lm_head: LinearConfig::new(11, 40).init(device),
            norm: burn::nn::RmsNormConfig::new(11).init(device),
        }
    }
}

#[test]
fn weights_stay_bit_identical_and_everything_else_is_frozen() {
    let device = Device::flex().autodiff();
    let model = Classifier::new(&device);
    let before = [
        bits(&model.body.first.weight.val()),
        bits(&model.body.second.weight.val()),
    ];
    let model = model.apply_hd_pissa(&config(), 0..3).unwrap();

    // The values in forward passes, in inference and after materialization.
    let valid = model.valid();
    let merged = model.clone().valid().materialize();
    for (layer, before) in [0, 1].into_iter().zip(before) {
        let weight = |m: &Classifier| match layer {
            0 => m.body.first.weight.clone(),
            _ => m.body.second.weight.clone(),
        };
        assert_eq!(bits(&weight(&model).base()), before);
        assert_eq!(bits(&weight(&model).val()), before);
        assert_eq!(bits(&weight(&valid).val()), before);
        assert_eq!(bits(&weight(&merged).val()), before);
        assert!(
            weight(&merged)
                .reparameterization::<HdPissaAdapter>()
                .is_none()
        );
    }
    assert!(
        model
            .lm_head
            .weight
            .reparameterization::<HdPissaAdapter>()
            .is_none()
    );

    // Only the selected shard's factors take gradients.
    let x = normal([4, 13], &device);
    let loss = |m: &Classifier| {
        m.lm_head
            .forward(m.norm.forward(m.body.forward(x.clone())))
            .sum()
    };
    let grads = GradientsParams::from_grads(loss(&model).backward(), &model);
    assert_eq!(grads.len(), 4);
    let adapter = model
        .body
        .first
        .weight
        .reparameterization::<HdPissaAdapter>()
        .unwrap();
    assert!(grads.get::<2>(adapter.shards[0].a.id).is_some());
    let model = model.select_shard(2).unwrap();
    let grads = GradientsParams::from_grads(loss(&model).backward(), &model);
    let adapter = model
        .body
        .first
        .weight
        .reparameterization::<HdPissaAdapter>()
        .unwrap();
    assert_eq!(grads.len(), 4);
    assert!(grads.get::<2>(adapter.shards[0].a.id).is_none());
    assert!(grads.get::<2>(adapter.shards[2].a.id).is_some());
}

#[test]
fn factors_are_windows_of_principal_components() {
    let device = Device::flex();
    let model = Dense::new(&device);
    let weight = bits(&model.first.weight.val())
        .iter::<f32>()
        .collect::<Vec<_>>();
    let config = config()
        .with_shards(6)
        .with_targets(Some(ParamGroup::from_path("first.weight")));
    let model = model.apply_hd_pissa(&config, 0..6).unwrap();
    let adapter = model
        .first
        .weight
        .reparameterization::<HdPissaAdapter>()
        .unwrap();
    assert_eq!((adapter.num_shards, adapter.scale), (6, 1.0));

    // Products of disjoint windows are orthogonal, and their energies add up.
    let products: Vec<Tensor<2>> = adapter
        .shards
        .iter()
        .map(|shard| shard.a.val().matmul(shard.b.val()))
        .collect();
    for (i, p) in products.iter().enumerate() {
        for (j, q) in products.iter().enumerate() {
            let inner = (p.clone() * q.clone()).sum().into_scalar::<f32>();
            assert!(i == j || inner.abs() < 1e-5, "windows {i}, {j}: {inner}");
        }
    }
    // 12 of 13 components: the smallest singular value is left.
    let sum = products.into_iter().reduce(|x, y| x + y).unwrap();
    let rest = model.first.weight.val() - sum;
    let energy = |t: Tensor<2>| t.square().sum().into_scalar::<f32>();
    assert!(energy(rest.clone()) < 0.02 * weight.iter().map(|w| w * w).sum::<f32>());
    let third = rest
        .clone()
        .matmul(rest.clone().transpose())
        .matmul(rest.clone());
    // Of rank 1: R·Rᵀ·R is a multiple of R.
    assert_close(third, rest.clone() * energy(rest), 1e-3);
}

#[test]
fn both_ways_in_agree_and_share_records() {
    let device = Device::flex().autodiff();
    let dense = Dense::new(&device);
    let lean: Lean = dense.clone().into();
    let dense = dense
        .apply_hd_pissa(&config(), 0..3)
        .unwrap()
        .select_shard(1)
        .unwrap();
    let lean = lean
        .apply_hd_pissa(&config(), 0..3)
        .unwrap()
        .select_shard(1)
        .unwrap();

    let x = normal([6, 13], &device);
    let (dense_y, lean_y) = (dense.forward(x.clone()), lean.forward(x.clone()));
    assert_close(lean_y.clone(), dense_y.clone(), 1e-6);
    let dense_grads = GradientsParams::from_grads(dense_y.square().sum().backward(), &dense);
    let lean_grads = GradientsParams::from_grads(lean_y.square().sum().backward(), &lean);
    assert_eq!((dense_grads.len(), lean_grads.len()), (4, 4));
    for weight in [&dense.first.weight, &dense.second.weight] {
        // Ids come from the path, so they are the same in both models.
        let adapter = weight.reparameterization::<HdPissaAdapter>().unwrap();
        for id in [adapter.shards[1].a.id, adapter.shards[1].b.id] {
            let gradient = lean_grads.get::<2>(id).unwrap();
            assert_close(gradient, dense_grads.get::<2>(id).unwrap(), 1e-5);
        }
    }

    // Through bytes into a model of the other kind with other weights.
    let other: Lean = Dense::new(&device).into();
    let other = other.apply_hd_pissa(&config(), 0..3).unwrap();
    let bytes = dense.clone().into_record().into_bytes().unwrap();
    let loaded = other.load_record(ModuleRecord::from_bytes(bytes).unwrap());
    assert_close(loaded.forward(x.clone()), dense.forward(x), 1e-6);
    for (ours, theirs) in [
        (&loaded.first.weight, &dense.first.weight),
        (&loaded.second.weight, &dense.second.weight),
    ] {
        assert_eq!(bits(&ours.base()), bits(&theirs.base()));
        let ours = ours.reparameterization::<HdPissaAdapter>().unwrap();
        let theirs = theirs.reparameterization::<HdPissaAdapter>().unwrap();
        for (ours, theirs) in ours.shards.iter().zip(&theirs.shards) {
            assert_eq!(ours.index, theirs.index);
            assert_eq!(bits(&ours.a.val()), bits(&theirs.a.val()));
            assert_eq!(bits(&ours.b.val()), bits(&theirs.b.val()));
            assert_eq!(ours.a.id, theirs.a.id);
        }
    }

    // A record of other shards is refused.
    let two = Dense::new(&device)
        .apply_hd_pissa(&config().with_shards(2), 0..2)
        .unwrap();
    let error = two.try_load_record(dense.into_record()).unwrap_err();
    assert!(error.to_string().contains("shard_0_of_2"), "{error}");
}

#[test]
fn validation_and_back_keeps_the_selected_shard() {
    let device = Device::flex().autodiff();
    let model: Lean = Dense::new(&device).into();
    let model = model
        .apply_hd_pissa(&config(), 0..3)
        .unwrap()
        .select_shard(1)
        .unwrap();
    let x = normal([3, 13], &device);
    let valid = model.valid();
    assert!(!valid.forward(x.clone().inner()).is_tracked());
    let adapter = valid
        .first
        .weight
        .reparameterization::<HdPissaAdapter>()
        .unwrap();
    assert!(adapter.selected().next().is_none());

    let trained = valid.train();
    let adapter = trained
        .first
        .weight
        .reparameterization::<HdPissaAdapter>()
        .unwrap();
    assert_eq!(adapter.selected().next().unwrap().index, 1);
    let y = trained.forward(x);
    let grads = GradientsParams::from_grads(y.sum().backward(), &trained);
    assert_eq!(grads.len(), 4);
}

#[test]
fn a_layer_without_hd_pissa_is_a_linear_layer() {
    let device = Device::flex().autodiff();
    for layout in [LinearLayout::Row, LinearLayout::Col] {
        let linear = LinearConfig::new(13, 17).with_layout(layout).init(&device);
        let lean = HdPissaLinear::from_linear(linear.clone());
        let x = normal([2, 5, 13], &device);
        assert_close(lean.forward(x.clone()), linear.forward(x.clone()), 0.0);
        // With Burn's LoRA the value is the composed weight.
        let lora = lean.clone().apply_lora(Lora::new(2, 4.0));
        let adapter = lora.weight.adapter().unwrap();
        let grads = lora.forward(x.clone()).sum().backward();
        assert!(adapter.b.val().grad(&grads).is_some());
        // Full fine-tuning trains the weight itself.
        let grads = lean.forward(x.clone()).sum().backward();
        assert!(lean.weight.val().grad(&grads).is_some());
        let back = lean.into_linear();
        assert_close(back.forward(x.clone()), linear.forward(x), 0.0);
    }
}

#[test]
fn column_major_weights() {
    let device = Device::flex().autodiff();
    let layer = HdPissaLinearConfig::new(13, 17)
        .with_layout(LinearLayout::Col)
        .init(&device)
        .apply_hd_pissa(&config(), 0..3)
        .unwrap();
    let x = normal([4, 13], &device);
    let bias = layer.bias.as_ref().unwrap().val().unsqueeze();
    let expected = x.clone().matmul(layer.weight.base()) + bias;
    assert_close(layer.forward(x), expected, 1e-6);
}

#[test]
fn ranks_scales_and_hosted_shards() {
    let device = Device::flex();
    let config = config().with_alpha(Some(6.0)).with_target_ranks(vec![
        TargetRank::new(ParamGroup::from_predicate("first"), 1),
        TargetRank::new(ParamGroup::from_path("first.weight"), 4),
    ]);
    let model = Dense::new(&device).apply_hd_pissa(&config, [2, 0]).unwrap();
    let first = model
        .first
        .weight
        .reparameterization::<HdPissaAdapter>()
        .unwrap();
    let second = model
        .second
        .weight
        .reparameterization::<HdPissaAdapter>()
        .unwrap();
    let indices =
        |adapter: &HdPissaAdapter| adapter.shards.iter().map(|s| s.index).collect::<Vec<_>>();
    assert_eq!((indices(first), indices(second)), (vec![0, 2], vec![0, 2]));
    assert_eq!(first.shards[1].a.dims(), [13, 4]);
    assert_eq!(second.shards[1].b.dims(), [2, 11]);
    assert_eq!((first.scale, second.scale), (1.5, 3.0));

    // A worker's window does not depend on its other shards.
    let all = Dense::new(&device);
    let one = all.clone().apply_hd_pissa(&config, [2]).unwrap();
    let all = all.apply_hd_pissa(&config, 0..3).unwrap();
    let of = |m: &Dense| {
        m.second
            .weight
            .reparameterization::<HdPissaAdapter>()
            .cloned()
            .unwrap()
    };
    assert_eq!(
        bits(&of(&one).shards[0].a.val()),
        bits(&of(&all).shards[2].a.val())
    );
    assert_eq!(of(&one).shards[0].a.id, of(&all).shards[2].a.id);
}

#[test]
fn bad_configurations_are_typed_errors() {
    let device = Device::flex();
    let model = Dense::new(&device);
    let refuse = |config: HdPissaConfig| model.clone().apply_hd_pissa(&config, 0..3).unwrap_err();

    let nowhere = ParamGroup::from_regex("q_proj").unwrap();
    let error = refuse(config().with_targets(Some(nowhere)));
    let candidates = vec!["first.weight".to_string(), "second.weight".to_string()];
    assert_eq!(error, HdPissaError::NoTarget { candidates });
    assert!(error.to_string().contains("first.weight, second.weight"));

    assert!(
        matches!(refuse(config().with_rank(0)), HdPissaError::ZeroRank { path } if path == "first.weight")
    );
    assert_eq!(refuse(config().with_shards(0)), HdPissaError::ZeroShards);
    let error = refuse(config().with_rank(4));
    assert_eq!(
        error.to_string(),
        "`second.weight` of shape [17, 11] has 11 principal components, but 3 shards of rank 4 \
         need 12: the largest rank for 3 shards is 3, the largest number of shards of rank 4 is 2"
    );
    // Even the product of both is too large.
    for config in [
        config().with_rank(usize::MAX),
        config().with_shards(usize::MAX),
    ] {
        let error = model.clone().apply_hd_pissa(&config, [0]).unwrap_err();
        let needed = format!("need {}", usize::MAX);
        assert!(error.to_string().contains(&needed), "{error}");
    }
    for alpha in [f64::NAN, f64::INFINITY, 0.0, -1.0] {
        let error = refuse(config().with_alpha(Some(alpha)));
        assert!(
            matches!(error, HdPissaError::InvalidAlpha { .. }),
            "{error}"
        );
    }
    for hosted in [vec![], vec![0, 0], vec![3]] {
        let error = model
            .clone()
            .apply_hd_pissa(&config(), hosted.clone())
            .unwrap_err();
        assert!(
            matches!(error, HdPissaError::InvalidHostedShards { .. }),
            "{error}"
        );
    }

    let lora = model.clone().apply_lora(Lora::new(2, 2.0));
    let error = lora.apply_hd_pissa(&config(), 0..3).unwrap_err();
    assert_eq!(
        error,
        HdPissaError::AlreadyReparameterized {
            path: "first.weight".into(),
            name: "lora".into()
        }
    );
    let twice = model.clone().apply_hd_pissa(&config(), 0..3).unwrap();
    let error = twice.apply_hd_pissa(&config(), 0..3).unwrap_err();
    assert!(error.to_string().contains("`hd_pissa`"), "{error}");

    let mut broken = model.clone();
    broken.second.weight = broken.second.weight.map(|w| w * f32::NAN);
    let error = broken.apply_hd_pissa(&config(), 0..3).unwrap_err();
    assert!(
        matches!(error, HdPissaError::NonFiniteWeight { path, count: 187, .. } if path == "second.weight")
    );

    // Factors of zeros would never have a gradient, and factors beyond the weight's rank would be
    // rounding noise.
    let mut zero = model.clone();
    zero.second.weight = zero.second.weight.map(|w| w * 0.0);
    let path = String::from("second.weight");
    assert_eq!(
        zero.clone().apply_hd_pissa(&config(), 0..3).unwrap_err(),
        HdPissaError::ZeroWeight { path: path.clone() }
    );
    assert_eq!(
        config().plan(&zero).unwrap_err(),
        HdPissaError::ZeroWeight { path: path.clone() }
    );
    let pissa = PissaConfig::new().with_rank(2);
    let error = zero.apply_pissa(&pissa).unwrap_err();
    assert_eq!(error, HdPissaError::ZeroWeight { path: path.clone() });
    let mut thin = model.clone();
    let (column, row) = (normal([17, 5], &device), normal([5, 11], &device));
    thin.second.weight = thin.second.weight.map(|_| column.matmul(row));
    let expected = HdPissaError::RankDeficient {
        path,
        numeric_rank: 5,
        needed: 6,
    };
    assert_eq!(config().plan(&thin).unwrap_err(), expected);
    assert_eq!(
        thin.clone().apply_hd_pissa(&config(), 0..3).unwrap_err(),
        expected
    );
    thin.apply_hd_pissa(&config().with_shards(2), 0..2).unwrap();

    let mut double = model;
    double.first.weight = double.first.weight.map(|w| w.cast(DType::F64));
    let error = double.apply_hd_pissa(&config(), 0..3).unwrap_err();
    assert!(matches!(
        error,
        HdPissaError::UnsupportedDtype {
            dtype: DType::F64,
            ..
        }
    ));
}

#[test]
fn selecting_a_shard_that_is_not_hosted_is_refused() {
    let model = Dense::new(&Device::flex());
    let refused = |model: Dense, index| model.select_shard(index).unwrap_err();
    let not_hosted = |index, hosted: &[usize]| HdPissaError::NotHosted {
        index,
        hosted: hosted.into(),
    };
    assert_eq!(refused(model.clone(), 0), not_hosted(0, &[]));
    let model = model.apply_hd_pissa(&config(), [2, 0]).unwrap();
    assert_eq!(refused(model.clone(), 1), not_hosted(1, &[0, 2]));
    assert_eq!(refused(model, 3), not_hosted(3, &[0, 2]));
}

/// The plan's bytes against the attached parameters.
#[test]
fn a_plan_tells_the_memory_of_a_worker() {
    let device = Device::flex();
    for mode in [GradientMode::PerShard, GradientMode::Shared] {
        let config = config().with_gradients(mode);
        let model = Dense::new(&device);
        let plan = config.plan(&model).unwrap();
        let hosted = match mode {
            GradientMode::PerShard => vec![1],
            GradientMode::Shared => vec![0, 1, 2],
        };
        let before = model.num_params();
        let adapted = model.apply_hd_pissa(&config, hosted).unwrap();
        let memory = plan.memory_per_worker(3);
        assert_eq!(
            memory.factors,
            4 * (adapted.num_params() - before),
            "{mode:?}"
        );
        // Of two weights and three shards.
        let row = 4 * 2 * ((13 + 17) + (17 + 11));
        assert_eq!((memory.frames, memory.moments), (3 * row, 2 * row));
        let printed = plan.to_string();
        assert!(printed.contains("worker with 1 of 3 shards"), "{printed}");
    }
}

/// Burn's own transformer, whose attention has a layer called `output`, with a head behind it and
/// fields whose names contain `head`.
#[derive(Module, Debug)]
struct Tagger {
    multi_head_body: burn::nn::transformer::TransformerEncoder,
    embedding: burn::nn::Embedding,
    head_norm: Linear,
    head: Linear,
}

#[test]
fn default_targets_leave_out_heads_by_the_name_of_the_layer() {
    let device = Device::flex();
    let encoder = burn::nn::transformer::TransformerEncoderConfig::new(12, 24, 2, 1);
    let model = Tagger {
        multi_head_body: encoder.init(&device),
        embedding: burn::nn::EmbeddingConfig::new(20, 12).init(&device),
        head_norm: LinearConfig::new(12, 12).init(&device),
        head: LinearConfig::new(12, 20).init(&device),
    };
    let plan = config().plan(&model).unwrap();
    let mut paths: Vec<&str> = plan.weights.iter().map(|w| w.path.as_str()).collect();
    paths.sort_unstable();
    let expected = [
        "head_norm.weight",
        "multi_head_body.layers.0.mha.key.weight",
        "multi_head_body.layers.0.mha.output.weight",
        "multi_head_body.layers.0.mha.query.weight",
        "multi_head_body.layers.0.mha.value.weight",
        "multi_head_body.layers.0.pwff.linear_inner.weight",
        "multi_head_body.layers.0.pwff.linear_outer.weight",
    ];
    assert_eq!(paths, expected);
    let left_out = |path: &str, shape, reason| LeftOut {
        path: path.into(),
        shape,
        reason,
    };
    let expected = [
        left_out("embedding.weight", [20, 12], LeftOutReason::NotLinear),
        left_out("head.weight", [12, 20], LeftOutReason::Head),
    ];
    assert_eq!(plan.left_out, expected);
    let table = plan.to_string();
    for line in [
        "left out: not the weight of a linear layer",
        "left out: a head, by its layer's name",
    ] {
        assert!(table.contains(line), "{table}");
    }
    // Targets that are named are adapted, even a head.
    let named = config().with_targets(Some(ParamGroup::from_regex(r"^head\.weight$").unwrap()));
    let plan = named.plan(&model).unwrap();
    assert_eq!(plan.weights.len(), 1);
    assert_eq!(plan.left_out.len(), 8);
    let reasons = plan.left_out.iter().map(|left_out| left_out.reason);
    assert!(reasons.eq([LeftOutReason::NotTargeted; 8]));
}

#[test]
fn the_plan_counts_what_apply_makes() {
    let device = Device::flex();
    let model = Classifier::new(&device);
    let parameters = model.num_params();
    let plan = config().plan(&model).unwrap();
    let paths: Vec<&str> = plan.weights.iter().map(|w| w.path.as_str()).collect();
    assert_eq!(paths, ["body.first.weight", "body.second.weight"]);
    assert_eq!(plan.parameters, parameters);

    let mut reported = Vec::new();
    let hd_pissa = HdPissa::prepare(&model, &config(), 0..3, |layer| reported.push(layer)).unwrap();
    for (planned, reported) in plan.weights.iter().zip(&reported) {
        assert_eq!(
            (&planned.path, planned.shape),
            (&reported.path, reported.shape)
        );
        for (planned, reported) in planned
            .explained_variance
            .iter()
            .zip(&reported.explained_variance)
        {
            assert!((planned - reported).abs() < 1e-5);
        }
        let total: f64 = planned.explained_variance.iter().sum();
        assert!(
            planned.explained_variance.is_sorted_by(|x, y| x >= y) && total > 0.3 && total < 1.0
        );
        assert!(
            reported.orthogonality_error < 1e-5,
            "{}",
            reported.orthogonality_error
        );
    }
    let adapted = model.apply_reparameterization(hd_pissa);
    assert_eq!(
        adapted.num_params(),
        parameters + plan.trainable_parameters()
    );

    let table = plan.to_string();
    assert!(
        table.contains("body.second.weight") && table.contains("17x11"),
        "{table}"
    );
    let bytes = 4 * 2 * (13 + 17 + 17 + 11);
    assert!(
        table.contains(&format!("{bytes} bytes per shard and step")),
        "{table}"
    );
}

#[test]
fn pissa_leaves_the_effective_weight_and_trains_the_principal_part() {
    let device = Device::flex().autodiff();
    let model = Dense::new(&device);
    let before = model.first.weight.val();
    for alpha in [None, Some(10.0)] {
        let config = PissaConfig::new().with_rank(5).with_alpha(alpha);
        let model = model.clone().apply_pissa(&config).unwrap();
        let weight = &model.first.weight;
        let adapter = weight.adapter().unwrap();
        assert_eq!(adapter.scale, alpha.map_or(1.0, |alpha| alpha / 5.0));
        assert_close(weight.val(), before.clone(), 1e-6);
        // The base has lost the principal part: its projection on the factors is zero.
        let left = adapter.a.val().transpose().matmul(weight.base());
        assert!(values(left).iter().all(|x| x.abs() < 1e-5));
        let grads = model.forward(normal([3, 13], &device)).sum().backward();
        let grads = GradientsParams::from_grads(grads, &model);
        assert_eq!(grads.len(), 4);
    }
    let error = model
        .apply_pissa(&PissaConfig::new().with_rank(12))
        .unwrap_err();
    assert!(matches!(
        error,
        HdPissaError::RankTooLarge { shards: 1, .. }
    ));
}

#[test]
fn half_precision_weights_have_f32_factors() {
    let device = Device::flex().autodiff();
    for dtype in [DType::F16, DType::BF16] {
        let mut layer = LinearConfig::new(13, 17).with_bias(false).init(&device);
        layer.weight = layer
            .weight
            .map(|w| Tensor::from_inner(w.inner().cast(dtype)));
        let before = bits(&base(&layer.weight));
        let layer: HdPissaLinear = layer.apply_hd_pissa(&config(), 0..3).unwrap().into();
        assert_eq!(bits(&base(&layer.weight)), before);
        let shard = &layer
            .weight
            .reparameterization::<HdPissaAdapter>()
            .unwrap()
            .shards[0];
        assert_eq!(shard.a.val().dtype(), DType::F32);
        let y = layer.forward(normal([4, 13], &device).cast(dtype));
        assert_eq!(y.dtype(), dtype);
        let grads = y.sum().backward();
        assert_eq!(shard.a.val().grad(&grads).unwrap().dtype(), DType::F32);
    }
}

#[test]
fn adapted_layers_and_adapters_can_be_displayed() {
    let config = HdPissaConfig::new().with_rank(2).with_shards(3);
    let model = Lean::new(&Device::flex()).apply_hd_pissa(&config, [0, 2]);
    let model = model.unwrap();
    let shown = model.to_string();
    for part in ["d_input: 13", "rank: 2", "shards: [0, 2]", "num_shards: 3"] {
        assert!(shown.contains(part), "{shown}");
    }
    let adapter = model.first.weight.reparameterization::<HdPissaAdapter>();
    let shown = adapter.unwrap().format(DisplaySettings::default());
    for part in ["gradients: PerShard", "frame_scale: ", "num_shards: 3"] {
        assert!(shown.contains(part), "{shown}");
    }
}
