//! Every operation of the backend extension, and thus every kernel, against sums in `f64`.

use crate::measure::sample::{Exact, Host, product};
use burn::backend::Dispatch;
use burn::tensor::{DType, Device, Int, Tensor};
use hd_pissa::ops::{HdPissaOps, Rounding, adapter_linear, adapter_weight, merge};
use hd_pissa_bits::fingerprint;
use hd_pissa_kernels::reference;

use crate::bounds::{Arithmetic, F32, smallest, unit};
use crate::case::Case;
use crate::comparison::{Compared, Expected};
use crate::report::Report;
use crate::sample::{Source, places};

/// Tokens, `d_input`, `d_output`, rank: one element more or less than a tile of any size, and
/// dimensions that no vector divides. The last one is large, and only some of its elements are
/// compared.
const SHAPES: [[usize; 4]; 5] = [
    [1, 31, 64, 16],
    [5, 13, 7, 1],
    [64, 96, 33, 8],
    [129, 65, 130, 5],
    [300, 1030, 517, 16],
];
const SHARDS: usize = 3;
const SCALE: f64 = 1.75;

/// The float dtypes of weights that the device has. The others are reported as left out.
pub fn dtypes(device: &Device, report: &mut Report) -> Vec<DType> {
    let (has, lacks): (Vec<_>, Vec<_>) = [DType::F32, DType::F16, DType::BF16]
        .into_iter()
        .partition(|dtype| device.supports_dtype(*dtype));
    for dtype in lacks {
        report.left_out(
            Case::new("everything", dtype, ""),
            "the device lacks this dtype",
        );
    }
    has
}

/// Compares all operations in all `dtypes`.
pub fn check(device: &Device, dtypes: &[DType], arithmetic: Arithmetic, report: &mut Report) {
    for &dtype in dtypes {
        for shape @ [tokens, d_input, d_output, rank] in SHAPES {
            let case = Operands::new(shape, dtype, device, arithmetic);
            let product = format!("{tokens}x{d_input}x{d_output} r {rank}");
            let named = |operation| Case::new(operation, dtype, product.as_str());
            report.case(named("adapter_linear"), || case.linear());
            report.case(named("adapter_weight"), || case.weight());
            report.case(named("factor_product"), || case.factor_product());
            let merged = format!("{d_input}x{d_output} r {rank} K {SHARDS}");
            report.case(Case::new("merge", dtype, merged), || case.merge());
            let matrix = format!("{d_input}x{d_output}");
            report.case(Case::new("fingerprint", dtype, matrix.as_str()), || {
                case.fingerprint()
            });
            if dtype != DType::F32 {
                report.case(Case::new("max_abs", dtype, matrix), || case.max_abs());
            }
        }
    }
    for (rows, columns, split) in [(1, 1, 0), (3, 35, 20), (2, 4099, 4099), (8, 25_600, 9_216)] {
        let case = Case::new("row_statistics", DType::F32, format!("{rows}x{columns}"));
        report.case(case, || {
            row_statistics(device, [rows, columns], split, arithmetic)
        });
    }
    let case = Case::new("fingerprint_int", DType::I32, "37x19");
    report.case(case, || fingerprint_int(device));
}

/// The operands of all operations of one shape, and their device.
struct Operands<'a> {
    device: &'a Device,
    dtype: DType,
    arithmetic: Arithmetic,
    x: Host,
    w: Host,
    a: Host,
    b: Host,
    /// The gradient of the output of a product.
    g: Host,
    /// The gradient of a weight.
    dense: Host,
    frames: Host,
    deltas: Host,
}

impl<'a> Operands<'a> {
    fn new(
        [tokens, d_input, d_output, rank]: [usize; 4],
        dtype: DType,
        device: &'a Device,
        arithmetic: Arithmetic,
    ) -> Self {
        let mut source = Source::new((tokens * d_input * d_output * rank) as u64);
        let row = [SHARDS, rank * (d_input + d_output)];
        Self {
            device,
            dtype,
            arithmetic,
            x: source.matrix([tokens, d_input], 1.0, dtype),
            w: source.matrix([d_input, d_output], 0.5, dtype),
            a: source.matrix([d_input, rank], 1.0, DType::F32),
            b: source.matrix([rank, d_output], 1.0, DType::F32),
            g: source.matrix([tokens, d_output], 1.0, dtype),
            dense: source.matrix([d_input, d_output], 1.0, dtype),
            frames: source.matrix(row, 0.2, DType::F32),
            deltas: source.matrix(row, 0.05, DType::F32),
        }
    }

    /// A leaf of a graph.
    fn leaf(&self, host: &Host, dtype: DType) -> Tensor<2> {
        host.tensor(&self.device.clone().autodiff(), dtype)
            .require_grad()
    }

    fn constant(&self, host: &Host) -> Tensor<2> {
        host.tensor(&self.device.clone().autodiff(), self.dtype)
    }

    /// A product by Burn, rounded to the dtype of the weight.
    fn rounded(&self, left: &Host, right: &Host) -> Vec<Expected> {
        let shape = [left.rows(), right.columns];
        let share = self.arithmetic.product(left.columns, shape, self.dtype);
        expect(shape, |place| {
            let exact = product(left, right, place);
            (exact.value, share * exact.magnitude + smallest(self.dtype))
        })
    }

    /// `factor · left · right` in `f32`, by Burn.
    fn thin(&self, left: &Host, right: &Host, factor: f64) -> Vec<Expected> {
        let shape = [left.rows(), right.columns];
        let share = self.arithmetic.product(left.columns, shape, DType::F32);
        self.thin_within(left, right, factor, share + 2.0 * F32)
    }

    /// The same, with an error of up to a share of the sum of the absolute values of its terms.
    fn thin_within(&self, left: &Host, right: &Host, factor: f64, share: f64) -> Vec<Expected> {
        expect([left.rows(), right.columns], |place| {
            let exact = product(left, right, place);
            (
                factor * exact.value,
                factor * share * exact.magnitude + smallest(DType::F32),
            )
        })
    }

    /// `scale · outerᵀ · (left · right)`, of two products in `f32`.
    fn chain(&self, outer: &Host, left: &Host, right: &Host) -> Vec<Expected> {
        let inner = |place| product(left, right, place);
        let columns = right.columns;
        let inner: Vec<Exact> = (0..left.rows() * columns)
            .map(|index| inner([index / columns, index % columns]))
            .collect();
        let shape = [outer.columns, columns];
        let share = self.arithmetic.product(left.rows(), shape, DType::F32) + 4.0 * F32;
        expect(shape, |[i, j]| {
            let terms = (0..outer.rows()).map(|row| (outer.at(row, i), inner[row * columns + j]));
            let value: f64 = terms.clone().map(|(x, q)| x * q.value).sum();
            let magnitude: f64 = terms.clone().map(|(x, q)| (x * q.value).abs()).sum();
            let magnitudes = terms.map(|(x, q)| (x.abs(), q.magnitude));
            let inner = self.arithmetic.chain(left.columns, magnitudes);
            let bound = SCALE * (inner + share * (magnitude + inner));
            (SCALE * value, bound + smallest(DType::F32))
        })
    }

    /// `x·W` and the gradients of `x`, `a` and `b`.
    fn linear(&self) -> Vec<Compared> {
        let (x, a, b) = (
            self.leaf(&self.x, self.dtype),
            self.leaf(&self.a, DType::F32),
            self.leaf(&self.b, DType::F32),
        );
        let y = adapter_linear(
            x.clone(),
            self.constant(&self.w),
            a.clone(),
            b.clone(),
            SCALE,
        );
        let value = Host::read(y.clone().inner());
        let grads = (y * self.constant(&self.g)).sum().backward();
        let grad = |leaf: &Tensor<2>| Host::read(leaf.grad(&grads).expect("a gradient"));
        let (gradient_a, gradient_b) = (
            self.chain(&self.x, &self.g, &self.b.transposed()),
            self.chain(&self.g, &self.x, &self.a),
        );
        vec![
            Compared::new("value", value, self.rounded(&self.x, &self.w)),
            Compared::new(
                "gradient of x",
                grad(&x),
                self.rounded(&self.g, &self.w.transposed()),
            ),
            Compared::new("gradient of a", grad(&a), gradient_a),
            Compared::new("gradient of b", grad(&b), transposed(gradient_b)),
        ]
    }

    /// `W` itself, and the gradients from a dense gradient.
    fn weight(&self) -> Vec<Compared> {
        let (a, b) = (
            self.leaf(&self.a, DType::F32),
            self.leaf(&self.b, DType::F32),
        );
        let w = adapter_weight(self.constant(&self.w), a.clone(), b.clone(), SCALE);
        let value = Host::read(w.clone().inner());
        let grads = (w * self.constant(&self.dense)).sum().backward();
        let grad = |leaf: &Tensor<2>| Host::read(leaf.grad(&grads).expect("a gradient"));
        let gradient_a = self.thin(&self.dense, &self.b.transposed(), SCALE);
        let gradient_b = self.thin(&self.a.transposed(), &self.dense, SCALE);
        vec![
            Compared::new("value", value, same(&self.w)),
            Compared::new("gradient of a", grad(&a), gradient_a),
            Compared::new("gradient of b", grad(&b), gradient_b),
        ]
    }

    /// The product with a factor, of operands in both orders of memory.
    fn factor_product(&self) -> Vec<Compared> {
        let product = |x: Tensor<2>, f: &Host| {
            let f = f.tensor(self.device, DType::F32);
            let found = Dispatch::hd_pissa_factor_product(x.into_dispatch(), f.into_dispatch());
            Host::read(Tensor::<2>::from_dispatch(found))
        };
        // Computed by our kernel, on the ordinary units.
        let expected = |left: &Host, right: &Host| {
            self.thin_within(left, right, 1.0, self.arithmetic.sum(left.columns + 1))
        };
        let w = || self.w.tensor(self.device, self.dtype);
        let (straight, across) = (self.b.transposed(), &self.a);
        vec![
            Compared::new("x·a", product(w(), &straight), expected(&self.w, &straight)),
            Compared::new(
                "xᵀ·q",
                product(w().transpose(), across),
                expected(&self.w.transposed(), across),
            ),
        ]
    }

    /// The update of element `[i, j]` of the weight by a merge.
    fn update(&self, place: [usize; 2]) -> Exact {
        let rank = self.a.columns;
        update(
            &self.frames,
            &self.deltas,
            rank,
            [self.w.rows(), self.w.columns],
            place,
        )
    }

    fn merge(&self) -> Vec<Compared> {
        let rank = self.a.columns;
        let shape = [self.w.rows(), self.w.columns];
        let [frames, deltas] =
            [&self.frames, &self.deltas].map(|host| host.tensor(self.device, DType::F32));
        let w = || self.w.tensor(self.device, self.dtype);
        let gated = |gate: f32| {
            let gate = Tensor::<1>::from_floats([gate], self.device);
            let (merged, squares) = Dispatch::hd_pissa_merge(
                w().into_dispatch(),
                frames.clone().into_dispatch(),
                deltas.clone().into_dispatch(),
                gate.into_dispatch(),
                rank,
                Rounding::Nearest,
                true,
            );
            let squares = Tensor::<1>::from_dispatch(squares).unsqueeze::<2>();
            [Tensor::<2>::from_dispatch(merged), squares].map(Host::read)
        };
        let sum = self.arithmetic.sum(2 * SHARDS * rank + 2);
        let merged = expect(shape, |place @ [i, j]| {
            let (before, update) = (self.w.at(i, j), self.update(place));
            let value = before + update.value;
            let bound = merge_bound(sum, before, update) + rounding(self.dtype, value);
            (value, bound)
        });
        let found = Host::read(merge(w(), frames.clone(), deltas.clone(), rank));
        let [kept, _] = gated(1.0);
        let [_, squares] = gated(0.0);
        let mut compared = vec![
            Compared::new("weight", found, merged),
            Compared::new("gate", kept, same(&self.w)),
        ];
        // This needs all elements of the update, which would take long for the large shape.
        if shape[0] * shape[1] <= 20_000 {
            compared.push(Compared::new("squares", squares, self.squares(sum)));
        }
        compared
    }

    /// The sum of the squares of the update, whose own sums are off by a share `sum` of their absolute
    /// terms.
    ///
    /// Flex takes it from the factors' Gram matrices, whose terms are the squares of the sums of
    /// absolute values.
    fn squares(&self, sum: f64) -> Vec<Expected> {
        let [rows, columns] = [self.w.rows(), self.w.columns];
        let inner = 2 * SHARDS * self.a.columns;
        let (mut value, mut own, mut magnitude) = (0.0, 0.0, 0.0);
        for index in 0..rows * columns {
            let update = self.update([index / columns, index % columns]);
            value += update.value.powi(2);
            own += 2.0 * sum * update.value.abs() * update.magnitude;
            magnitude += update.magnitude.powi(2);
        }
        let arithmetic = self.arithmetic;
        let bound = match arithmetic.has_gram_matrices() {
            true => {
                let sums = [rows, columns, inner * inner].map(|terms| arithmetic.sum(terms));
                (2.0 * sum + sums.iter().sum::<f64>()) * magnitude
            }
            false => own + arithmetic.sum(rows * columns) * value,
        };
        vec![Expected {
            place: [0, 0],
            value,
            bound,
        }]
    }

    fn fingerprint(&self) -> Vec<Compared> {
        let found = |w: Tensor<2>| {
            let words = Dispatch::hd_pissa_fingerprint(w.into_dispatch());
            words_of(Tensor::from_dispatch(words))
        };
        let w = self.w.tensor(self.device, self.dtype);
        let by_column = self
            .w
            .transposed()
            .tensor(self.device, self.dtype)
            .transpose();
        let bits = || self.w.values.iter().map(|value| value.to_bits());
        vec![
            Compared::new("words", found(w), words(fingerprint((0..).zip(bits())))),
            Compared::new(
                "words by column",
                found(by_column),
                words(fingerprint((0..).zip(bits()))),
            ),
        ]
    }

    fn max_abs(&self) -> Vec<Compared> {
        let w = self.w.tensor(self.device, self.dtype);
        let largest = Dispatch::hd_pissa_max_abs(w.into_dispatch());
        let found = Host::read(Tensor::<1>::from_dispatch(largest).unsqueeze());
        let value = self
            .w
            .values
            .iter()
            .fold(0f32, |most, value| most.max(value.abs()));
        vec![Compared::new(
            "value",
            found,
            same(&Host {
                values: vec![value],
                columns: 1,
            }),
        )]
    }
}

/// The update of element `[i, j]` of a weight of `[d_input, d_output]`, with `a + Δa` in `f32`.
pub fn update(
    frames: &Host,
    deltas: &Host,
    rank: usize,
    [d_input, d_output]: [usize; 2],
    [i, j]: [usize; 2],
) -> Exact {
    let mut exact = Exact::default();
    for shard in 0..frames.rows() {
        for q in 0..rank {
            let (left, right) = (i * rank + q, rank * d_input + q * d_output + j);
            let (a, b) = (frames.at(shard, left), frames.at(shard, right));
            let (delta_a, delta_b) = (deltas.at(shard, left), deltas.at(shard, right));
            exact.add(a + delta_a, delta_b);
            exact.add(delta_a, b);
        }
    }
    exact
}

/// The error of the `f32` sum of a weight and an update. `sum` is the share of the update's own
/// sum: the weight may be the first or the last term.
pub fn merge_bound(sum: f64, before: f64, update: Exact) -> f64 {
    sum * update.magnitude + 2.0 * F32 * (before.abs() + update.magnitude)
}

/// The error that rounding to nearest adds to a half-precision weight.
pub fn rounding(dtype: DType, value: f64) -> f64 {
    match dtype {
        DType::F32 => smallest(dtype),
        // A little more, because the sum's own error may carry the value into the next binade.
        dtype => 1.01 * unit(dtype) * value.abs() + smallest(dtype),
    }
}

fn row_statistics(
    device: &Device,
    [rows, columns]: [usize; 2],
    split: usize,
    arithmetic: Arithmetic,
) -> Vec<Compared> {
    let mut x = Source::new(columns as u64).matrix([rows, columns], 1.0, DType::F32);
    x.values[0] = f32::NAN;
    x.values[columns - 1] = f32::NEG_INFINITY;
    if rows > 1 {
        // Its square is near the end of the range of `f32`.
        x.values[columns + 1] = 1e15;
    }
    let tensor = x.tensor(device, DType::F32);
    let found = Dispatch::hd_pissa_row_statistics(tensor.into_dispatch(), split);
    let found = Host::read(Tensor::<2>::from_dispatch(found));
    let share = arithmetic.sum(columns + 2);
    let mut expected = Vec::new();
    for (row, values) in x.values.chunks(columns).enumerate() {
        let statistics = reference::row_statistics(values, split);
        expected.extend(
            statistics
                .into_iter()
                .enumerate()
                .map(|(column, value)| Expected {
                    place: [row, column],
                    value,
                    bound: match column {
                        0 => 0.0,
                        // Small squares of scaled elements may be zero.
                        3 => share * value + columns as f64 * smallest(DType::F32),
                        _ => share * value,
                    },
                }),
        );
    }
    vec![Compared::new("statistics", found, expected)]
}

fn fingerprint_int(device: &Device) -> Vec<Compared> {
    let values = Source::new(1).matrix([37, 19], 1e9, DType::F32).values;
    let values: Vec<i32> = values.into_iter().map(|value| value as i32).collect();
    let data = burn::tensor::TensorData::new(values.clone(), [37, 19]);
    let x = Tensor::<2, Int>::from_data(data, (device, DType::I32));
    let found = Dispatch::hd_pissa_fingerprint_int(x.into_dispatch());
    let found = words_of(Tensor::from_dispatch(found));
    let expected = fingerprint((0..).zip(values.into_iter().map(|value| value as u32)));
    vec![Compared::new("words", found, words(expected))]
}

/// The halves of two words, which `f32` holds exactly.
fn halves(words: [u32; 2]) -> [f32; 4] {
    let [first, second] = words.map(|word| [(word & 0xffff) as f32, (word >> 16) as f32]);
    [first[0], first[1], second[0], second[1]]
}

fn words_of(found: Tensor<1, Int>) -> Host {
    let words: Vec<i32> = found.into_data().iter().collect();
    let words = [words[0] as u32, words[1] as u32];
    Host {
        values: halves(words).to_vec(),
        columns: 4,
    }
}

fn words(expected: [u32; 2]) -> Vec<Expected> {
    let values = halves(expected).to_vec();
    same(&Host { values, columns: 4 })
}

/// Every compared element, unchanged.
pub fn same(host: &Host) -> Vec<Expected> {
    expect([host.rows(), host.columns], |[row, column]| {
        (host.at(row, column), 0.0)
    })
}

/// Value and bound of the compared elements of a matrix.
pub fn expect(shape: [usize; 2], at: impl Fn([usize; 2]) -> (f64, f64)) -> Vec<Expected> {
    let each = places(shape).into_iter().map(|place| {
        let (value, bound) = at(place);
        Expected {
            place,
            value,
            bound,
        }
    });
    each.collect()
}

fn transposed(mut expected: Vec<Expected>) -> Vec<Expected> {
    for Expected { place, .. } in &mut expected {
        place.reverse();
    }
    expected
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_merge_that_does_nothing_is_beyond_its_bound() {
        let device = Device::flex();
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let case = Operands::new([1, 96, 33, 8], dtype, &device, Arithmetic::of("flex"));
            let mut weight = case.merge().remove(0);
            assert!(weight.worst().is_within());
            weight.found = case.w.clone();
            assert!(!weight.worst().is_within(), "{dtype:?}");
        }
    }

    /// The update by the reference of the kernels' tests.
    #[test]
    fn the_update_is_that_of_the_matrices() {
        let [d_input, d_output, rank] = [5, 7, 2];
        let mut source = Source::new(3);
        let row = [2, rank * (d_input + d_output)];
        let frames = source.matrix(row, 0.2, DType::F32);
        let deltas = source.matrix(row, 0.05, DType::F32);
        let split = |host: &Host, shard: usize| {
            let row = &host.values[shard * host.columns..(shard + 1) * host.columns];
            let (a, b) = row.split_at(rank * d_input);
            (a.to_vec(), b.to_vec())
        };
        let shards: Vec<reference::Shard> = (0..2)
            .map(|shard| {
                let ((a, b), (delta_a, delta_b)) = (split(&frames, shard), split(&deltas, shard));
                reference::Shard {
                    a,
                    b,
                    delta_a,
                    delta_b,
                }
            })
            .collect();
        let all = reference::update(&shards, [d_input, rank, d_output]);
        for i in 0..d_input {
            for j in 0..d_output {
                let exact = update(&frames, &deltas, rank, [d_input, d_output], [i, j]);
                // The reference rounds `a + Δa`.
                let error = (exact.value - all.value[i * d_output + j]).abs();
                assert!(error <= F32 * exact.magnitude, "{error}");
            }
        }
    }
}
