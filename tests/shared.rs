//! Workers that share the decompositions: the same factors as on one worker, and the same errors on
//! all.

use burn::module::{Module, Param, ParamGroup};
use burn::tensor::{DType, Device, Tensor, TensorData};
use hd_pissa::comm::Communicator;
use hd_pissa::{
    HdPissa, HdPissaAdapter, HdPissaConfig, HdPissaError, HdPissaLinear, HdPissaLinearConfig,
    HdPissaModule, TargetRank,
};
use hd_pissa_tests::{bits, on_threads};

/// By falling cost of decomposition: layers 0, 2, 1, 4, 3.
const SHAPES: [[usize; 2]; 5] = [[13, 17], [17, 11], [11, 19], [19, 8], [8, 23]];
const SHARDS: usize = 4;

#[derive(Module, Debug)]
struct Stack {
    layers: Vec<HdPissaLinear>,
}

impl Stack {
    fn new(dtype: DType) -> Self {
        let device = Device::flex().autodiff();
        let layer = |[d_input, d_output]: [usize; 2]| {
            let mut layer = HdPissaLinearConfig::new(d_input, d_output).init(&device);
            layer.weight = layer
                .weight
                .map(|weight| Tensor::from_inner(weight.inner().cast(dtype)));
            layer
        };
        Self {
            layers: SHAPES.map(layer).into(),
        }
    }

    fn with_nan(mut self, layer: usize) -> Self {
        let weight = self.layers[layer].weight.val().inner();
        let mut values: Vec<f32> = weight.clone().into_data().iter().collect();
        values[5] = f32::NAN;
        let data = TensorData::new(values, weight.dims());
        self.layers[layer].weight =
            Param::from_tensor(Tensor::from_data(data, &weight.device().autodiff()));
        self
    }
}

fn config() -> HdPissaConfig {
    HdPissaConfig::new().with_rank(2).with_shards(SHARDS)
}

/// Index and bits of the factors of each hosted shard, weight by weight.
fn factors(model: &Stack) -> Vec<Vec<(usize, [TensorData; 2])>> {
    let adapters = model.layers.iter().map(|layer| {
        let adapter = layer.weight.reparameterization::<HdPissaAdapter>();
        let shards = adapter.expect("every layer is a target").shards.iter();
        shards
            .map(|shard| (shard.index, [&shard.a, &shard.b].map(|f| bits(&f.val()))))
            .collect()
    });
    adapters.collect()
}

#[test]
fn shared_factors_are_those_of_one_worker() {
    for dtype in [DType::F32, DType::BF16] {
        let start = Stack::new(dtype);
        for workers in [2, 4] {
            let decomposed = on_threads(workers, |communicator| {
                let share = SHARDS / workers;
                let first = communicator.worker_index() * share;
                let hosted = first..first + share;
                let alone = start
                    .clone()
                    .apply_hd_pissa(&config(), hosted.clone())
                    .unwrap();
                let mut decomposed = Vec::new();
                let shared =
                    HdPissa::prepare_shared(&start, &config(), hosted, &communicator, |layer| {
                        assert_eq!((layer.total, layer.shape), (5, SHAPES[layer.index]));
                        decomposed.push(layer.index);
                    });
                let shared = start.clone().apply_reparameterization(shared.unwrap());
                assert_eq!(factors(&shared), factors(&alone));
                decomposed
            });
            let expected: &[&[usize]] = match workers {
                2 => &[&[0, 1, 3], &[2, 4]],
                _ => &[&[0, 3], &[2], &[1], &[4]],
            };
            assert_eq!(decomposed, expected);
        }
    }
}

/// The reports of two workers. The second has another model or configuration.
fn errors(models: [&Stack; 2], configs: [&HdPissaConfig; 2]) -> [HdPissaError; 2] {
    let errors = on_threads(2, |communicator| {
        let worker = communicator.worker_index();
        let result = models[worker].clone().apply_hd_pissa_shared(
            configs[worker],
            [worker, worker + 2],
            &communicator,
        );
        result.unwrap_err()
    });
    errors.try_into().unwrap()
}

#[test]
fn what_one_worker_finds_reaches_the_others() {
    let start = Stack::new(DType::F32);
    // A weight of the second round, which the second worker decomposes.
    let spoiled = start.clone().with_nan(4);
    let [first, second] = errors([&start, &spoiled], [&config(), &config()]);
    let nan = HdPissaError::NonFiniteWeight {
        path: "layers.4.weight".into(),
        count: 1,
        row: 0,
        col: 5,
    };
    let of_other = |error: &HdPissaError| HdPissaError::OtherWorker {
        worker: 1,
        reason: error.to_string(),
    };
    assert_eq!((&first, &second), (&of_other(&nan), &nan));

    // Before any decomposition.
    let none = config().with_rank(0);
    let [first, second] = errors([&start, &start], [&config(), &none]);
    assert!(
        matches!(second, HdPissaError::ZeroRank { .. }),
        "{second:?}"
    );
    assert_eq!(first, of_other(&second));
}

#[test]
fn workers_that_prepare_different_adapters_are_refused() {
    let start = Stack::new(DType::F32);
    let smaller = TargetRank {
        targets: ParamGroup::from_path("layers.3.weight"),
        rank: 1,
    };
    let other = config().with_target_ranks(vec![smaller]);
    let weight =
        |rank| format!("`layers.3.weight` of shape [19, 8] and dtype F32 with rank {rank}");
    let mismatch = |worker, ours: String, theirs: String| HdPissaError::WorkerMismatch {
        worker,
        ours,
        theirs,
    };
    let errors = errors([&start, &start], [&config(), &other]);
    assert_eq!(errors[0], mismatch(1, weight(2), weight(1)));
    assert_eq!(errors[1], mismatch(0, weight(1), weight(2)));
}
