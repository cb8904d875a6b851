//! Changes of weights as low-rank factors: exact where they can be, nearest where they cannot, and read back
//! from files.

use std::path::Path;

use burn::module::{Module, ParamGroup, ParamId};
use burn::nn::{Linear, LinearConfig};
use burn::optim::{AdamConfig, GradientsParams};
use burn::tensor::{Device, Tensor, TensorData};
use faer::Mat;
use hd_pissa::comm::Solo;
use hd_pissa::export::{
    ExportError, Peft, RankLimit, WeightChange, read_delta, read_peft, write_delta, write_peft,
};
use hd_pissa::{
    FrameScale, GradientMode, HdPissaAdapter, HdPissaConfig, HdPissaError, HdPissaModule,
    HdPissaOptimizerConfig, ShardGradients, SharedGradients, TargetRank, Windows,
};
use hd_pissa_tests::{Lean, base, bits, frame_choices, normal};
use proptest::prelude::*;
use safetensors::SafeTensors;
use serde_json::Value;

fn config(rank: usize, shards: usize, (windows, scale): (Windows, FrameScale)) -> HdPissaConfig {
    HdPissaConfig::new()
        .with_rank(rank)
        .with_shards(shards)
        .with_windows(windows)
        .with_frame_scale(scale)
}

fn host(tensor: &Tensor<2>) -> Mat<f64> {
    matrix(&tensor.clone().inner().into_data())
}

fn matrix(data: &TensorData) -> Mat<f64> {
    let values: Vec<f64> = data.iter().collect();
    let dims: [usize; 2] = data.shape().clone().dims();
    Mat::from_fn(dims[0], dims[1], |i, j| values[i * dims[1] + j])
}

fn product(change: &WeightChange) -> Mat<f64> {
    matrix(&change.left()) * matrix(&change.right())
}

/// What is left of the columns without what they have along the `directions`: Gram and Schmidt, one
/// vector after the other.
fn without(columns: &Mat<f64>, directions: &Mat<f64>) -> Mat<f64> {
    let mut basis: Vec<Vec<f64>> = Vec::new();
    let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>();
    let column = |m: &Mat<f64>, i: usize| m.col(i).iter().copied().collect::<Vec<_>>();
    let strip = |mut vector: Vec<f64>, basis: &[Vec<f64>]| {
        // Twice is enough.
        for direction in basis.iter().chain(basis) {
            let along = dot(&vector, direction);
            for (value, part) in vector.iter_mut().zip(direction) {
                *value -= along * part;
            }
        }
        vector
    };
    for i in 0..directions.ncols() {
        let vector = strip(column(directions, i), &basis);
        let norm = dot(&vector, &vector).sqrt();
        basis.push(vector.iter().map(|value| value / norm).collect());
    }
    let stripped: Vec<_> = (0..columns.ncols())
        .map(|i| strip(column(columns, i), &basis))
        .collect();
    Mat::from_fn(columns.nrows(), columns.ncols(), |i, j| stripped[j][i])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// A change of first order is found to rounding, and of any other one exactly the part that no
    /// training of first order could make is missing; whatever the frames and the shape.
    #[test]
    fn the_part_of_first_order_is_found(
        (rank, shards) in (1usize..4, 1usize..4),
        more in (0usize..9, 0usize..9),
        choice in 0usize..7,
        seed: u64,
    ) {
        let device = Device::flex();
        device.seed(seed);
        let m = rank * shards;
        let (rows, cols) = (m + more.0, m + more.1);
        let config = config(rank, shards, frame_choices()[choice]);
        let base = normal([rows, cols], &device);
        let frames = config.frames("w", &base);
        // A random matrix is seldom, but not never, close to one of a lower rank.
        prop_assume!(frames.is_ok());
        let frames = frames.unwrap();
        let [a, b] = frames.clone();

        let x = normal([m, cols], &device);
        let y = normal([rows, m], &device);
        let trained = base.clone() + (a.clone().matmul(x) + y.matmul(b.clone())) * 0.1;
        let change = WeightChange::new("w", &base, &trained, &frames, &RankLimit::NONE).unwrap();
        prop_assert_eq!(change.rank(), 2 * m);
        prop_assert_eq!(change.dims(), [rows, cols]);
        let rounding = 1e-6 * f64::from(u16::try_from(2 * m + 2).unwrap());
        prop_assert!(change.relative_error() < rounding, "{}", change.relative_error());
        let rebuilt = host(&change.added_to(&base).unwrap());
        prop_assert!((rebuilt - host(&trained)).norm_max() < 1e-5);

        // Nothing of it is of first order alone.
        let trained = normal([rows, cols], &device);
        let change = WeightChange::new("w", &base, &trained, &frames, &RankLimit::NONE).unwrap();
        let whole = host(&trained) - host(&base);
        let missing = without(&whole, &host(&a));
        let missing = without(&missing.transpose().to_owned(), &host(&b).transpose().to_owned());
        let expected = missing.norm_l2() / whole.norm_l2();
        prop_assert!((change.relative_error() - expected).abs() < 1e-5);
        let missing = missing.transpose().to_owned();
        let distance = (whole - product(&change) - missing).norm_max();
        prop_assert!(distance < 1e-4, "{distance}");
        // Both factors of a component are of the same length.
        let (left, right) = (matrix(&change.left()), matrix(&change.right()));
        for i in 0..change.rank() {
            let (left, right) = (left.col(i).norm_l2(), right.row(i).norm_l2());
            // But for one that holds nothing but rounding.
            let is_noise = left.min(right) < 1e-6;
            prop_assert!((left - right).abs() < 1e-4 * left || is_noise, "{left} {right}");
        }
    }
}

/// Eckart and Young: what a truncated change misses are the other singular values.
#[test]
fn truncation_keeps_the_leading_singular_triples() {
    let device = Device::flex();
    device.seed(5);
    for (rows, cols) in [(23, 31), (31, 23), (9, 40)] {
        let config = config(2, 3, (Windows::Leading, FrameScale::Balanced));
        let base = normal([rows, cols], &device);
        let frames = config.frames("w", &base).unwrap();
        let [a, b] = frames.clone();
        let x = normal([6, cols], &device);
        let y = normal([rows, 6], &device);
        let trained = base.clone() + a.matmul(x) + y.matmul(b);
        let values = (host(&trained) - host(&base)).singular_values().unwrap();
        let energy = |values: &[f64]| values.iter().map(|value| value * value).sum::<f64>();
        let most = 12.min(rows.min(cols));
        for kept in [1, 5, most] {
            let error = (energy(&values[kept..]) / energy(&values)).sqrt();
            let share = energy(&values[..kept]) / energy(&values);
            let by_rank = RankLimit {
                rank: Some(kept),
                ..RankLimit::NONE
            };
            let by_energy = RankLimit {
                // As much as these hold, and hardly more.
                energy: Some((share - 1e-5).max(0.0)),
                ..RankLimit::NONE
            };
            for limit in [by_rank, by_energy] {
                let change = WeightChange::new("w", &base, &trained, &frames, &limit).unwrap();
                assert_eq!(change.rank(), kept, "{limit:?}");
                let found = change.relative_error();
                assert!((found - error).abs() < 1e-4, "{found} {error}");
            }
        }
        // No limit, no decomposition: more components than the weight has.
        let change = WeightChange::new("w", &base, &trained, &frames, &RankLimit::NONE).unwrap();
        assert_eq!(change.rank(), 12);
        let capped = RankLimit {
            max_rank: 7,
            energy: Some(1.0),
            rank: None,
        };
        let change = WeightChange::new("w", &base, &trained, &frames, &capped).unwrap();
        assert_eq!(change.rank(), 7);
    }
}

fn adapter(layer: &Linear) -> &HdPissaAdapter {
    layer.weight.reparameterization().unwrap()
}

#[test]
fn frames_are_those_of_the_adapters() {
    let device = Device::flex();
    device.seed(3);
    let model = LinearConfig::new(17, 13).init(&device);
    for choice in frame_choices() {
        let mut config = config(3, 4, choice);
        // Of several the last counts; an id is not a path.
        config.target_ranks = vec![
            TargetRank {
                targets: ParamGroup::from_regex("^weight$").unwrap(),
                rank: 2,
            },
            TargetRank {
                targets: ParamGroup::from_ids(vec![ParamId::new()]),
                rank: 1,
            },
        ];
        let adapted = model.clone().apply_hd_pissa(&config, 0..4).unwrap();
        let shards = &adapter(&adapted).shards;
        let a = shards.iter().map(|shard| shard.a.val().inner()).collect();
        let b = shards.iter().map(|shard| shard.b.val().inner()).collect();
        let expected = [Tensor::cat(a, 1), Tensor::cat(b, 0)];
        let found = config.frames("weight", &model.weight.val()).unwrap();
        for (found, expected) in found.iter().zip(&expected) {
            assert_eq!(bits(found), bits(expected), "{choice:?}");
        }
    }
    let too_many = config(7, 2, (Windows::Leading, FrameScale::Unit));
    let error = too_many.frames("fc.weight", &model.weight.val());
    let error = error.unwrap_err().to_string();
    assert!(
        error.contains("`fc.weight`") && error.contains("14"),
        "{error}"
    );
    for (config, expected) in [
        (too_many.clone().with_rank(0), "the rank of `w` is 0"),
        (too_many.clone().with_shards(0), "the number of shards is 0"),
        (
            config(1, 2, (Windows::Random { seed: 1 }, FrameScale::Balanced)),
            "Random { seed: 1 }",
        ),
    ] {
        let error: HdPissaError = config.frames("w", &model.weight.val()).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    }
}

/// A few steps of Adam on random regressions; the model before and after.
fn train(config: &HdPissaConfig, lr: f64) -> [Lean; 2] {
    let device = Device::flex().autodiff();
    device.seed(11);
    let start = Lean::new(&device);
    let mut model = start
        .clone()
        .apply_hd_pissa(config, 0..config.shards)
        .unwrap();
    let adam = AdamConfig::new().with_epsilon(1e-8).init();
    let mut optim = HdPissaOptimizerConfig::new().init(adam, Solo).unwrap();
    for _step in 0..4 {
        let batches =
            (0..config.shards).map(|_| (normal([5, 13], &device), normal([5, 11], &device)));
        let batches: Vec<_> = batches.collect();
        let gradients = |model: &Lean, (x, y): &(Tensor<2>, Tensor<2>)| {
            let loss = (model.forward(x.clone()) - y.clone()).square().mean();
            GradientsParams::from_grads(loss.backward(), model)
        };
        let stepped = match config.gradients {
            GradientMode::PerShard => {
                let mut all = ShardGradients::new(&model);
                for (shard, batch) in batches.iter().enumerate() {
                    model = model.select_shard(shard).unwrap();
                    all.push(shard, gradients(&model, batch));
                }
                optim.step(lr, model, all)
            }
            GradientMode::Shared => {
                let mut all = SharedGradients::new(&model, batches.len());
                for batch in &batches {
                    all.push(gradients(&model, batch));
                }
                optim.step(lr, model, all)
            }
        };
        model = stepped.unwrap();
    }
    [start.valid(), model.valid().materialize()]
}

/// A training leaves the frames' reach only by its part of second order, which falls with the learning
/// rate.
#[test]
fn trained_changes_are_of_first_order() {
    for gradients in [GradientMode::PerShard, GradientMode::Shared] {
        for choice in frame_choices() {
            let config = config(1, 4, choice).with_gradients(gradients);
            let errors = [1e-2, 1e-3].map(|lr| {
                let [start, trained] = train(&config, lr);
                let layers = [
                    ("first.weight", &start.first.weight, &trained.first.weight),
                    (
                        "second.weight",
                        &start.second.weight,
                        &trained.second.weight,
                    ),
                ];
                layers.map(|(path, start, trained)| {
                    let (start, trained) = (base(start), base(trained));
                    let frames = config.frames(path, &start).unwrap();
                    let change =
                        WeightChange::new(path, &start, &trained, &frames, &RankLimit::NONE);
                    let change = change.unwrap();
                    let whole = host(&trained) - host(&start);
                    let missing = (whole.clone() - product(&change)).norm_l2();
                    let error = missing / whole.norm_l2();
                    assert!((error - change.relative_error()).abs() < 1e-9);
                    error
                })
            });
            for layer in 0..2 {
                let [large, small] = errors.map(|of_lr| of_lr[layer]);
                assert!(large < 0.05, "{choice:?}: {large}");
                let ratio = large / small;
                assert!((5.0..20.0).contains(&ratio), "{choice:?}: {large} {small}");
            }
        }
    }
}

/// Two changes of other sizes and ranks.
fn changes(device: &Device) -> (Vec<Tensor<2>>, Vec<Tensor<2>>, Vec<WeightChange>) {
    device.seed(2);
    let mut all = (Vec::new(), Vec::new(), Vec::new());
    for (path, dims, rank) in [
        ("layers.0.fc.weight", [13, 17], 2),
        ("layers.1.fc.weight", [19, 11], 3),
    ] {
        let config = config(rank, 1, (Windows::Leading, FrameScale::Balanced));
        let base = normal(dims, device);
        let trained = base.clone() + normal(dims, device) * 1e-2;
        let frames = config.frames(path, &base).unwrap();
        let change = WeightChange::new(path, &base, &trained, &frames, &RankLimit::NONE);
        all.0.push(base);
        all.1.push(trained);
        all.2.push(change.unwrap());
    }
    all
}

#[test]
fn files_hold_what_was_written() {
    let device = Device::flex();
    let (bases, _, changes) = changes(&device);
    let folder = tempfile::tempdir().unwrap();
    let delta = folder.path().join("delta.safetensors");
    write_delta(&delta, &changes).unwrap();
    assert_eq!(read_delta(&delta).unwrap(), changes);
    let about = Peft {
        base_model: "somebody/model".into(),
        task_type: Some("CAUSAL_LM".into()),
    };
    write_peft(folder.path(), &changes, &about).unwrap();
    assert_eq!(read_peft(folder.path()).unwrap(), changes);
    // Every file is complete: nothing else is left.
    assert_eq!(folder.path().read_dir().unwrap().count(), 3);

    // As PEFT reads it: y = x·W + (alpha / r)·x·Aᵀ·Bᵀ.
    let config = std::fs::read(folder.path().join("adapter_config.json")).unwrap();
    let config: Value = serde_json::from_slice(&config).unwrap();
    assert_eq!(config["peft_type"], "LORA");
    assert_eq!(config["task_type"], "CAUSAL_LM");
    assert_eq!(config["base_model_name_or_path"], "somebody/model");
    assert_eq!(
        (&config["r"], &config["lora_alpha"]),
        (&6.into(), &6.into())
    );
    let bytes = std::fs::read(folder.path().join("adapter_model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(tensors.len(), 4);
    let tensor = |name: String| {
        let tensor = tensors.tensor(&name).unwrap();
        let (values, _) = tensor.data().as_chunks::<4>();
        let values: Vec<f32> = values.iter().map(|&v| f32::from_le_bytes(v)).collect();
        matrix(&TensorData::new(values, tensor.shape().to_vec()))
    };
    for (layer, (change, base)) in changes.iter().zip(&bases).enumerate() {
        let module = format!("layers.{layer}.fc");
        assert_eq!(config["target_modules"][layer], module);
        let rank = config["rank_pattern"].get(&module).unwrap_or(&config["r"]);
        let alpha = config["alpha_pattern"].get(&module);
        let alpha = alpha.unwrap_or(&config["lora_alpha"]);
        assert_eq!((rank, alpha), (&change.rank().into(), rank));
        let a = tensor(format!("base_model.model.{module}.lora_A.weight"));
        let b = tensor(format!("base_model.model.{module}.lora_B.weight"));
        assert_eq!(a.nrows(), change.rank());
        assert_eq!((b * a).transpose().to_owned(), product(change));
        // What was read back is applied alike.
        let read = &read_delta(&delta).unwrap()[layer];
        let sum = read.added_to(base).unwrap();
        assert_eq!(bits(&sum), bits(&change.added_to(base).unwrap()));
        let expected = host(base) + product(change);
        assert!((host(&sum) - expected).norm_max() < 1e-6);
    }
}

#[test]
fn another_base_is_refused_by_both_digests() {
    let device = Device::flex();
    let (bases, trained, changes) = changes(&device);
    for other in [&trained[0], &(bases[0].clone() * 1.000_001)] {
        let error = changes[0].added_to(other).unwrap_err();
        let ExportError::WrongBase {
            path,
            expected,
            found,
        } = &error
        else {
            panic!("{error}");
        };
        assert_eq!(path, "layers.0.fc.weight");
        assert_eq!(expected, changes[0].base_digest());
        assert!(found != expected && found.len() == 64);
        let message = error.to_string();
        assert!(message.contains(found) && message.contains(expected));
    }
    let error = changes[0].added_to(&bases[1]).unwrap_err();
    assert!(
        matches!(error, ExportError::ShapeMismatch { .. }),
        "{error}"
    );
}

#[test]
fn what_cannot_be_a_change_is_refused() {
    let device = Device::flex();
    let (bases, trained, _) = changes(&device);
    let frames = |rank| {
        let config = config(rank, 1, (Windows::Leading, FrameScale::Balanced));
        config.frames("w", &bases[0]).unwrap()
    };
    let new = |trained: &Tensor<2>, frames: &[Tensor<2>; 2], limit: &RankLimit| {
        WeightChange::new("w", &bases[0], trained, frames, limit)
    };
    let [a, b] = frames(2);
    let swapped = [b.clone().transpose(), a.clone().transpose()];
    for (result, expected) in [
        (
            new(&trained[1], &[a.clone(), b.clone()], &RankLimit::NONE),
            "the trained value of `w` has the shape [19, 11]; the base is [13, 17]",
        ),
        (
            new(&trained[0], &swapped, &RankLimit::NONE),
            "the left frame of `w` has the shape [17, 2]",
        ),
        (
            new(
                &(trained[0].clone() * f32::INFINITY),
                &frames(2),
                &RankLimit::NONE,
            ),
            "the change of `w` holds NaN or infinite values",
        ),
        (
            new(
                &trained[0],
                &frames(2),
                &RankLimit {
                    energy: Some(2.0),
                    ..RankLimit::NONE
                },
            ),
            "energy is 2;",
        ),
    ] {
        let error = result.unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    // A weight that has not moved has a change of zero.
    let limit = RankLimit {
        energy: Some(0.9),
        ..RankLimit::NONE
    };
    for limit in [limit, RankLimit::NONE] {
        let still = new(&bases[0], &frames(2), &limit).unwrap();
        assert_eq!(still.relative_error(), 0.0);
        let sum = still.added_to(&bases[0]).unwrap();
        assert_eq!(bits(&sum), bits(&bases[0]));
    }
}

#[test]
fn files_that_are_no_export_are_refused() {
    let device = Device::flex();
    let (_, _, changes) = changes(&device);
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let refused = |result: Result<Vec<WeightChange>, ExportError>, parts: &[&str]| {
        let error = result.unwrap_err().to_string();
        for part in parts {
            assert!(error.contains(part), "`{part}` is not in: {error}");
        }
    };
    let delta = path("delta.safetensors");
    refused(read_delta(&delta), &["delta.safetensors", "No such file"]);
    assert!(matches!(
        write_delta(&delta, &[]).unwrap_err(),
        ExportError::Empty { .. }
    ));
    let twice = [changes[0].clone(), changes[0].clone()];
    let error = write_delta(&delta, &twice).unwrap_err().to_string();
    assert!(
        error.contains("layers.0.fc.weight: is given twice"),
        "{error}"
    );
    let nowhere = Path::new("/no/such/folder/delta.safetensors");
    let error = write_delta(nowhere, &changes).unwrap_err();
    assert!(matches!(error, ExportError::Io { .. }), "{error}");
    assert!(!delta.exists());

    write_delta(&delta, &changes).unwrap();
    let whole = std::fs::read(&delta).unwrap();
    std::fs::write(&delta, &whole[..whole.len() - 1]).unwrap();
    refused(read_delta(&delta), &["delta.safetensors: content:"]);
    // An infinite value at the end.
    let mut bytes = whole.clone();
    let end = bytes.len() - 4;
    bytes[end..].copy_from_slice(&f32::INFINITY.to_le_bytes());
    std::fs::write(&delta, &bytes).unwrap();
    refused(
        read_delta(&delta),
        &["layers.1.fc.weight.right: holds NaN or infinite values"],
    );
    // The adapter of some other program has no digest of its base.
    let tensors = SafeTensors::deserialize(&whole).unwrap();
    safetensors::serialize_to_file(tensors.tensors(), None, &delta).unwrap();
    refused(read_delta(&delta), &["hd_pissa: is not in the metadata"]);

    let about = Peft::default();
    let config = path("adapter_config.json");
    for (key, value) in [("lora_alpha", "12"), ("alpha_pattern", "{}")] {
        write_peft(folder.path(), &changes, &about).unwrap();
        let mut json: Value = serde_json::from_slice(&std::fs::read(&config).unwrap()).unwrap();
        json[key] = value.parse().unwrap();
        std::fs::write(&config, json.to_string()).unwrap();
        refused(
            read_peft(folder.path()),
            &["adapter_config.json", key, "the scale is not 1"],
        );
    }
    std::fs::write(&config, "{").unwrap();
    refused(read_peft(folder.path()), &["adapter_config.json: content:"]);
    std::fs::remove_file(&config).unwrap();
    refused(
        read_peft(folder.path()),
        &["adapter_config.json", "No such file"],
    );

    let base = normal([6, 5], &device);
    let frames = HdPissaConfig::new().with_rank(1).with_shards(1);
    let frames = frames.frames("table", &base).unwrap();
    let change = WeightChange::new("table", &base, &base, &frames, &RankLimit::NONE).unwrap();
    let other = tempfile::tempdir().unwrap();
    let error = write_peft(other.path(), &[change], &about).unwrap_err();
    assert_eq!(
        error,
        ExportError::NoLayer {
            path: "table".into()
        }
    );
    assert_eq!(other.path().read_dir().unwrap().count(), 0);
}
