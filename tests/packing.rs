//! The factors of all shards as one parameter of the inner optimizer: every optimizer gives the
//! same bits as with one parameter for each factor, and the same records.

use burn::lr_scheduler::module_lr_scheduler::{ModuleLearningRate, ModuleLrSchedulerConfig};
use burn::module::ParamGroup;
use burn::optim::momentum::MomentumConfig;
use burn::optim::{
    AdaGradConfig, AdafactorConfig, AdamConfig, AdamWConfig, AdanConfig, LionConfig,
    ModuleOptimizer, MuonConfig, RmsPropConfig, SgdConfig,
};
use burn::tensor::{Device, Tensor, TensorData};
use hd_pissa::comm::Solo;
use hd_pissa::{HdPissaConfig, HdPissaModule, HdPissaOptimizer, HdPissaOptimizerConfig};
use hd_pissa_tests::training::gradients;
use hd_pissa_tests::{Lean, base, bits, normal, resumed, state};

const SHARDS: usize = 3;
const STEPS: usize = 6;

/// Every optimizer of Burn's whose update does not read the parameter. The last two work on whole
/// matrices.
fn optimizers() -> Vec<(&'static str, ModuleOptimizer)> {
    let momentum = MomentumConfig::new().with_nesterov(true);
    let adafactor = AdafactorConfig::new().with_scale_parameter(false);
    vec![
        ("Adam", AdamConfig::new().with_epsilon(1e-8).init()),
        ("AMSGrad", AdamConfig::new().with_amsgrad(true).init()),
        ("AdamW", AdamWConfig::new().with_weight_decay(0.0).init()),
        ("SGD", SgdConfig::new().init()),
        (
            "momentum",
            SgdConfig::new().with_momentum(Some(momentum)).init(),
        ),
        ("RMSProp", RmsPropConfig::new().with_centered(true).init()),
        ("Adagrad", AdaGradConfig::new().init()),
        ("Adan", AdanConfig::new().init()),
        ("Lion", LionConfig::new().with_weight_decay(0.0).init()),
        ("Muon", MuonConfig::new().init()),
        ("Adafactor", adafactor.init()),
    ]
}

fn adapted(start: &Lean) -> Lean {
    let config = HdPissaConfig::new().with_rank(2).with_shards(SHARDS);
    start.clone().apply_hd_pissa(&config, 0..SHARDS).unwrap()
}

fn optimizer(inner: ModuleOptimizer, packs: bool) -> HdPissaOptimizer {
    let config = HdPissaOptimizerConfig::new().with_pack_factors(packs);
    config.init(inner, Solo).unwrap()
}

fn step(
    model: Lean,
    optim: &mut HdPissaOptimizer,
    lr: impl Into<ModuleLearningRate>,
    batches: &[Tensor<2>],
) -> Lean {
    let (model, gradients) = gradients(model, batches);
    optim.step(lr, model, gradients).unwrap()
}

fn weights(model: &Lean) -> [TensorData; 2] {
    [&model.first.weight, &model.second.weight].map(|weight| bits(&base(weight)))
}

/// The content of a record, in the order of names.
fn content(optim: &HdPissaOptimizer) -> Vec<(String, Vec<usize>, Vec<u8>)> {
    let reader = burn_pack::Reader::from_bytes(state(optim)).unwrap();
    let scalars = format!("{:?} {:?}", reader.scalars(), reader.metadata());
    let mut content: Vec<_> = reader
        .into_tensors()
        .unwrap()
        .into_iter()
        .map(|tensor| {
            let bytes = tensor.to_bytes().unwrap().to_vec();
            (tensor.name.clone(), tensor.shape.to_vec(), bytes)
        })
        .collect();
    content.sort();
    content.push((scalars, Vec::new(), Vec::new()));
    content
}

/// Gradients of very different sizes. A record is taken half-way and loaded, from either form into
/// the other.
#[test]
fn every_optimizer_gives_the_same_bits_packed_and_apart() {
    let device = Device::flex().autodiff();
    let start = Lean::new(&device);
    let data: Vec<Vec<Tensor<2>>> = (0..STEPS as i32)
        .map(|step| {
            let scale = 10f64.powi(2 - step);
            let batch = |_| normal([5, 13], &device) * scale;
            (0..SHARDS).map(batch).collect()
        })
        .collect();
    for (name, inner) in optimizers() {
        let run = |first: bool, second: bool| {
            let mut optim = optimizer(inner.clone(), first);
            let mut model = adapted(&start);
            for batches in &data[..STEPS / 2] {
                model = step(model, &mut optim, 1e-2, batches);
            }
            let half = content(&optim);
            let mut optim = resumed(optimizer(inner.clone(), second), state(&optim)).unwrap();
            for batches in &data[STEPS / 2..] {
                model = step(model, &mut optim, 1e-2, batches);
            }
            (weights(&model), half, content(&optim))
        };
        let apart = run(false, false);
        for (first, second) in [(true, true), (true, false), (false, true)] {
            assert!(run(first, second) == apart, "{name}: {first}, {second}");
        }
    }
}

/// A separate learning rate for the `b` factors, from the first step on or only later.
#[test]
fn learning_rates_that_differ_within_a_weight_are_kept() {
    let device = Device::flex().autodiff();
    let start = Lean::new(&device);
    let batches: Vec<Tensor<2>> = (0..SHARDS).map(|_| normal([5, 13], &device)).collect();
    let rates = || -> ModuleLearningRate {
        let group = ParamGroup::from_regex(r"\.b$").unwrap();
        let config = ModuleLrSchedulerConfig::new(1e-2.into()).with_group(group, 1e-1);
        config.init().unwrap().step()
    };
    for later in [false, true] {
        let run = |packs: bool| {
            let mut optim = optimizer(AdamConfig::new().init(), packs);
            let mut model = adapted(&start);
            if later {
                model = step(model, &mut optim, 1e-2, &batches);
            }
            for _ in 0..2 {
                model = step(model, &mut optim, rates(), &batches);
            }
            model = step(model, &mut optim, 1e-2, &batches);
            (weights(&model), content(&optim))
        };
        assert!(run(true) == run(false), "later: {later}");
    }
}

/// A separate optimizer for the second shard.
#[test]
fn optimizers_that_differ_within_a_weight_are_kept() {
    let device = Device::flex().autodiff();
    let start = Lean::new(&device);
    let batches: Vec<Tensor<2>> = (0..SHARDS).map(|_| normal([5, 13], &device)).collect();
    let run = |packs: bool| {
        let group = ParamGroup::from_predicate("shard_1_of_3");
        let other = AdamConfig::new().with_epsilon(1e-3).build();
        let inner = AdamConfig::new().with_epsilon(1e-8).init();
        let mut optim = optimizer(inner.with_group(group, other, None), packs);
        let mut model = adapted(&start);
        for _ in 0..3 {
            model = step(model, &mut optim, 1e-2, &batches);
        }
        (weights(&model), content(&optim))
    };
    assert!(run(true) == run(false));
}
