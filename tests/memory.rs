//! The allocations of a training step on Flex, counted by the global allocator.

#[path = "allocator.rs"]
mod allocator;

use std::sync::atomic::Ordering;

use burn::module::Module;
use burn::nn::{Linear, LinearConfig, LinearLayout};
use burn::optim::GradientsParams;
use burn::tensor::{Device, Tensor};
use hd_pissa::{HdPissaConfig, HdPissaLinear, HdPissaModule, HdPissaOptimizer, side_by_side};
use hd_pissa_tests::normal;
use hd_pissa_tests::training::{adam, gradients_by, optimizer};

use allocator::{LIVE, measure, one_at_a_time};

const D_INPUT: usize = 2048;
const D_OUTPUT: usize = 1536;
const TOKENS: usize = 32;
const WEIGHT_BYTES: usize = 4 * D_INPUT * D_OUTPUT;

fn layer(layout: LinearLayout, device: &Device) -> Linear {
    LinearConfig::new(D_INPUT, D_OUTPUT)
        .with_layout(layout)
        .init(device)
}

fn config() -> HdPissaConfig {
    HdPissaConfig::new().with_rank(4).with_shards(2)
}

/// In its first product, a thread takes a block of twice the processor's cache for faer, and keeps it.
/// Of this block, a product touches what it packs.
fn warm_up() {
    rayon::broadcast(|_| {
        let matrix = faer::Mat::<f32>::identity(64, 64);
        assert_eq!(&matrix * &matrix, matrix);
    });
}

/// The largest allocation of a forward and a backward pass with an input of the given shape.
fn largest_of<const D: usize>(
    shape: [usize; D],
    forward: impl FnOnce(Tensor<D>) -> Tensor<D>,
    device: &Device,
) -> usize {
    let x = normal(shape, device).require_grad();
    let (_, largest, _) = measure(|| {
        let grads = forward(x.clone()).square().sum().backward();
        x.grad(&grads).expect("the input is tracked");
    });
    largest
}

/// Inputs of rank 2, 3 and 4, batches of one and of several, and both layouts of the weight.
#[test]
fn the_adapter_makes_no_tensor_of_the_weights_size() {
    let _guard = one_at_a_time();
    let device = Device::flex().autodiff();
    for layout in [LinearLayout::Row, LinearLayout::Col] {
        let plain = layer(layout, &device).no_grad();
        let adapted = plain.clone().apply_hd_pissa(&config(), 0..2).unwrap();
        let lean = HdPissaLinear::from_linear(adapted.clone());
        // Without gradients, and without an adapter, the layer is also lean.
        let frozen = HdPissaLinear::from_linear(plain);
        let valid = HdPissaLinear::from_linear(adapted.clone().freeze());
        for (name, layer) in [("adapted", &lean), ("plain", &frozen), ("frozen", &valid)] {
            for largest in [
                largest_of([TOKENS, D_INPUT], |x| layer.forward(x), &device),
                largest_of([1, TOKENS, D_INPUT], |x| layer.forward(x), &device),
                largest_of([4, TOKENS / 4, D_INPUT], |x| layer.forward(x), &device),
                largest_of([1, 1, TOKENS, D_INPUT], |x| layer.forward(x), &device),
                largest_of([2, 4, TOKENS / 8, D_INPUT], |x| layer.forward(x), &device),
            ] {
                // gemm packs blocks of an operand. Its block sizes bound that memory, not the size
                // of the weight.
                assert!(
                    largest < WEIGHT_BYTES / 2,
                    "{name}, {layout:?}: {largest} of {WEIGHT_BYTES} bytes"
                );
            }
        }
        // The measurement would see a tensor of that size: Burn's layer computes the dense
        // gradient, which the adapter projects.
        let largest = largest_of([TOKENS, D_INPUT], |x| adapted.forward(x), &device);
        assert!(largest >= WEIGHT_BYTES, "{largest} of {WEIGHT_BYTES} bytes");
    }
}

#[test]
fn a_step_updates_the_weight_in_place() {
    let _guard = one_at_a_time();
    let device = Device::flex().autodiff();
    let mut model: HdPissaLinear = layer(LinearLayout::Row, &device).into();
    model = model.apply_hd_pissa(&config(), 0..2).unwrap();
    let mut optim = optimizer(adam());
    warm_up();

    let mut live = Vec::new();
    for step in 0..40 {
        let batch = |shard| (shard, normal([TOKENS, D_INPUT], &device).require_grad());
        let (selected, gradients) = gradients_by(model, HdPissaLinear::forward, (0..2).map(batch));
        let (stepped, largest, peak) = measure(|| optim.step(1e-4, selected, gradients).unwrap());
        model = stepped;
        assert!(
            largest < WEIGHT_BYTES / 2,
            "step {step}: {largest} of {WEIGHT_BYTES} bytes"
        );
        assert!(
            peak < WEIGHT_BYTES,
            "step {step}: {peak} of {WEIGHT_BYTES} bytes"
        );
        live.push(LIVE.load(Ordering::Relaxed));
    }
    // Memory does not grow: the last steps end with as many live bytes as the tenth.
    let growth = live[39] - live[9];
    assert!(
        growth.abs() < 64 * 1024,
        "{growth} bytes in 30 steps: {live:?}"
    );

    // A weight that something else holds is copied. The measurement shows that too.
    let clone = model.clone();
    let x = normal([TOKENS, D_INPUT], &device);
    let batches = (0..2).map(|shard| (shard, x.clone()));
    let (model, gradients) = gradients_by(model, HdPissaLinear::forward, batches);
    let (_, largest, _) = measure(|| optim.step(1e-4, model, gradients).unwrap());
    assert!(largest >= WEIGHT_BYTES, "{largest} of {WEIGHT_BYTES} bytes");
    drop(clone);

    // Between steps the optimizer has two moments of each factor, and no copy of the frames.
    let factors = 4 * 2 * 4 * (D_INPUT + D_OUTPUT);
    let before = LIVE.load(Ordering::Relaxed);
    drop(optim);
    let held = (before - LIVE.load(Ordering::Relaxed)) as usize;
    assert!(
        (2 * factors..5 * factors / 2).contains(&held),
        "{held} bytes beside factors of {factors}"
    );
}

/// A step holds the moments twice: before and after. The first step after a record brings its moments
/// into the optimizer's form, and holds them in two forms at most.
#[test]
fn the_first_step_of_a_resumed_run_takes_no_more_than_another() {
    const LAYERS: usize = 8;
    let _guard = one_at_a_time();
    let device = Device::flex().autodiff();
    let layers = |_| HdPissaLinear::from(LinearConfig::new(256, 192).init(&device));
    let config = HdPissaConfig::new().with_rank(8).with_shards(4);
    let mut model: Vec<HdPissaLinear> = (0..LAYERS).map(layers).collect();
    model = model.apply_hd_pissa(&config, 0..4).unwrap();
    let forward = |model: &Vec<HdPissaLinear>, x: Tensor<2>| {
        let outputs = model.iter().map(|layer| layer.forward(x.clone()));
        Tensor::cat(outputs.collect(), 1)
    };
    let mut optim = optimizer(adam());
    let mut growth_of = |optim: &mut HdPissaOptimizer| {
        let batches = (0..4).map(|shard| (shard, normal([TOKENS, 256], &device)));
        let (selected, gradients) = gradients_by(std::mem::take(&mut model), forward, batches);
        let step = || optim.step(1e-4, selected, gradients).unwrap();
        let (stepped, _, growth) = measure(step);
        model = stepped;
        growth
    };
    warm_up();
    for _ in 0..3 {
        growth_of(&mut optim);
    }
    // A thread that waits inside a product may begin another one, which takes a block of its own.
    // So the least of several counts.
    let mut least_of = |start: &dyn Fn() -> HdPissaOptimizer| {
        let growths = (0..8).map(|_| growth_of(&mut start()));
        growths.min().expect("there are some")
    };
    // The first step of any optimizer tries it out.
    let fresh = least_of(&|| optimizer(adam()));
    let resumed = least_of(&|| {
        let mut resumed = optimizer(adam());
        resumed.load_record(optim.to_record().unwrap()).unwrap();
        resumed
    });
    let of_a_weight = 2 * 4 * 4 * 8 * (256 + 192);
    assert!(
        resumed < fresh + of_a_weight,
        "{resumed} bytes, at first {fresh}"
    );
}

#[test]
fn nothing_extra_without_gradients() {
    let _guard = one_at_a_time();
    let device = Device::flex().autodiff();
    let adapted: HdPissaLinear = layer(LinearLayout::Row, &device)
        .apply_hd_pissa(&config(), 0..2)
        .unwrap()
        .into();
    let frozen = adapted.clone().freeze();
    let peak_of = |layer: &HdPissaLinear, x: &Tensor<2>| {
        let (y, _, peak) = measure(|| layer.forward(x.clone()));
        drop(y);
        peak
    };
    let plain: HdPissaLinear = layer(LinearLayout::Row, &device).no_grad().into();
    let x = normal([TOKENS, D_INPUT], &device);
    // Runs once before measuring, because the first use of the product makes its thread-local
    // buffers.
    peak_of(&plain, &x);
    let reference = peak_of(&plain, &x);
    let slack = 16 * 1024;
    assert!(peak_of(&frozen, &x) <= reference + slack);
    assert!(peak_of(&adapted.valid(), &x.inner()) <= reference + slack);
}

/// Copies of the model for other threads share the weights. They leave nothing in Burn's autodiff
/// graph, because every backward pass walks the whole graph.
#[test]
fn side_by_side_shares_the_weights_and_leaves_nothing_behind() {
    let _guard = one_at_a_time();
    let device = Device::flex().autodiff();
    let model: HdPissaLinear = layer(LinearLayout::Row, &device).into();
    let model = model.apply_hd_pissa(&config(), 0..2).unwrap();
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(2)
        .build()
        .unwrap();
    let round = || {
        let batches: Vec<_> = (0..4)
            .map(|i| (i % 2, normal([2, D_INPUT], &device)))
            .collect();
        side_by_side(
            &model,
            batches,
            |model, (shard, x)| {
                let model = model.clone().select_shard(shard).unwrap();
                let loss = model.forward(x).square().mean();
                GradientsParams::from_grads(loss.backward(), &model)
            },
            drop,
        );
    };
    // Threads that end free their last buffers later, some hundred rounds together. The least of
    // a thousand rounds has none of them.
    let least_of = |rounds| {
        let live = (0..rounds).map(|_| {
            let (_, largest, _) = measure(|| pool.install(round));
            assert!(
                largest < WEIGHT_BYTES / 2,
                "{largest} of {WEIGHT_BYTES} bytes"
            );
            LIVE.load(Ordering::Relaxed)
        });
        live.min().expect("there are rounds")
    };
    least_of(100);
    let first = least_of(1000);
    let growth = least_of(1000) - first;
    println!("{growth} bytes in 1000 rounds");
    assert!(growth < 128 * 1024, "{growth} bytes in 1000 rounds");
}
