//! The effect of more shards on loss, rank and time: simulations on one device, and a prediction
//! for many.

pub mod cost;
pub mod layer;
pub mod llama;
mod picture;
mod table;

use std::path::Path;
use std::time::Instant;

use burn::tensor::{Device, Distribution, Tensor};
use hd_pissa::ops::merge;
use serde::Serialize;

use crate::console::conclude;
use crate::output::Staged;
use crate::{Error, Llama, Pretrained};
use cost::{Layout, Rates, Sample, StartTime, StepTime, Work};
use layer::{LayerReport, LayerScaling};
use llama::{LlamaReport, LlamaScaling};

/// The simulations, and the run that they predict.
#[derive(Clone, Debug)]
pub struct Scaling {
    /// Shards of the tiny Llama.
    pub llama: LlamaScaling,
    /// Shards of one layer.
    pub layer: LayerScaling,
    /// The run that is predicted.
    pub question: Question,
}

/// A run on many workers.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Question {
    /// Name of the model.
    pub model: String,
    /// Its weights, rank and tokens.
    pub work: Work,
    /// The largest number of workers, and the number of shards.
    pub layout: Layout,
    /// Bytes per second into each worker.
    pub bandwidth: f64,
    /// Tokens per second of one worker's forward and backward passes; derived from the layer's
    /// times if `None`.
    pub tokens_per_second: Option<f64>,
}

/// A measured step, or its update, that was not used for the fit.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Check {
    /// Number of shards.
    pub shards: usize,
    /// Seconds measured.
    pub measured: f64,
    /// Seconds predicted.
    pub predicted: f64,
    /// Their difference, relative to the measurement.
    pub error: f64,
}

/// The time on one layout.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Prediction {
    /// The layout.
    pub layout: Layout,
    /// A step.
    pub step: StepTime,
    /// The seconds of [`step`](Self::step) in all.
    pub total: f64,
    /// Before the first step.
    pub start: StartTime,
}

/// Constants of one of the simulations, and their errors.
#[derive(Clone, Debug, Serialize)]
pub struct Fit {
    /// Numbers of shards that the constants were fitted to.
    pub fitted_to: Vec<usize>,
    /// The constants.
    pub rates: Rates,
    /// The other numbers of shards.
    pub checks: Vec<Check>,
}

/// All results of a run.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The tiny Llama.
    pub llama: LlamaReport,
    /// The cost model on it.
    pub llama_fit: Fit,
    /// The layer.
    pub layer: LayerReport,
    /// The cost model on it.
    pub layer_fit: Fit,
    /// What is predicted.
    pub question: Question,
    /// The constants that the prediction uses.
    pub rates: Rates,
    /// One for each number of workers.
    pub predictions: Vec<Prediction>,
    /// Seconds of the whole run.
    pub seconds: f64,
}

impl Scaling {
    /// The default simulations, or short ones.
    pub fn new(quick: bool, seed: u64, question: Question) -> Self {
        let powers = |of: usize, exponents: std::ops::Range<u32>| -> Vec<usize> {
            exponents.map(|exponent| of.pow(exponent)).collect()
        };
        let llama = LlamaScaling {
            seed,
            rank: 2,
            steps: if quick { 3 } else { 50 },
            batch_size: 2,
            test_problems: if quick { 10 } else { 200 },
            // The smallest side of a projection is 64.
            shards: powers(2, 0..if quick { 4 } else { 6 }),
        };
        let layer = LayerScaling {
            seed,
            size: if quick { 256 } else { 1024 },
            rank: 4,
            steps: if quick { 20 } else { 60 },
            shards: powers(4, 0..if quick { 4 } else { 5 }),
        };
        Self {
            llama,
            layer,
            question,
        }
    }

    /// Simulates, predicts, and writes tables and picture.
    ///
    /// # Errors
    ///
    /// Those of the question, the simulations and the output.
    pub fn run(&self, device: &Device, output: &Path, overwrite: bool) -> Result<Report, Error> {
        let start = Instant::now();
        self.question.check()?;
        let staged = Staged::new(output, overwrite)?;
        let llama = self.llama.run(device)?;
        let layer = self.layer.run(device)?;
        let samples = llama.rows.iter().map(|row| row.measured).collect();
        let llama_fit = Fit::of(&llama.work, samples, StepTime::total);
        let samples = layer.rows.iter().map(|row| row.measured).collect();
        // Its forward and backward passes are measured once, not for every number of shards.
        let layer_fit = Fit::of(&layer.work, samples, StepTime::update);
        let rates = self.question.rates(&layer.work, &layer_fit.rates);
        let report = Report {
            predictions: self.question.predict(&rates),
            question: self.question.clone(),
            rates,
            llama,
            llama_fit,
            layer,
            layer_fit,
            seconds: start.elapsed().as_secs_f64(),
        };

        let table = table::of(&report);
        conclude!("{table}");
        let write = |name: &str, content: &str| {
            let path = staged.path().join(name);
            std::fs::write(&path, content).map_err(Error::io(path))
        };
        write("table.txt", &table)?;
        let json = serde_json::to_string_pretty(&report).expect("numbers have a JSON form");
        write("scaling.json", &format!("{json}\n"))?;
        picture::draw(&staged.path().join("scaling.svg"), &report)?;
        staged.commit()?;
        conclude!(
            "{:.0} s in all; tables (table.txt, scaling.json) and picture (scaling.svg) are in {}",
            report.seconds,
            output.display()
        );
        Ok(report)
    }
}

impl Question {
    /// The weights of a pretrained model that HD-PiSSA adapts.
    ///
    /// # Errors
    ///
    /// Those of [`Pretrained::open`].
    pub fn shapes_of(folder: &Path, device: &Device) -> Result<Vec<([usize; 2], usize)>, Error> {
        let config = Pretrained::open(folder)?.config;
        // No random values are drawn, because weights are made when they are first read.
        Ok(llama::shapes(&Llama::new(&config, device)))
    }

    /// Reads `ROWSxCOLUMNSxCOUNT,...`.
    ///
    /// # Errors
    ///
    /// [`Error::Usage`].
    pub fn parse_shapes(text: &str) -> Result<Vec<([usize; 2], usize)>, Error> {
        let shape = |part: &str| {
            let numbers: Option<Vec<usize>> = part
                .split('x')
                .map(|number| number.parse().ok().filter(|&n| (1..=1 << 20).contains(&n)))
                .collect();
            match numbers?[..] {
                [rows, cols, count] => Some(([rows, cols], count)),
                _ => None,
            }
        };
        text.split(',')
            .map(|part| {
                shape(part).ok_or_else(|| Error::Usage {
                    option: "shapes",
                    reason: format!("`{part}` is not ROWSxCOLUMNSxCOUNT, such as 4096x11008x64"),
                })
            })
            .collect()
    }

    fn check(&self) -> Result<(), Error> {
        let Layout { shards, workers } = self.layout;
        let (option, reason) = if !shards.is_multiple_of(workers) {
            let reason = format!("{workers} workers cannot share {shards} shards out evenly");
            ("workers", reason)
        } else if shards > self.work.most_shards() {
            let reason = format!(
                "{shards} shards of rank {} are more components than the smallest weight of {} \
                 has: at most {}",
                self.work.rank,
                self.model,
                self.work.most_shards()
            );
            ("shards", reason)
        } else {
            return Ok(());
        };
        Err(Error::Usage { option, reason })
    }

    /// The layer's constants, converted to the given weights.
    fn rates(&self, layer: &Work, rates: &Rates) -> Rates {
        let per_operation = rates.token / layer.token_flops();
        let token = match self.tokens_per_second {
            Some(tokens) => tokens.recip(),
            None => self.work.token_flops() * per_operation,
        };
        Rates { token, ..*rates }
    }

    fn predict(&self, rates: &Rates) -> Vec<Prediction> {
        let Layout { shards, workers } = self.layout;
        (1..=workers)
            .filter(|&fewer| fewer.is_power_of_two() || fewer == workers)
            .filter(|&fewer| shards.is_multiple_of(fewer))
            .map(|workers| {
                let layout = Layout { shards, workers };
                let step = rates.step(&self.work, &layout, self.bandwidth);
                Prediction {
                    layout,
                    step,
                    total: step.total(),
                    start: rates.start(&self.work, &layout, self.bandwidth),
                }
            })
            .collect()
    }
}

impl Fit {
    /// Fits every other sample, and checks that part of a step against those between.
    fn of(work: &Work, samples: Vec<Sample>, part: fn(&StepTime) -> f64) -> Self {
        let (fitted, checked): (Vec<_>, Vec<_>) = samples
            .into_iter()
            .enumerate()
            .partition(|(index, _)| index.is_multiple_of(2));
        let fitted: Vec<Sample> = fitted.into_iter().map(|(_, sample)| sample).collect();
        let rates = Rates::fit(work, &fitted);
        let check = |(_, sample): (usize, Sample)| {
            let layout = Layout::virtual_shards(sample.shards);
            let measured = part(&sample.time);
            let predicted = part(&rates.step(work, &layout, f64::INFINITY));
            Check {
                shards: sample.shards,
                measured,
                predicted,
                error: predicted / measured - 1.0,
            }
        };
        Self {
            fitted_to: fitted.iter().map(|sample| sample.shards).collect(),
            rates,
            checks: checked.into_iter().map(check).collect(),
        }
    }
}

/// Seconds of the merges of one step, each weight measured separately.
fn time_of_merges(work: &Work, shards: usize, device: &Device) -> f64 {
    let draw =
        |shape: [usize; 2]| Tensor::<2>::random(shape, Distribution::Normal(0.0, 1e-3), device);
    let merges = work.shapes.iter().map(|&([rows, cols], count)| {
        let row = [shards, work.rank * (rows + cols)];
        let (frames, deltas) = (draw(row), draw(row));
        let mut weight = Tensor::<2>::zeros([rows, cols], device);
        let mut times = Vec::new();
        for _ in 0..9 {
            let (frames, deltas) = (frames.clone(), deltas.clone());
            let begin = Instant::now();
            weight = merge(weight, frames, deltas, work.rank);
            device.sync().expect("the device works");
            times.push(begin.elapsed().as_secs_f64());
        }
        count as f64 * median(times)
    });
    merges.sum()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values[values.len() / 2]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn question() -> Question {
        Question {
            model: "a model".into(),
            work: Work {
                shapes: vec![([64, 32], 3)],
                rank: 2,
                tokens: 10.0,
            },
            layout: Layout {
                shards: 16,
                workers: 8,
            },
            bandwidth: 1e9,
            tokens_per_second: Some(100.0),
        }
    }

    #[test]
    fn questions_without_an_answer_are_refused() {
        let shards = |shards, workers| Question {
            layout: Layout { shards, workers },
            ..question()
        };
        question().check().unwrap();
        let message = |question: Question| question.check().unwrap_err().to_string();
        assert!(message(shards(32, 8)).contains("at most 16"));
        assert!(message(shards(12, 8)).contains("8 workers"));
    }

    #[test]
    fn every_layout_up_to_the_largest_is_predicted() {
        let rates = Rates {
            token: 1.0,
            optimizer_weight: 0.0,
            optimizer_value: 1e-9,
            merge_weight: 0.0,
            merge_flops: 1e9,
            svd: 1e-9,
        };
        let rates = question().rates(&question().work, &rates);
        assert_eq!(rates.token, 0.01);
        let predictions = question().predict(&rates);
        let workers = predictions.iter().map(|row| row.layout.workers);
        assert_eq!(workers.collect::<Vec<_>>(), [1, 2, 4, 8]);
        assert_eq!(predictions[0].step.forward_backward, 16.0 * 10.0 * 0.01);
        assert_eq!(predictions[3].step.forward_backward, 2.0 * 10.0 * 0.01);
    }

    #[test]
    fn shapes_are_read() {
        assert_eq!(
            Question::parse_shapes("576x1536x60,1536x576x30").unwrap(),
            [([576, 1536], 60), ([1536, 576], 30)]
        );
        for text in ["", "5x6", "5x6x0", "5x6x7x8", "axbxc", "5x6x7,"] {
            assert!(Question::parse_shapes(text).is_err(), "{text}");
        }
    }
}
