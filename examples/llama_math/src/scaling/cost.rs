//! The time of a step: a formula, and its constants from measured times.

use serde::Serialize;

/// Bytes of a value on the wire.
const VALUE: f64 = 4.0;

/// The trained weights.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Work {
    /// `[d_input, d_output]` of each kind of adapted weight, and the number of such weights.
    pub shapes: Vec<([usize; 2], usize)>,
    /// Rank of each shard.
    pub rank: usize,
    /// Tokens of each shard in each step.
    pub tokens: f64,
}

impl Work {
    fn sum(&self, of: impl Fn(f64, f64) -> f64) -> f64 {
        self.shapes
            .iter()
            .map(|&([rows, cols], count)| count as f64 * of(rows as f64, cols as f64))
            .sum()
    }

    /// Number of adapted weights.
    pub fn weights(&self) -> f64 {
        self.sum(|_, _| 1.0)
    }

    /// Values of the factors of one shard: `r · Σ (d_input + d_output)`.
    pub fn factor_values(&self) -> f64 {
        self.rank as f64 * self.sum(|rows, cols| rows + cols)
    }

    /// Operations of the merges of one step: `W += L·R` with an inner size of `2·K·r`.
    pub fn merge_flops(&self, shards: usize) -> f64 {
        4.0 * (shards * self.rank) as f64 * self.sum(|rows, cols| rows * cols)
    }

    /// Operations of forward and backward for each token in the adapted weights: `x·W` and
    /// `G·Wᵀ`, and the four thin products of the adapter.
    pub fn token_flops(&self) -> f64 {
        4.0 * (self.sum(|rows, cols| rows * cols) + self.factor_values())
    }

    /// `Σ max(d) · min(d)²` over all weights. The time of their decompositions is proportional to
    /// it.
    pub fn svd_size(&self) -> f64 {
        self.sum(|rows, cols| rows.max(cols) * rows.min(cols).powi(2))
    }

    /// The largest `K` for this rank: a weight has no more than `min(d)` components.
    pub fn most_shards(&self) -> usize {
        let smallest = self.shapes.iter().flat_map(|(shape, _)| shape).min();
        smallest.copied().unwrap_or(0) / self.rank.max(1)
    }

    /// Bytes that each worker receives in a step: the deltas of the shards that it does not host.
    pub fn bytes(&self, layout: &Layout) -> f64 {
        VALUE * (layout.shards - layout.hosted()) as f64 * self.factor_values()
    }
}

/// The distribution of shards over workers.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Layout {
    /// Number of shards `K`.
    pub shards: usize,
    /// Number of workers, which divides the number of shards.
    pub workers: usize,
}

impl Layout {
    /// Every shard on one worker.
    pub fn virtual_shards(shards: usize) -> Self {
        Self { shards, workers: 1 }
    }

    fn hosted(&self) -> usize {
        self.shards / self.workers
    }
}

/// The constants of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Rates {
    /// Seconds of forward and backward per token.
    pub token: f64,
    /// Seconds of the optimizer per step and weight, for any number of shards.
    pub optimizer_weight: f64,
    /// Seconds of the optimizer per value of a hosted shard's factors.
    pub optimizer_value: f64,
    /// Seconds of a merge per weight, for any number of shards.
    pub merge_weight: f64,
    /// Operations per second of the merge's product.
    pub merge_flops: f64,
    /// Seconds of a decomposition per unit of [`Work::svd_size`].
    pub svd: f64,
}

/// Seconds of a step's parts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct StepTime {
    /// Forward and backward passes of the hosted shards.
    pub forward_backward: f64,
    /// The optimizer on the factors of the hosted shards.
    pub optimizer: f64,
    /// The deltas of the other shards, on their way.
    pub exchange: f64,
    /// The merge of all shards' deltas, on every worker.
    pub merge: f64,
}

impl StepTime {
    /// Seconds of the whole step: nothing overlaps.
    pub fn total(&self) -> f64 {
        self.forward_backward + self.update()
    }

    /// Seconds of everything after the backward passes.
    pub fn update(&self) -> f64 {
        self.optimizer + self.exchange + self.merge
    }
}

/// Seconds before the first step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct StartTime {
    /// A worker's share of the decompositions, one worker per weight.
    pub svd: f64,
    /// The frames of all shards, sent once to every worker. With gradients per shard, the first
    /// step gathers them again, which this does not count.
    pub frames: f64,
}

impl Rates {
    /// The time of a step of `work`, with `bandwidth` in bytes per second into each worker.
    pub fn step(&self, work: &Work, layout: &Layout, bandwidth: f64) -> StepTime {
        let hosted = layout.hosted() as f64;
        StepTime {
            forward_backward: hosted * work.tokens * self.token,
            optimizer: work.weights() * self.optimizer_weight
                + hosted * work.factor_values() * self.optimizer_value,
            exchange: work.bytes(layout) / bandwidth,
            merge: work.weights() * self.merge_weight
                + work.merge_flops(layout.shards) / self.merge_flops,
        }
    }

    /// The time before the first step.
    pub fn start(&self, work: &Work, layout: &Layout, bandwidth: f64) -> StartTime {
        let workers = layout.workers as f64;
        let frames = VALUE * layout.shards as f64 * work.factor_values();
        StartTime {
            svd: self.svd * work.svd_size() / workers,
            frames: match layout.workers {
                1 => 0.0,
                _ => frames / bandwidth,
            },
        }
    }

    /// The constants that fit measured steps of virtual shards best: with the least sum of squares
    /// of errors, relative to the update for its parts and to the time itself for the others.
    ///
    /// # Panics
    ///
    /// Without samples.
    pub fn fit(work: &Work, samples: &[Sample]) -> Self {
        assert!(!samples.is_empty(), "constants come from measurements");
        // The times of optimizer and merge count relative to the whole update, because each may be
        // almost zero.
        let fit = |size: &dyn Fn(usize) -> f64, time: &dyn Fn(&StepTime) -> f64| {
            let points: Vec<Point> = samples
                .iter()
                .map(|sample| Point {
                    x: size(sample.shards),
                    y: time(&sample.time),
                    scale: sample.time.update(),
                })
                .collect();
            line(&points)
        };
        let alone = |x: f64, y: f64| Point { x, y, scale: y };
        let passes = samples.iter().map(|sample| {
            let tokens = sample.shards as f64 * work.tokens;
            alone(tokens, sample.time.forward_backward)
        });
        let token = through_origin(passes);
        let (optimizer, value) = fit(&|shards| shards as f64 * work.factor_values(), &|time| {
            time.optimizer
        });
        let (merge, flop) = fit(&|shards| work.merge_flops(shards), &|time| time.merge);
        let starts = samples
            .iter()
            .map(|sample| alone(work.svd_size(), sample.start));
        let svd = through_origin(starts);
        Self {
            token,
            optimizer_weight: optimizer / work.weights(),
            optimizer_value: value,
            merge_weight: merge / work.weights(),
            merge_flops: flop.recip(),
            svd,
        }
    }
}

/// Measured times of steps of virtual shards on one worker.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Sample {
    /// Number of shards.
    pub shards: usize,
    /// Seconds of a step's parts.
    pub time: StepTime,
    /// Seconds of the decompositions before the first step.
    pub start: f64,
}

/// A size and its time. The error of the time counts relative to `scale`.
#[derive(Clone, Copy)]
struct Point {
    x: f64,
    y: f64,
    scale: f64,
}

/// Intercept and slope of a line that is nowhere negative.
fn line(points: &[Point]) -> (f64, f64) {
    let weighted = |of: fn(&Point) -> f64| -> f64 {
        points
            .iter()
            .map(|point| of(point) / point.scale.powi(2))
            .sum()
    };
    let (one, x, y) = (weighted(|_| 1.0), weighted(|p| p.x), weighted(|p| p.y));
    let (xx, xy) = (weighted(|p| p.x * p.x), weighted(|p| p.x * p.y));
    let determinant = one * xx - x * x;
    let slope = (one * xy - x * y) / determinant;
    let intercept = (y * xx - x * xy) / determinant;
    if points.len() < 2 || !(slope > 0.0 && intercept >= 0.0) {
        return (0.0, through_origin(points.iter().copied()));
    }
    (intercept, slope)
}

/// Slope of a line through the origin.
fn through_origin(points: impl Iterator<Item = Point>) -> f64 {
    let (mut numerator, mut denominator) = (0.0, 0.0);
    for Point { x, y, scale } in points {
        numerator += x * y / scale.powi(2);
        denominator += (x / scale).powi(2);
    }
    numerator / denominator
}

#[cfg(test)]
mod tests {
    use super::*;

    fn work() -> Work {
        Work {
            shapes: vec![([30, 50], 2), ([50, 20], 3)],
            rank: 4,
            tokens: 70.0,
        }
    }

    #[test]
    fn sizes_are_those_of_the_weights() {
        let work = work();
        assert_eq!(work.weights(), 5.0);
        assert_eq!(work.factor_values(), 4.0 * (2.0 * 80.0 + 3.0 * 70.0));
        assert_eq!(work.most_shards(), 5);
        // Two products of inner size K·r for each weight, of two operations each.
        assert_eq!(
            work.merge_flops(3),
            2.0 * 2.0 * 12.0 * (2.0 * 1500.0 + 3.0 * 1000.0)
        );
        assert_eq!(work.svd_size(), 2.0 * 50.0 * 900.0 + 3.0 * 50.0 * 400.0);
        let layout = Layout {
            shards: 8,
            workers: 4,
        };
        // The six shards that a worker of two does not host.
        assert_eq!(work.bytes(&layout), 6.0 * 4.0 * work.factor_values());
        assert_eq!(work.bytes(&Layout::virtual_shards(8)), 0.0);
    }

    #[test]
    fn planted_constants_are_found_and_predict_other_layouts() {
        let work = work();
        let planted = Rates {
            token: 2e-5,
            optimizer_weight: 3e-4,
            optimizer_value: 5e-9,
            merge_weight: 1e-5,
            merge_flops: 4e10,
            svd: 1e-9,
        };
        let sample = |shards| Sample {
            shards,
            time: planted.step(&work, &Layout::virtual_shards(shards), f64::INFINITY),
            start: planted.start(&work, &Layout::virtual_shards(1), 1.0).svd,
        };
        let found = Rates::fit(&work, &[sample(1), sample(2), sample(5)]);
        for (found, planted) in [
            (found.token, planted.token),
            (found.optimizer_weight, planted.optimizer_weight),
            (found.optimizer_value, planted.optimizer_value),
            (found.merge_weight, planted.merge_weight),
            (found.merge_flops, planted.merge_flops),
            (found.svd, planted.svd),
        ] {
            assert!((found / planted - 1.0).abs() < 1e-9, "{found} {planted}");
        }
        let layout = Layout {
            shards: 4,
            workers: 4,
        };
        let step = found.step(&work, &layout, 1e9);
        let alone = found.step(&work, &Layout::virtual_shards(4), 1e9);
        assert!((4.0 * step.forward_backward / alone.forward_backward - 1.0).abs() < 1e-12);
        assert_eq!(step.merge, alone.merge);
        assert_eq!(step.exchange, work.bytes(&layout) / 1e9);
        assert_eq!(alone.exchange, 0.0);
    }

    #[test]
    fn a_fit_is_never_negative() {
        let points = |points: &[[f64; 2]]| -> Vec<Point> {
            let point = |&[x, y]: &[f64; 2]| Point { x, y, scale: y };
            points.iter().map(point).collect()
        };
        // Falls with size: noise.
        let (intercept, slope) = line(&points(&[[1.0, 2.0], [2.0, 1.9], [3.0, 1.7]]));
        assert!(intercept >= 0.0 && slope > 0.0);
        assert_eq!(line(&points(&[[2.0, 3.0]])), (0.0, 1.5));
    }
}
