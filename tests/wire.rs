//! The traffic between workers: deltas in `f32` or `bf16`, in one gather or several.

use std::cell::Cell;
use std::num::NonZeroUsize;
use std::time::Duration;

use burn::optim::{AdamConfig, GradientsParams, SgdConfig};
use burn::tensor::{Device, Tensor};
use half::bf16;
use hd_pissa::comm::{
    CommError, Communicator, PendingGather, Solo, ThreadCommunicator, Traffic, thread_group,
};
use hd_pissa::{
    CommunicationDtype, HdPissaAdapter, HdPissaConfig, HdPissaLinear, HdPissaLinearConfig,
    HdPissaModule, HdPissaOptimizerConfig, OptimizerError, ShardGradients,
};
use hd_pissa_tests::{Lean, base, bits, normal, state, values};

const D_INPUT: usize = 9;
const D_OUTPUT: usize = 7;
const RANK: usize = 2;
const SHARDS: usize = 3;

fn layer(device: &Device) -> HdPissaLinear {
    let config = HdPissaConfig::new().with_rank(RANK).with_shards(SHARDS);
    HdPissaLinearConfig::new(D_INPUT, D_OUTPUT)
        .with_bias(false)
        .init(device)
        .apply_hd_pissa(&config, 0..SHARDS)
        .unwrap()
}

/// Gradients of both factors of every shard, times `factor`.
fn gradients(layer: &HdPissaLinear, factor: f32) -> (ShardGradients, Vec<[Tensor<2>; 2]>) {
    let adapter = layer.weight.reparameterization::<HdPissaAdapter>().unwrap();
    let mut gradients = ShardGradients::new(layer);
    let tensors = adapter.shards.iter().map(|shard| {
        let mut of_shard = GradientsParams::new();
        let tensors = [&shard.a, &shard.b].map(|factor_of_shard| {
            let device = factor_of_shard.val().device().inner();
            let gradient = normal(factor_of_shard.dims(), &device) * factor;
            of_shard.register(factor_of_shard.id, gradient.clone());
            gradient
        });
        gradients.push(shard.index, of_shard);
        tensors
    });
    let tensors = tensors.collect();
    (gradients, tensors)
}

/// One step of plain gradient descent, whose deltas are `-lr` times the gradients, against the
/// formula in `f64` with deltas rounded by another implementation.
#[test]
fn rounded_deltas_are_what_is_merged() {
    let device = Device::flex().autodiff();
    let layer = layer(&device);
    let (gradients, tensors) = gradients(&layer, 1.0);
    let lr = 0.5f32;
    let adapter = layer.weight.reparameterization::<HdPissaAdapter>().unwrap();
    let update = |round: fn(f32) -> f32| -> Vec<f64> {
        let mut update = vec![0.0; D_INPUT * D_OUTPUT];
        for (shard, gradients) in adapter.shards.iter().zip(&tensors) {
            let [a, b] = [&shard.a, &shard.b].map(|factor| values(factor.val()));
            let [da, db] = gradients.clone().map(|gradient| {
                let gradient = gradient.into_data();
                let deltas = gradient.iter::<f32>().map(|g| round(-lr * g));
                deltas.collect::<Vec<f32>>()
            });
            for (at, update) in update.iter_mut().enumerate() {
                let (i, o) = (at / D_OUTPUT, at % D_OUTPUT);
                for r in 0..RANK {
                    let [a, da] = [&a, &da].map(|a| f64::from(a[i * RANK + r]));
                    let [b, db] = [&b, &db].map(|b| f64::from(b[r * D_OUTPUT + o]));
                    *update += a * db + da * b + da * db;
                }
            }
        }
        update
    };
    let rounded = update(|delta| bf16::from_f32(delta).to_f32());
    let exact = update(|delta| delta);

    let before = values(base(&layer.weight));
    let mut optim = HdPissaOptimizerConfig::new()
        .with_communication_dtype(CommunicationDtype::Bf16)
        .init(SgdConfig::new().init(), Solo)
        .unwrap();
    let layer = optim.step(f64::from(lr), layer, gradients).unwrap();
    let moved: Vec<f64> = values(base(&layer.weight))
        .iter()
        .zip(before)
        .map(|(after, before)| f64::from(*after) - f64::from(before))
        .collect();

    let norm = |values: &[f64]| values.iter().map(|x| x * x).sum::<f64>().sqrt();
    let error = |x: &[f64], y: &[f64]| {
        let difference: Vec<f64> = x.iter().zip(y).map(|(x, y)| x - y).collect();
        norm(&difference) / norm(y)
    };
    assert!(error(&moved, &rounded) < 1e-6);
    // Relative errors of up to 2⁻⁸ in each delta, independent of each other.
    let cost = error(&rounded, &exact);
    println!("bf16 changes the update of one step by {cost:.1e} of its norm");
    assert!(cost > 2e-4 && cost < 2f64.powi(-8), "{cost}");
}

#[test]
fn what_rounding_carries_to_infinity_is_counted() {
    let device = Device::flex().autodiff();
    let layer = layer(&device);
    let (mut gradients, _) = gradients(&layer, 0.0);
    // Finite in `f32`, as is the delta; in `bf16` the nearest value is infinity.
    let adapter = layer.weight.reparameterization::<HdPissaAdapter>().unwrap();
    let mut large = GradientsParams::new();
    let b = &adapter.shards[1].b;
    large.register(b.id, b.val().inner().zeros_like() + 3.4e38);
    gradients.push(1, large);
    let mut optim = HdPissaOptimizerConfig::new()
        .with_communication_dtype(CommunicationDtype::Bf16)
        .init(SgdConfig::new().init(), Solo)
        .unwrap();
    let before = bits(&base(&layer.weight));
    let refused = optim.step(1.0, layer, gradients).unwrap_err();
    let expected = OptimizerError::NonFiniteUpdate {
        path: "weight.hd_pissa.shard_1_of_3".into(),
        count: RANK * D_OUTPUT,
    };
    assert_eq!(refused.cause, expected);
    assert_eq!(bits(&base(&refused.model.weight)), before);
}

/// The cost of `bf16` over many steps, where the next gradients depend on it.
#[test]
fn rounded_deltas_change_the_trajectory_by_little() {
    const STEPS: usize = 40;
    let device = Device::flex().autodiff();
    let config = HdPissaConfig::new().with_rank(2).with_shards(4);
    let start = Lean::new(&device);
    let data: Vec<[Tensor<2>; 2]> = (0..4 * STEPS)
        .map(|_| [normal([8, 13], &device), normal([8, 11], &device)])
        .collect();
    let weights = |model: &Lean| -> Vec<f64> {
        let values = [&model.first.weight, &model.second.weight].map(|w| values(base(w)));
        values.concat().into_iter().map(f64::from).collect()
    };
    let train = |wire: CommunicationDtype| -> Vec<f64> {
        let mut model = start.clone().apply_hd_pissa(&config, 0..4).unwrap();
        let adam = AdamConfig::new().with_epsilon(1e-8).init();
        let mut optim = HdPissaOptimizerConfig::new()
            .with_communication_dtype(wire)
            .init(adam, Solo)
            .unwrap();
        for batches in data.chunks(4) {
            let mut gradients = ShardGradients::new(&model);
            for (shard, [x, y]) in batches.iter().enumerate() {
                model = model.select_shard(shard).unwrap();
                let loss = (model.forward(x.clone()) - y.clone()).square().mean();
                gradients.push(shard, GradientsParams::from_grads(loss.backward(), &model));
            }
            model = optim.step(1e-3, model, gradients).unwrap();
        }
        let (after, before) = (weights(&model), weights(&start));
        after.iter().zip(before).map(|(x, y)| x - y).collect()
    };
    let (exact, rounded) = (
        train(CommunicationDtype::F32),
        train(CommunicationDtype::Bf16),
    );
    let norm = |values: &[f64]| values.iter().map(|x| x * x).sum::<f64>().sqrt();
    let difference: Vec<f64> = rounded.iter().zip(&exact).map(|(x, y)| x - y).collect();
    let cost = norm(&difference) / norm(&exact);
    println!("bf16 changes the update of {STEPS} steps by {cost:.1e} of its norm");
    // Below the relative change of a delta by one rounding.
    assert!(cost > 1e-5 && cost < 2f64.powi(-8), "{cost}");
}

/// A transport on which the gather of a given number fails.
struct Failing {
    inner: ThreadCommunicator,
    gathers_left: Cell<usize>,
}

impl Communicator for Failing {
    fn worker_index(&self) -> usize {
        self.inner.worker_index()
    }

    fn num_workers(&self) -> usize {
        self.inner.num_workers()
    }

    fn all_gather(&self, buffer: Tensor<1>) -> Result<Tensor<1>, CommError> {
        self.inner.all_gather(buffer)
    }

    fn start_all_gather(
        &self,
        buffer: Tensor<1>,
    ) -> Result<Box<dyn PendingGather + '_>, CommError> {
        match self.gathers_left.get() {
            0 => Err(CommError::WorkerGone { worker: 1 }),
            left => {
                self.gathers_left.set(left - 1);
                self.inner.start_all_gather(buffer)
            }
        }
    }

    fn broadcast(&self, buffer: Tensor<1>, root: usize) -> Result<Tensor<1>, CommError> {
        self.inner.broadcast(buffer, root)
    }

    fn reduce_scatter(&self, buffer: Tensor<1>) -> Result<Tensor<1>, CommError> {
        self.inner.reduce_scatter(buffer)
    }

    fn all_gather_bytes(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, CommError> {
        self.inner.all_gather_bytes(bytes)
    }

    fn broadcast_bytes(&self, bytes: &[u8], root: usize) -> Result<Vec<u8>, CommError> {
        self.inner.broadcast_bytes(bytes, root)
    }

    fn barrier(&self) -> Result<(), CommError> {
        self.inner.barrier()
    }

    fn traffic(&self) -> Traffic {
        self.inner.traffic()
    }
}

/// The second gather of the second step fails on one worker while the first is open. The other
/// worker may have completed the first.
#[test]
fn a_gather_that_fails_beside_another_changes_nothing() {
    let device = Device::flex().autodiff();
    let start = Lean::new(&device);
    let config = HdPissaConfig::new().with_rank(2).with_shards(2);
    std::thread::scope(|scope| {
        for inner in thread_group(2, Duration::from_secs(60)) {
            let (start, config) = (start.clone(), &config);
            scope.spawn(move || {
                let device = Device::flex().autodiff();
                let index = inner.worker_index();
                let gathers_left = Cell::new(if index == 1 { 3 } else { usize::MAX });
                let mut model = start.apply_hd_pissa(config, [index]).unwrap();
                let adam = AdamConfig::new().init();
                let communicator = Failing {
                    inner,
                    gathers_left,
                };
                let mut optim = HdPissaOptimizerConfig::new()
                    .with_buckets(NonZeroUsize::new(2).unwrap())
                    .init(adam, communicator)
                    .unwrap();
                let gradients = |model: &Lean| {
                    let loss = model.forward(normal([5, 13], &device)).square().mean();
                    GradientsParams::from_grads(loss.backward(), model)
                };
                let first = gradients(&model);
                model = optim.step(1e-3, model, first).unwrap();
                let weights = |model: &Lean| {
                    [&model.first.weight, &model.second.weight].map(|weight| bits(&base(weight)))
                };
                let before = (weights(&model), state(&optim));
                let second = gradients(&model);
                let refused = optim.step(1e-3, model, second).unwrap_err();
                let gone = CommError::WorkerGone { worker: 1 };
                assert_eq!(refused.cause, OptimizerError::Comm(gone));
                assert_eq!(before.0, weights(&refused.model));
                assert_eq!(before.1[..], state(&optim)[..]);
                assert_eq!(optim.steps(), 1);
            });
        }
    });
}
