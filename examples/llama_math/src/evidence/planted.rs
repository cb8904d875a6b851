//! One linear layer, and a change of its weight that a method has to learn from examples.
//!
//! The layer has a random weight `W`, `[d, d]`, with entries of deviation `1/√d`. The change `D` has
//! a chosen rank and equal singular values, and a tenth of the norm of `W`. In every step all methods
//! see the same rows of random inputs `x`, and the loss is `‖x·(W + ΔW) − x·(W + D)‖²`. What a method
//! misses of the change, `‖ΔW − D‖²/‖D‖²`, is known in advance for some: see [`Planted::missed`].

use std::time::Instant;

use burn::module::{Lora, Module};
use burn::nn::Linear;
use burn::optim::{AdamConfig, GradientsParams, ModuleOptimizer};
use burn::tensor::{Device, Distribution, Tensor, TensorData};
use faer::Mat;
use hd_pissa::comm::Solo;
use hd_pissa::{
    HdPissaConfig, HdPissaModule, HdPissaOptimizer, HdPissaOptimizerConfig, PissaConfig,
    PissaModule, ShardGradients, SharedGradients, Windows,
};

use crate::Error;
use crate::method::{Adaptation, Method, num_trainable};
use crate::scaling::layer;
use crate::schedule::{Decay, Schedule};
use crate::spectrum::Ranks;

/// The norm of the change, relative to that of the weight.
const CHANGE: f64 = 0.1;
/// Rows of inputs in a step, the same for every method.
const ROWS: usize = 256;
/// How often the missed share and the rank are measured during the training.
const WATCHED: usize = 10;
/// Epsilon of Adam, far below the gradients.
const EPSILON: f32 = 1e-10;

/// Where a planted change lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Between random directions on both sides.
    Random,
    /// Between the leading singular directions of the weight.
    Aligned,
}

/// A layer and the kind of its change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Planted {
    /// Number of rows, and of columns.
    pub size: usize,
    /// Where the change lies.
    pub direction: Direction,
}

/// One training of a layer.
#[derive(Clone, Debug)]
pub struct LayerTraining {
    /// Layer and change.
    pub planted: Planted,
    /// Rank of the change.
    pub change: usize,
    /// What is trained, and how.
    pub adaptation: Adaptation,
    /// Largest learning rate.
    pub lr: f64,
    /// Steps.
    pub steps: usize,
    /// Seed of weight, change, adapters and inputs.
    pub seed: u64,
}

/// What a layer has learned.
#[derive(Clone, Debug)]
pub struct Learned {
    /// Training loss of each step, relative to the squared norm of the change.
    pub losses: Vec<f64>,
    /// Step and effective rank of the update, every few steps.
    pub ranks: Vec<(usize, f64)>,
    /// Missed share of the change in the end.
    pub missed: f64,
    /// Ranks of the update in the end.
    pub last: Ranks,
    /// Number of values that gradients move.
    pub trainable: usize,
    /// Seconds of the steps.
    pub seconds: f64,
    /// Inputs per second.
    pub rows_per_second: f64,
}

/// Weight and target, on the device without gradients.
struct Problem {
    weight: Tensor<2>,
    target: Tensor<2>,
    /// Squared norm of the change.
    whole: f64,
}

/// What takes a step.
enum Optimizer {
    Shards(Box<HdPissaOptimizer>),
    Mean(ModuleOptimizer),
}

impl Planted {
    /// The heading of a change of this rank.
    pub fn heading(self, rank: usize) -> String {
        let size = self.size;
        match self.direction {
            Direction::Random => {
                format!("Layer {size} × {size}, change of rank {rank} in random directions")
            }
            Direction::Aligned => {
                format!("Layer {size} × {size}, change of rank {rank} in leading directions")
            }
        }
    }

    /// The share of the change's energy that a method misses at best, where a closed form is known, for
    /// a change of rank `change` and equal singular values. A LoRA of rank `r` misses `1 − r/R`
    /// (Eckart and Young). HD-PiSSA reaches every direction that starts or ends in its frames, which
    /// are `K·r` of `d`: of a change between random directions it misses `(1 − K·r/d)²`, whatever its
    /// rank; leading frames miss `(1 − K·r/R)²` of one between the leading `R` directions. PiSSA of
    /// rank `r` starts at the components that one such shard holds, and misses as much to first order
    /// in the change. `None` for other frames and a change in leading directions.
    pub fn missed(self, adaptation: &Adaptation, change: usize) -> Option<f64> {
        let below = |reach: usize, of: usize| (1.0 - reach as f64 / of as f64).max(0.0);
        let reach = match adaptation.method {
            Method::Full => return Some(0.0),
            Method::Lora => return Some(below(adaptation.rank, change)),
            Method::Pissa => adaptation.rank,
            Method::HdPissa => adaptation.rank * adaptation.shards,
        };
        match (adaptation.windows, self.direction) {
            (Windows::Leading, Direction::Aligned) => Some(below(reach, change).powi(2)),
            (Windows::Random { .. }, _) | (_, Direction::Random) => {
                Some(below(reach, self.size).powi(2))
            }
            (_, Direction::Aligned) => None,
        }
    }

    fn problem(self, seed: u64, rank: usize, device: &Device) -> Problem {
        let size = self.size;
        device.seed(seed);
        let deviation = (size as f64).sqrt().recip();
        let normal = Distribution::Normal(0.0, deviation);
        let draw = |cols: usize| -> Mat<f64> {
            let values = Tensor::<2>::random([size, cols], normal, device).into_data();
            let values: Vec<f32> = values.iter().collect();
            Mat::from_fn(size, cols, |row, col| f64::from(values[row * cols + col]))
        };
        let weight = draw(size);
        let (left, right) = (orthonormal(&draw(rank)), orthonormal(&draw(rank)));
        let change = match self.direction {
            Direction::Random => &left * right.transpose(),
            Direction::Aligned => {
                let svd = weight.svd().expect("random numbers are finite");
                let leading = |vectors: faer::MatRef<'_, f64>| vectors.get(.., ..rank).to_owned();
                // A rotation between the two sides, so that the change is no mere scaling.
                let rotation = orthonormal(&left.get(..rank, ..).to_owned());
                leading(svd.U()) * rotation * leading(svd.V()).transpose()
            }
        };
        let scale = CHANGE * weight.norm_l2() / (rank as f64).sqrt();
        let tensor = |entry: &dyn Fn(usize, usize) -> f64| {
            let places = (0..size).flat_map(|row| (0..size).map(move |col| (row, col)));
            let values: Vec<f32> = places.map(|(row, col)| entry(row, col) as f32).collect();
            Tensor::<2>::from_data(TensorData::new(values, [size, size]), device)
        };
        Problem {
            weight: tensor(&|row, col| weight[(row, col)]),
            target: tensor(&|row, col| weight[(row, col)] + scale * change[(row, col)]),
            whole: rank as f64 * scale * scale,
        }
    }
}

impl LayerTraining {
    /// Trains the layer and measures it.
    ///
    /// # Errors
    ///
    /// Those of the adapters and the steps.
    pub fn run(&self, device: &Device) -> Result<Learned, Error> {
        let Self {
            planted,
            change,
            adaptation,
            steps,
            seed,
            ..
        } = self;
        let problem = planted.problem(*seed, *change, device);
        let mut layer = attach(adaptation, layer::with_weight(&problem.weight, device))?;
        let trainable = num_trainable(&layer);
        let mut optimizer = optimizer(adaptation)?;
        // Whatever the adapters drew, the rows are the same for every method.
        device.seed(seed.wrapping_add(1 << 32));
        let schedule = Schedule::new(self.lr, Decay::Cosine, 0.05, *steps);
        let (mut losses, mut ranks) = (Vec::new(), Vec::new());
        let start = Instant::now();
        for step in 0..*steps {
            let shape = [ROWS, planted.size];
            let rows = Tensor::<2>::random(shape, Distribution::Normal(0.0, 1.0), device);
            let place = (step + 1, schedule.at(step));
            let loss;
            (layer, loss) = problem.step(layer, &mut optimizer, adaptation, rows, place, device)?;
            losses.push(loss / problem.whole);
            if (step + 1).is_multiple_of((steps / WATCHED).max(1)) {
                ranks.push((step + 1, problem.ranks(&layer).effective));
            }
        }
        let seconds = start.elapsed().as_secs_f64();
        Ok(Learned {
            losses,
            ranks,
            missed: problem.missed(&layer),
            last: problem.ranks(&layer),
            trainable,
            seconds,
            rows_per_second: (ROWS * steps) as f64 / seconds.max(1e-9),
        })
    }
}

/// An orthonormal basis of the columns.
fn orthonormal(columns: &Mat<f64>) -> Mat<f64> {
    columns.qr().compute_thin_Q()
}

fn attach(adaptation: &Adaptation, layer: Linear) -> Result<Linear, Error> {
    let (rank, shards) = (adaptation.rank, adaptation.shards);
    Ok(match adaptation.method {
        Method::Full => layer,
        Method::Lora => {
            let [rows, _] = layer.weight.lazy_shape().dims();
            let mut lora = Lora::new(rank, rank as f64);
            // The deviation of PEFT's uniform start.
            lora.init_std = Some((3.0 * rows as f64).sqrt().recip());
            layer.apply_lora(lora)
        }
        Method::Pissa => layer.apply_pissa(&PissaConfig::new().with_rank(rank))?,
        Method::HdPissa => {
            let config = HdPissaConfig::new()
                .with_rank(rank)
                .with_shards(shards)
                .with_windows(adaptation.windows)
                .with_frame_scale(adaptation.frame_scale)
                .with_gradients(adaptation.gradients);
            layer.apply_hd_pissa(&config, 0..shards)?
        }
    })
}

fn optimizer(adaptation: &Adaptation) -> Result<Optimizer, Error> {
    let adam = AdamConfig::new().with_epsilon(EPSILON).init();
    Ok(match adaptation.method {
        Method::HdPissa => {
            let optimizer = HdPissaOptimizerConfig::new().init(adam, Solo)?;
            Optimizer::Shards(Box::new(optimizer))
        }
        _ => Optimizer::Mean(adam),
    })
}

impl Problem {
    /// A step on these rows; returns the layer and the mean loss of a row.
    fn step(
        &self,
        layer: Linear,
        optimizer: &mut Optimizer,
        adaptation: &Adaptation,
        rows: Tensor<2>,
        (step, lr): (usize, f64),
        device: &Device,
    ) -> Result<(Linear, f64), Error> {
        let expected = rows.clone().matmul(self.target.clone());
        let autodiff = device.clone().autodiff();
        let gradients = |layer: &Linear, first: usize, count: usize| {
            let part = |all: &Tensor<2>| {
                Tensor::<2>::from_data(all.clone().narrow(0, first, count).into_data(), &autodiff)
            };
            let error = layer.forward(part(&rows)) - part(&expected);
            let loss = error.square().sum() / count as f64;
            let value: f64 = loss.clone().into_scalar();
            (GradientsParams::from_grads(loss.backward(), layer), value)
        };
        let finite = |loss: f64| match loss.is_finite() {
            true => Ok(loss),
            false => Err(Error::NonFiniteLoss { step, loss }),
        };
        match optimizer {
            Optimizer::Mean(inner) => {
                let (gradients, loss) = gradients(&layer, 0, ROWS);
                Ok((inner.step(lr, layer, gradients), finite(loss)?))
            }
            Optimizer::Shards(inner) => {
                let (gradients, loss) = if adaptation.shares_gradients() {
                    let (of_all, loss) = gradients(&layer, 0, ROWS);
                    let mut shared = SharedGradients::new(&layer, 1);
                    shared.push(of_all);
                    (hd_pissa::StepGradients::from(shared), loss)
                } else {
                    let shards = adaptation.shards;
                    let (mut own, mut sum) = (ShardGradients::new(&layer), 0.0);
                    for shard in 0..shards {
                        let selected = layer.clone().select_shard(shard);
                        let selected = selected.expect("this worker hosts all shards");
                        let count = ROWS / shards;
                        let (of_shard, loss) = gradients(&selected, shard * count, count);
                        own.push(shard, of_shard);
                        sum += loss;
                    }
                    (own.into(), sum / shards as f64)
                };
                let loss = finite(loss)?;
                let stepped = inner.step(lr, layer, gradients);
                let layer = stepped.map_err(|refused| Error::Step {
                    step,
                    source: refused.cause,
                })?;
                Ok((layer, loss))
            }
        }
    }

    /// The share of the change that is missing, by energy.
    fn missed(&self, layer: &Linear) -> f64 {
        let missing = self.target.clone() - layer.valid().weight.val();
        missing.square().sum().into_scalar::<f64>() / self.whole
    }

    fn ranks(&self, layer: &Linear) -> Ranks {
        let update = layer.valid().weight.val() - self.weight.clone();
        let [rows, cols] = update.dims();
        let update: Vec<f32> = update.into_data().iter().collect();
        Ranks::of(&update, rows, cols)
    }
}
