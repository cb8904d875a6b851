//! A GPU against Flex: values, gradients, whole steps, and memory over many steps.
//!
//! Runs with the feature `cuda`, or with `wgpu` if there is an adapter; software drivers are
//! enough. With `HD_PISSA_REQUIRE_CUDA=1` or `HD_PISSA_REQUIRE_WGPU=1` a missing device fails the
//! tests.
#![cfg(any(feature = "wgpu", feature = "cuda"))]

use burn::module::{Module, ModuleMapper, Param};
use burn::optim::{AdamConfig, GradientsParams};
use burn::tensor::{DType, Device, Tensor, TensorData};
use hd_pissa::comm::Solo;
use hd_pissa::ops::adapter_linear;
use hd_pissa::{
    Decomposition, HdPissa, HdPissaAdapter, HdPissaConfig, HdPissaLinear, HdPissaLinearConfig,
    HdPissaModule, HdPissaOptimizerConfig, OptimizerError, ShardGradients, SvdMethod, SvdPrecision,
};
use hd_pissa_tests::{
    Dense, Lean, assert_close, base, bits, gpu, gpu_product_tolerance, gpu_supports, normal, values,
};

fn on<const D: usize>(tensor: &Tensor<D>, device: &Device) -> Tensor<D> {
    Tensor::from_data(bits(tensor), (device, tensor.dtype()))
}

#[test]
fn values_and_gradients() {
    let Some(gpu) = gpu() else { return };
    let cpu = Device::flex();
    for ([tokens, d_input, d_output, rank], dtype, tolerance) in [
        ([5, 13, 7, 1], DType::F32, gpu_product_tolerance()),
        ([64, 96, 33, 8], DType::F32, gpu_product_tolerance()),
        ([1, 31, 64, 16], DType::F32, gpu_product_tolerance()),
        ([24, 64, 48, 4], DType::F16, 5e-3),
        ([7, 19, 23, 3], DType::F16, 5e-3),
        ([24, 64, 48, 4], DType::BF16, 4e-2),
    ] {
        if !gpu_supports(&gpu, dtype) {
            continue;
        }
        // The leaves of one run on each device; which inputs are tracked varies.
        for track_x in [false, true] {
            let x = normal([tokens, d_input], &cpu).cast(dtype);
            let w = (normal([d_input, d_output], &cpu) * 0.2).cast(dtype);
            let (a, b) = (
                normal([d_input, rank], &cpu),
                normal([rank, d_output], &cpu),
            );
            let run = |device: &Device| {
                let device = &device.clone().autodiff();
                let x = on(&x, device).set_require_grad(track_x);
                let (a, b) = (on(&a, device).require_grad(), on(&b, device).require_grad());
                let y = adapter_linear(x.clone(), on(&w, device), a.clone(), b.clone(), 1.5);
                let y = y.cast(DType::F32);
                let grads = (y.clone().tanh().sum() + y.clone().square().mean()).backward();
                let leaves = [a.grad(&grads), b.grad(&grads), x.grad(&grads)];
                let leaves = leaves.map(|leaf| leaf.map(|g| bits(&g.cast(DType::F32))));
                (bits(&y), leaves)
            };
            let ((gpu_y, gpu_grads), (cpu_y, cpu_grads)) = (run(&gpu), run(&cpu));
            let close = |gpu: TensorData, reference: TensorData| {
                let tensor = |data| Tensor::<2>::from_data(data, &cpu);
                assert_close(tensor(gpu), tensor(reference), tolerance);
            };
            close(gpu_y, cpu_y);
            assert_eq!(gpu_grads[2].is_some(), track_x);
            for (gpu, cpu) in gpu_grads.into_iter().zip(cpu_grads) {
                if let (Some(gpu), Some(cpu)) = (gpu, cpu) {
                    close(gpu, cpu);
                }
            }
        }
    }
}

#[test]
fn empty_batches() {
    let Some(gpu) = gpu() else { return };
    let device = gpu.autodiff();
    let (a, b) = (
        normal([5, 2], &device).require_grad(),
        normal([2, 3], &device).require_grad(),
    );
    let x = Tensor::<2>::zeros([0, 5], &device);
    let y = adapter_linear(x, normal([5, 3], &device), a, b, 1.0);
    assert_eq!(y.dims(), [0, 3]);
}

/// The leading components of one weight: by the block Krylov method on the GPU, exactly on the CPU.
#[test]
fn krylov_frames() {
    let Some(gpu) = gpu() else { return };
    let cpu = Device::flex();
    // Columns of falling lengths.
    let lengths: Vec<f32> = (0..90).map(|col| 0.96f32.powi(col)).collect();
    let lengths = Tensor::<2>::from_data(TensorData::new(lengths, [1, 90]), &cpu);
    let weight = normal([120, 90], &cpu) * lengths;
    let mut decomposition = Decomposition::None;
    let mut vectors = |device: &Device, svd| {
        let mut layer = HdPissaLinearConfig::new(120, 90).init(device);
        layer.weight = Param::from_tensor(on(&weight, device));
        let config = HdPissaConfig::new()
            .with_rank(3)
            .with_shards(2)
            .with_svd(svd);
        let adapters = HdPissa::prepare(&layer, &config, 0..2, |weight| {
            decomposition = weight.decomposition;
        });
        let layer = layer.apply_reparameterization(adapters.unwrap());
        let adapter = layer.weight.reparameterization::<HdPissaAdapter>().unwrap();
        let rows = adapter.shards.iter().flat_map(|shard| {
            let factors = [shard.a.val().transpose(), shard.b.val()];
            factors.map(|rows| (rows.dims()[1], values(rows)))
        });
        let rows = rows
            .flat_map(|(width, rows)| rows.chunks(width).map(<[f32]>::to_vec).collect::<Vec<_>>());
        rows.collect::<Vec<_>>()
    };
    let exact = vectors(&cpu, SvdMethod::Exact(SvdPrecision::F64));
    let ours = vectors(&gpu, SvdMethod::Krylov);
    assert_eq!(ours.len(), exact.len());
    let product = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f32>();
    for (x, y) in ours.iter().zip(&exact) {
        let cosine = product(x, y) / (product(x, x) * product(y, y)).sqrt();
        assert!(cosine > 0.999, "{cosine}");
    }
    // Products in tf32 may leave too much over.
    let converged = matches!(decomposition, Decomposition::Krylov { .. });
    assert!(
        converged || gpu_product_tolerance() > 1e-4,
        "{decomposition:?}"
    );
}

/// One model on both devices, the same batches: the weights after a few steps.
#[test]
fn steps() {
    let Some(gpu) = gpu() else { return };
    let config = HdPissaConfig::new().with_rank(2).with_shards(3);
    let start = Dense::new(&Device::flex())
        .into_record()
        .into_bytes()
        .unwrap();
    let batches: Vec<Tensor<2>> = (0..12).map(|_| normal([6, 13], &Device::flex())).collect();
    let train = |device: &Device| {
        let device = device.clone().autodiff();
        let record = burn::store::ModuleRecord::from_bytes(start.clone()).unwrap();
        let model: Lean = Dense::new(&device).load_record(record).into();
        let before = bits(&base(&model.first.weight));
        let mut model = model.apply_hd_pissa(&config, 0..3).unwrap();
        let adam = AdamConfig::new().with_epsilon(1e-8).init();
        let mut optim = HdPissaOptimizerConfig::new().init(adam, Solo).unwrap();
        for step in batches.chunks(3) {
            let mut gradients = ShardGradients::new(&model);
            for (shard, batch) in step.iter().enumerate() {
                model = model.select_shard(shard).unwrap();
                let loss = model.forward(on(batch, &device)).square().mean();
                gradients.push(shard, GradientsParams::from_grads(loss.backward(), &model));
            }
            model = optim.step(1e-2, model, gradients).unwrap();
        }
        let after = bits(&base(&model.first.weight));
        let tensor = |data| Tensor::<2>::from_data(data, &Device::flex());
        tensor(after) - tensor(before)
    };
    // Relative to the change, not to the weight. Adam divides by the gradient's size, which
    // magnifies the errors of small gradients.
    let tolerance = 100.0 * gpu_product_tolerance();
    assert_close(train(&gpu), train(&Device::flex()), tolerance);
}

/// Marks a weight as distributed.
struct Mark;

impl ModuleMapper for Mark {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if param.lazy_shape().as_slice() != [13, 17] {
            return param;
        }
        let (id, value, mapper) = param.consume();
        Param::from_mapped_value(id, value.set_distributed(id), mapper)
    }
}

#[test]
fn a_clone_is_unchanged_and_bad_steps_are_refused() {
    let Some(gpu) = gpu() else { return };
    let device = gpu.autodiff();
    let layer = HdPissaLinearConfig::new(13, 17).init(&device);
    let config = HdPissaConfig::new().with_rank(2).with_shards(1);
    let model = layer.apply_hd_pissa(&config, 0..1).unwrap();
    let mut optim = HdPissaOptimizerConfig::new()
        .init(AdamConfig::new().init(), Solo)
        .unwrap();
    let gradients = |model: &HdPissaLinear, factor: f32| {
        let loss = model
            .forward(normal([4, 13], &device) * factor)
            .square()
            .mean();
        GradientsParams::from_grads(loss.backward(), model)
    };
    let before = bits(&base(&model.weight));
    let (clone, grads) = (model.clone(), gradients(&model, 1.0));
    let model = optim.step(1e-2, model, grads).unwrap();
    assert_ne!(bits(&base(&model.weight)), before);
    assert_eq!(bits(&base(&clone.weight)), before);

    // Burn's mark of a distributed parameter is not lost.
    let model = model.map(&mut Mark);
    assert!(model.weight.base().is_distributed());
    let grads = gradients(&model, 1.0);
    let model = optim.step(1e-2, model, grads).unwrap();
    assert!(model.weight.base().is_distributed());

    for bad in [f32::NAN, f32::INFINITY] {
        let before = bits(&base(&model.weight));
        let grads = gradients(&model, bad);
        let error = optim.step(1e-2, model.clone(), grads).unwrap_err();
        assert!(
            matches!(error.cause, OptimizerError::NonFiniteGradient { .. }),
            "{}",
            error.cause
        );
        assert_eq!(bits(&base(&error.model.weight)), before);
    }
}

/// Memory in use on the device does not grow after the first steps. What is freed late differs from one moment to
/// the next by some scalars. Anything that each step leaves behind adds at least one allocation per step.
#[test]
fn five_hundred_steps_without_growth() {
    let Some(gpu) = gpu() else { return };
    let device = gpu.clone().autodiff();
    let config = HdPissaConfig::new().with_rank(2).with_shards(2);
    let mut model = Lean::new(&device).apply_hd_pissa(&config, 0..2).unwrap();
    let adam = AdamConfig::new().with_epsilon(1e-8).init();
    let mut optim = HdPissaOptimizerConfig::new().init(adam, Solo).unwrap();
    let mut used = Vec::new();
    for step in 0..500 {
        let mut gradients = ShardGradients::new(&model);
        for shard in 0..2 {
            model = model.select_shard(shard).unwrap();
            let loss = model.forward(normal([6, 13], &device)).square().mean();
            gradients.push(shard, GradientsParams::from_grads(loss.backward(), &model));
        }
        model = optim.step(1e-3, model, gradients).unwrap();
        if step % 100 == 99 {
            gpu.sync().unwrap();
            used.push(
                gpu.memory_pool_usage()
                    .expect("the device reports its memory"),
            );
        }
    }
    let adapter = model
        .first
        .weight
        .reparameterization::<HdPissaAdapter>()
        .unwrap();
    assert!(
        values(adapter.shards[1].a.val())
            .iter()
            .all(|x| x.is_finite())
    );
    let (early, late) = (&used[0], &used[4]);
    assert!(
        late.number_allocs < early.number_allocs + 200
            && late.bytes_in_use < early.bytes_in_use * 11 / 10,
        "after 100 steps: {early:?}; after 500: {late:?}"
    );
}
