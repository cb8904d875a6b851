//! Times of the operations on one layer.

use std::cell::{Cell, RefCell};
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::measure::{alternate_within, copy, count_launches, large_product, panic_message};
use burn::nn::LinearConfig;
use burn::optim::{AdamConfig, GradientsParams};
use burn::tensor::module::linear;
use burn::tensor::{DType, Device, Tensor};
use hd_pissa::comm::Solo;
use hd_pissa::ops::{adapter_linear, merge};
use hd_pissa::{
    FrameScale, HdPissaAdapter, HdPissaConfig, HdPissaLinear, HdPissaModule,
    HdPissaOptimizerConfig, ShardGradients, Windows,
};

use crate::bounds::Arithmetic;
use crate::case::Case;
use crate::report::Report;
use crate::sample::Source;
use crate::speed::{Rates, Speed};

const RANK: usize = 16;
const SHARDS: usize = 8;
/// The largest side of a layer.
const LARGEST: usize = 4096;
/// Larger than the caches.
const COPIED: [usize; 2] = [4096, 8192];

/// Times everything in each dtype on one layer. The device's large product determines its size.
pub fn measure(
    device: &Device,
    dtypes: &[DType],
    arithmetic: Arithmetic,
    seconds: f64,
    report: &mut Report,
) {
    println!("\ntimes: medians; shares of the rates of a copy and of a large product by Burn");
    for &dtype in dtypes {
        let work = || of_dtype(device, dtype, arithmetic, seconds);
        match catch_unwind(AssertUnwindSafe(work)) {
            Ok(speeds) => speeds.into_iter().for_each(|speed| report.speed(speed)),
            Err(panic) => {
                let message = panic_message(&*panic);
                report.case(Case::new("times", dtype, ""), || panic!("{message}"));
            }
        }
    }
}

fn of_dtype(device: &Device, dtype: DType, arithmetic: Arithmetic, seconds: f64) -> Vec<Speed> {
    let error = |inner| arithmetic.product(inner, [inner, inner], dtype);
    let (side, large) = large_product(device, dtype, 8192, seconds, error);
    let size = [side.min(LARGEST), side.min(LARGEST) + 64];
    let copied = copy(device, COPIED, dtype, seconds);
    let rates = Rates {
        bytes_per_second: copied.bytes_per_second(),
        flops_per_second: large.flops_per_second(),
    };
    let mut speeds = vec![
        Speed::new(
            Case::new(
                "large product by Burn",
                dtype,
                format!("{side}x{side}x{side}"),
            ),
            (large.times, None),
            [large.bytes, large.flops],
            &rates,
        ),
        Speed::new(
            Case::new("copy", dtype, format!("{}x{}", COPIED[0], COPIED[1])),
            (copied.times, None),
            [copied.bytes, copied.flops],
            &rates,
        ),
    ];
    speeds.extend(products(device, dtype, size, seconds, &rates));
    speeds.extend(steps(device, dtype, size, seconds, &rates));
    speeds
}

/// A forward and a backward pass, and Burn's product with a frozen weight for comparison.
fn products(
    device: &Device,
    dtype: DType,
    [d_input, d_output]: [usize; 2],
    seconds: f64,
    rates: &Rates,
) -> Vec<Speed> {
    let tokens = d_input;
    let tracked = device.clone().autodiff();
    let mut source = Source::new(1);
    let mut tensor = |shape, dtype| source.matrix(shape, 1.0, dtype).tensor(&tracked, dtype);
    let x = tensor([tokens, d_input], dtype).require_grad();
    let w = tensor([d_input, d_output], dtype);
    let a = tensor([d_input, RANK], DType::F32).require_grad();
    let b = tensor([RANK, d_output], DType::F32).require_grad();
    let g = tensor([tokens, d_output], dtype);

    let adapted = || adapter_linear(x.clone(), w.clone(), a.clone(), b.clone(), 1.0);
    let frozen = || linear(x.clone(), w.clone(), None);
    let backward = |y: Tensor<2>| drop((y * g.clone()).sum().backward());

    let [t, i, o, r] = [tokens, d_input, d_output, RANK].map(|n| n as f64);
    let bytes = dtype.size() as f64 * (t * i + i * o + t * o);
    let (thin, flops) = (4.0 * r * (t + i + o), 2.0 * t * i * o);
    let sizes = format!("{tokens}x{d_input}x{d_output} r {RANK}");
    let both = |operation: &str| format!("{operation}, both passes");
    let works: [Work; 4] = [
        ("frozen".into(), Box::new(|| drop(frozen())), [bytes, flops]),
        (
            "adapter".into(),
            Box::new(|| drop(adapted())),
            [bytes + thin, flops + 2.0 * t * i * r],
        ),
        (
            both("frozen"),
            Box::new(|| backward(frozen())),
            [2.0 * bytes, 2.0 * flops],
        ),
        (
            both("adapter"),
            Box::new(|| backward(adapted())),
            [
                2.0 * (bytes + thin),
                2.0 * flops + 2.0 * r * (2.0 * t * i + 2.0 * t * o),
            ],
        ),
    ];
    timed(device, dtype, &sizes, seconds, rates, works)
}

/// A name, the work, and the least bytes and flops that it takes.
type Work<'a> = (String, Box<dyn Fn() + 'a>, [f64; 2]);

/// Times pieces of work in turn, each with its wait for the device.
fn timed<const N: usize>(
    device: &Device,
    dtype: DType,
    sizes: &str,
    seconds: f64,
    rates: &Rates,
    works: [Work; N],
) -> Vec<Speed> {
    let sync = || device.sync().expect("the device works");
    let (names, works): (Vec<_>, Vec<_>) = works
        .into_iter()
        .map(|(name, work, amount)| ((name, amount), work))
        .unzip();
    let run = |work: &dyn Fn()| {
        work();
        sync();
    };
    // Compile and tune before counting.
    works.iter().for_each(|work| run(work));
    let launches: Vec<Option<usize>> = works
        .iter()
        .map(|work| count_launches(|| run(work)).0)
        .collect();
    let mut runs: Vec<_> = works.iter().map(|work| || run(work)).collect();
    let mut runs: Vec<&mut dyn FnMut()> = runs.iter_mut().map(|run| run as _).collect();
    let times = alternate_within(seconds * N as f64, &mut runs);
    let each = names.into_iter().zip(times).zip(launches);
    each.map(|(((name, amount), times), launches)| {
        Speed::new(
            Case::new(name, dtype, sizes),
            (times, launches),
            amount,
            rates,
        )
    })
    .collect()
}

/// A merge, and a whole step of Adam.
fn steps(
    device: &Device,
    dtype: DType,
    size @ [d_input, d_output]: [usize; 2],
    seconds: f64,
    rates: &Rates,
) -> Vec<Speed> {
    let row = [SHARDS, RANK * (d_input + d_output)];
    let mut source = Source::new(2);
    let mut rows = || {
        source
            .matrix(row, 1e-3, DType::F32)
            .tensor(device, DType::F32)
    };
    let (frames, deltas) = (rows(), rows());
    let weight = Source::new(3).matrix(size, 0.5, dtype);
    let weight = Cell::new(Some(weight.tensor(device, dtype)));

    let layer = LinearConfig::new(d_input, d_output)
        .with_bias(false)
        .init(&device.clone().autodiff());
    // Frames without a decomposition: a step takes the same time with any frames.
    let config = HdPissaConfig::new()
        .with_rank(RANK)
        .with_shards(SHARDS)
        .with_windows(Windows::Random { seed: 1 })
        .with_frame_scale(FrameScale::Unit);
    let layer = burn::nn::Linear {
        weight: layer
            .weight
            .map(|w| Tensor::from_inner(w.inner().cast(dtype))),
        ..layer
    };
    let layer: HdPissaLinear = layer
        .apply_hd_pissa(&config, 0..SHARDS)
        .expect("the size allows the ranks")
        .into();
    let adam = AdamConfig::new().with_epsilon(1e-8).init();
    let optimizer = HdPissaOptimizerConfig::new()
        .init(adam, Solo)
        .expect("Adam is supported");
    let optimizer = RefCell::new(optimizer);
    let layer = Cell::new(Some(layer));

    let [i, o] = size.map(|n| n as f64);
    let factors = (SHARDS * RANK) as f64 * (i + o);
    let flops = 4.0 * (SHARDS * RANK) as f64 * i * o;
    // A half-precision weight keeps 16 more bits in a whole step.
    let stored = 2.0 * dtype.size() as f64 * i * o;
    let kept = if dtype == DType::F32 {
        stored
    } else {
        2.0 * stored
    };
    let sizes = format!("{d_input}x{d_output} r {RANK} K {SHARDS}");
    let works: [Work; 2] = [
        (
            "merge".into(),
            Box::new(|| {
                let current = weight.take().expect("put back");
                weight.set(Some(merge(current, frames.clone(), deltas.clone(), RANK)));
            }),
            [stored + 8.0 * factors, flops],
        ),
        (
            "step of Adam".into(),
            Box::new(|| {
                let current = layer.take().expect("put back");
                let gradients = gradients(&current);
                let stepped = optimizer.borrow_mut().step(2e-5, current, gradients);
                layer.set(Some(
                    stepped.unwrap_or_else(|error| panic!("{}", error.cause)),
                ));
            }),
            // Adam reads gradients and two moments, and writes moments and deltas.
            [kept + (24.0 + 8.0) * factors, flops],
        ),
    ];
    timed(device, dtype, &sizes, seconds, rates, works)
}

/// Gradients in the form of a backward pass, with the factors as values.
fn gradients(model: &HdPissaLinear) -> ShardGradients {
    let adapter = model.weight.reparameterization::<HdPissaAdapter>();
    let mut gradients = ShardGradients::new(model);
    for shard in &adapter.expect("attached above").shards {
        let mut grads = GradientsParams::new();
        grads.register(shard.a.id, shard.a.val().inner());
        grads.register(shard.b.id, shard.b.val().inner());
        gradients.push(shard.index, grads);
    }
    gradients
}
