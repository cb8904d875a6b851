//! Choices of frames: directions, lengths, reach, and errors if choices are mixed up.

use burn::module::{Module, Param};
use burn::nn::{Linear, LinearConfig};
use burn::optim::{AdamConfig, GradientsParams, SgdConfig};
use burn::tensor::{DType, Device, Tensor, TensorData};
use faer::{Mat, MatRef};
use hd_pissa::checkpoint::{CheckpointError, Checkpoints, Snapshot};
use hd_pissa::comm::{Communicator, Solo};
use hd_pissa::{
    FrameScale, HdPissa, HdPissaAdapter, HdPissaConfig, HdPissaError, HdPissaModule,
    HdPissaOptimizer, HdPissaOptimizerConfig, LayerProgress, OptimizerError, ShardGradients,
    SvdMethod, SvdPrecision, Windows,
};
use hd_pissa_tests::{
    Lean, base, bits, frame_choices, normal, on_threads, resumed, state as optimizer_state,
    training,
};
use proptest::prelude::*;
use sha2::{Digest, Sha256};

const RANDOM: Windows = Windows::Random { seed: 7 };

fn config(rank: usize, shards: usize, (windows, scale): (Windows, FrameScale)) -> HdPissaConfig {
    HdPissaConfig::new()
        .with_rank(rank)
        .with_shards(shards)
        .with_windows(windows)
        .with_frame_scale(scale)
        .with_svd(SvdMethod::Exact(SvdPrecision::F64))
}

fn layer(weight: &Mat<f64>, device: &Device) -> Linear {
    let (rows, cols) = (weight.nrows(), weight.ncols());
    let mut layer = LinearConfig::new(rows, cols).with_bias(false).init(device);
    let values: Vec<f32> = (0..rows * cols)
        .map(|at| weight[(at / cols, at % cols)] as f32)
        .collect();
    layer.weight = Param::from_data(TensorData::new(values, [rows, cols]), device);
    layer
}

fn host(tensor: Tensor<2>) -> Mat<f64> {
    let [rows, cols] = tensor.dims();
    let values: Vec<f64> = tensor.inner().into_data().iter().collect();
    Mat::from_fn(rows, cols, |i, j| values[i * cols + j])
}

fn random(rows: usize, cols: usize, device: &Device) -> Mat<f64> {
    host(normal([rows, cols], device))
}

/// A matrix with these singular values, one for each index of its smaller side.
fn with_spectrum(rows: usize, cols: usize, sigma: &[f64], device: &Device) -> Mat<f64> {
    let side = |rows: usize| random(rows, sigma.len(), device).qr().compute_thin_Q();
    side(rows) * diagonal(sigma) * side(cols).transpose()
}

fn side_by_side(parts: &[Mat<f64>]) -> Mat<f64> {
    let cols = parts[0].ncols();
    Mat::from_fn(parts[0].nrows(), cols * parts.len(), |i, j| {
        parts[j / cols][(i, j % cols)]
    })
}

fn adapter(layer: &Linear) -> &HdPissaAdapter {
    layer.weight.reparameterization().unwrap()
}

/// The factors of all shards side by side, `[d_input, K·r]` and `[d_output, K·r]`.
fn factors(layer: &Linear) -> [Mat<f64>; 2] {
    let shards = &adapter(layer).shards;
    let a: Vec<_> = shards.iter().map(|shard| host(shard.a.val())).collect();
    let b = shards.iter().map(|shard| host(shard.b.val().transpose()));
    [side_by_side(&a), side_by_side(&b.collect::<Vec<_>>())]
}

fn distance(actual: &Mat<f64>, expected: &Mat<f64>) -> f64 {
    (actual - expected).norm_max()
}

fn diagonal(values: &[f64]) -> Mat<f64> {
    let n = values.len();
    Mat::from_fn(n, n, |i, j| if i == j { values[i] } else { 0.0 })
}

/// The components of all shards, shard by shard, in a simple loop that deals them like cards.
fn components(windows: Windows, rank: usize, shards: usize, n: usize) -> Vec<usize> {
    let count = rank * shards;
    match windows {
        Windows::Leading => (0..count).collect(),
        Windows::Trailing => (0..n).skip(n - count).collect(),
        Windows::Spread => {
            let chosen: Vec<usize> = (0..count).map(|i| i * n / count).collect();
            let deal = |shard| chosen.iter().copied().skip(shard).step_by(shards);
            (0..shards).flat_map(deal).collect()
        }
        Windows::Random { .. } => panic!("no components"),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// For every shape, windows are disjoint and orthogonal on both sides, hold the components of
    /// the formula, and have the length of the scale.
    #[test]
    fn frames_are_what_the_choice_says(
        (rank, shards) in (1usize..4, 1usize..5),
        more in (0usize..9, 0usize..9),
        seed: u64,
    ) {
        let device = Device::flex();
        device.seed(seed);
        let (rows, cols) = (rank * shards + more.0, rank * shards + more.1);
        let n = rows.min(cols);
        let weight = host(Tensor::from_dispatch(normal([rows, cols], &device).into_dispatch()));
        let values = weight.singular_values().unwrap();
        // Balanced scales are refused there.
        prop_assume!(values[n - 1] > 1e-4 * values[0]);
        let mean = weight.norm_l2() / (n as f64).sqrt();
        for choice in frame_choices() {
            let config = config(rank, shards, choice);
            let layer = layer(&weight, &device).apply_hd_pissa(&config, 0..shards).unwrap();
            let [a, b] = factors(&layer);
            let lengths: Vec<f64> = match choice {
                (_, FrameScale::Unit) => vec![mean; rank * shards],
                (windows, FrameScale::Balanced) => {
                    let components = components(windows, rank, shards, n);
                    components.into_iter().map(|i| values[i]).collect()
                }
            };
            let lengths = diagonal(&lengths);
            let tolerance = 1e-5 * values[0];
            prop_assert!(distance(&(a.transpose() * &a), &lengths) < tolerance, "{choice:?}");
            prop_assert!(distance(&(b.transpose() * &b), &lengths) < tolerance, "{choice:?}");
            if matches!(choice.0, Windows::Random { .. }) {
                continue;
            }
            // W·v = σ·u and Wᵀ·u = σ·v, for exactly these components.
            let components = components(choice.0, rank, shards, n);
            let sigma: Vec<f64> = components.into_iter().map(|i| values[i]).collect();
            let sigma = diagonal(&sigma);
            let tolerance = tolerance * values[0].sqrt();
            prop_assert!(distance(&(&weight * &b), &(&a * &sigma)) < tolerance, "{choice:?}");
            let other = weight.transpose() * &a;
            prop_assert!(distance(&other, &(&b * &sigma)) < tolerance, "{choice:?}");
        }
    }
}

/// Explained variance and orthogonality against their definition, for a weight of a known spectrum.
#[test]
fn energies_are_those_of_the_windows() {
    let device = Device::flex();
    let (rank, shards) = (2, 3);
    let sigma: Vec<f64> = (1..14).rev().map(f64::from).collect();
    let weight = with_spectrum(13, 17, &sigma, &device);
    let total = weight.squared_norm_l2();
    for choice in frame_choices() {
        let config = config(rank, shards, choice);
        let model = layer(&weight, &device);
        let mut progress: Option<LayerProgress> = None;
        let hd_pissa = HdPissa::prepare(&model, &config, 0..shards, |layer| progress = Some(layer));
        let progress = progress.unwrap();
        let plan = config.with_targets(None).plan(&model).unwrap();
        let adapted = model.apply_reparameterization(hd_pissa.unwrap());
        for shard in &adapter(&adapted).shards {
            let unit = |factor: Mat<f64>| {
                Mat::from_fn(factor.nrows(), rank, |i, j| {
                    factor[(i, j)] / factor.col(j).norm_l2()
                })
            };
            let (u, v) = (
                unit(host(shard.a.val())),
                unit(host(shard.b.val().transpose())),
            );
            let expected = (u.transpose() * &weight * v).squared_norm_l2() / total;
            let energy = progress.explained_variance[shard.index];
            assert!(
                (energy - expected).abs() < 1e-6,
                "{choice:?}: {energy} {expected}"
            );
            assert!((plan.weights[0].explained_variance[shard.index] - energy).abs() < 1e-9);
        }
        assert!(
            progress.orthogonality_error < 1e-12,
            "{choice:?}: {}",
            progress.orthogonality_error
        );
        // Given components in turn, the shards are alike.
        if choice.0 == Windows::Spread {
            let (first, last) = (
                progress.explained_variance[0],
                progress.explained_variance[shards - 1],
            );
            assert!(last > 0.3 * first, "{:?}", progress.explained_variance);
        }
    }
}

/// The same bits for any hosted shards, threads and workers.
#[test]
fn frames_do_not_depend_on_who_computes_them() {
    let device = Device::flex().autodiff();
    let start = Lean::new(&device);
    let frames = |model: &Lean| -> Vec<(usize, [TensorData; 2])> {
        let weights = [&model.first.weight, &model.second.weight].into_iter();
        let adapters = weights.map(|w| w.reparameterization::<HdPissaAdapter>().unwrap());
        adapters
            .flat_map(|adapter| &adapter.shards)
            .map(|shard| (shard.index, [&shard.a, &shard.b].map(|f| bits(&f.val()))))
            .collect()
    };
    for choice in frame_choices() {
        let config = config(2, 4, choice);
        let of = |model: Lean, hosted: &[usize]| {
            frames(&model.apply_hd_pissa(&config, hosted.to_vec()).unwrap())
        };
        let all = of(start.clone(), &[0, 1, 2, 3]);
        for threads in [1, 2] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
            let again = pool
                .build()
                .unwrap()
                .install(|| of(start.clone(), &[0, 1, 2, 3]));
            assert_eq!(again, all, "{choice:?}, {threads} threads");
        }
        let hosting = |hosted: &[usize]| -> Vec<_> {
            let is_hosted = |(index, _): &&(usize, _)| hosted.contains(index);
            all.iter().filter(is_hosted).cloned().collect()
        };
        assert_eq!(of(start.clone(), &[2]), hosting(&[2]));
        on_threads(2, |communicator| {
            let hosted = [communicator.worker_index(), communicator.worker_index() + 2];
            let model = start.clone();
            let model = model.apply_hd_pissa_shared(&config, hosted, &communicator);
            assert_eq!(frames(&model.unwrap()), hosting(&hosted), "{choice:?}");
        });
    }
}

#[derive(Module, Debug)]
struct Pair {
    first: Linear,
    second: Linear,
}

#[test]
fn random_frames_depend_on_seed_path_and_shape_alone() {
    let device = Device::flex();
    let weights = [random(11, 14, &device), random(11, 14, &device)];
    let pair = |weights: [&Mat<f64>; 2]| Pair {
        first: layer(weights[0], &device),
        second: layer(weights[1], &device),
    };
    // Without its length.
    let directions = |model: Pair, seed: u64| {
        let config = config(2, 3, (Windows::Random { seed }, FrameScale::Unit));
        let model = model.apply_hd_pissa(&config, 0..3).unwrap();
        [&model.first, &model.second].map(|layer| {
            let [a, _] = factors(layer);
            let length = a.col(0).norm_l2();
            a * faer::Scale(1.0 / length)
        })
    };
    let [first, second] = directions(pair([&weights[0], &weights[1]]), 1);
    // The weight's values determine only the length.
    let [swapped, _] = directions(pair([&weights[1], &weights[0]]), 1);
    assert!(distance(&first, &swapped) < 1e-6);
    // Another path, another seed.
    let [reseeded, _] = directions(pair([&weights[0], &weights[1]]), 2);
    for other in [second, reseeded] {
        assert!(distance(&first, &other) > 0.1);
    }
    // Another shape: not the first rows of the same columns.
    let [larger, _] = directions(pair([&random(11, 15, &device), &weights[1]]), 1);
    assert!(distance(&first, &larger) > 0.1);
}

/// A weight whose squares overflow: its decomposition in `f32` fails, and random frames need none.
#[test]
fn random_frames_decompose_nothing() {
    let device = Device::flex();
    let signs = random(9, 12, &device);
    let weight = Mat::from_fn(9, 12, |i, j| 3e38 * signs[(i, j)].signum());
    let config = |choice| config(2, 2, choice).with_svd(SvdMethod::Exact(SvdPrecision::F32));
    let leading = config((Windows::Leading, FrameScale::Unit));
    let random = config((RANDOM, FrameScale::Unit));
    let refused = layer(&weight, &device).apply_hd_pissa(&leading, 0..2);
    assert!(
        matches!(refused, Err(HdPissaError::NoConvergence { .. })),
        "{refused:?}"
    );
    assert!(leading.plan(&layer(&weight, &device)).is_err());
    let adapted = layer(&weight, &device)
        .apply_hd_pissa(&random, 0..2)
        .unwrap();
    let [a, _] = factors(&adapted);
    let mean = weight.norm_l2() / 3.0;
    assert!(distance(&(a.transpose() * &a), &diagonal(&[mean; 4])) < 1e-5 * mean);
    let plan = random.plan(&layer(&weight, &device)).unwrap();
    assert!(
        plan.weights[0]
            .explained_variance
            .iter()
            .all(|&e| e > 0.0 && e < 1.0)
    );
}

#[test]
fn balanced_random_frames_are_refused_by_both_names() {
    let device = Device::flex();
    let model = layer(&random(9, 12, &device), &device);
    let config = config(2, 2, (RANDOM, FrameScale::Balanced));
    let expected = HdPissaError::BalancedRandom { seed: 7 };
    assert_eq!(config.plan(&model).unwrap_err(), expected);
    assert_eq!(model.apply_hd_pissa(&config, 0..2).unwrap_err(), expected);
    let message = expected.to_string();
    assert!(
        message.contains("windows") && message.contains("frame_scale"),
        "{message}"
    );
}

/// Components without a singular value: refused if it is the frames' length, else directions on
/// which the weight is zero, not directions of rounding errors.
#[test]
fn singular_values_of_zero() {
    let device = Device::flex();
    for (rows, cols) in [(17, 11), (11, 17), (11, 11)] {
        let weight = random(rows, 5, &device) * random(5, cols, &device);
        let weight = host(base(&layer(&weight, &device).weight));
        let largest = weight.singular_values().unwrap()[0];
        for (windows, needed) in [
            (Windows::Leading, 6),
            (Windows::Spread, 10),
            (Windows::Trailing, 11),
        ] {
            let model = layer(&weight, &device);
            let balanced = config(2, 3, (windows, FrameScale::Balanced));
            let expected = HdPissaError::RankDeficient {
                path: "weight".into(),
                numeric_rank: 5,
                needed,
            };
            assert_eq!(balanced.plan(&model).unwrap_err(), expected);
            let refused = model.clone().apply_hd_pissa(&balanced, 0..3);
            assert_eq!(refused.unwrap_err(), expected);

            let unit = config(2, 3, (windows, FrameScale::Unit));
            let [double, single] = [SvdPrecision::F64, SvdPrecision::F32].map(|precision| {
                let unit = unit.clone().with_svd(SvdMethod::Exact(precision));
                let energy = unit.plan(&model).unwrap().weights[0]
                    .explained_variance
                    .clone();
                let adapted = model.clone().apply_hd_pissa(&unit, 0..3).unwrap();
                (factors(&adapted), energy)
            });
            let ([a, b], energy) = &double;
            let mean = weight.norm_l2() / 11f64.sqrt();
            let lengths = diagonal(&[mean; 6]);
            assert!(distance(&(a.transpose() * a), &lengths) < 1e-5 * mean);
            assert!(distance(&(b.transpose() * b), &lengths) < 1e-5 * mean);
            for (i, component) in components(windows, 2, 3, 11).into_iter().enumerate() {
                let images = [
                    (&weight * b.col(i)).norm_l2(),
                    (weight.transpose() * a.col(i)).norm_l2(),
                ];
                let zero = 1e-4 * largest * mean.sqrt();
                assert!(
                    images
                        .into_iter()
                        .all(|image| (image < zero) == (component >= 5))
                );
            }
            // A decomposition's own basis of the null space would differ in another precision.
            let ([single_a, single_b], single_energy) = &single;
            assert!(distance(a, single_a) < 1e-3, "{}", distance(a, single_a));
            assert!(distance(b, single_b) < 1e-3, "{}", distance(b, single_b));
            for (energy, single) in energy.iter().zip(single_energy) {
                assert!((energy - single).abs() < 1e-5);
            }
        }
    }
    // A weight of zeros has no length for its frames either.
    for choice in frame_choices() {
        let zero = layer(&Mat::zeros(9, 12), &device);
        let refused = zero
            .apply_hd_pissa(&config(2, 2, choice), 0..2)
            .unwrap_err();
        let path = "weight".into();
        assert_eq!(refused, HdPissaError::ZeroWeight { path });
    }
}

/// One step of Adam on every shard's own data, in `f64` on the host, from the formulas.
#[test]
fn a_step_is_the_formula_for_every_choice() {
    let device = Device::flex().autodiff();
    // With this epsilon, Adam does not make whole steps of rounding errors.
    let (rank, shards, lr, epsilon) = (2, 3, 1e-2, 1.0);
    for choice in frame_choices() {
        let weight = random(9, 7, &device);
        let config = config(rank, shards, choice);
        let mut model = layer(&weight, &device)
            .apply_hd_pissa(&config, 0..shards)
            .unwrap();
        let weight = host(base(&model.weight));
        let mut gradients = ShardGradients::new(&model);
        let mut expected = Mat::<f64>::zeros(9, 7);
        for shard in 0..shards {
            let x = normal([4, 9], &device);
            model = model.select_shard(shard).unwrap();
            // The loss Σ y²/2 has the gradient G = y.
            let loss = model.forward(x.clone()).square().sum() * 0.5;
            gradients.push(shard, GradientsParams::from_grads(loss.backward(), &model));
            let x = host(x);
            let dense = x.transpose() * &x * &weight;
            let frames = &adapter(&model).shards[shard];
            let (a, b) = (host(frames.a.val()), host(frames.b.val()));
            // Adam's first step, bias corrected.
            let delta = |gradient: Mat<f64>| {
                Mat::from_fn(gradient.nrows(), gradient.ncols(), |i, j| {
                    -lr * gradient[(i, j)] / (gradient[(i, j)].abs() + epsilon)
                })
            };
            let delta_a = delta(&dense * b.transpose());
            let delta_b = delta(a.transpose() * &dense);
            expected += &a * &delta_b + &delta_a * &b + &delta_a * &delta_b;
        }
        let adam = AdamConfig::new().with_epsilon(epsilon as f32).init();
        let mut optim = HdPissaOptimizerConfig::new().init(adam, Solo).unwrap();
        let model = optim.step(lr, model, gradients).unwrap();
        let moved = host(base(&model.weight)) - weight;
        assert!(
            distance(&moved, &expected) < 1e-3 * expected.norm_max(),
            "{choice:?}"
        );
    }
}

/// `P_U⊥ D P_V⊥`: the part of a change `D` that no update of the shards of `layer` can reach.
fn out_of_reach(layer: &Linear, change: &Mat<f64>) -> Mat<f64> {
    let without = |frames: &Mat<f64>, change: MatRef<'_, f64>| {
        let q = frames.qr().compute_thin_Q();
        change - &q * (q.transpose() * change)
    };
    let [a, b] = factors(layer);
    let left = without(&a, change.as_ref());
    let both = without(&b, left.transpose());
    both.transpose().to_owned()
}

/// Training a planted change to its end leaves exactly the part that is out of reach, entry by
/// entry.
#[test]
fn training_ends_at_what_is_out_of_reach() {
    let device = Device::flex().autodiff();
    let (rank, shards) = (2, 3);
    // With this, balanced frames learn as fast as others.
    let sigma: Vec<f64> = (0..12).map(|i| 2.0 - f64::from(i) / 11.0).collect();
    let weight = with_spectrum(12, 14, &sigma, &device);
    let change = random(12, 14, &device) * faer::Scale(1e-3);
    for choice in frame_choices() {
        let config = config(rank, shards, choice);
        let mut model = layer(&weight, &device)
            .apply_hd_pissa(&config, 0..shards)
            .unwrap();
        let start = host(base(&model.weight));
        let expected = out_of_reach(&model, &change);
        let [a, b] = factors(&model);
        let target = &start + &change;
        let mut optim = HdPissaOptimizerConfig::new()
            .init(SgdConfig::new().init(), Solo)
            .unwrap();
        let mut missing = change.clone();
        for _step in 0..60 {
            let tensor = |m: Mat<f64>| {
                let values: Vec<f32> = (0..m.nrows() * m.ncols())
                    .map(|at| m[(at / m.ncols(), at % m.ncols())] as f32)
                    .collect();
                let data = TensorData::new(values, [m.nrows(), m.ncols()]);
                Tensor::<2>::from_data(data, (&Device::flex(), DType::F32))
            };
            let mut gradients = ShardGradients::new(&model);
            for (k, shard) in adapter(&model).shards.iter().enumerate() {
                let columns = k * rank..(k + 1) * rank;
                let mut own = GradientsParams::new();
                let (a, b) = (
                    a.subcols(columns.start, rank),
                    b.subcols(columns.start, rank),
                );
                own.register(shard.a.id, tensor(-(&missing * b)));
                own.register(shard.b.id, tensor(-(a.transpose() * &missing)));
                gradients.push(shard.index, own);
            }
            model = optim.step(0.4, model, gradients).unwrap();
            missing = &target - host(base(&model.weight));
        }
        let error = distance(&missing, &expected) / change.norm_max();
        // Second-order parts of the updates leave a little.
        assert!(error < 5e-3, "{choice:?}: {error}");
        // This part is large, but not everything.
        let share = expected.squared_norm_l2() / change.squared_norm_l2();
        assert!((0.1..0.6).contains(&share), "{choice:?}: {share}");
    }
}

/// The closed forms of the book: the share of a change that is out of reach.
#[test]
fn shares_out_of_reach() {
    let device = Device::flex();
    let (rows, cols, rank, shards) = (48usize, 64usize, 4, 4);
    let (n, m) = (48.0, 16.0);
    let weight = random(rows, cols, &device);
    let svd = weight.thin_svd().unwrap();
    // Of 12 components, the first of which is `start`.
    let aligned = |start: usize, middle: Mat<f64>| {
        let (u, v) = (svd.U().subcols(start, 12), svd.V().subcols(start, 12));
        u * middle * v.transpose()
    };
    let generic = (1.0 - m / rows as f64) * (1.0 - m / cols as f64);
    // Of 12 neighbours, spread windows hold every third.
    let kept = 1.0 - m / n;
    let spread = [kept, kept * kept];
    // The leading 12 components and the trailing 12, each with itself and in any pairs.
    for (windows, leading, trailing) in [
        (Windows::Leading, [0.0; 2], [1.0; 2]),
        (Windows::Spread, spread, spread),
        (Windows::Trailing, [1.0; 2], [0.0; 2]),
        (RANDOM, [generic; 2], [generic; 2]),
    ] {
        let config = config(rank, shards, (windows, FrameScale::Unit));
        let model = layer(&weight, &device);
        let model = model.apply_hd_pissa(&config, 0..shards).unwrap();
        let mean_share = |draw: &dyn Fn() -> Mat<f64>| {
            let share = |change: Mat<f64>| {
                out_of_reach(&model, &change).squared_norm_l2() / change.squared_norm_l2()
            };
            (0..400).map(|_| share(draw())).sum::<f64>() / 400.0
        };
        for (rank, tolerance) in [(48, 0.01), (3, 0.03)] {
            // Without a preferred direction, of any rank.
            let share = mean_share(&|| random(rows, rank, &device) * random(rank, cols, &device));
            assert!((share - generic).abs() < tolerance, "{windows:?}: {share}");
        }
        let tolerance = match windows {
            // One basis for all draws, of 12 directions.
            Windows::Random { .. } => 0.15,
            _ => 0.03,
        };
        for (start, [of_pairs, of_all]) in [(0, leading), (36, trailing)] {
            let share = mean_share(&|| aligned(start, diagonal(&[1.0; 12])));
            assert!((share - of_pairs).abs() < tolerance, "{windows:?}: {share}");
            let share = mean_share(&|| aligned(start, random(12, 12, &device)));
            assert!((share - of_all).abs() < tolerance, "{windows:?}: {share}");
        }
    }
}

/// Every pair of choices that differ in one setting, with the name of that setting.
fn pairs() -> [([(Windows, FrameScale); 2], &'static str); 4] {
    let (balanced, unit) = (FrameScale::Balanced, FrameScale::Unit);
    [
        (
            [(Windows::Leading, balanced), (Windows::Spread, balanced)],
            "windows",
        ),
        ([(Windows::Trailing, unit), (RANDOM, unit)], "windows"),
        (
            [(RANDOM, unit), (Windows::Random { seed: 8 }, unit)],
            "windows",
        ),
        (
            [(Windows::Leading, balanced), (Windows::Leading, unit)],
            "frame_scale",
        ),
    ]
}

#[test]
fn workers_of_different_choices_are_refused() {
    let device = Device::flex().autodiff();
    let start = Lean::new(&device);
    for (choices, setting) in pairs() {
        // Workers that prepare together.
        let errors = on_threads(2, |communicator| {
            let worker = communicator.worker_index();
            let config = config(2, 2, choices[worker]);
            let model = start.clone();
            let result = model.apply_hd_pissa_shared(&config, [worker], &communicator);
            result.unwrap_err()
        });
        let line = |(windows, scale): (Windows, FrameScale)| match setting {
            "windows" => format!("windows {windows:?}"),
            _ => format!("frame_scale {scale:?}"),
        };
        for (worker, error) in errors.into_iter().enumerate() {
            let expected = HdPissaError::WorkerMismatch {
                worker: 1 - worker,
                ours: line(choices[worker]),
                theirs: line(choices[1 - worker]),
            };
            assert_eq!(error, expected);
        }
        // Workers that each prepare by themselves, at the first step.
        let errors = on_threads(2, |communicator| {
            let worker = communicator.worker_index();
            let config = config(2, 2, choices[worker]);
            let model = start.clone().apply_hd_pissa(&config, [worker]).unwrap();
            let adam = AdamConfig::new().init();
            let mut optim = HdPissaOptimizerConfig::new()
                .init(adam, communicator)
                .unwrap();
            let loss = model.forward(normal([5, 13], &Device::flex().autodiff()));
            let gradients = GradientsParams::from_grads(loss.sum().backward(), &model);
            optim.step(1e-3, model, gradients).unwrap_err().cause
        });
        for (worker, error) in errors.into_iter().enumerate() {
            let of_first = |choice| format!("{} of `first.weight`", line(choice));
            let expected = OptimizerError::WorkerMismatch {
                worker: 1 - worker,
                ours: of_first(choices[worker]),
                theirs: of_first(choices[1 - worker]),
            };
            assert_eq!(error, expected);
        }
    }
}

fn trained(start: &Lean, choice: (Windows, FrameScale)) -> (Lean, HdPissaOptimizer) {
    let config = config(2, 2, choice);
    let mut model = start.clone().apply_hd_pissa(&config, 0..2).unwrap();
    let mut optim = HdPissaOptimizerConfig::new()
        .init(AdamConfig::new().init(), Solo)
        .unwrap();
    let gradients;
    (model, gradients) = gradients_of(model);
    (optim.step(1e-3, model, gradients).unwrap(), optim)
}

fn gradients_of(model: Lean) -> (Lean, ShardGradients) {
    training::gradients(model, &training::data(1, 2, &Device::flex().autodiff())[0])
}

#[test]
fn records_and_checkpoints_carry_the_choice() {
    let start = Lean::new(&Device::flex().autodiff());
    let folder = tempfile::tempdir().unwrap();
    for (index, (choices, setting)) in pairs().into_iter().enumerate() {
        for (ours, theirs) in [(choices[0], choices[1]), (choices[1], choices[0])] {
            let (saved, state) = trained(&start, theirs);
            let fresh = |choice| {
                let config = config(2, 2, choice);
                start.clone().apply_hd_pissa(&config, 0..2).unwrap()
            };
            // A record of the model.
            let record = || saved.clone().into_record();
            let error = fresh(ours)
                .try_load_record(record())
                .unwrap_err()
                .to_string();
            let name = format!("shard_0_of_2{}", suffix(ours));
            assert!(error.contains(&name), "{error}");
            fresh(theirs).try_load_record(record()).unwrap();

            // A record of the optimizer. The step that would use it refuses it.
            let load = || {
                let optim = HdPissaOptimizerConfig::new()
                    .init(AdamConfig::new().init(), Solo)
                    .unwrap();
                resumed(optim, optimizer_state(&state)).unwrap()
            };
            let (model, gradients) = gradients_of(fresh(ours));
            let error = load().step(1e-3, model, gradients).unwrap_err().cause;
            let expected = OptimizerError::RecordOfOthers {
                recorded: format!("shard_0_of_2{}", suffix(theirs)),
                given: name,
            };
            assert_eq!(error, expected);
            let (model, gradients) = gradients_of(fresh(theirs));
            load().step(1e-3, model, gradients).unwrap();

            // A checkpoint.
            let name = format!("{index}{}", suffix(ours));
            let checkpoints = Checkpoints::new(folder.path().join(name));
            let snapshot = Snapshot::new(1, &saved, optimizer_state(&state));
            checkpoints.save(&snapshot, &Solo).unwrap();
            let checkpoint = checkpoints.latest().unwrap().checkpoint.unwrap();
            let error = checkpoint.restore(fresh(ours)).unwrap_err().cause;
            let show = |(windows, scale): (Windows, FrameScale)| match setting {
                "windows" => format!("{windows:?}"),
                _ => format!("{scale:?}"),
            };
            let expected = CheckpointError::SettingMismatch {
                path: checkpoint.path().into(),
                setting: setting.into(),
                saved: show(theirs),
                given: show(ours),
            };
            assert_eq!(error, expected);
            assert_eq!(
                checkpoint.optimizer(&fresh(ours), &Solo).unwrap_err(),
                expected
            );
            let restored = checkpoint.restore(fresh(theirs)).unwrap();
            checkpoint.optimizer(&restored, &Solo).unwrap();
            assert_eq!(
                bits(&base(&restored.first.weight)),
                bits(&base(&saved.first.weight))
            );
        }
    }
}

/// The ending of a shard's name.
fn suffix((windows, scale): (Windows, FrameScale)) -> String {
    let windows = match windows {
        Windows::Leading => String::new(),
        Windows::Spread => "_spread".into(),
        Windows::Trailing => "_trailing".into(),
        Windows::Random { seed } => format!("_random_{seed}"),
    };
    match scale {
        FrameScale::Balanced => windows,
        FrameScale::Unit => windows + "_unit",
    }
}

/// A checkpoint without a choice of frames has the published ones.
#[test]
fn checkpoints_from_before_the_choice() {
    let start = Lean::new(&Device::flex().autodiff());
    let published = (Windows::Leading, FrameScale::Balanced);
    let (saved, optim) = trained(&start, published);
    let folder = tempfile::tempdir().unwrap();
    let checkpoints = Checkpoints::new(folder.path());
    let snapshot = Snapshot::new(1, &saved, optimizer_state(&optim));
    let path = checkpoints.save(&snapshot, &Solo).unwrap();

    let [manifest, sums] = ["manifest.json", "SHA256SUMS"].map(|name| path.join(name));
    let digest = |bytes: &[u8]| -> String {
        let digest = Sha256::digest(bytes);
        digest.iter().map(|byte| format!("{byte:02x}")).collect()
    };
    let before = std::fs::read(&manifest).unwrap();
    let mut json: serde_json::Value = serde_json::from_slice(&before).unwrap();
    json.as_object_mut().unwrap().remove("frames").unwrap();
    let after = serde_json::to_vec(&json).unwrap();
    std::fs::write(&manifest, &after).unwrap();
    let text = std::fs::read_to_string(&sums).unwrap();
    std::fs::write(&sums, text.replace(&digest(&before), &digest(&after))).unwrap();

    let checkpoint = checkpoints.latest().unwrap().checkpoint.unwrap();
    let fresh = |choice| {
        let config = config(2, 2, choice);
        start.clone().apply_hd_pissa(&config, 0..2).unwrap()
    };
    checkpoint.restore(fresh(published)).unwrap();
    let error = checkpoint
        .restore(fresh((Windows::Spread, FrameScale::Balanced)))
        .unwrap_err();
    assert!(
        error
            .to_string()
            .contains("made with windows Leading, this run has Spread")
    );
}
