//! A recorded single-layer run, and its replay through the public API.

use std::path::{Path, PathBuf};

use burn::optim::{AdamConfig, GradientsParams};
use burn::tensor::{Device, Tensor, TensorData};
use hd_pissa::comm::Solo;
use hd_pissa::{
    HdPissaConfig, HdPissaError, HdPissaLinear, HdPissaLinearConfig, HdPissaModule,
    HdPissaOptimizerConfig, OptimizerError, ShardGradients, SvdMethod,
};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;

/// Why a recorded run could not be replayed. Every message names the file.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    #[error("{}: {source}", path.display())]
    Read {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{}: not a safetensors file: {source}", path.display())]
    Format {
        path: PathBuf,
        source: safetensors::SafeTensorError,
    },
    #[error("{}: {field}: {reason}", path.display())]
    Field {
        path: PathBuf,
        /// Metadata key or tensor name.
        field: String,
        reason: String,
    },
    #[error("{}: {source}", path.display())]
    Model { path: PathBuf, source: HdPissaError },
    #[error("{}: step {step}: {source}", path.display())]
    Step {
        path: PathBuf,
        step: usize,
        source: OptimizerError,
    },
}

/// The parts of the `case` object of a recorded run's metadata that a replay needs.
#[derive(Debug, Clone, Deserialize)]
struct Case {
    name: String,
    #[serde(rename = "K")]
    shards: usize,
    #[serde(rename = "r")]
    rank: usize,
    n_in: usize,
    n_out: usize,
    scale: f64,
    #[serde(rename = "T")]
    steps: usize,
    #[serde(rename = "M")]
    micro_batches: usize,
    #[serde(rename = "n")]
    rows: usize,
    lrs: Vec<f64>,
    beta1: f32,
    beta2: f32,
    eps: f32,
}

/// A recorded run of one linear layer without bias, in the layout of the file: PyTorch's
/// `[out, in]` weights.
#[derive(Debug, Clone)]
pub struct RecordedRun {
    path: PathBuf,
    case: Case,
    /// `[T + 1, out, in]`
    weights: Vec<f32>,
    /// `[T, M, K, n, in]`
    inputs: Vec<f32>,
    /// `[T, M, K, n, out]`
    targets: Vec<f32>,
}

impl RecordedRun {
    pub fn read(path: &Path) -> Result<Self, ReplayError> {
        let bytes = std::fs::read(path).map_err(|source| ReplayError::Read {
            path: path.into(),
            source,
        })?;
        let format = |source| ReplayError::Format {
            path: path.into(),
            source,
        };
        let field = |field: &str, reason: String| ReplayError::Field {
            path: path.into(),
            field: field.into(),
            reason,
        };
        let (_, metadata) = SafeTensors::read_metadata(&bytes).map_err(format)?;
        let tensors = SafeTensors::deserialize(&bytes).map_err(format)?;
        let case = metadata
            .metadata()
            .as_ref()
            .and_then(|metadata| metadata.get("case"))
            .ok_or_else(|| field("case", "the metadata has no such key".into()))?;
        let case: Case =
            serde_json::from_str(case).map_err(|error| field("case", error.to_string()))?;
        for (name, value) in [
            ("K", case.shards),
            ("r", case.rank),
            ("n_in", case.n_in),
            ("n_out", case.n_out),
            ("T", case.steps),
            ("M", case.micro_batches),
            ("n", case.rows),
        ] {
            if value == 0 {
                return Err(field(&format!("case.{name}"), "must be at least 1".into()));
            }
        }
        if case.lrs.len() != case.steps || !case.lrs.iter().all(|lr| lr.is_finite()) {
            let reason = format!("must be {} finite numbers, one for each step", case.steps);
            return Err(field("case.lrs", reason));
        }

        let read = |name: &str, shape: &[usize]| -> Result<Vec<f32>, ReplayError> {
            let tensor = tensors
                .tensor(name)
                .map_err(|_| field(name, "the file has no such tensor".into()))?;
            if tensor.dtype() != Dtype::F32 || tensor.shape() != shape {
                let reason = format!(
                    "is {:?} of shape {:?}, must be F32 of shape {shape:?}",
                    tensor.dtype(),
                    tensor.shape()
                );
                return Err(field(name, reason));
            }
            let values: Vec<f32> = tensor
                .data()
                .chunks_exact(4)
                .map(|bytes| f32::from_le_bytes(bytes.try_into().expect("chunks of 4")))
                .collect();
            match values.iter().position(|value| !value.is_finite()) {
                Some(at) => Err(field(name, format!("value {at} is NaN or infinite"))),
                None => Ok(values),
            }
        };
        let batch = [case.steps, case.micro_batches, case.shards, case.rows];
        let batch_of = |features: usize| [&batch[..], &[features]].concat();
        Ok(Self {
            weights: read("W", &[case.steps + 1, case.n_out, case.n_in])?,
            inputs: read("X", &batch_of(case.n_in))?,
            targets: read("Y", &batch_of(case.n_out))?,
            path: path.into(),
            case,
        })
    }

    pub fn name(&self) -> &str {
        &self.case.name
    }

    pub fn describe(&self) -> String {
        let case = &self.case;
        format!(
            "{}x{}, K = {}, r = {}, {} steps of {} micro-batches",
            case.n_in, case.n_out, case.shards, case.rank, case.steps, case.micro_batches
        )
    }

    /// Steps of the run.
    pub fn steps(&self) -> usize {
        self.case.steps
    }

    /// `d_input` and `d_output`.
    pub fn size(&self) -> [usize; 2] {
        [self.case.n_in, self.case.n_out]
    }

    /// The run with every input and target changed at random by up to `share` of its value.
    pub fn disturbed(&self, share: f64, seed: u64) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let mut off = |value: &f32| {
            let share = random.random_range(-share..=share);
            (f64::from(*value) * (1.0 + share)) as f32
        };
        Self {
            inputs: self.inputs.iter().map(&mut off).collect(),
            targets: self.targets.iter().map(&mut off).collect(),
            ..self.clone()
        }
    }

    /// The recorded weight after `step` steps, in PyTorch's layout `[out, in]`.
    pub fn recorded(&self, step: usize) -> &[f32] {
        let size = self.case.n_out * self.case.n_in;
        &self.weights[step * size..(step + 1) * size]
    }

    /// Rows of one micro-batch of one shard out of `values`, `[T, M, K, n, features]`.
    fn rows(
        &self,
        values: &[f32],
        features: usize,
        [step, micro_batch, shard]: [usize; 3],
        device: &Device,
    ) -> Tensor<2> {
        let case = &self.case;
        let size = case.rows * features;
        let start = ((step * case.micro_batches + micro_batch) * case.shards + shard) * size;
        let data = TensorData::new(values[start..start + size].to_vec(), [case.rows, features]);
        Tensor::from_data(data, device)
    }

    /// Trains from `W[0]` with the recorded data and learning rates. The result holds, for every
    /// step, the largest absolute difference to the recorded weight as a share of the largest
    /// change that any recorded step shows.
    ///
    /// # Errors
    ///
    /// Those of [`weights`](Self::weights).
    pub fn replay(&self, device: &Device, svd: SvdMethod) -> Result<Vec<f64>, ReplayError> {
        let largest_change = (1..=self.case.steps)
            .map(|step| largest_difference(self.recorded(step), self.recorded(0)))
            .fold(0.0, f64::max);
        let weights = self.weights(device, svd)?;
        let differences = weights.iter().enumerate().map(|(step, ours)| {
            match largest_difference(ours, self.recorded(step + 1)) {
                0.0 => 0.0,
                difference => difference / largest_change,
            }
        });
        Ok(differences.collect())
    }

    /// The weight after each step, in PyTorch's layout `[out, in]`, of a training from `W[0]` with the
    /// recorded data and learning rates.
    ///
    /// # Errors
    ///
    /// [`ReplayError::Model`] or [`ReplayError::Step`] if the library refuses the run.
    pub fn weights(&self, device: &Device, svd: SvdMethod) -> Result<Vec<Vec<f32>>, ReplayError> {
        let case = &self.case;
        let device = device.clone().autodiff();
        let start = TensorData::new(self.recorded(0).to_vec(), [case.n_out, case.n_in]);
        let mut layer: HdPissaLinear = HdPissaLinearConfig::new(case.n_in, case.n_out)
            .with_bias(false)
            .init(&device);
        layer.weight = layer
            .weight
            .map(|_| Tensor::<2>::from_data(start, &device).transpose());

        let config = HdPissaConfig::new()
            .with_rank(case.rank)
            .with_shards(case.shards)
            .with_alpha(Some(case.scale * case.rank as f64))
            .with_svd(svd);
        let mut model = layer
            .apply_hd_pissa(&config, 0..case.shards)
            .map_err(|source| ReplayError::Model {
                path: self.path.clone(),
                source,
            })?;
        let adam = AdamConfig::new()
            .with_beta_1(case.beta1)
            .with_beta_2(case.beta2)
            .with_epsilon(case.eps);
        let step_error = |step, source| ReplayError::Step {
            path: self.path.clone(),
            step,
            source,
        };
        let mut optim = HdPissaOptimizerConfig::new()
            .init(adam.init(), Solo)
            .map_err(|source| step_error(0, source))?;

        let mut weights = Vec::with_capacity(case.steps);
        for (step, &lr) in case.lrs.iter().enumerate() {
            let mut gradients = ShardGradients::new(&model);
            for shard in 0..case.shards {
                let selected = model.select_shard(shard);
                model = selected.expect("this worker hosts every shard");
                for micro_batch in 0..case.micro_batches {
                    let at = [step, micro_batch, shard];
                    let x = self.rows(&self.inputs, case.n_in, at, &device);
                    let y = self.rows(&self.targets, case.n_out, at, &device);
                    let loss = (model.forward(x) - y).square().mean();
                    gradients.push(shard, GradientsParams::from_grads(loss.backward(), &model));
                }
            }
            model = optim
                .step(lr, model, gradients.into_mean())
                .map_err(|error| step_error(step, error.cause))?;
            let ours: Vec<f32> = model
                .weight
                .base()
                .inner()
                .transpose()
                .into_data()
                .iter()
                .collect();
            weights.push(ours);
        }
        Ok(weights)
    }
}

fn largest_difference(x: &[f32], y: &[f32]) -> f64 {
    x.iter()
        .zip(y)
        .map(|(&x, &y)| (f64::from(x) - f64::from(y)).abs())
        .fold(0.0, f64::max)
}
