//! Shards are one thing, workers another: any layout of the same shards gives the same weights.

use std::time::Duration;

use burn::module::{Module, ModuleMapper, Param, ParamGroup};
use burn::optim::{AdamConfig, GradientsParams};
use burn::tensor::{Device, Tensor, TensorData};
use hd_pissa::comm::{Communicator, Solo, thread_group};
use hd_pissa::{HdPissaConfig, HdPissaModule, HdPissaOptimizer, OptimizerError, ShardGradients};
use hd_pissa_tests::{Lean, base, bits, normal};

const SHARDS: usize = 4;
const STEPS: usize = 5;

fn config() -> HdPissaConfig {
    HdPissaConfig::new().with_rank(2).with_shards(SHARDS)
}

/// Trains the shards `hosted` of `start`, one of whose biases trains too; the final parameters.
fn train(
    start: Lean,
    hosted: Vec<usize>,
    data: &[Vec<Tensor<2>>],
    communicator: impl Communicator + 'static,
) -> Vec<TensorData> {
    let mut model = start
        .apply_hd_pissa(&config(), hosted.clone())
        .unwrap()
        .set_require_grad_group(ParamGroup::from_path("first.bias"), true);
    let adam = AdamConfig::new().with_epsilon(1e-8).init();
    let mut optim = HdPissaOptimizer::new(adam, communicator).unwrap();
    for batches in data {
        let mut gradients = ShardGradients::new(&model);
        for &shard in &hosted {
            model = model.select_shard(shard);
            let loss = model.forward(batches[shard].clone()).square().mean();
            gradients.push(shard, GradientsParams::from_grads(loss.backward(), &model));
        }
        model = optim.step(1e-2, model, gradients).unwrap();
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
    let data: Vec<Vec<Tensor<2>>> = (0..STEPS)
        .map(|_| (0..SHARDS).map(|_| normal([5, 13], &device)).collect())
        .collect();
    let solo = train(start.clone(), (0..SHARDS).collect(), &data, Solo);
    // Contiguous blocks, and shards dealt out in another order.
    for layout in [
        vec![vec![0, 1], vec![2, 3]],
        vec![vec![3, 0], vec![1, 2]],
        vec![vec![2], vec![0], vec![3], vec![1]],
    ] {
        let group = thread_group(layout.len(), Duration::from_secs(60));
        std::thread::scope(|scope| {
            let workers: Vec<_> = layout
                .into_iter()
                .zip(group)
                .map(|(hosted, communicator)| {
                    let (start, data) = (start.clone(), &data);
                    scope.spawn(move || train(start, hosted, data, communicator))
                })
                .collect();
            for worker in workers {
                assert_eq!(worker.join().unwrap(), solo);
            }
        });
    }
}

/// The step's result on each of two workers that host the shards given.
fn first_steps(
    models: [Lean; 2],
    hosted: [usize; 2],
    spoil: f32,
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
                    let mut optim = HdPissaOptimizer::new(adam, communicator).unwrap();
                    let model = model.select_shard(shard);
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
        first_steps([model(0), model(1)], [0, 1], 1.0),
        vec![Ok(()); 2]
    );
    let errors = first_steps([model(0), model(1)], [0, 1], f32::NAN);
    assert_eq!(errors[0], errors[1]);
    match &errors[0] {
        Err(OptimizerError::NonFinite { path, .. }) => {
            assert_eq!(path, "first.weight.hd_pissa.shard_1_of_2");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn workers_that_disagree_are_refused() {
    let device = Device::flex().autodiff();
    let start = Lean::new(&device);
    let config = config().with_shards(2);
    let model =
        |config: &HdPissaConfig, shard| start.clone().apply_hd_pissa(config, [shard]).unwrap();

    let errors = first_steps([model(&config, 1), model(&config, 1)], [1, 1], 1.0);
    let hosted = vec![1, 1];
    assert_eq!(
        errors,
        vec![Err(OptimizerError::IncompleteShards { hosted, shards: 2 }); 2]
    );

    let other = config.clone().with_rank(3);
    let errors = first_steps([model(&config, 0), model(&other, 1)], [0, 1], 1.0);
    for (worker, error) in [1, 0].into_iter().zip(errors) {
        match error {
            Err(OptimizerError::WorkerMismatch {
                worker: named,
                setting,
                ..
            }) => {
                assert_eq!(named, worker);
                assert!(setting.contains("fingerprint"), "{setting}");
            }
            other => panic!("{other:?}"),
        }
    }
}

/// Flips the lowest bit of the first value of the first layer's weight.
struct Flip;

impl ModuleMapper for Flip {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if param.lazy_shape().as_slice() != [13, 17] {
            return param;
        }
        let (id, value, mapper) = param.consume();
        let data = value.inner().into_data();
        let mut bytes = data.as_bytes().to_vec();
        bytes[0] ^= 1;
        let data = TensorData::from_bytes_vec(bytes, data.shape().clone(), data.dtype());
        let value = Tensor::from_inner(Tensor::from_data(data, &Device::flex()));
        Param::from_mapped_value(id, value, mapper)
    }
}

#[test]
fn one_flipped_bit_on_one_worker_is_caught() {
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
                    let mut optim = HdPissaOptimizer::new(adam, communicator)
                        .unwrap()
                        .with_fingerprint_every(std::num::NonZeroU64::new(2));
                    for step in 0.. {
                        if step == flip_after && index == 1 {
                            model = model.map(&mut Flip);
                        }
                        let loss = model.forward(normal([5, 13], &device)).square().mean();
                        let grads = GradientsParams::from_grads(loss.backward(), &model);
                        match optim.step(1e-3, model, grads) {
                            Ok(stepped) => model = stepped,
                            Err(error) => {
                                assert_eq!(step, first_to_refuse);
                                println!("worker {index}: {error}");
                                match error.cause {
                                    OptimizerError::WorkerMismatch {
                                        setting, worker, ..
                                    } => {
                                        assert_eq!((step, worker), (0, 1 - index));
                                        assert!(setting.contains("the model"), "{setting}");
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

#[test]
fn a_step_sends_half_of_what_the_published_script_does() {
    // Its processes gather both factors and both deltas of every weight in every step.
    let ours = |values: usize, weights: usize| 4 * (values + weights) as u64;
    let theirs = |values: usize| 4 * 2 * values as u64;
    let device = Device::flex().autodiff();
    let start = Lean::new(&device);
    let config = config().with_shards(2);
    std::thread::scope(|scope| {
        for communicator in thread_group(2, Duration::from_secs(60)) {
            let (start, config) = (start.clone(), &config);
            scope.spawn(move || {
                let device = Device::flex().autodiff();
                let index = communicator.worker_index();
                let mut model = start.apply_hd_pissa(config, [index]).unwrap();
                let adam = AdamConfig::new().init();
                let mut optim = HdPissaOptimizer::new(adam, communicator).unwrap();
                let mut before = optim.traffic();
                for step in 0..3 {
                    let loss = model.forward(normal([5, 13], &device)).square().mean();
                    let grads = GradientsParams::from_grads(loss.backward(), &model);
                    model = optim.step(1e-3, model, grads).unwrap();
                    let after = optim.traffic();
                    if step > 0 {
                        let bytes = ours(2 * (13 + 17 + 17 + 11), 2);
                        assert_eq!(after.sent - before.sent, bytes);
                        assert_eq!(after.received - before.received, bytes);
                    }
                    before = after;
                }
            });
        }
    });
    // SmolLM2-135M: q and o, k and v, gate and up and down, in each of 30 layers.
    let sums = 2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536);
    let (values, weights) = (16 * 30 * sums, 30 * 7);
    let (ours, theirs) = (7 * ours(values, weights), 7 * theirs(values));
    println!(
        "SmolLM2-135M, K = 8, r = 16: {ours} bytes per step and worker, the script's {theirs}"
    );
    assert!(ours as f64 <= 0.51 * theirs as f64);
}
