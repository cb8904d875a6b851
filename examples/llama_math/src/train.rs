//! Steps of training, the same micro-batches for every method.

use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::{
    AdamConfig, AdamWConfig, GradientsAccumulator, GradientsParams, ModuleOptimizer,
};
use burn::tensor::{Device, Tensor};
use hd_pissa::comm::Solo;
use hd_pissa::{HdPissaModule, HdPissaOptimizer, ShardGradients};

use crate::batch::MicroBatch;
use crate::method::{Adaptation, Method};
use crate::spectrum::Snapshot;
use crate::{Error, Llama};

/// Epsilon of Adam: PyTorch's default, where Burn's is 1e-5.
const EPSILON: f32 = 1e-8;

/// Settings of the optimizer.
#[derive(Clone, Copy, Debug, Default)]
pub struct OptimizerSettings {
    /// Largest global gradient norm; with HD-PiSSA of each shard.
    pub clip: Option<f64>,
    /// Decoupled weight decay; not with HD-PiSSA.
    pub weight_decay: f64,
}

/// A model in training.
pub struct Trainer {
    /// `None` only while a step holds it.
    model: Option<Llama>,
    optimizer: Optimizer,
    device: Device,
}

enum Optimizer {
    /// A step per shard's mean gradient, merged into the weights.
    HdPissa(HdPissaOptimizer),
    /// One step with the mean gradient of all micro-batches.
    Mean {
        inner: ModuleOptimizer,
        clip: Option<f64>,
    },
}

/// What one step did.
#[derive(Clone, Copy, Debug)]
pub struct StepReport {
    /// Mean over the micro-batches of their mean loss per target.
    pub loss: f64,
    /// Global norm of the gradients before clipping, over all shards.
    pub gradient_norm: f64,
    /// Frobenius norm of the change of all weight matrices together.
    pub update_norm: f64,
    /// Tokens processed, without padding.
    pub tokens: usize,
}

impl Trainer {
    /// Prepares `model`, which must be on an autodiff device.
    ///
    /// # Errors
    ///
    /// Those of [`Adaptation::apply`], and [`Error::Optimizer`].
    pub fn new(
        model: Llama,
        adaptation: &Adaptation,
        settings: OptimizerSettings,
    ) -> Result<Self, Error> {
        let device = model.device();
        let model = adaptation.apply(model)?;
        let optimizer = match adaptation.method {
            Method::HdPissa => {
                let adam = AdamConfig::new().with_epsilon(EPSILON).init();
                let optimizer = HdPissaOptimizer::new(adam, Solo)?.with_update_norm();
                Optimizer::HdPissa(match settings.clip {
                    Some(clip) => optimizer.with_max_grad_norm(clip)?,
                    None => optimizer,
                })
            }
            _ => Optimizer::Mean {
                // Without decay this is Adam.
                inner: AdamWConfig::new()
                    .with_epsilon(EPSILON)
                    .with_weight_decay(settings.weight_decay as f32)
                    .init(),
                clip: settings.clip,
            },
        };
        Ok(Self {
            model: Some(model),
            optimizer,
            device,
        })
    }

    /// The model.
    pub fn model(&self) -> &Llama {
        self.model.as_ref().expect("a step puts the model back")
    }

    /// Ends the training.
    pub fn into_model(self) -> Llama {
        self.model.expect("a step puts the model back")
    }

    /// Takes a step on the micro-batches of each shard. `step` counts from 1, for messages.
    ///
    /// # Errors
    ///
    /// [`Error::NonFiniteLoss`], [`Error::NonFiniteGradient`] and [`Error::Step`]. The weights are
    /// then those from before the step.
    pub fn step(
        &mut self,
        step: usize,
        lr: f64,
        shards: &[Vec<MicroBatch>],
    ) -> Result<StepReport, Error> {
        let model = self.model.take().expect("a step puts the model back");
        let mut total = Total {
            step,
            loss: 0.0,
            tokens: 0,
            micro_batches: 0,
        };
        let (model, norms) = match &mut self.optimizer {
            Optimizer::HdPissa(inner) => {
                step_of_shards(inner, model, lr, shards, &self.device, &mut total)
            }
            Optimizer::Mean { inner, clip } => {
                step_of_mean(inner, *clip, model, lr, shards, &self.device, &mut total)
            }
        };
        self.model = Some(model);
        let Norms { gradient, update } = norms?;
        Ok(StepReport {
            loss: total.loss / total.micro_batches as f64,
            gradient_norm: gradient,
            update_norm: update,
            tokens: total.tokens,
        })
    }
}

/// Norms of a step's gradient and update.
struct Norms {
    gradient: f64,
    update: f64,
}

/// HD-PiSSA: every shard's mean gradient goes to its own factors and moments.
fn step_of_shards(
    optimizer: &mut HdPissaOptimizer,
    mut model: Llama,
    lr: f64,
    shards: &[Vec<MicroBatch>],
    device: &Device,
    total: &mut Total,
) -> (Llama, Result<Norms, Error>) {
    let mut gradients = ShardGradients::new(&model);
    let mut squared_norm = 0.0;
    for (shard, micro_batches) in shards.iter().enumerate() {
        model = model.select_shard(shard);
        match mean_gradients(&model, &[micro_batches], device, total) {
            Ok(mean) => {
                squared_norm += squared_gradient_norm(&model, &mean);
                gradients.push(shard, mean);
            }
            Err(error) => return (model, Err(error)),
        }
    }
    match optimizer.step(lr, model, gradients) {
        Ok(model) => {
            let norms = Norms {
                gradient: squared_norm.sqrt(),
                update: optimizer.update_norm().unwrap_or_default(),
            };
            (model, Ok(norms))
        }
        Err(refused) => {
            let error = Error::Step {
                step: total.step,
                source: refused.cause,
            };
            (refused.model, Err(error))
        }
    }
}

/// Every other method: one step with the mean gradient of all micro-batches.
fn step_of_mean(
    optimizer: &mut ModuleOptimizer,
    clip: Option<f64>,
    model: Llama,
    lr: f64,
    shards: &[Vec<MicroBatch>],
    device: &Device,
    total: &mut Total,
) -> (Llama, Result<Norms, Error>) {
    let all: Vec<&[MicroBatch]> = shards.iter().map(Vec::as_slice).collect();
    let mut mean = match mean_gradients(&model, &all, device, total) {
        Ok(mean) => mean,
        Err(error) => return (model, Err(error)),
    };
    let norm = squared_gradient_norm(&model, &mean).sqrt();
    if !norm.is_finite() {
        return (
            model,
            Err(Error::NonFiniteGradient {
                step: total.step,
                norm,
            }),
        );
    }
    if let Some(clip) = clip {
        // As PyTorch's clip_grad_norm_.
        let factor = clip / (norm + 1e-6);
        if factor < 1.0 {
            scale_gradients(&model, &mut mean, factor);
        }
    }
    let before = Snapshot::of(&model);
    let model = optimizer.step(lr, model, mean);
    let update = before.distance(&model);
    (
        model,
        Ok(Norms {
            gradient: norm,
            update,
        }),
    )
}

struct Total {
    step: usize,
    loss: f64,
    tokens: usize,
    micro_batches: usize,
}

/// The mean over all micro-batches of the gradients of their mean loss per target.
fn mean_gradients(
    model: &Llama,
    groups: &[&[MicroBatch]],
    device: &Device,
    total: &mut Total,
) -> Result<GradientsParams, Error> {
    let count: usize = groups.iter().map(|group| group.len()).sum();
    let mut accumulator = GradientsAccumulator::new();
    for micro_batch in groups.iter().copied().flatten() {
        let targets = micro_batch.targets();
        let loss = model.target_loss(micro_batch.tokens(device), targets) / targets.len() as f64;
        let value: f64 = loss.clone().into_scalar();
        if !value.is_finite() {
            return Err(Error::NonFiniteLoss {
                step: total.step,
                loss: value,
            });
        }
        total.loss += value;
        total.tokens += micro_batch.num_tokens();
        total.micro_batches += 1;
        let gradients = (loss / count as f64).backward();
        accumulator.accumulate(model, GradientsParams::from_grads(gradients, model));
    }
    Ok(accumulator.grads())
}

fn squared_gradient_norm(model: &Llama, gradients: &GradientsParams) -> f64 {
    struct Norm<'a> {
        gradients: &'a GradientsParams,
        squares: Vec<Tensor<1>>,
    }

    impl ModuleVisitor for Norm<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            if let Some(gradient) = self.gradients.get::<D>(param.id) {
                self.squares.push(gradient.square().sum());
            }
        }
    }

    let mut norm = Norm {
        gradients,
        squares: Vec::new(),
    };
    model.visit(&mut norm);
    match norm.squares.is_empty() {
        true => 0.0,
        false => Tensor::cat(norm.squares, 0).sum().into_scalar(),
    }
}

fn scale_gradients(model: &Llama, gradients: &mut GradientsParams, factor: f64) {
    struct Scale<'a> {
        gradients: &'a mut GradientsParams,
        factor: f64,
    }

    impl ModuleVisitor for Scale<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            if let Some(gradient) = self.gradients.remove::<D>(param.id) {
                self.gradients.register(param.id, gradient * self.factor);
            }
        }
    }

    model.visit(&mut Scale { gradients, factor });
}
