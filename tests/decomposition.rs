//! Principal components by the block Krylov method and from the cache, through the public API.

use std::path::Path;

use burn::module::{Module, Param};
use burn::nn::{Linear, LinearConfig};
use burn::tensor::{DType, Device, Tensor, TensorData};
use faer::Mat;
use hd_pissa::{
    CacheUse, Decomposition, FrameScale, HdPissa, HdPissaAdapter, HdPissaConfig, HdPissaError,
    HdPissaModule, LayerProgress, PissaConfig, PissaModule, SvdCache, SvdMethod, SvdPrecision,
    Windows,
};
use hd_pissa_tests::{bits, normal, on_threads};

const SHARDS: usize = 4;

fn config(svd: SvdMethod) -> HdPissaConfig {
    let config = HdPissaConfig::new().with_rank(3).with_shards(SHARDS);
    config.with_svd(svd)
}

/// `U·diag(values)·Vᵀ` with random `U: [rows, n]` and `V: [cols, n]`.
fn layer([rows, cols]: [usize; 2], values: &[f64], dtype: DType) -> Linear {
    let device = Device::flex().autodiff();
    device.seed(5);
    let side = |rows: usize| {
        let drawn: Vec<f64> = normal::<2>([rows, values.len()], &device)
            .inner()
            .into_data()
            .iter()
            .collect();
        let drawn = Mat::from_fn(rows, values.len(), |i, j| drawn[i * values.len() + j]);
        drawn.qr().compute_thin_Q()
    };
    let (u, v) = (side(rows), side(cols));
    let scaled = Mat::from_fn(rows, values.len(), |i, j| u[(i, j)] * values[j]);
    let matrix = scaled * v.transpose();
    let at = (0..rows * cols).map(|at| matrix[(at / cols, at % cols)] as f32);
    let data = TensorData::new(at.collect(), [rows, cols]);
    let weight = Tensor::<2>::from_data(data, &Device::flex()).cast(dtype);
    let mut layer = LinearConfig::new(rows, cols).with_bias(false).init(&device);
    layer.weight = Param::from_tensor(Tensor::from_inner(weight));
    layer
}

fn decaying() -> Vec<f64> {
    (0..150).map(|i| 0.96f64.powi(i)).collect()
}

/// The adapted layer, and what was told of it.
fn adapted(
    layer: &Linear,
    config: &HdPissaConfig,
) -> Result<(Linear, LayerProgress), HdPissaError> {
    let mut told = None;
    let adapters = HdPissa::prepare(layer, config, 0..config.shards, |weight| {
        told = Some(weight)
    })?;
    let layer = layer.clone().apply_reparameterization(adapters);
    Ok((layer, told.unwrap()))
}

/// The factors of each shard, as they are stored.
fn factors(layer: &Linear) -> Vec<[TensorData; 2]> {
    let adapter: &HdPissaAdapter = layer.weight.reparameterization().unwrap();
    let factors = adapter.shards.iter().map(|shard| [&shard.a, &shard.b]);
    factors
        .map(|pair| pair.map(|factor| bits(&factor.val())))
        .collect()
}

/// The smallest cosine of the vectors in the factors of two layers.
fn smallest_cosine(ours: &Linear, theirs: &Linear) -> f64 {
    let vectors = |layer: &Linear| {
        let adapter: &HdPissaAdapter = layer.weight.reparameterization().unwrap();
        let vectors = adapter.shards.iter().flat_map(|shard| {
            let a = shard.a.val().inner().transpose();
            [a, shard.b.val().inner()].map(|rows| {
                let width = rows.dims()[1];
                let values: Vec<f64> = rows.into_data().iter().collect();
                values
                    .chunks(width)
                    .map(<[f64]>::to_vec)
                    .collect::<Vec<_>>()
            })
        });
        vectors.flatten().collect::<Vec<_>>()
    };
    let product = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>();
    let (ours, theirs) = (vectors(ours), vectors(theirs));
    assert_eq!(ours.len(), theirs.len());
    let cosines = ours
        .iter()
        .zip(&theirs)
        .map(|(x, y)| product(x, y) / (product(x, x) * product(y, y)).sqrt());
    cosines.fold(1.0, f64::min)
}

const EXACT: SvdMethod = SvdMethod::Exact(SvdPrecision::F32);
const DOUBLE: SvdMethod = SvdMethod::Exact(SvdPrecision::F64);

/// The same vectors with the same signs and lengths as by the exact method, for either orientation and a
/// half-precision weight.
#[test]
fn krylov_frames_are_the_exact_ones() {
    for (shape, dtype) in [
        ([150, 190], DType::F32),
        ([190, 150], DType::F32),
        ([150, 190], DType::BF16),
    ] {
        let layer = layer(shape, &decaying(), dtype);
        let (exact, of_exact) = adapted(&layer, &config(DOUBLE)).unwrap();
        let (krylov, of_krylov) = adapted(&layer, &config(SvdMethod::Krylov)).unwrap();
        assert_eq!(of_exact.decomposition, Decomposition::Exact);
        let Decomposition::Krylov { dimension } = of_krylov.decomposition else {
            panic!("{:?}", of_krylov.decomposition);
        };
        assert!((12..150).contains(&dimension), "{dimension}");
        let cosine = smallest_cosine(&krylov, &exact);
        assert!(cosine > 0.999, "{cosine}");
        let explained = of_krylov.explained_variance.iter();
        for (ours, exact) in explained.zip(&of_exact.explained_variance) {
            assert!((ours - exact).abs() < 1e-6, "{ours} {exact}");
        }
        assert!(of_krylov.orthogonality_error < 1e-5);
        let plan = config(SvdMethod::Krylov).plan(&layer).unwrap();
        let planned = &plan.weights[0];
        assert_eq!(planned.decomposition, of_krylov.decomposition);
        assert_eq!(planned.explained_variance, of_krylov.explained_variance);
    }
}

#[test]
fn what_does_not_converge_is_told_and_exact() {
    let mut cluster = decaying();
    cluster[7] = cluster[6];
    let layer = layer([150, 190], &cluster, DType::F32);
    let (exact, _) = adapted(&layer, &config(EXACT)).unwrap();
    let (krylov, told) = adapted(&layer, &config(SvdMethod::Krylov)).unwrap();
    let Decomposition::Fallback(failure) = told.decomposition else {
        panic!("{:?}", told.decomposition);
    };
    assert_eq!(told.path, "weight");
    assert_eq!(failure.component, 6);
    assert_eq!(factors(&krylov), factors(&exact));
    let plan = config(SvdMethod::Krylov).plan(&layer).unwrap();
    assert_eq!(plan.weights[0].decomposition, told.decomposition);
    assert!(
        plan.to_string()
            .contains("weight  decomposed exactly: the block Krylov method")
    );
    let text = failure.to_string();
    assert!(text.contains("has not converged in") && text.contains("component 6"));
}

/// A rank below what the shards need gives what it gives by the exact method: an error, or random
/// directions that complete the frames.
#[test]
fn low_ranks_are_found() {
    let layer = layer([150, 190], &decaying()[..9], DType::F32);
    let error = |svd| adapted(&layer, &config(svd)).err().unwrap();
    assert_eq!(error(SvdMethod::Krylov), error(EXACT));
    assert!(matches!(
        error(SvdMethod::Krylov),
        HdPissaError::RankDeficient {
            numeric_rank: 9,
            needed: 12,
            ..
        }
    ));
    let unit = |svd| config(svd).with_frame_scale(FrameScale::Unit);
    let (krylov, told) = adapted(&layer, &unit(SvdMethod::Krylov)).unwrap();
    assert!(matches!(told.decomposition, Decomposition::Fallback(_)));
    let (exact, _) = adapted(&layer, &unit(EXACT)).unwrap();
    assert_eq!(factors(&krylov), factors(&exact));
}

#[test]
fn only_leading_components_take_the_method() {
    let layer = layer([150, 190], &decaying(), DType::F32);
    let of_windows = |windows| {
        let config = config(SvdMethod::Krylov).with_windows(windows);
        adapted(&layer, &config.with_frame_scale(FrameScale::Unit))
    };
    for windows in [Windows::Spread, Windows::Trailing] {
        let error = of_windows(windows).err().unwrap();
        assert_eq!(error, HdPissaError::KrylovWindows { windows });
    }
    let (_, told) = of_windows(Windows::Random { seed: 3 }).unwrap();
    assert_eq!(told.decomposition, Decomposition::None);
    // With too many components for a space of their own there is nothing to tell.
    let many = config(SvdMethod::Krylov).with_rank(20);
    let (_, told) = adapted(&layer, &many).unwrap();
    assert_eq!(told.decomposition, Decomposition::Exact);
}

#[test]
fn workers_and_threads_get_the_same_bits() {
    let layer = layer([150, 190], &decaying(), DType::F32);
    let config = config(SvdMethod::Krylov);
    let alone = factors(&adapted(&layer, &config).unwrap().0);
    for threads in [1, 3] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
        let (ours, _) = pool.unwrap().install(|| adapted(&layer, &config)).unwrap();
        assert_eq!(factors(&ours), alone, "{threads} threads");
    }
    on_threads(2, |communicator| {
        let shared = layer
            .clone()
            .apply_hd_pissa_shared(&config, 0..SHARDS, &communicator);
        assert_eq!(factors(&shared.unwrap()), alone);
    });
}

#[test]
fn pissa_takes_it_too() {
    let layer = layer([150, 190], &decaying(), DType::F32);
    let weight = layer.weight.val().inner();
    // What the adapter takes out of the weight.
    let taken = |svd| {
        let config = PissaConfig::new().with_rank(12).with_svd(svd);
        let layer = layer.clone().apply_pissa(&config).unwrap();
        weight.clone() - layer.weight.base().inner()
    };
    let norm = |x: Tensor<2>| x.square().sum().sqrt().into_scalar::<f32>();
    let (krylov, exact) = (taken(SvdMethod::Krylov), taken(DOUBLE));
    let difference = norm(krylov - exact.clone()) / norm(exact);
    // Both vectors of a triple may be off by an angle whose sine is 0.0316.
    assert!(
        difference > 0.0 && difference < 2.0 * 0.0316,
        "{difference}"
    );
}

fn cached(config: HdPissaConfig, folder: &Path) -> HdPissaConfig {
    config.with_svd_cache(Some(SvdCache::new(folder.into())))
}

fn files(folder: &Path) -> Vec<std::path::PathBuf> {
    let files = std::fs::read_dir(folder).unwrap();
    files.map(|file| file.unwrap().path()).collect()
}

/// What is read gives the bits that were computed, and the same report.
#[test]
fn what_is_read_is_what_was_computed() {
    let mut cluster = decaying();
    cluster[7] = cluster[6];
    for values in [decaying(), cluster] {
        let layer = layer([150, 190], &values, DType::F32);
        for svd in [EXACT, DOUBLE, SvdMethod::Krylov] {
            let folder = tempfile::tempdir().unwrap();
            let config = cached(config(svd), &folder.path().join("new"));
            let (computed, of_computed) = adapted(&layer, &config).unwrap();
            let (read, of_read) = adapted(&layer, &config).unwrap();
            assert_eq!(of_computed.cache, CacheUse::Written);
            assert_eq!(of_read.cache, CacheUse::Read);
            assert_eq!(factors(&read), factors(&computed));
            assert_eq!(of_read.decomposition, of_computed.decomposition);
            assert_eq!(of_read.explained_variance, of_computed.explained_variance);
            let alone = adapted(&layer, &self::config(svd)).unwrap();
            assert_eq!(factors(&alone.0), factors(&computed));
            assert_eq!(alone.1.cache, CacheUse::Unused);
        }
    }
}

/// Whatever changes the decomposition looks elsewhere, and nothing else does.
#[test]
fn one_file_for_each_decomposition() {
    let folder = tempfile::tempdir().unwrap();
    let first = layer([150, 190], &decaying(), DType::F32);
    let used = |layer: &Linear, config: HdPissaConfig| {
        adapted(layer, &cached(config, folder.path()))
            .unwrap()
            .1
            .cache
    };
    assert_eq!(used(&first, config(EXACT)), CacheUse::Written);
    // Shards and ranks of the same product, and another length of the frames.
    let one = config(EXACT).with_rank(12).with_shards(1);
    assert_eq!(used(&first, one), CacheUse::Read);
    let unit = config(EXACT).with_frame_scale(FrameScale::Unit);
    assert_eq!(used(&first, unit.clone()), CacheUse::Read);
    // A half-precision weight with these values.
    let half = layer([150, 190], &decaying(), DType::BF16);
    let mut single = half.clone();
    single.weight = Param::from_tensor(Tensor::from_inner(
        half.weight.val().inner().cast(DType::F32),
    ));
    assert_eq!(used(&half, config(EXACT)), CacheUse::Written);
    assert_eq!(used(&single, config(EXACT)), CacheUse::Read);

    let mut other = first.clone();
    other.weight = other.weight.map(|weight| {
        let data = weight.inner().into_data();
        let mut values: Vec<f32> = data.iter().collect();
        values[77] = f32::from_bits(values[77].to_bits() ^ 1);
        let data = TensorData::new(values, [150, 190]);
        Tensor::from_data(data, &Device::flex().autodiff())
    });
    // The same values in another shape.
    let mut reshaped = first.clone();
    reshaped.weight = Param::from_tensor(first.weight.val().reshape([190, 150]).detach());
    for (layer, config) in [
        (&other, config(EXACT)),
        (&reshaped, config(EXACT)),
        (&first, config(DOUBLE)),
        (&first, config(SvdMethod::Krylov)),
        (&first, config(EXACT).with_rank(4)),
        (&first, unit.with_windows(Windows::Spread)),
    ] {
        assert_eq!(used(layer, config.clone()), CacheUse::Written, "{config}");
        assert_eq!(used(layer, config), CacheUse::Read);
    }

    // The first again, by the baseline.
    let before = files(folder.path()).len();
    let cache = Some(SvdCache::new(folder.path().into()));
    let pissa = PissaConfig::new().with_rank(12).with_svd_cache(cache);
    first.clone().apply_pissa(&pissa).unwrap();
    assert_eq!(files(folder.path()).len(), before);
}

/// A weight that is refused is refused from the cache as well.
#[test]
fn low_ranks_are_refused_from_the_cache() {
    let folder = tempfile::tempdir().unwrap();
    let layer = layer([150, 190], &decaying()[..9], DType::F32);
    let unit = cached(
        config(EXACT).with_frame_scale(FrameScale::Unit),
        folder.path(),
    );
    let (computed, _) = adapted(&layer, &unit).unwrap();
    let (read, told) = adapted(&layer, &unit).unwrap();
    assert_eq!(told.cache, CacheUse::Read);
    assert_eq!(factors(&read), factors(&computed));
    let error = adapted(&layer, &cached(config(EXACT), folder.path())).err();
    assert!(
        matches!(error, Some(HdPissaError::RankDeficient { .. })),
        "{error:?}"
    );
}

#[test]
fn damaged_files_are_computed_again() {
    let folder = tempfile::tempdir().unwrap();
    let layer = layer([30, 40], &decaying()[..30], DType::F32);
    let config = cached(config(EXACT), folder.path());
    let (computed, _) = adapted(&layer, &config).unwrap();
    let [path] = &files(folder.path())[..] else {
        panic!("one file");
    };
    let whole = std::fs::read(path).unwrap();
    let cuts = (0..whole.len())
        .step_by(97)
        .map(|end| whole[..end].to_vec());
    let flips = (0..whole.len()).step_by(89).map(|at| {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x10;
        bytes
    });
    for damaged in cuts.chain(flips) {
        std::fs::write(path, damaged).unwrap();
        let (again, told) = adapted(&layer, &config).unwrap();
        assert_eq!(told.cache, CacheUse::Replaced);
        assert_eq!(factors(&again), factors(&computed));
        assert!(std::fs::read(path).unwrap() == whole);
    }
}

/// Content that is as it was written, but not by this version: the first bytes differ.
#[test]
fn other_content_is_computed_again() {
    let folder = tempfile::tempdir().unwrap();
    let layer = layer([30, 40], &decaying()[..30], DType::F32);
    let config = cached(config(EXACT), folder.path());
    adapted(&layer, &config).unwrap();
    let [path] = &files(folder.path())[..] else {
        panic!("one file");
    };
    let key = path.file_stem().unwrap().to_str().unwrap();
    let whole = std::fs::read(path).unwrap();
    let content = &whole[..whole.len() - 32];
    let cache = hd_pissa::cache::FileCache::new(folder.path(), "svd", 1 << 20);
    let mut renamed = content.to_vec();
    renamed[0] ^= 1;
    for other in [
        &renamed,
        &content[..100],
        &content[..content.len() - 4],
        &[],
    ] {
        cache.write(key, other).unwrap();
        let (_, told) = adapted(&layer, &config).unwrap();
        assert_eq!(told.cache, CacheUse::Replaced);
        assert!(std::fs::read(path).unwrap() == whole);
    }
}

#[test]
fn a_cache_that_cannot_be_written_ends_no_run() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let layer = layer([30, 40], &decaying()[..30], DType::F32);
    let (alone, _) = adapted(&layer, &config(EXACT)).unwrap();
    let (ours, told) = adapted(&layer, &cached(config(EXACT), file.path())).unwrap();
    assert_eq!(factors(&ours), factors(&alone));
    assert!(matches!(told.cache, CacheUse::NotKept { .. }), "{told:?}");

    let folder = tempfile::tempdir().unwrap();
    let cache = SvdCache::new(folder.path().into()).with_max_bytes(1000);
    let small = config(EXACT).with_svd_cache(Some(cache));
    let (ours, told) = adapted(&layer, &small).unwrap();
    assert_eq!(factors(&ours), factors(&alone));
    let CacheUse::NotKept { reason } = told.cache else {
        panic!("{told:?}");
    };
    assert!(reason.contains("the limit of 1000"), "{reason}");
}

#[test]
fn two_writers_at_a_time() {
    let folder = tempfile::tempdir().unwrap();
    let layer = layer([30, 40], &decaying()[..30], DType::F32);
    let config = cached(config(EXACT), folder.path());
    let expected = factors(&adapted(&layer, &self::config(EXACT)).unwrap().0);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..10 {
                    let (ours, told) = adapted(&layer, &config).unwrap();
                    assert_eq!(factors(&ours), expected);
                    assert!(matches!(told.cache, CacheUse::Read | CacheUse::Written));
                }
            });
        }
    });
    assert_eq!(files(folder.path()).len(), 1);
}
