//! Any layout of the same shards over workers gives the same weights.

use std::num::NonZeroUsize;
use std::time::Duration;

use burn::module::{Module, ModuleMapper, Param, ParamGroup};
use burn::optim::{AdamConfig, GradientsParams};
use burn::tensor::{Device, Tensor, TensorData};
use hd_pissa::comm::{Communicator, Solo, thread_group};
use hd_pissa::{
    CommunicationDtype, HdPissaAdapter, HdPissaConfig, HdPissaModule, HdPissaOptimizer,
    HdPissaOptimizerConfig, OptimizerError,
};
use hd_pissa_tests::training::{data, step};
use hd_pissa_tests::{Lean, base, bits, normal};

const SHARDS: usize = 4;
const STEPS: usize = 5;

fn config() -> HdPissaConfig {
    HdPissaConfig::new().with_rank(2).with_shards(SHARDS)
}

/// Trains the shards `hosted` of `start`, and one bias. Returns the final parameters. The model has
/// the factors of the shards `known`.
fn train(
    start: Lean,
    known: Vec<usize>,
    hosted: Vec<usize>,
    data: &[Vec<Tensor<2>>],
    communicator: impl Communicator + 'static,
    wire: CommunicationDtype,
    gathers: usize,
) -> Vec<TensorData> {
    let mut model = start
        .apply_hd_pissa(&config(), known)
        .unwrap()
        .set_require_grad_group(ParamGroup::from_path("first.bias"), true);
    let adam = AdamConfig::new().with_epsilon(1e-8).init();
    let mut optim = HdPissaOptimizerConfig::new()
        .with_communication_dtype(wire)
        .with_buckets(NonZeroUsize::new(gathers).unwrap())
        .init(adam, communicator)
        .unwrap();
    for batches in data {
        model = step(model, &mut optim, hosted.iter().copied(), batches);
    }
    vec![
        bits(&base(&model.first.weight)),
        bits(&base(&model.second.weight)),
        bits(&model.first.bias.unwrap().val()),
    ]
}

#[test]
fn every_layout_of_shards_on_workers_gives_the_same_bits() {
    let device = Device::flex().autodiff();
    let start = Lean::new(&device);
    let data = data(STEPS, SHARDS, &device);
    let alone = |wire| {
        let all: Vec<usize> = (0..SHARDS).collect();
        train(start.clone(), all.clone(), all, &data, Solo, wire, 1)
    };
    let solo = [CommunicationDtype::F32, CommunicationDtype::Bf16].map(|wire| (wire, alone(wire)));
    assert_ne!(solo[0].1, solo[1].1);
    // Contiguous blocks, and shards in another order; one gather per step, as many as weights, and
    // more. Workers that have the factors of all shards host blocks.
    for (gathers, layout, knows_all) in [
        (1, vec![vec![0, 1], vec![2, 3]], false),
        (2, vec![vec![3, 0], vec![1, 2]], false),
        (1 << 40, vec![vec![2], vec![0], vec![3], vec![1]], false),
        (2, vec![vec![0, 1], vec![2, 3]], true),
    ] {
        for (wire, solo) in &solo {
            let group = thread_group(layout.len(), Duration::from_secs(60));
            std::thread::scope(|scope| {
                let workers: Vec<_> = layout
                    .iter()
                    .zip(group)
                    .map(|(hosted, communicator)| {
                        let (start, hosted, data) = (start.clone(), hosted.clone(), &data);
                        let known = match knows_all {
                            true => (0..SHARDS).collect(),
                            false => hosted.clone(),
                        };
                        scope.spawn(move || {
                            train(start, known, hosted, data, communicator, *wire, gathers)
                        })
                    })
                    .collect();
                for worker in workers {
                    assert_eq!(worker.join().unwrap(), *solo);
                }
            });
        }
    }
}

/// Only default settings.
fn plain(_index: usize) -> HdPissaOptimizerConfig {
    HdPissaOptimizerConfig::new()
}

/// The step's result on each of two workers that host the shards given.
fn first_steps(
    models: [Lean; 2],
    hosted: [usize; 2],
    spoil: f32,
    setup: fn(usize) -> HdPissaOptimizerConfig,
) -> Vec<Result<(), OptimizerError>> {
    let group = thread_group(2, Duration::from_secs(60));
    std::thread::scope(|scope| {
        let workers: Vec<_> = models
            .into_iter()
            .zip(hosted)
            .zip(group)
            .map(|((model, shard), communicator)| {
                scope.spawn(move || {
                    let device = Device::flex().autodiff();
                    let index = communicator.worker_index();
                    let adam = AdamConfig::new().init();
                    let mut optim = setup(index).init(adam, communicator).unwrap();
                    let model = model.select_shard(shard).unwrap();
                    let factor = if index == 1 { spoil } else { 1.0 };
                    let x = normal([5, 13], &device) * factor;
                    let loss = model.forward(x).square().mean();
                    let grads = GradientsParams::from_grads(loss.backward(), &model);
                    let before = bits(&base(&model.first.weight));
                    match optim.step(1e-3, model, grads) {
                        Ok(_) => Ok(()),
                        Err(error) => {
                            assert_eq!(bits(&base(&error.model.first.weight)), before);
                            Err(error.cause)
                        }
                    }
                })
            })
            .collect();
        workers.into_iter().map(|w| w.join().unwrap()).collect()
    })
}

#[test]
fn a_bad_gradient_on_one_worker_refuses_the_step_on_all() {
    let device = Device::flex().autodiff();
    let start = Lean::new(&device);
    let config = config().with_shards(2);
    let model = |shard| start.clone().apply_hd_pissa(&config, [shard]).unwrap();
    assert_eq!(
        first_steps([model(0), model(1)], [0, 1], 1.0, plain),
        vec![Ok(()); 2]
    );
    let bf16_in_two = |_| {
        HdPissaOptimizerConfig::new()
            .with_communication_dtype(CommunicationDtype::Bf16)
            .with_buckets(NonZeroUsize::new(2).unwrap())
    };
    let setups: [fn(usize) -> HdPissaOptimizerConfig; 2] = [plain, bf16_in_two];
    for setup in setups {
        let errors = first_steps([model(0), model(1)], [0, 1], f32::NAN, setup);
        let expected = OptimizerError::NonFiniteGradient {
            path: "first.weight.hd_pissa.shard_1_of_2".into(),
            count: 2 * (13 + 17),
        };
        assert_eq!(errors, vec![Err(expected); 2]);
    }
}

#[test]
fn workers_that_disagree_are_refused() {
    let device = Device::flex().autodiff();
    let start = Lean::new(&device);
    let config = config().with_shards(2);
    let model =
        |config: &HdPissaConfig, shard| start.clone().apply_hd_pissa(config, [shard]).unwrap();

    let errors = first_steps([model(&config, 1), model(&config, 1)], [1, 1], 1.0, plain);
    let hosted = vec![1, 1];
    assert_eq!(
        errors,
        vec![Err(OptimizerError::IncompleteShards { hosted, shards: 2 }); 2]
    );

    let other = config.clone().with_rank(3);
    let errors = first_steps([model(&config, 0), model(&other, 1)], [0, 1], 1.0, plain);
    for (worker, error) in [1, 0].into_iter().zip(errors) {
        match error {
            Err(OptimizerError::WorkerMismatch {
                worker: named,
                ours,
                ..
            }) => {
                assert_eq!(named, worker);
                assert!(
                    ours.starts_with("`first.weight` of shape [13, 17]"),
                    "{ours}"
                );
            }
            other => panic!("{other:?}"),
        }
    }

    let models = || [model(&config, 0), model(&config, 1)];
    let mismatch = |worker, ours: &str, theirs: &str| {
        Err(OptimizerError::WorkerMismatch {
            worker,
            ours: ours.into(),
            theirs: theirs.into(),
        })
    };
    let all = start.clone().apply_hd_pissa(&config, 0..2).unwrap();
    let errors = first_steps([all, model(&config, 1)], [0, 1], 1.0, plain);
    let [all, own] = [
        "factors of all shards",
        "factors of the hosted shards alone",
    ];
    assert_eq!(errors[0], mismatch(1, all, own));
    assert_eq!(errors[1], mismatch(0, own, all));
    let errors = first_steps(models(), [0, 1], 1.0, |index| match index {
        0 => plain(index),
        _ => plain(index).with_communication_dtype(CommunicationDtype::Bf16),
    });
    let [f32, bf16] = ["communication_dtype f32", "communication_dtype bf16"];
    assert_eq!(errors[0], mismatch(1, f32, bf16));
    assert_eq!(errors[1], mismatch(0, bf16, f32));
    let errors = first_steps(models(), [0, 1], 1.0, |index| {
        plain(index).with_buckets(NonZeroUsize::new(1 + index).unwrap())
    });
    assert_eq!(errors[0], mismatch(1, "1 buckets", "2 buckets"));
    assert_eq!(errors[1], mismatch(0, "2 buckets", "1 buckets"));
}

/// Flips one bit in each of some bytes of the first layer's weight.
struct Flip(&'static [(usize, u8)]);

impl ModuleMapper for Flip {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if param.lazy_shape().as_slice() != [13, 17] {
            return param;
        }
        let (id, value, mapper) = param.consume();
        let data = value.inner().into_data();
        let mut bytes = data.as_bytes().to_vec();
        for &(byte, bit) in self.0 {
            bytes[byte] ^= bit;
        }
        let data = TensorData::from_bytes_vec(bytes, data.shape().clone(), data.dtype());
        let value = Tensor::from_inner(Tensor::from_data(data, &Device::flex()));
        Param::from_mapped_value(id, value, mapper)
    }
}

/// Flips one bit of the first value, and the signs of the second and the fourth. Hashes that only
/// multiply lose the highest bits of two words.
#[test]
fn flipped_bits_on_one_worker_are_caught() {
    for flip in [&[(0, 1)][..], &[(4 + 3, 0x80), (12 + 3, 0x80)]] {
        drift_is_caught(flip);
    }
}

fn drift_is_caught(flip: &'static [(usize, u8)]) {
    let device = Device::flex().autodiff();
    let start = Lean::new(&device);
    let config = config().with_shards(2);
    for (flip_after, first_to_refuse) in [(0, 0), (3, 4)] {
        let group = thread_group(2, Duration::from_secs(60));
        std::thread::scope(|scope| {
            for communicator in group {
                let (start, config) = (start.clone(), &config);
                scope.spawn(move || {
                    let device = Device::flex().autodiff();
                    let index = communicator.worker_index();
                    let mut model = start.apply_hd_pissa(config, [index]).unwrap();
                    let adam = AdamConfig::new().init();
                    let mut optim = HdPissaOptimizerConfig::new()
                        .with_fingerprint_every(std::num::NonZeroU64::new(2))
                        .init(adam, communicator)
                        .unwrap();
                    for step in 0.. {
                        if step == flip_after && index == 1 {
                            model = model.map(&mut Flip(flip));
                        }
                        let loss = model.forward(normal([5, 13], &device)).square().mean();
                        let grads = GradientsParams::from_grads(loss.backward(), &model);
                        match optim.step(1e-3, model, grads) {
                            Ok(stepped) => model = stepped,
                            Err(error) => {
                                assert_eq!(step, first_to_refuse);
                                println!("worker {index}: {error}");
                                match error.cause {
                                    OptimizerError::WorkerMismatch { ours, worker, .. } => {
                                        assert_eq!((step, worker), (0, 1 - index));
                                        assert!(ours.starts_with("parameters"), "{ours}");
                                    }
                                    OptimizerError::Drift {
                                        path,
                                        worker,
                                        ours,
                                        theirs,
                                    } => {
                                        assert_eq!(
                                            (path.as_str(), worker),
                                            ("first.weight", 1 - index)
                                        );
                                        assert_ne!(ours, theirs);
                                    }
                                    other => panic!("{other:?}"),
                                }
                                break;
                            }
                        }
                    }
                });
            }
        });
    }
}

/// Two workers train the shards of one model. After two steps, only worker 1 or both load the
/// adapters of another run of the same shape. The next steps are those of a fresh optimizer.
#[test]
fn frames_that_change_between_steps_are_shared_again() {
    let device = Device::flex().autodiff();
    let config = config().with_shards(2);
    let (start, other) = (Lean::new(&device), Lean::new(&device));
    let batches: Vec<Tensor<2>> = (0..2).map(|_| normal([5, 13], &device)).collect();
    // The weights of `start` with the frames of `other` in the shards `swapped`.
    let mixed = |hosted: &[usize], swapped: &[usize]| {
        let ours = start
            .clone()
            .apply_hd_pissa(&config, hosted.to_vec())
            .unwrap();
        let theirs = other
            .clone()
            .apply_hd_pissa(&config, hosted.to_vec())
            .unwrap();
        let frames = [&theirs.first.weight, &theirs.second.weight]
            .into_iter()
            .flat_map(|weight| {
                weight
                    .reparameterization::<HdPissaAdapter>()
                    .unwrap()
                    .shards
                    .clone()
            })
            .filter(|shard| swapped.contains(&shard.index))
            .flat_map(|shard| [(shard.a.id, shard.a.val()), (shard.b.id, shard.b.val())]);
        ours.map(&mut Replace(frames.collect()))
    };
    let step = |optim: &mut HdPissaOptimizer, model: Lean, hosted: &[usize]| {
        step(model, optim, hosted.iter().copied(), &batches)
    };
    let weights = |m: &Lean| [bits(&base(&m.first.weight)), bits(&base(&m.second.weight))];
    let sgd = || burn::optim::SgdConfig::new().init();
    for swapped in [&[1][..], &[0, 1]] {
        let expected = {
            let mut optim = HdPissaOptimizerConfig::new().init(sgd(), Solo).unwrap();
            weights(&step(&mut optim, mixed(&[0, 1], swapped), &[0, 1]))
        };
        // A single worker that goes from one model to the other.
        let mut optim = HdPissaOptimizerConfig::new().init(sgd(), Solo).unwrap();
        step(&mut optim, mixed(&[0, 1], &[]), &[0, 1]);
        let after = step(&mut optim, mixed(&[0, 1], swapped), &[0, 1]);
        assert_eq!(weights(&after), expected);
        // Two workers.
        std::thread::scope(|scope| {
            for communicator in thread_group(2, Duration::from_secs(60)) {
                let (mixed, step, weights, expected) = (&mixed, &step, &weights, &expected);
                scope.spawn(move || {
                    let own = [communicator.worker_index()];
                    let mut optim = HdPissaOptimizerConfig::new()
                        .init(sgd(), communicator)
                        .unwrap();
                    let model = step(&mut optim, mixed(&own, &[]), &own);
                    step(&mut optim, model, &own);
                    let after = step(&mut optim, mixed(&own, swapped), &own);
                    assert_eq!(weights(&after), *expected);
                    assert_eq!(optim.steps(), 3);
                });
            }
        });
    }
}

/// Replaces parameters by id.
struct Replace(Vec<(burn::module::ParamId, Tensor<2>)>);

impl ModuleMapper for Replace {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        match self.0.iter().find(|(id, _)| *id == param.id) {
            Some((_, value)) => {
                let value = Tensor::<D>::from_dispatch(value.clone().into_dispatch());
                param.map(|_| value.detach().require_grad())
            }
            None => param,
        }
    }
}

#[test]
fn a_step_sends_half_of_what_the_published_script_does() {
    // Its processes gather both factors and both deltas of every weight in every step. In addition
    // to the deltas, one count for each weight, and one for each gather.
    let ours = |wire, values: usize, weights: usize, gathers: usize| match wire {
        CommunicationDtype::F32 => 4 * (values + weights + gathers) as u64,
        CommunicationDtype::Bf16 => 2 * (values + 3 * (weights + gathers)) as u64,
    };
    let theirs = |values: usize| 4 * 2 * values as u64;
    let device = Device::flex().autodiff();
    let start = Lean::new(&device);
    let config = config().with_shards(2);
    for wire in [CommunicationDtype::F32, CommunicationDtype::Bf16] {
        std::thread::scope(|scope| {
            for communicator in thread_group(2, Duration::from_secs(60)) {
                let (start, config) = (start.clone(), &config);
                scope.spawn(move || {
                    let device = Device::flex().autodiff();
                    let index = communicator.worker_index();
                    let mut model = start.apply_hd_pissa(config, [index]).unwrap();
                    let adam = AdamConfig::new().init();
                    let mut optim = HdPissaOptimizerConfig::new()
                        .with_communication_dtype(wire)
                        .init(adam, communicator)
                        .unwrap();
                    let mut before = optim.traffic();
                    for step in 0..3 {
                        let loss = model.forward(normal([5, 13], &device)).square().mean();
                        let grads = GradientsParams::from_grads(loss.backward(), &model);
                        model = optim.step(1e-3, model, grads).unwrap();
                        let after = optim.traffic();
                        if step > 0 {
                            let bytes = ours(wire, 2 * (13 + 17 + 17 + 11), 2, 2);
                            assert_eq!(after.sent - before.sent, bytes);
                            assert_eq!(after.received - before.received, bytes);
                        }
                        before = after;
                    }
                });
            }
        });
    }
    // SmolLM2-135M: q and o, k and v, gate and up and down, in each of 30 layers.
    let sums = 2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536);
    let (values, weights) = (16 * 30 * sums, 30 * 7);
    let theirs = 7 * theirs(values);
    for (wire, share) in [
        (CommunicationDtype::F32, 0.51),
        (CommunicationDtype::Bf16, 0.255),
    ] {
        let ours = 7 * ours(wire, values, weights, 4);
        println!(
            "SmolLM2-135M, K = 8, r = 16: {ours} bytes of {wire} per step and worker, the script's \
             {theirs}"
        );
        assert!(ours as f64 <= share * theirs as f64);
    }
}
