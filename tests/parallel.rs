//! Micro-batches and decompositions in parallel: the same bits on any number of threads.

use std::time::Duration;

use burn::optim::{AdamConfig, GradientsParams};
use burn::tensor::{Device, Tensor, TensorData};
use hd_pissa::comm::{Solo, thread_group};
use hd_pissa::{
    HdPissaAdapter, HdPissaConfig, HdPissaLinearConfig, HdPissaModule, HdPissaOptimizerConfig,
    ShardGradients, side_by_side,
};
use hd_pissa_tests::{Lean, base, bits, normal};

const SHARDS: usize = 3;
const MICRO_BATCHES: usize = 4;

fn in_pool<T: Send>(threads: usize, work: impl FnOnce() -> T + Send) -> T {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
    pool.unwrap().install(work)
}

fn weights(model: &Lean) -> [TensorData; 2] {
    [&model.first.weight, &model.second.weight].map(|weight| bits(&base(weight)))
}

#[test]
fn steps_do_not_depend_on_the_number_of_threads() {
    let device = Device::flex().autodiff();
    let config = HdPissaConfig::new().with_rank(2).with_shards(SHARDS);
    let start = Lean::new(&device)
        .apply_hd_pissa(&config, 0..SHARDS)
        .unwrap();
    let data: Vec<Vec<(usize, Tensor<2>)>> = (0..4)
        .map(|_| {
            let batches = (0..SHARDS * MICRO_BATCHES).map(|i| i / MICRO_BATCHES);
            batches
                .map(|shard| (shard, normal([5, 13], &device)))
                .collect()
        })
        .collect();
    let optimizer = || {
        let adam = AdamConfig::new().with_epsilon(1e-8).init();
        HdPissaOptimizerConfig::new().init(adam, Solo).unwrap()
    };
    let gradients = |model: &Lean, shard: usize, batch: Tensor<2>| {
        let model = model.clone().select_shard(shard).unwrap();
        let loss = model.forward(batch).square().mean();
        GradientsParams::from_grads(loss.backward(), &model)
    };
    // One after the other, as without the function.
    let expected = {
        let (mut model, mut optim) = (start.clone(), optimizer());
        for batches in &data {
            let mut all = ShardGradients::new(&model);
            for (shard, batch) in batches {
                all.push(*shard, gradients(&model, *shard, batch.clone()));
            }
            model = optim.step(1e-2, model, all.into_mean()).unwrap();
        }
        weights(&model)
    };
    for threads in [1, 2, 4, 24] {
        let (mut model, mut optim) = (start.clone(), optimizer());
        for batches in &data {
            let mut all = ShardGradients::new(&model);
            let mut order = Vec::new();
            in_pool(threads, || {
                side_by_side(
                    &model.clone(),
                    batches.clone(),
                    |model, (shard, batch)| {
                        assert_eq!(rayon::current_num_threads(), (threads / 12).max(1));
                        (shard, gradients(model, shard, batch))
                    },
                    |(shard, of_batch)| {
                        order.push(shard);
                        all.push(shard, of_batch);
                    },
                );
            });
            assert!(order.is_sorted() && order.len() == batches.len());
            model = optim.step(1e-2, model, all.into_mean()).unwrap();
        }
        assert_eq!(weights(&model), expected, "{threads} threads");
    }
}

#[test]
fn factors_do_not_depend_on_the_number_of_threads() {
    // Of a size at which the decomposition itself would use several threads.
    let device = Device::flex();
    let start = Lean {
        first: HdPissaLinearConfig::new(320, 352).init(&device),
        second: HdPissaLinearConfig::new(352, 300).init(&device),
    };
    let config = HdPissaConfig::new().with_rank(2).with_shards(SHARDS);
    let factors = |threads| {
        let model = in_pool(threads, || {
            start.clone().apply_hd_pissa(&config, 0..SHARDS).unwrap()
        });
        let of = |shard: &hd_pissa::HdPissaShard| [bits(&shard.a.val()), bits(&shard.b.val())];
        [&model.first.weight, &model.second.weight]
            .into_iter()
            .flat_map(|weight| {
                let adapter = weight.reparameterization::<HdPissaAdapter>().unwrap();
                adapter.shards.iter().flat_map(of).collect::<Vec<_>>()
            })
            .collect::<Vec<_>>()
    };
    let expected = factors(1);
    assert_eq!(expected.len(), 4 * SHARDS);
    assert_eq!(factors(2), expected);
    assert_eq!(factors(5), expected);
    // A single weight, and several workers that share the work.
    let alone = in_pool(2, || {
        let model = start.first.clone().apply_hd_pissa(&config, 0..SHARDS);
        let model = model.unwrap();
        let adapter = model.weight.reparameterization::<HdPissaAdapter>().unwrap();
        bits(&adapter.shards[0].a.val())
    });
    assert_eq!(alone, expected[0]);
    let shared = std::thread::scope(|scope| {
        let workers: Vec<_> = thread_group(2, Duration::from_secs(60))
            .into_iter()
            .map(|communicator| {
                let (start, config) = (start.clone(), &config);
                scope.spawn(move || {
                    let model = start.apply_hd_pissa_shared(config, 0..SHARDS, &communicator);
                    let model = model.unwrap();
                    let weight = model.first.weight;
                    let adapter = weight.reparameterization::<HdPissaAdapter>().unwrap();
                    bits(&adapter.shards[0].a.val())
                })
            })
            .collect();
        let join = |worker: std::thread::ScopedJoinHandle<_>| worker.join().unwrap();
        workers.into_iter().map(join).collect::<Vec<_>>()
    });
    assert_eq!(shared, vec![expected[0].clone(); 2]);
}
