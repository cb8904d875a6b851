//! The frames of a weight: orthonormal directions on both sides, chosen and scaled for its shards.

use burn::tensor::Tensor;
use faer::Mat;

use crate::basis::random_columns;
use crate::host::HostMatrix;
use crate::parallel::on_one_thread;
use crate::svd::{Decomposition, Request, Svd, number_of_leading, numeric_rank, singular_values};
use crate::svd_cache::{self, CacheUse};
use crate::{FrameScale, HdPissaConfig, HdPissaError, SvdCache, SvdMethod, Windows};

/// The frames of all shards of a weight.
#[derive(Debug)]
pub(crate) struct WeightFrames {
    /// Directions `[d_input, shards · rank]`, shard by shard.
    u: Mat<f64>,
    /// Directions `[d_output, shards · rank]`, shard by shard.
    v: Mat<f64>,
    /// For each direction the square of what multiplies it, on either side.
    scales: Vec<f64>,
    /// Directions of a shard.
    rank: usize,
    /// Share of the weight's squared Frobenius norm in the window of each shard,
    /// `‖U_kᵀ W V_k‖² / ‖W‖²`.
    pub(crate) explained_variance: Vec<f64>,
    /// How they were found.
    pub(crate) decomposition: Decomposition,
    /// What the cache of decompositions did.
    pub(crate) cache: CacheUse,
}

impl WeightFrames {
    /// Those that `config` asks for, of shards of rank `rank`.
    pub(crate) fn compute(
        path: &str,
        weight: &Tensor<2>,
        rank: usize,
        config: &HdPissaConfig,
    ) -> Result<Self, HdPissaError> {
        let host = HostMatrix::read(path, weight)?;
        match config.windows {
            Windows::Random { seed } => {
                let count = config.shards * rank;
                let none = [host.rows(), host.cols()].map(|rows| Mat::zeros(rows, 0));
                let [u, v] =
                    orthogonal_to(none.each_ref(), count, &format!("random/{seed}/{path}"));
                let explained_variance =
                    on_one_thread(|| explained_by_directions(&host, &u, &v, rank));
                Ok(Self {
                    u,
                    v,
                    scales: vec![mean_singular_value(&host); count],
                    rank,
                    explained_variance,
                    decomposition: Decomposition::None,
                    cache: CacheUse::Unused,
                })
            }
            windows => {
                let n = host.rows().min(host.cols());
                let components = windows.components(config.shards, rank, n);
                let components = components.expect("directions that are not random are components");
                let request = Request {
                    path,
                    weight,
                    host: &host,
                    method: config.svd,
                    components: &components,
                };
                let cache = config.svd_cache.as_ref();
                Self::of_components(&request, cache, rank, config.frame_scale)
            }
        }
    }

    /// One shard of the leading `rank` components, with singular values that are divided by
    /// `divisor`.
    pub(crate) fn leading(
        path: &str,
        weight: &Tensor<2>,
        (method, cache): (SvdMethod, Option<&SvdCache>),
        rank: usize,
        divisor: f64,
    ) -> Result<Self, HdPissaError> {
        let host = HostMatrix::read(path, weight)?;
        let components: Vec<usize> = (0..rank).collect();
        let request = Request {
            path,
            weight,
            host: &host,
            method,
            components: &components,
        };
        let mut frames = Self::of_components(&request, cache, rank, FrameScale::Balanced)?;
        for scale in &mut frames.scales {
            *scale /= divisor;
        }
        Ok(frames)
    }

    fn of_components(
        request: &Request<'_>,
        cache: Option<&SvdCache>,
        rank: usize,
        scale: FrameScale,
    ) -> Result<Self, HdPissaError> {
        let Request {
            path,
            host,
            components,
            ..
        } = *request;
        let mut numeric_rank = None;
        let (svd, cache) = svd_cache::compute(request, cache, |values| {
            numeric_rank = check_rank(path, host, values, components, scale)?;
            Ok(match numeric_rank {
                Some(numeric_rank) => (0..numeric_rank).collect(),
                None => components.to_vec(),
            })
        })?;
        let Svd {
            u,
            v,
            values,
            decomposition,
        } = svd;
        let explained_variance = explained_by_components(&values, host, components, rank);
        let [u, v] = match numeric_rank {
            Some(numeric_rank) => {
                let null = orthogonal_to(
                    [&u, &v],
                    values.len() - numeric_rank,
                    &format!("null/{path}"),
                );
                join([&u, &v], null, components)
            }
            None => [u, v],
        };
        let scales = match scale {
            FrameScale::Balanced => components.iter().map(|&i| values[i]).collect(),
            FrameScale::Unit => vec![mean_singular_value(host); components.len()],
        };
        Ok(Self {
            u,
            v,
            scales,
            rank,
            explained_variance,
            decomposition,
            cache,
        })
    }

    /// The factors of a shard, row by row: `a` of shape `[d_input, rank]` and `b` of shape
    /// `[rank, d_output]`.
    pub(crate) fn window(&self, shard: usize) -> (Vec<f32>, Vec<f32>) {
        let columns = shard * self.rank..(shard + 1) * self.rank;
        let root = |i: usize| self.scales[i].sqrt();
        let a = (0..self.u.nrows())
            .flat_map(|row| columns.clone().map(move |i| (row, i)))
            .map(|(row, i)| (self.u[(row, i)] * root(i)) as f32)
            .collect();
        let b = columns
            .clone()
            .flat_map(|i| (0..self.v.nrows()).map(move |col| (i, col)))
            .map(|(i, col)| (self.v[(col, i)] * root(i)) as f32)
            .collect();
        (a, b)
    }

    /// Largest absolute inner product of two directions of different shards, over both sides: 0 for
    /// exactly orthogonal shards.
    pub(crate) fn orthogonality_error(&self) -> f64 {
        let largest = |vectors: &Mat<f64>| {
            let gram = vectors.transpose() * vectors;
            let count = gram.ncols();
            (0..count)
                .flat_map(|i| (0..i).map(move |j| (i, j)))
                .filter(|(i, j)| i / self.rank != j / self.rank)
                .map(|(i, j)| gram[(i, j)].abs())
                .fold(0.0, f64::max)
        };
        largest(&self.u).max(largest(&self.v))
    }
}

/// What [`WeightFrames::explained_variance`] and [`WeightFrames::decomposition`] would be, and the errors of
/// [`WeightFrames::compute`], as far as possible without singular vectors.
pub(crate) fn explained_variance(
    path: &str,
    weight: &Tensor<2>,
    rank: usize,
    config: &HdPissaConfig,
) -> Result<(Vec<f64>, Decomposition), HdPissaError> {
    let n = weight.dims().into_iter().min().unwrap_or(0);
    let components = config.windows.components(config.shards, rank, n);
    let (SvdMethod::Exact(precision), Some(components)) = (config.svd, components) else {
        let frames = WeightFrames::compute(path, weight, rank, config)?;
        return Ok((frames.explained_variance, frames.decomposition));
    };
    let weight = HostMatrix::read(path, weight)?;
    let values = singular_values(path, &weight, precision)?;
    check_rank(path, &weight, &values, &components, config.frame_scale)?;
    let explained = explained_by_components(&values, &weight, &components, rank);
    Ok((explained, Decomposition::Exact))
}

/// The numeric rank of the weight, if it leaves some of `components` without a direction of their own:
/// refused where their scale would be rounding noise.
fn check_rank(
    path: &str,
    weight: &HostMatrix,
    values: &[f64],
    components: &[usize],
    scale: FrameScale,
) -> Result<Option<usize>, HdPissaError> {
    let numeric_rank = numeric_rank(weight, values);
    let needed = number_of_leading(components);
    match scale {
        _ if needed <= numeric_rank => Ok(None),
        FrameScale::Unit => Ok(Some(numeric_rank)),
        FrameScale::Balanced => Err(HdPissaError::RankDeficient {
            path: path.into(),
            numeric_rank,
            needed,
        }),
    }
}

/// On each side `count` random directions that are orthogonal to the given ones.
fn orthogonal_to([u, v]: [&Mat<f64>; 2], count: usize, name: &str) -> [Mat<f64>; 2] {
    let shape = format!("{}x{}", u.nrows(), v.nrows());
    let columns = |given: &Mat<f64>, side: char| {
        random_columns(given.as_ref(), count, &format!("{name}/{shape}/{side}"))
    };
    // In its last bits a factorization depends on the number of threads.
    on_one_thread(|| [columns(u, 'a'), columns(v, 'b')])
}

/// On each side the directions of `components`. The given ones come first; those after them are in
/// `null`.
fn join(given: [&Mat<f64>; 2], null: [Mat<f64>; 2], components: &[usize]) -> [Mat<f64>; 2] {
    let [of_u, of_v] = null;
    [(given[0], of_u), (given[1], of_v)].map(|(given, null)| {
        Mat::from_fn(given.nrows(), components.len(), |row, i| {
            match components[i].checked_sub(given.ncols()) {
                Some(col) => null[(row, col)],
                None => given[(row, components[i])],
            }
        })
    })
}

/// Root mean square of the singular values, `‖W‖_F / √min(d_input, d_output)`.
fn mean_singular_value(weight: &HostMatrix) -> f64 {
    (weight.squared_norm() / weight.rows().min(weight.cols()) as f64).sqrt()
}

fn explained_by_components(
    values: &[f64],
    weight: &HostMatrix,
    components: &[usize],
    rank: usize,
) -> Vec<f64> {
    let total = weight.squared_norm();
    let share = |&component: &usize| values[component] * values[component] / total;
    let windows = components.chunks(rank);
    windows
        .map(|window| window.iter().map(share).sum())
        .collect()
}

fn explained_by_directions(
    weight: &HostMatrix,
    u: &Mat<f64>,
    v: &Mat<f64>,
    rank: usize,
) -> Vec<f64> {
    let projected = u.transpose() * weight.f64();
    let total = weight.squared_norm();
    let of_window = |start: usize| {
        let block = projected.subrows(start, rank) * v.subcols(start, rank);
        block.squared_norm_l2() / total
    };
    (0..u.ncols()).step_by(rank).map(of_window).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{Device, Distribution, TensorData};
    use proptest::prelude::*;

    use crate::SvdPrecision;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        /// The windows of all components add up to the matrix, whatever its shape.
        #[test]
        fn windows_restore_the_matrix(rows in 1usize..24, cols in 1usize..24, seed: u64) {
            let device = Device::flex();
            device.seed(seed);
            let weight = Tensor::<2>::random([rows, cols], Distribution::Default, &device);
            let count = rows.min(cols);
            let method = SvdMethod::Exact(SvdPrecision::F64);
            let frames = WeightFrames::leading("w", &weight, (method, None), count, 4.0);
            // A random matrix is seldom, but not never, close to one of a lower rank.
            prop_assume!(frames.is_ok());
            let (a, b) = frames.unwrap().window(0);
            let a = Tensor::<2>::from_data(TensorData::new(a, [rows, count]), &device);
            let b = Tensor::<2>::from_data(TensorData::new(b, [count, cols]), &device);
            let error = (a.matmul(b) * 4.0 - weight).abs().max().into_scalar::<f32>();
            prop_assert!(error < 1e-5, "{error}");
        }
    }

    #[test]
    fn explained_variance_of_a_known_spectrum() {
        let values = [4.0, 3.0, 0.0, 0.0];
        let device = Device::flex();
        let weight =
            Tensor::<2>::from_floats([[0.0, 3.0, 0.0, 0.0], [4.0, 0.0, 0.0, 0.0]], &device);
        let weight = HostMatrix::read("w", &weight).unwrap();
        let explained = |components: &[usize], rank| {
            explained_by_components(&values, &weight, components, rank)
        };
        assert_eq!(explained(&[1, 0], 1), [9.0 / 25.0, 16.0 / 25.0]);
        assert_eq!(explained(&[0, 1, 2, 3], 2), [1.0, 0.0]);
    }
}
