//! The merge: `W += [a + Δa | Δa] · [Δb ; b]` over all shards.

use std::cell::Cell;

use burn::tensor::Tensor;
use hd_pissa::ops::merge;

use crate::device::Bench;
use crate::float::Float;
use crate::operands::{Merge, Merged, Variant};
use crate::rows::{Roofline, Row, Rows};
use hd_pissa_check::measure::sample::{Exact, assert_close, places};

pub fn flops([d_input, d_output]: [usize; 2], rank: usize, shards: usize) -> f64 {
    4.0 * (d_input * d_output) as f64 * (shards * rank) as f64
}

impl Merge {
    fn new(bench: &Bench, size: [usize; 2], rank: usize, shards: usize) -> Self {
        let row = [shards, rank * (size[0] + size[1])];
        Self {
            size,
            rank,
            shards,
            // Values that every dtype holds exactly.
            weight: bench.random(size, 0.05, Float::BF16),
            frames: bench.random(row, 0.2, Float::F32),
            deltas: bench.random(row, 1e-4, Float::F32),
        }
    }

    /// The update of element `[i, j]`.
    fn update(&self, [i, j]: [usize; 2]) -> Exact {
        let [d_input, d_output] = self.size;
        let mut exact = Exact::default();
        for shard in 0..self.shards {
            for q in 0..self.rank {
                let (left, right) = (i * self.rank + q, self.rank * d_input + q * d_output + j);
                let (a, b) = (self.frames.at(shard, left), self.frames.at(shard, right));
                let (delta_a, delta_b) =
                    (self.deltas.at(shard, left), self.deltas.at(shard, right));
                exact.add(a + delta_a, delta_b);
                exact.add(delta_a, b);
            }
        }
        exact
    }

    /// A weight that has taken the update a number of times.
    fn verify(&self, variant: &Variant<Merged>) {
        let (found, merges) = (variant.result)();
        let merges = merges as f64;
        for place @ [i, j] in places(self.size) {
            let (before, update) = (self.weight.at(i, j), self.update(place));
            let expected = before + merges * update.value;
            // Every merge rounds the weight once. A pair of f16 holds it to within 2^-39.
            let largest = before.abs() + merges * update.magnitude;
            let rounding = f64::from(f32::EPSILON) * largest + 2f64.powi(-39);
            let bound = merges * (variant.error * update.magnitude + rounding);
            assert_close(variant.name, place, found.at(i, j), expected, bound);
        }
    }
}

pub fn measure(
    bench: &Bench,
    size @ [d_input, d_output]: [usize; 2],
    rank: usize,
    shards: usize,
    roofline: &Roofline,
    rows: &mut Rows,
) {
    let case = Merge::new(bench, size, rank, shards);
    let inner = 2 * shards * rank;
    let (frames, deltas) = (
        bench.tensor(&case.frames, Float::F32),
        bench.tensor(&case.deltas, Float::F32),
    );
    let weights = [(); 3].map(|()| Cell::new(Some(bench.tensor(&case.weight, Float::F32))));
    let counts = [(); 3].map(|()| Cell::new(0));
    let step = |which: usize, next: &dyn Fn(Tensor<2>) -> Tensor<2>| {
        let weight = weights[which].take().expect("put back");
        weights[which].set(Some(next(weight)));
        counts[which].set(counts[which].get() + 1);
        bench.sync();
    };
    let weight = |which: usize| {
        let weight = weights[which].take().expect("put back");
        // A handle kept here would make the next merge copy.
        let values = bench.values(weight.clone());
        weights[which].set(Some(weight));
        (values, counts[which].get())
    };
    let (left, right) = stacks(&case, &frames, &deltas);

    let sums = (2 * inner + 1) as f64 * f64::from(f32::EPSILON);
    let burn = bench.error(Float::F32, 2 * inner + 1);
    let mut variants = vec![
        Variant {
            name: "merge",
            work: Box::new(|| {
                step(0, &|weight| {
                    merge(weight, frames.clone(), deltas.clone(), rank)
                })
            }),
            result: Box::new(|| weight(0)),
            error: sums,
        },
        Variant {
            name: "stacks, product, sum",
            work: Box::new(|| {
                step(1, &|weight| {
                    let (left, right) = stacks(&case, &frames, &deltas);
                    weight + left.matmul(right)
                })
            }),
            result: Box::new(|| weight(1)),
            error: burn,
        },
        Variant {
            name: "product, sum",
            work: Box::new(|| {
                step(2, &|weight| weight + left.clone().matmul(right.clone()));
            }),
            result: Box::new(|| weight(2)),
            error: burn,
        },
    ];
    #[cfg(feature = "cubecl-kernels")]
    if let Some(client) = &bench.client {
        variants.extend(crate::direct::merges(client, &case, sums));
    }
    for variant in &mut variants {
        (variant.work)();
        case.verify(variant);
    }
    let mut works: Vec<&mut dyn FnMut()> = variants
        .iter_mut()
        .map(|variant| &mut variant.work as _)
        .collect();
    let times = bench.times(&mut works);

    // The weight is read and written, as f32 or as a pair of 16-bit halves; the factors are read.
    let bytes = 8.0 * ((d_input * d_output) + shards * rank * (d_input + d_output)) as f64;
    for (variant, times) in variants.iter().zip(&times) {
        case.verify(variant);
        let work = [bytes, flops(size, rank, shards)];
        let row = Row::new(["merge", variant.name, "f32"], size, work, times, roofline);
        rows.push(Row {
            rank: Some(rank),
            shards: Some(shards),
            ..row
        });
    }
}

/// `[a + Δa | Δa]` and `[Δb ; b]` over all shards.
fn stacks(case: &Merge, frames: &Tensor<2>, deltas: &Tensor<2>) -> (Tensor<2>, Tensor<2>) {
    let ([d_input, d_output], rank) = (case.size, case.rank);
    let (mut left, mut right) = (Vec::new(), Vec::new());
    for shard in 0..case.shards {
        let split = |rows: &Tensor<2>| {
            let row = rows.clone().narrow(0, shard, 1);
            let a = row.clone().narrow(1, 0, rank * d_input);
            let b = row.narrow(1, rank * d_input, rank * d_output);
            (a.reshape([d_input, rank]), b.reshape([rank, d_output]))
        };
        let ((a, b), (delta_a, delta_b)) = (split(frames), split(deltas));
        left.extend([a + delta_a.clone(), delta_a]);
        right.extend([delta_b, b]);
    }
    (Tensor::cat(left, 1), Tensor::cat(right, 0))
}
