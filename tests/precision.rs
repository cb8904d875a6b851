//! Updates of half-precision weights: against an `f32` weight that takes the same deltas, and
//! backends against each other.

use burn::module::{Module, Param};
use burn::optim::{AdamConfig, GradientsParams};
use burn::store::ModuleRecord;
use burn::tensor::{DType, Device, Tensor};
use half::{bf16, f16};
use hd_pissa::comm::Solo;
use hd_pissa::{
    HdPissaAdapter, HdPissaConfig, HdPissaLinear, HdPissaLinearConfig, HdPissaModule,
    HdPissaOptimizer, HdPissaOptimizerConfig, MergePrecision, OptimizerError, ShardGradients,
};
use hd_pissa_tests::{base, bits, resumed, state, values};

const SHARDS: usize = 2;

/// A layer whose `f32` weight holds values of `dtype`.
fn layer([d_input, d_output]: [usize; 2], dtype: DType) -> HdPissaLinear {
    let device = Device::flex().autodiff();
    let mut layer = HdPissaLinearConfig::new(d_input, d_output)
        .with_bias(false)
        .init(&device);
    layer.weight = layer
        .weight
        .map(|w| Tensor::from_inner(w.inner().cast(dtype).cast(DType::F32)));
    layer
}

/// The layer with its weight in `dtype` on `device`, adapted.
fn adapted(
    layer: &HdPissaLinear,
    dtype: DType,
    precision: MergePrecision,
    device: &Device,
) -> HdPissaLinear {
    let mut layer = layer.clone();
    layer.weight = layer.weight.map(|w| {
        let data = bits(&w);
        let w = Tensor::<2>::from_data(data, (device, DType::F32)).cast(dtype);
        Tensor::from_inner(w)
    });
    let config = HdPissaConfig::new()
        .with_rank(2)
        .with_shards(SHARDS)
        .with_precision(precision);
    layer.apply_hd_pissa(&config, 0..SHARDS).unwrap()
}

fn adapter(layer: &HdPissaLinear) -> &HdPissaAdapter {
    layer.weight.reparameterization().unwrap()
}

fn residual(layer: &HdPissaLinear) -> Vec<i32> {
    let residual = adapter(layer).residual.as_ref().unwrap().val();
    residual.into_data().iter::<i32>().collect()
}

fn optimizer() -> HdPissaOptimizer {
    HdPissaOptimizerConfig::new()
        .init(AdamConfig::new().with_epsilon(1e-8).init(), Solo)
        .unwrap()
}

/// Gradients of step `step` that do not depend on weights, so every dtype sees the same deltas.
fn gradients(layer: &HdPissaLinear, step: usize) -> ShardGradients {
    let mut gradients = ShardGradients::new(layer);
    for shard in &adapter(layer).shards {
        let mut own = GradientsParams::new();
        for (side, factor) in [&shard.a, &shard.b].into_iter().enumerate() {
            let shift = ((step * 7 + side * 3 + shard.index) % 11) as f64 / 5.0 - 1.0;
            let factor: &Param<Tensor<2>> = factor;
            own.register(factor.id, factor.val().inner() + shift * 0.1);
        }
        gradients.push(shard.index, own);
    }
    gradients
}

fn train(
    mut layer: HdPissaLinear,
    optim: &mut HdPissaOptimizer,
    steps: std::ops::Range<usize>,
) -> HdPissaLinear {
    for step in steps {
        let gradients = gradients(&layer, step);
        layer = optim.step(2e-5, layer, gradients).unwrap();
    }
    layer
}

/// The values of weight and residual bits together.
fn joined(layer: &HdPissaLinear) -> Vec<f32> {
    let weight = base(&layer.weight);
    let [_, d_output] = weight.dims();
    let words = residual(layer);
    let per_row = d_output.div_ceil(2);
    let data = weight.into_data();
    let high: Vec<u16> = match data.dtype() {
        DType::BF16 => data.iter::<bf16>().map(bf16::to_bits).collect(),
        DType::F16 => data.iter::<f16>().map(f16::to_bits).collect(),
        other => panic!("{other:?}"),
    };
    high.into_iter()
        .enumerate()
        .map(|(index, high)| {
            let (row, col) = (index / d_output, index % d_output);
            let word = words[row * per_row + col / 2] as u32;
            let low = i32::from((word >> (16 * (col % 2))) as u16 as i16);
            let bits = match data.dtype() {
                DType::BF16 => u32::from(high) << 16,
                _ => f16::from_bits(high).to_f32().to_bits(),
            };
            f32::from_bits(bits.wrapping_add_signed(low))
        })
        .collect()
}

#[test]
fn a_compensated_bf16_weight_follows_f32_bit_for_bit() {
    let flex = Device::flex().autodiff();
    // The last one is merged in more than one tile, and has columns left over in its last word.
    for (shape, steps) in [([13, 17], 200), ([40, 8], 200), ([1030, 37], 5)] {
        let start = layer(shape, DType::BF16);
        let run = |dtype| {
            let start = adapted(&start, dtype, MergePrecision::Compensated, &flex);
            train(start, &mut optimizer(), 0..steps)
        };
        let (half, full) = (run(DType::BF16), run(DType::F32));
        assert_eq!(base(&half.weight).dtype(), DType::BF16);
        assert!(adapter(&full).residual.is_none());
        let full = values(base(&full.weight));
        assert_eq!(joined(&half), full, "{shape:?}");
        let dense = half.materialize_f32();
        assert!(
            dense
                .weight
                .reparameterization::<HdPissaAdapter>()
                .is_none()
        );
        assert_eq!(values(dense.weight.val()), full, "{shape:?}");
        let start = values(base(&start.weight));
        let moved = start.iter().zip(&full).filter(|(a, b)| a != b).count();
        assert!(moved * 10 > start.len() * 9, "{moved} of {}", start.len());
    }
}

#[test]
fn a_compensated_f16_weight_follows_f32_in_its_range() {
    let flex = Device::flex().autodiff();
    const STEPS: usize = 200;
    let start = layer([13, 17], DType::F16);
    let run = |dtype| adapted(&start, dtype, MergePrecision::Compensated, &flex);
    let half = train(run(DType::F16), &mut optimizer(), 0..STEPS);
    let half = values(half.materialize_f32().weight.val());
    // A value that was small on the way has lost digits, and does not get them back.
    let (mut full, mut optim) = (run(DType::F32), optimizer());
    let mut smallest = values(base(&full.weight));
    for step in 0..STEPS {
        full = train(full, &mut optim, step..step + 1);
        for (smallest, value) in smallest.iter_mut().zip(values(base(&full.weight))) {
            *smallest = smallest.abs().min(value.abs());
        }
    }
    let full = values(base(&full.weight));
    let mut in_range = 0;
    for ((half, full), smallest) in half.iter().zip(&full).zip(smallest) {
        if smallest >= 1.0 / 16384.0 {
            in_range += 1;
            assert_eq!(half.to_bits(), full.to_bits());
        }
    }
    assert!(in_range * 2 > full.len(), "{in_range} of {}", full.len());
}

#[test]
fn the_residual_bits_are_part_of_the_record_and_not_of_the_plain_model() {
    let flex = Device::flex().autodiff();
    let start = layer([13, 17], DType::BF16);
    let start = adapted(&start, DType::BF16, MergePrecision::Compensated, &flex);
    let mut optim = optimizer();
    let middle = train(start.clone(), &mut optim, 0..10);
    let record = middle.clone().into_record().into_bytes().unwrap();
    let state = state(&optim);
    let whole = train(middle.clone(), &mut optim, 10..20);

    let loaded = start.load_record(ModuleRecord::from_bytes(record).unwrap());
    let mut optim = resumed(optimizer(), state).unwrap();
    assert_eq!(optim.steps(), 10);
    let resumed = train(loaded, &mut optim, 10..20);
    assert_eq!(joined(&resumed), joined(&whole));
    assert_ne!(residual(&middle), residual(&whole));

    let plain = whole.clone().valid().materialize();
    assert!(
        plain
            .weight
            .reparameterization::<HdPissaAdapter>()
            .is_none()
    );
    assert_eq!(bits(&plain.weight.val()), bits(&base(&whole.weight)));
}

#[test]
fn a_refused_step_and_a_clone_keep_the_residual_bits() {
    let flex = Device::flex().autodiff();
    let start = layer([13, 17], DType::BF16);
    let start = adapted(&start, DType::BF16, MergePrecision::Compensated, &flex);
    let mut optim = optimizer();
    let model = train(start, &mut optim, 0..3);
    let (before, clone) = (joined(&model), model.clone());
    let mut bad = ShardGradients::new(&model);
    for shard in &adapter(&model).shards {
        let mut own = GradientsParams::new();
        own.register(shard.a.id, shard.a.val().inner() * f32::NAN);
        own.register(shard.b.id, shard.b.val().inner());
        bad.push(shard.index, own);
    }
    let refused = optim.step(2e-5, model, bad).err().unwrap();
    assert!(matches!(
        refused.cause,
        OptimizerError::NonFiniteGradient { .. }
    ));
    assert_eq!(joined(&refused.model), before);
    let next = train(refused.model, &mut optim, 3..4);
    assert_ne!(joined(&next), before);
    assert_eq!(joined(&clone), before);
}

#[test]
fn nearest_rounding_gives_the_nearest_value_and_loses_small_updates() {
    let flex = Device::flex().autodiff();
    let start = layer([13, 17], DType::BF16);
    let half = adapted(&start, DType::BF16, MergePrecision::Nearest, &flex);
    let full = adapted(&start, DType::F32, MergePrecision::Nearest, &flex);
    let half = train(half, &mut optimizer(), 0..1);
    let full = train(full, &mut optimizer(), 0..1);
    assert!(adapter(&half).residual.is_none());
    let rounded = base(&full.weight).cast(DType::BF16);
    assert_eq!(bits(&base(&half.weight)), bits(&rounded));
    let start = values(base(&start.weight));
    let half = values(base(&half.weight));
    let lost = start.iter().zip(&half).filter(|(a, b)| a == b).count();
    assert!(lost * 10 > start.len() * 9, "{lost} of {}", start.len());
}

#[test]
fn stochastic_rounding_is_unbiased_and_repeatable() {
    let flex = Device::flex().autodiff();
    let start = layer([13, 17], DType::BF16);
    let run = |seed, steps: std::ops::Range<usize>, optim: &mut HdPissaOptimizer| {
        let precision = MergePrecision::Stochastic { seed };
        train(adapted(&start, DType::BF16, precision, &flex), optim, steps)
    };
    let before = values(base(&start.weight));
    let full = adapted(&start, DType::F32, MergePrecision::Compensated, &flex);
    let full = values(base(&train(full, &mut optimizer(), 0..1).weight));

    const SEEDS: u64 = 256;
    let runs: Vec<Vec<f32>> = (0..SEEDS)
        .map(|seed| values(base(&run(seed, 0..1, &mut optimizer()).weight)))
        .collect();
    // The mean rounding error over seeds and elements, in units of its standard deviation.
    let errors = runs
        .iter()
        .flat_map(|run| run.iter().zip(&full))
        .zip(before.iter().cycle())
        .map(|((rounded, full), before)| {
            let ulp = f64::from(f32::from_bits(before.to_bits() & 0x7f80_0000)) / 128.0;
            (f64::from(*rounded) - f64::from(*full)) / ulp
        });
    let (mut sum, mut squares, mut count) = (0.0, 0.0, 0.0);
    for error in errors {
        sum += error;
        squares += error * error;
        count += 1.0;
    }
    let deviation = f64::sqrt(squares / count);
    let standard_error = deviation / f64::sqrt(count);
    let bias = sum / count;
    assert!(deviation > 0.01, "nothing was rounded: {deviation}");
    assert!(bias.abs() < 4.0 * standard_error, "{bias} {standard_error}");

    // The same seed draws the same bits, another seed or step others.
    let once = values(base(&run(1, 0..3, &mut optimizer()).weight));
    assert_eq!(once, values(base(&run(1, 0..3, &mut optimizer()).weight)));
    assert_ne!(once, values(base(&run(2, 0..3, &mut optimizer()).weight)));
    let mut later = optimizer();
    run(1, 0..1, &mut later);
    assert_ne!(runs[1], values(base(&run(1, 0..1, &mut later).weight)));
}

/// The kernel and Flex each have their own rounding code.
#[cfg(any(feature = "wgpu", feature = "cuda"))]
#[test]
fn the_gpu_rounds_as_flex_does() {
    let Some(gpu) = hd_pissa_tests::gpu() else {
        return;
    };
    let flex = Device::flex().autodiff();
    for (dtype, precision) in [DType::F16, DType::BF16].into_iter().flat_map(|dtype| {
        [
            (dtype, MergePrecision::Compensated),
            (dtype, MergePrecision::Stochastic { seed: 5 }),
        ]
    }) {
        if !hd_pissa_tests::gpu_supports(&gpu, dtype) {
            continue;
        }
        let start = layer([13, 18], dtype);
        let run = |device: &Device| {
            let model = adapted(&start, dtype, precision, device);
            train(model, &mut optimizer(), 0..1)
        };
        let (on_gpu, on_cpu) = (run(&gpu.clone().autodiff()), run(&flex));
        // The sums differ in their last bits, and with them some roundings.
        let pairs: Vec<(f32, f32)> = match precision {
            MergePrecision::Compensated => {
                joined(&on_gpu).into_iter().zip(joined(&on_cpu)).collect()
            }
            _ => values(base(&on_gpu.weight))
                .into_iter()
                .zip(values(base(&on_cpu.weight)))
                .collect(),
        };
        let different = pairs.iter().filter(|(g, c)| (g - c).abs() > 1e-6).count();
        assert!(
            different <= pairs.len() / 50,
            "{dtype:?}, {precision:?}: {different} of {}",
            pairs.len()
        );
        let before = values(base(&start.weight));
        let moved = before.iter().zip(&pairs).filter(|(b, (g, _))| *b != g);
        assert!(moved.count() > 10, "{dtype:?}, {precision:?}");
    }
}
