//! Shards that learn from every micro-batch: the same as one wide shard, on any layout of workers.

use std::path::Path;

use burn::module::{Module, ModuleMapper, Param, ParamGroup};
use burn::optim::GradientsParams;
use burn::tensor::{Device, Tensor, TensorData};
use hd_pissa::checkpoint::{Checkpoints, Snapshot};
use hd_pissa::comm::{Communicator, Solo, Traffic};
use hd_pissa::{
    CommunicationDtype, GradientMode, HdPissaConfig, HdPissaError, HdPissaModule, HdPissaOptimizer,
    HdPissaOptimizerConfig, HdPissaOptimizerRecord, OptimizerError, ShardGradients,
    SharedGradients,
};
use hd_pissa_tests::training::adam;
use hd_pissa_tests::{
    Dense, Lean, base, bits, normal, on_threads, relative_error, resumed, state, values,
};

const SHARDS: usize = 4;
const RANK: usize = 2;
const STEPS: usize = 5;

fn config() -> HdPissaConfig {
    HdPissaConfig::new()
        .with_rank(RANK)
        .with_shards(SHARDS)
        .with_gradients(GradientMode::Shared)
}

/// `micro_batches` for each of the steps.
fn data(device: &Device, micro_batches: usize) -> Vec<Vec<Tensor<2>>> {
    (0..STEPS)
        .map(|_| {
            (0..micro_batches)
                .map(|_| normal([5, 13], device))
                .collect()
        })
        .collect()
}

fn loss(model: &Lean, batch: &Tensor<2>) -> Tensor<1> {
    model.forward(batch.clone()).square().mean()
}

fn shared_gradients(model: &Lean, batches: &[Tensor<2>]) -> SharedGradients {
    let mut gradients = SharedGradients::new(model, batches.len());
    for batch in batches {
        let of_batch = loss(model, batch).backward();
        gradients.push(GradientsParams::from_grads(of_batch, model));
    }
    gradients
}

fn parameters(model: &Lean) -> Vec<TensorData> {
    vec![
        bits(&base(&model.first.weight)),
        bits(&base(&model.second.weight)),
        bits(&model.first.bias.as_ref().unwrap().val()),
    ]
}

fn with_bias(model: Lean) -> Lean {
    model.set_require_grad_group(ParamGroup::from_path("first.bias"), true)
}

/// The differences between the runs of a layout test.
#[derive(Clone, Copy, Default)]
struct Settings {
    wire: CommunicationDtype,
    clip: Option<f64>,
    shards: usize,
}

/// A worker's training from step `first` on, with its part of the micro-batches. If `first` is
/// above 0, it starts from the checkpoint in `folder`. If it ends before the last step, it writes a
/// checkpoint there.
fn train(
    start: &Lean,
    data: &[Vec<Tensor<2>>],
    communicator: impl Communicator + 'static,
    settings: Settings,
    steps: std::ops::Range<usize>,
    folder: Option<&Path>,
) -> Vec<TensorData> {
    let (worker, workers) = (communicator.worker_index(), communicator.num_workers());
    let config = config().with_shards(settings.shards);
    let model = start
        .clone()
        .apply_hd_pissa_shared(&config, 0..settings.shards, &communicator)
        .unwrap();
    let mut model = with_bias(model);
    let mut optim = HdPissaOptimizerConfig::new()
        .with_communication_dtype(settings.wire)
        .with_max_grad_norm(settings.clip)
        .init(adam(), communicator)
        .unwrap();
    if steps.start > 0 {
        let found = Checkpoints::new(folder.unwrap()).latest().unwrap();
        let checkpoint = found.checkpoint.unwrap();
        model = checkpoint.restore(model).unwrap();
        let state = checkpoint.optimizer(&model, optim.communicator()).unwrap();
        optim = resumed(optim, state).unwrap();
    }
    for batches in &data[steps.clone()] {
        let part = batches.len() / workers;
        let own = &batches[worker * part..(worker + 1) * part];
        let gradients = shared_gradients(&model, own);
        model = optim.step(1e-2, model, gradients).unwrap();
    }
    if steps.end < STEPS {
        let state = state(&optim);
        let snapshot = Snapshot::new(steps.end as u64, &model, state);
        let checkpoints = Checkpoints::new(folder.unwrap());
        checkpoints.save(&snapshot, optim.communicator()).unwrap();
    }
    parameters(&model)
}

/// The same on several threads, whose results must be equal.
fn train_on_workers(
    workers: usize,
    start: &Lean,
    data: &[Vec<Tensor<2>>],
    settings: Settings,
    steps: std::ops::Range<usize>,
    folder: Option<&Path>,
) -> Vec<TensorData> {
    if workers == 1 {
        return train(start, data, Solo, settings, steps, folder);
    }
    let results = on_threads(workers, |communicator| {
        train(start, data, communicator, settings, steps.clone(), folder)
    });
    assert!(results.iter().all(|other| *other == results[0]));
    results.into_iter().next().unwrap()
}

#[test]
fn shards_that_share_gradients_train_like_one_wide_shard() {
    let device = Device::flex().autodiff();
    let start = Lean::new(&device);
    let data = data(&device, 4);
    let wide = config()
        .with_gradients(GradientMode::PerShard)
        .with_rank(RANK * SHARDS)
        .with_shards(1);

    let apply = |config: &HdPissaConfig| {
        let model = start.clone().apply_hd_pissa(config, 0..config.shards);
        let optim = HdPissaOptimizerConfig::new().init(adam(), Solo).unwrap();
        (with_bias(model.unwrap()), optim)
    };
    let (mut one, mut one_optim) = apply(&wide);
    let (mut many, mut many_optim) = apply(&config());
    for batches in &data {
        let mut gradients = ShardGradients::new(&one);
        for batch in batches {
            let of_batch = loss(&one, batch).backward();
            gradients.push(0, GradientsParams::from_grads(of_batch, &one));
        }
        one = one_optim.step(1e-2, one, gradients.into_mean()).unwrap();
        let gradients = shared_gradients(&many, batches);
        many = many_optim.step(1e-2, many, gradients).unwrap();
    }
    for (one, many, start) in [
        (&one.first, &many.first, &start.first),
        (&one.second, &many.second, &start.second),
    ] {
        let start = start.weight.val().inner();
        let [one, many] = [one, many].map(|layer| base(&layer.weight) - start.clone());
        let error = relative_error(many, one);
        assert!(error < 1e-5, "{error}");
    }
    let [one, many] = [one, many].map(|model| model.first.bias.unwrap().val());
    assert!(relative_error(many, one) < 1e-5);
}

/// In a forward pass for all shards, each shard gets the same gradients as in a separate pass, with
/// lean layers and with Burn's.
#[test]
fn one_pass_serves_all_shards() {
    let device = Device::flex().autodiff();
    let dense = Dense::new(&device);
    let lean = Lean::from(dense.clone());
    let batch = normal([7, 13], &device);

    let per_shard_config = config().with_gradients(GradientMode::PerShard);
    let mut per_shard = lean
        .clone()
        .apply_hd_pissa(&per_shard_config, 0..SHARDS)
        .unwrap();
    let lean = lean.apply_hd_pissa(&config(), 0..SHARDS).unwrap();
    let dense = dense.apply_hd_pissa(&config(), 0..SHARDS).unwrap();
    let of_lean = GradientsParams::from_grads(loss(&lean, &batch).backward(), &lean);
    let of_dense = dense.forward(batch.clone()).square().mean().backward();
    let of_dense = GradientsParams::from_grads(of_dense, &dense);

    let value = loss(&lean, &batch).into_scalar::<f32>();
    for shard in 0..SHARDS {
        per_shard = per_shard.select_shard(shard).unwrap();
        let of_shard = loss(&per_shard, &batch);
        assert_eq!(of_shard.clone().into_scalar::<f32>(), value);
        let of_shard = GradientsParams::from_grads(of_shard.backward(), &per_shard);
        for layer in [&per_shard.first, &per_shard.second] {
            let adapter = layer
                .weight
                .reparameterization::<hd_pissa::HdPissaAdapter>();
            let shard = &adapter.unwrap().shards[shard];
            for id in [shard.a.id, shard.b.id] {
                let expected = of_shard.get::<2>(id).unwrap();
                assert!(values(expected.clone()).iter().any(|&x| x != 0.0));
                for found in [&of_lean, &of_dense] {
                    let error = relative_error(found.get::<2>(id).unwrap(), expected.clone());
                    assert!(error < 1e-5, "{error}");
                }
            }
        }
    }
}

#[test]
fn powers_of_two_of_workers_give_the_same_bits() {
    let device = Device::flex().autodiff();
    let start = Lean::new(&device);
    for micro_batches in [4, 12] {
        let data = data(&device, micro_batches);
        for (wire, clip) in [
            (CommunicationDtype::F32, None),
            (CommunicationDtype::F32, Some(1e-3)),
            (CommunicationDtype::Bf16, None),
        ] {
            let settings = Settings {
                wire,
                clip,
                shards: SHARDS,
            };
            let [one, two, four] = [1, 2, 4]
                .map(|workers| train_on_workers(workers, &start, &data, settings, 0..STEPS, None));
            assert_eq!(one, two);
            assert_eq!(one, four);
        }
    }
}

#[test]
fn other_numbers_of_workers_agree_to_rounding() {
    let device = Device::flex().autodiff();
    let start = Lean::new(&device);
    let data = data(&device, 6);
    let settings = Settings {
        shards: 3,
        ..Settings::default()
    };
    let [one, three] =
        [1, 3].map(|workers| train_on_workers(workers, &start, &data, settings, 0..STEPS, None));
    let start = values(start.first.weight.val());
    let change = |data: &TensorData| -> Vec<f32> {
        let values = data.iter::<f32>().zip(&start);
        values.map(|(end, start)| end - start).collect()
    };
    let (one, three) = (change(&one[0]), change(&three[0]));
    let largest = one.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
    let differences = one.iter().zip(&three).map(|(a, b)| (a - b).abs());
    let worst = differences.fold(0.0f32, f32::max);
    assert!(worst < 1e-4 * largest, "{worst} of {largest}");
}

#[test]
fn a_checkpoint_resumes_on_any_number_of_workers() {
    let device = Device::flex().autodiff();
    let start = Lean::new(&device);
    let data = data(&device, 4);
    let settings = Settings {
        shards: SHARDS,
        ..Settings::default()
    };
    let uninterrupted = train_on_workers(1, &start, &data, settings, 0..STEPS, None);
    for (before, after) in [(1, 4), (4, 1), (2, 4), (4, 2)] {
        let folder = tempfile::tempdir().unwrap();
        let folder = Some(folder.path());
        train_on_workers(before, &start, &data, settings, 0..3, folder);
        let resumed = train_on_workers(after, &start, &data, settings, 3..STEPS, folder);
        assert_eq!(resumed, uninterrupted, "{before} workers, then {after}");
    }
}

/// In a step a worker sends the gradients of shards that others host, and the deltas of its own
/// shards.
#[test]
fn the_traffic_of_a_step_is_as_documented() {
    const WORKERS: usize = 2;
    let device = Device::flex().autodiff();
    let start = Lean::new(&device);
    let data = data(&device, 2);
    let measured: Vec<Traffic> = on_threads(WORKERS, |communicator| {
        let worker = communicator.worker_index();
        let mut model = start.clone().apply_hd_pissa(&config(), 0..SHARDS).unwrap();
        let mut optim = HdPissaOptimizerConfig::new()
            .with_fingerprint_every(None)
            .init(adam(), communicator)
            .unwrap();
        let step = |model: Lean, optim: &mut HdPissaOptimizer| {
            let gradients = shared_gradients(&model, &data[0][worker..=worker]);
            optim.step(1e-3, model, gradients).unwrap()
        };
        // The first step agrees on the layout too.
        model = step(model, &mut optim);
        let before = optim.traffic();
        step(model, &mut optim);
        let after = optim.traffic();
        Traffic {
            sent: after.sent - before.sent,
            received: after.received - before.received,
        }
    });
    // Values of all shards.
    let factors = (SHARDS * RANK * ((13 + 17) + (17 + 11))) as u64;
    let gradients = 4 * factors * (WORKERS as u64 - 1) / WORKERS as u64;
    let deltas = 4 * factors / WORKERS as u64 * (WORKERS as u64 - 1);
    // A count for each weight and hosted shard and whether frames are stale, for each of two groups of
    // weights; the number of micro-batches, behind the name of the call.
    let (weights, hosted) = (2, (SHARDS / WORKERS) as u64);
    let checks = 4 * (weights * hosted + 2) + 8 + "gather_integers ".len() as u64;
    for traffic in measured {
        assert_eq!(traffic.sent, gradients + deltas + checks);
        assert_eq!(traffic.received, gradients + deltas + checks);
    }
}

#[test]
fn gradients_that_do_not_fit_are_refused() {
    let device = Device::flex().autodiff();
    let start = Lean::new(&device);
    let batch = normal([5, 13], &device);
    let per_shard = config().with_gradients(GradientMode::PerShard);

    let hosted = start.clone().apply_hd_pissa(&config(), 0..2).unwrap_err();
    assert!(matches!(hosted, HdPissaError::SharedNeedsAllShards { .. }));

    let shared = start.clone().apply_hd_pissa(&config(), 0..SHARDS).unwrap();
    let own = start.clone().apply_hd_pissa(&per_shard, 0..SHARDS).unwrap();
    let mut optim = HdPissaOptimizerConfig::new().init(adam(), Solo).unwrap();

    let other_mode = |model| OptimizerError::OtherGradientMode { model };
    let gradients = ShardGradients::new(&shared);
    let refused = optim.step(1e-3, shared, gradients).err().unwrap();
    assert_eq!(refused.cause, other_mode(GradientMode::Shared));
    let shared = refused.model;

    let gradients = shared_gradients(&own, std::slice::from_ref(&batch));
    let refused = optim.step(1e-3, own, gradients).err().unwrap();
    assert_eq!(refused.cause, other_mode(GradientMode::PerShard));
    let own = refused.model;

    for pushed in [1, 3] {
        let mut gradients = SharedGradients::new(&shared, 2);
        for _ in 0..pushed {
            let of_batch = loss(&shared, &batch).backward();
            gradients.push(GradientsParams::from_grads(of_batch, &shared));
        }
        let refused = optim.step(1e-3, shared.clone(), gradients).err().unwrap();
        let expected = OptimizerError::WrongNumberOfMicroBatches {
            pushed,
            expected: 2,
        };
        assert_eq!(refused.cause, expected);
    }

    // Of a forward pass of another model.
    let of_other = loss(&own.select_shard(1).unwrap(), &batch).backward();
    let mut foreign = SharedGradients::new(&shared, 1);
    foreign.push(GradientsParams::from_grads(of_other, &shared));
    let refused = optim.step(1e-3, shared, foreign).err().unwrap();
    assert!(matches!(
        refused.cause,
        OptimizerError::MissingGradient { .. }
    ));
}

#[test]
fn no_shard_is_selected_where_all_are() {
    let device = Device::flex().autodiff();
    let model = Lean::new(&device).apply_hd_pissa(&config(), 0..SHARDS);
    let error = model.unwrap().select_shard(0).unwrap_err();
    assert_eq!(error, HdPissaError::SharesGradients { index: 0 });
}

/// The first step of each of `workers` workers, whose models may differ.
fn first_steps(
    workers: usize,
    model: impl Fn(usize) -> Lean + Sync,
) -> Vec<Result<(), OptimizerError>> {
    on_threads(workers, |communicator| {
        let model = model(communicator.worker_index());
        let mut optim = HdPissaOptimizerConfig::new()
            .init(adam(), communicator)
            .unwrap();
        let batch = Tensor::ones([5, 13], &Device::flex().autodiff());
        let gradients = GradientsParams::from_grads(loss(&model, &batch).backward(), &model);
        let stepped = optim.step(1e-3, model, gradients);
        stepped.map(|_| ()).map_err(|error| error.cause)
    })
}

/// Both modes host the same number of shards on a worker, so only the mode differs.
#[test]
fn workers_of_different_modes_are_refused() {
    let start = Lean::new(&Device::flex().autodiff());
    let per_shard = config()
        .with_gradients(GradientMode::PerShard)
        .with_shards(2);
    let results = first_steps(2, |worker| {
        let start = start.clone();
        match worker {
            0 => start.apply_hd_pissa(&config().with_shards(2), 0..2),
            _ => start.apply_hd_pissa(&per_shard, 1..2),
        }
        .unwrap()
    });
    for result in results {
        let message = result.unwrap_err().to_string();
        assert!(
            message.contains("PerShard gradients") && message.contains("Shared gradients"),
            "{message}"
        );
    }
}

#[test]
fn a_checkpoint_of_the_other_mode_is_refused() {
    let device = Device::flex().autodiff();
    let start = Lean::new(&device);
    let apply = |mode| {
        let config = config().with_gradients(mode);
        start.clone().apply_hd_pissa(&config, 0..SHARDS).unwrap()
    };
    for (saved, given) in [
        (GradientMode::PerShard, GradientMode::Shared),
        (GradientMode::Shared, GradientMode::PerShard),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(folder.path());
        let model = apply(saved);
        let state = HdPissaOptimizerConfig::new()
            .init(adam(), Solo)
            .unwrap()
            .to_record()
            .and_then(HdPissaOptimizerRecord::into_bytes);
        let snapshot = Snapshot::new(1, &model, state.unwrap());
        checkpoints.save(&snapshot, &Solo).unwrap();
        let checkpoint = checkpoints.latest().unwrap().checkpoint.unwrap();
        let message = checkpoint.restore(apply(given)).unwrap_err().to_string();
        for part in [
            "gradients".into(),
            format!("{saved:?}"),
            format!("{given:?}"),
        ] {
            assert!(message.contains(&part), "{message}");
        }
    }
}

#[test]
fn workers_that_do_not_divide_the_shards_are_refused() {
    let start = Lean::new(&Device::flex().autodiff());
    let model = |_| start.clone().apply_hd_pissa(&config(), 0..SHARDS).unwrap();
    for result in first_steps(3, model) {
        let expected = OptimizerError::UnevenWorkers {
            shards: SHARDS,
            workers: 3,
        };
        assert_eq!(result, Err(expected));
    }
}

/// Each worker knows the frames of all shards. They must be the same.
#[test]
fn frames_that_differ_between_workers_are_refused() {
    struct Scale(f64);

    impl ModuleMapper for Scale {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            match param.is_require_grad() {
                true => {
                    param.map(|value| Tensor::from_inner(value.inner() * self.0).require_grad())
                }
                false => param,
            }
        }
    }

    let start = Lean::new(&Device::flex().autodiff());
    let model = |worker: usize| {
        let model = start.clone().apply_hd_pissa(&config(), 0..SHARDS).unwrap();
        model.map(&mut Scale(1.0 + worker as f64))
    };
    for result in first_steps(2, model) {
        assert!(
            matches!(result, Err(OptimizerError::Drift { .. })),
            "{result:?}"
        );
    }
}
