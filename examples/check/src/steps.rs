//! Whole optimizer steps, of each dtype and precision, against the method in `f64`.

use crate::measure::sample::Host;
use burn::optim::{AdamConfig, GradientsParams};
use burn::tensor::{DType, Device, Tensor};
use half::{bf16, f16};
use hd_pissa::comm::Solo;
use hd_pissa::{
    HdPissaAdapter, HdPissaConfig, HdPissaLinear, HdPissaLinearConfig, HdPissaModule,
    HdPissaOptimizerConfig, MergePrecision, ShardGradients,
};
use hd_pissa_bits::{Half, fingerprint};

use crate::bounds::{Arithmetic, F32, unit};
use crate::case::Case;
use crate::comparison::{Compared, Expected};
use crate::operations::{expect, merge_bound, rounding, update};
use crate::report::Report;
use crate::sample::Source;

const SIZES: [[usize; 2]; 2] = [[37, 50], [130, 97]];
const RANK: usize = 4;
const SHARDS: usize = 3;
const RATE: f64 = 1e-2;
const BETAS: [f32; 2] = [0.9, 0.999];
const EPSILON: f32 = 1e-8;
/// Number of steps if the weight keeps the bits that rounding cuts off. Otherwise there is one
/// step, because its rounding would change the start of the next.
const STEPS: usize = 3;
const SEED: u64 = 5;

/// Compares steps of all `dtypes`.
pub fn check(device: &Device, dtypes: &[DType], arithmetic: Arithmetic, report: &mut Report) {
    for &dtype in dtypes {
        let precisions = match dtype {
            // All precisions are the same for this dtype.
            DType::F32 => vec![MergePrecision::Compensated],
            _ => vec![
                MergePrecision::Compensated,
                MergePrecision::Nearest,
                MergePrecision::Stochastic { seed: SEED },
            ],
        };
        for precision in precisions {
            for size @ [d_input, d_output] in SIZES {
                let name = match (dtype, precision) {
                    (DType::F32, _) => "step".into(),
                    (_, MergePrecision::Stochastic { .. }) => "step, Stochastic".into(),
                    (_, other) => format!("step, {other:?}"),
                };
                let sizes = format!("{d_input}x{d_output} r {RANK} K {SHARDS}");
                report.case(Case::new(name, dtype, sizes), || {
                    step(device, size, dtype, precision, arithmetic)
                });
            }
        }
    }
}

fn step(
    device: &Device,
    size: [usize; 2],
    dtype: DType,
    precision: MergePrecision,
    arithmetic: Arithmetic,
) -> Vec<Compared> {
    let start = start(size, dtype);
    let keeps_all = dtype == DType::F32 || precision == MergePrecision::Compensated;
    let steps = if keeps_all { STEPS } else { 1 };
    let run = Run::new(device, &start, dtype, precision).train(steps);
    let method = run.method(&start, steps, arithmetic, error_of_adam);
    let mut compared = Vec::new();
    if let MergePrecision::Stochastic { .. } = precision
        && dtype != DType::F32
    {
        // Rounding may draw either neighbour of the sum.
        let neighbour = |expected: &Expected| Expected {
            bound: expected.bound + 2.0 * rounding(dtype, expected.value),
            ..*expected
        };
        let expected = method.iter().map(neighbour).collect();
        compared.push(Compared::new("weight", run.weight.clone(), expected));
        let flex = Run::new(&Device::flex(), &start, dtype, precision).train(steps);
        let method = run.method(&start, steps, arithmetic, error_of_device);
        compared.push(draws(&run.weight, &flex.weight, &method, dtype));
    } else {
        // A pair of halves of f16 ends at 2^-40; each step rounds to it.
        let stored = |expected: &Expected| Expected {
            bound: expected.bound
                + match keeps_all {
                    true => steps as f64 * 2f64.powi(-39),
                    false => rounding(dtype, expected.value),
                },
            ..*expected
        };
        let expected = method.iter().map(stored).collect();
        compared.push(Compared::new("weight", run.weight.clone(), expected));
    }
    compared
}

/// The weight before the first step.
fn start(size: [usize; 2], dtype: DType) -> Host {
    Source::new(size[0] as u64).matrix(size, 0.5, dtype)
}

/// The number of elements that were rounded differently from Flex, which draws the same bits.
///
/// A sum with an error of a share `p` of the distance of its neighbours is rounded differently with
/// probability `p`. The bound is 6 standard deviations above the mean, plus 6.
fn draws(found: &Host, flex: &Host, method: &[Expected], dtype: DType) -> Compared {
    let differ = method.iter().filter(|expected| {
        let [row, column] = expected.place;
        found.at(row, column) != flex.at(row, column)
    });
    let count = differ.count() as f32;
    let distance = |value: f64| 2.0 * unit(dtype) * 2f64.powf(value.abs().log2().floor());
    let share = |expected: &Expected| (2.0 * expected.bound / distance(expected.value)).min(1.0);
    let mean: f64 = method.iter().map(share).sum();
    let expected = Expected {
        place: [0, 0],
        value: 0.0,
        bound: mean + 6.0 * mean.sqrt() + 6.0,
    };
    let values = vec![count];
    Compared::new(
        "draws unlike Flex",
        Host { values, columns: 1 },
        vec![expected],
    )
}

/// A layer and its optimizer, and after training the weight with all bits that it keeps.
struct Run {
    layer: HdPissaLinear,
    /// A row for each shard, in the form of a merge.
    frames: Host,
    weight: Host,
}

impl Run {
    fn new(device: &Device, start: &Host, dtype: DType, precision: MergePrecision) -> Self {
        let device = device.clone().autodiff();
        let [d_input, d_output] = [start.rows(), start.columns];
        let mut layer: HdPissaLinear = HdPissaLinearConfig::new(d_input, d_output)
            .with_bias(false)
            .init(&device);
        layer.weight = layer.weight.map(|_| start.tensor(&device, dtype));
        let config = HdPissaConfig::new()
            .with_rank(RANK)
            .with_shards(SHARDS)
            .with_precision(precision);
        let layer = layer
            .apply_hd_pissa(&config, 0..SHARDS)
            .expect("the sizes allow the ranks");
        let frames = packed(adapter(&layer).shards.iter().map(|shard| {
            [&shard.a, &shard.b].map(|factor| Host::read(factor.val().inner()).values)
        }));
        Self {
            layer,
            frames,
            weight: start.clone(),
        }
    }

    fn train(mut self, steps: usize) -> Self {
        let adam = AdamConfig::new()
            .with_beta_1(BETAS[0])
            .with_beta_2(BETAS[1])
            .with_epsilon(EPSILON);
        let mut optimizer = HdPissaOptimizerConfig::new()
            .init(adam.init(), Solo)
            .expect("Adam is supported");
        for step in 0..steps {
            let mut gradients = ShardGradients::new(&self.layer);
            for shard in &adapter(&self.layer).shards {
                let mut own = GradientsParams::new();
                let [a, b] = self.gradients(step, shard.index);
                for (factor, gradient) in [(&shard.a, a), (&shard.b, b)] {
                    let [rows, columns] = factor.val().dims();
                    let data = burn::tensor::TensorData::new(gradient, [rows, columns]);
                    let device = factor.val().inner().device();
                    own.register(
                        factor.id,
                        Tensor::<2>::from_data(data, (&device, DType::F32)),
                    );
                }
                gradients.push(shard.index, own);
            }
            let stepped = optimizer.step(RATE, self.layer, gradients);
            self.layer = stepped.unwrap_or_else(|error| panic!("{}", error.cause));
        }
        self.weight = weight(&self.layer);
        self
    }

    /// Gradients of a shard's factors. Each element has the same sign in all steps, so no moment is
    /// a difference of large numbers.
    fn gradients(&self, step: usize, shard: usize) -> [Vec<f32>; 2] {
        let split = RANK * self.weight.rows();
        let all = (0..self.frames.columns).map(|index| {
            let hash = fingerprint([(0, (index + 977 * shard) as u32)])[0];
            let sign = if hash.is_multiple_of(2) { 1.0 } else { -1.0 };
            let size = 0.5 + (hash >> 8) as f32 / (1 << 24) as f32;
            sign * size * (1.0 + 0.25 * step as f32)
        });
        let (a, b) = all
            .enumerate()
            .partition::<Vec<_>, _>(|(index, _)| *index < split);
        [a, b].map(|side| side.into_iter().map(|(_, value)| value).collect())
    }

    /// The weight after `steps` steps of the method in `f64`, before rounding, and a bound on the
    /// error of `f32` arithmetic, if Adam's delta of step `t` has an error of a share `error(t)`.
    fn method(
        &self,
        start: &Host,
        steps: usize,
        arithmetic: Arithmetic,
        error: fn(usize) -> f64,
    ) -> Vec<Expected> {
        let size = [start.rows(), start.columns];
        let [beta_1, beta_2] = BETAS.map(f64::from);
        let columns = self.frames.columns;
        let mut moments = vec![[0.0, 0.0]; SHARDS * columns];
        let mut updates = Vec::new();
        for step in 0..steps {
            let t = (step + 1) as i32;
            let gradients = (0..SHARDS).flat_map(|shard| self.gradients(step, shard).concat());
            let deltas = moments.iter_mut().zip(gradients).map(|([m, v], gradient)| {
                let gradient = f64::from(gradient);
                *m = beta_1 * *m + (1.0 - beta_1) * gradient;
                *v = beta_2 * *v + (1.0 - beta_2) * gradient * gradient;
                let (m, v) = (*m / (1.0 - beta_1.powi(t)), *v / (1.0 - beta_2.powi(t)));
                // Rounded to `f32`: half a unit of the error that `error_of_adam` allows.
                (-RATE * m / (v.sqrt() + f64::from(EPSILON))) as f32
            });
            updates.push(Host {
                values: deltas.collect(),
                columns,
            });
        }
        let sum = arithmetic.sum(2 * SHARDS * RANK + 2);
        expect(size, |place @ [i, j]| {
            let (mut value, mut bound) = (start.at(i, j), 0.0);
            for (step, deltas) in updates.iter().enumerate() {
                let update = update(&self.frames, deltas, RANK, size, place);
                // A delta enters a term at most twice.
                bound += 2.0 * error(step + 1) * update.magnitude;
                bound += merge_bound(sum, value, update);
                value += update.value;
            }
            (value, bound)
        })
    }
}

/// A bound on the error of Adam's delta of step `t` in `f32` arithmetic, as a share of the delta:
/// the part of the device, and the part of the host. The corrections `1 − βᵗ` come from a power
/// with `t` roundings and lose digits by cancellation.
fn error_of_adam(t: usize) -> f64 {
    let n = t as f64;
    let [first, second] = BETAS.map(|beta| (n + 1.0) / (1.0 - f64::from(beta).powi(t as i32)));
    error_of_device(t) + F32 * (first + second / 2.0)
}

/// The device's part: both moments are sums of terms of one sign, with 3 and 4 roundings a step, of
/// which the root halves the second's. After that come the root, a division, and a few products, of
/// which devices may round roots and divisions to 3 units: 16 in all.
fn error_of_device(t: usize) -> f64 {
    F32 * (3.0 * t as f64 + 2.0 * t as f64 + 16.0)
}

fn adapter(layer: &HdPissaLinear) -> &HdPissaAdapter {
    layer
        .weight
        .reparameterization()
        .expect("attached in Run::new")
}

fn packed(shards: impl Iterator<Item = [Vec<f32>; 2]>) -> Host {
    let rows: Vec<Vec<f32>> = shards.map(|[a, b]| [a, b].concat()).collect();
    Host {
        columns: rows[0].len(),
        values: rows.concat(),
    }
}

/// The values of a weight with all bits that it keeps.
fn weight(layer: &HdPissaLinear) -> Host {
    let base = layer.weight.base().inner();
    let dtype = base.dtype();
    let mut weight = Host::read(base);
    if let Some(residual) = &adapter(layer).residual {
        let words: Vec<i32> = residual.val().into_data().iter().collect();
        let pitch = weight.columns.div_ceil(2);
        for (index, value) in weight.values.iter_mut().enumerate() {
            let (row, column) = (index / weight.columns, index % weight.columns);
            let word = words[row * pitch + column / 2] as u32;
            let low = (word >> (16 * (column % 2))) as u16;
            *value = match dtype {
                DType::F16 => f16::from_f32(*value).join(low),
                _ => bf16::from_f32(*value).join(low),
            };
        }
    }
    weight
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_weight_that_takes_no_update_or_half_of_it_is_beyond_its_bound() {
        let (device, arithmetic) = (Device::flex(), Arithmetic::of("flex"));
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            for precision in [
                MergePrecision::Compensated,
                MergePrecision::Nearest,
                MergePrecision::Stochastic { seed: SEED },
            ] {
                let before = start(SIZES[0], dtype);
                let mut weight = step(&device, SIZES[0], dtype, precision, arithmetic).remove(0);
                assert!(weight.worst().is_within());
                let after = weight.found.values.clone();
                for share in [0.0, 0.5] {
                    let pairs = before.values.iter().zip(&after);
                    weight.found.values = pairs.map(|(x, y)| x + share * (y - x)).collect();
                    let worst = weight.worst();
                    assert!(
                        !worst.is_within(),
                        "{dtype:?} {precision:?} {share} {worst:?}"
                    );
                }
            }
        }
    }
}
