//! A trained model in the layout of the pretrained one: weights in the dtype that is asked for, and
//! every other file of the model it came from.

use std::borrow::Cow;
use std::path::Path;

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Tensor, TensorData};
use clap::ValueEnum;
use half::{bf16, f16};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use safetensors::Dtype;
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::shards::{write_file, write_folder};
use crate::pretrained::TensorName;
use crate::weights::{SINGLE, Unwritten, encode, transpose};
use crate::{Error, Llama, Pretrained};

/// The dtype of written weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum OutputDtype {
    /// That which each tensor has in the pretrained model.
    #[default]
    Same,
    /// 32 bits: what was trained, bit for bit.
    F32,
    /// 16 bits with 8 of precision.
    Bf16,
    /// 16 bits with 11 of precision, up to 65504.
    F16,
}

/// How weights are rounded to 16 bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Rounding {
    /// To the nearest value: most of a small update is lost.
    #[default]
    Nearest,
    /// Up or down at random, so that an update survives on average.
    Stochastic,
}

/// The page of a model, and where that of the pretrained one goes.
pub(crate) const README: &str = "README.md";
pub(crate) const BASE_README: &str = "README-base.md";
/// Where an export has that of the run.
pub(crate) const RUN_README: &str = "README-run.md";

/// How an export is written.
#[derive(Clone, Copy, Debug)]
pub struct ExportConfig {
    /// The dtype of weights.
    pub dtype: OutputDtype,
    /// How they get it.
    pub rounding: Rounding,
    /// Seed of the stochastic rounding.
    pub seed: u64,
    /// Most bytes of a weight file. What takes more is written in several, with an index.
    pub max_shard_size: u64,
}

impl Default for ExportConfig {
    /// As the files of the pretrained model, rounded to the nearest value; 5 GB in a file.
    fn default() -> Self {
        Self {
            dtype: OutputDtype::default(),
            rounding: Rounding::default(),
            seed: 0,
            max_shard_size: 5_000_000_000,
        }
    }
}

/// What an export did.
#[derive(Clone, Debug, Default)]
pub struct Exported {
    /// Share of the update that the written weights hold: the length of what is written, along the
    /// update, relative to the update. `None` if nothing was rounded or nothing has changed.
    pub survived: Option<f64>,
    /// What could not be carried over or measured, with the reason.
    pub left_out: Vec<String>,
}

impl Exported {
    /// How much of the update is there, in words.
    pub(crate) fn figure(&self) -> Option<String> {
        let share = 100.0 * self.survived?;
        Some(format!(
            "{share:.1} % of the update survives the rounding of the written weights"
        ))
    }
}

impl ExportConfig {
    fn dtype(&self, own: Option<Dtype>) -> Dtype {
        match self.dtype {
            OutputDtype::Same => own.unwrap_or(Dtype::F32),
            OutputDtype::F32 => Dtype::F32,
            OutputDtype::Bf16 => Dtype::BF16,
            OutputDtype::F16 => Dtype::F16,
        }
    }

    /// `values` rounded to `dtype`; `name` chooses the random stream.
    fn round<'a>(&self, values: &'a [f32], dtype: Dtype, name: &str) -> Cow<'a, [f32]> {
        if dtype == Dtype::F32 {
            return values.into();
        }
        let digest = Sha256::new()
            .chain_update(self.seed.to_le_bytes())
            .chain_update(name)
            .finalize();
        let mut rng = StdRng::from_seed(digest.into());
        let mut round = |value: f32, nearest: f32, neighbor: &dyn Fn(bool) -> f32| {
            if self.rounding == Rounding::Nearest || nearest == value {
                return nearest;
            }
            // The other value between which and `nearest` the exact one lies.
            let other = neighbor(value > nearest);
            let share = (value - nearest) / (other - nearest);
            match other.is_finite() && rng.random::<f32>() < share {
                true => other,
                false => nearest,
            }
        };
        let steps = |bits: u16, up: bool| match (bits & 0x7fff == 0, up == (bits < 0x8000)) {
            // Away from zero, on the side that is asked for.
            (true, _) => u16::from(!up) << 15 | 1,
            (false, true) => bits + 1,
            (false, false) => bits - 1,
        };
        let value = |&value: &f32| match dtype {
            Dtype::BF16 => {
                let nearest = bf16::from_f32(value);
                let next = |up| bf16::from_bits(steps(nearest.to_bits(), up)).to_f32();
                round(value, nearest.to_f32(), &next)
            }
            Dtype::F16 => {
                let nearest = f16::from_f32(value);
                let next = |up| f16::from_bits(steps(nearest.to_bits(), up)).to_f32();
                round(value, nearest.to_f32(), &next)
            }
            _ => value,
        };
        values.iter().map(value).collect()
    }

    /// `config.json` with the dtype that is written.
    fn config(&self, bytes: &[u8], untied: bool) -> Vec<u8> {
        let name = match self.dtype {
            OutputDtype::Same => None,
            OutputDtype::F32 => Some("float32"),
            OutputDtype::Bf16 => Some("bfloat16"),
            OutputDtype::F16 => Some("float16"),
        };
        let parsed = serde_json::from_slice::<Value>(bytes);
        let (Ok(Value::Object(mut config)), true) = (parsed, name.is_some() || untied) else {
            return bytes.into();
        };
        if let Some(name) = name {
            let keys = ["torch_dtype", "dtype"];
            let mut found = false;
            for key in keys {
                if let Some(value) = config.get_mut(key) {
                    *value = name.into();
                    found = true;
                }
            }
            if !found {
                config.insert("torch_dtype".into(), name.into());
            }
        }
        if untied {
            config.insert("tie_word_embeddings".into(), false.into());
        }
        format!("{:#}\n", Value::Object(config)).into_bytes()
    }
}

impl Pretrained {
    /// Writes `model` into `folder` with the names and other files of this one. Adapters are
    /// merged. The folder must exist.
    ///
    /// # Errors
    ///
    /// [`Error::Io`], and [`Error::Field`] for a weight that is not finite in the dtype that is
    /// written.
    pub fn export(
        &self,
        model: &Llama,
        folder: &Path,
        config: &ExportConfig,
    ) -> Result<Exported, Error> {
        let path = folder.join(SINGLE);
        let (mut along, mut square) = (0.0, 0.0);
        let mut unread = None;
        let weights = collect(model);
        let own = |weight: &Weight| self.tensors.get(&weight.name);
        let dtype = |weight: &Weight| config.dtype(own(weight).map(|entry| entry.dtype));
        // Without a rounding all of the update survives, and nothing is read.
        let rounds = weights.iter().any(|weight| dtype(weight) != Dtype::F32);
        let mut unwritten = Vec::new();
        for weight in &weights {
            let dtype = dtype(weight);
            let values = (weight.values)();
            let values = as_slice(&values);
            let written = weight.checked(values, config, dtype, &path)?;
            let before = own(weight).filter(|_| rounds);
            let before = before.map(|entry| entry.read(&weight.name));
            match before {
                Some(Ok(before)) => {
                    for ((&before, &value), &written) in before.iter().zip(values).zip(&*written) {
                        let update = f64::from(value) - f64::from(before);
                        along += (f64::from(written) - f64::from(before)) * update;
                        square += update * update;
                    }
                }
                // The model is worth more than a figure about it.
                Some(Err(error)) => unread = Some(error),
                None => {}
            }
            unwritten.push(weight.unwritten(config, dtype));
        }
        write_folder(unwritten, folder, config.max_shard_size)?;
        for (name, bytes) in &self.known_files {
            let path = folder.join(name);
            let content = match name.as_str() {
                "config.json" => config.config(bytes, self.is_untied),
                _ => bytes.clone(),
            };
            std::fs::write(&path, content).map_err(Error::io(&path))?;
        }
        let mut left_out = Vec::new();
        if let Some(error) = &unread {
            left_out.push(format!("the share of the update that survives ({error})"));
        }
        let card = (Path::new(README), Path::new(BASE_README));
        let card = self.folder.join(README).is_file().then_some(card);
        let others = self.other_files.iter().map(|name| (&**name, &**name));
        for (name, new_name) in others.chain(card) {
            let (from, to) = (self.folder.join(name), folder.join(new_name));
            let parent = to.parent().unwrap_or(folder);
            let copied = std::fs::create_dir_all(parent).and_then(|()| std::fs::copy(&from, &to));
            // The model is worth more than a file beside it.
            if let Err(error) = copied {
                left_out.push(format!("{} ({error})", name.display()));
            }
        }
        Ok(Exported {
            survived: (rounds && square > 0.0 && unread.is_none()).then(|| along / square),
            left_out,
        })
    }

    /// Bytes that an export takes, as far as they are known before.
    pub fn export_size(&self, config: &ExportConfig) -> u64 {
        let size = |dtype: Dtype| if dtype == Dtype::F32 { 4 } else { 2 };
        let weights = self.tensors.values().map(|entry| {
            let values = entry.len / size(entry.dtype);
            (values * size(config.dtype(Some(entry.dtype)))) as u64
        });
        let known_files = self.known_files.values().map(|bytes| bytes.len() as u64);
        let card = Path::new(README);
        let others = self.other_files.iter().map(|name| &**name).chain([card]);
        let others = others.filter_map(|name| {
            let found = self.folder.join(name).metadata().ok()?;
            Some(found.len())
        });
        weights.sum::<u64>() + known_files.sum::<u64>() + others.sum::<u64>()
    }
}

/// Writes the model's weights in the layout of the files, each in the dtype that `dtype` gives its
/// name.
///
/// # Errors
///
/// See [`Pretrained::export`].
pub fn write_weights(
    model: &Llama,
    dtype: impl Fn(&str) -> Dtype,
    path: &Path,
) -> Result<(), Error> {
    let config = ExportConfig::default();
    let weights = collect(model);
    let unwritten = weights.iter().map(|weight| {
        let dtype = dtype(&weight.name);
        weight.checked(as_slice(&(weight.values)()), &config, dtype, path)?;
        Ok(weight.unwritten(&config, dtype))
    });
    write_file(unwritten.collect::<Result<_, Error>>()?, path)
}

/// A parameter as the files hold it. Its values are made when they are asked for, so that the model is
/// never there twice.
struct Weight {
    name: String,
    shape: Vec<usize>,
    /// `f32`.
    values: Box<dyn Fn() -> TensorData>,
}

impl Weight {
    /// `values` as they are written, all of them finite.
    fn checked<'a>(
        &self,
        values: &'a [f32],
        config: &ExportConfig,
        dtype: Dtype,
        path: &Path,
    ) -> Result<Cow<'a, [f32]>, Error> {
        let written = config.round(values, dtype, &self.name);
        match written.iter().all(|value| value.is_finite()) {
            true => Ok(written),
            false => {
                let reason = format!("is not finite as {dtype:?}");
                Err(Error::field(path, &self.name, reason))
            }
        }
    }

    fn unwritten<'a>(&'a self, config: &'a ExportConfig, dtype: Dtype) -> (String, Unwritten<'a>) {
        let bytes = move || {
            let values = (self.values)();
            encode(&config.round(as_slice(&values), dtype, &self.name), dtype)
        };
        let tensor = Unwritten {
            dtype,
            shape: self.shape.clone(),
            bytes: Box::new(bytes),
        };
        (self.name.clone(), tensor)
    }
}

/// Every parameter.
fn collect(model: &Llama) -> Vec<Weight> {
    let mut collector = Collector {
        names: TensorName::default(),
        weights: Vec::new(),
    };
    model.valid().materialize().visit(&mut collector);
    collector.weights
}

struct Collector {
    names: TensorName,
    weights: Vec<Weight>,
}

impl ModuleVisitor for Collector {
    fn enter_module(&mut self, name: &str, container_type: &str) {
        self.names.enter(name, container_type);
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.names.exit();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let tensor = param.val();
        let mut shape = tensor.dims().to_vec();
        let is_transposed = self.names.is_transposed();
        let values: Box<dyn Fn() -> TensorData> = match (is_transposed, &shape[..]) {
            (true, &[rows, columns]) => {
                let transposed = move |values| transpose(as_slice(&values), rows, columns);
                Box::new(move || TensorData::new(transposed(values(&tensor)), [columns, rows]))
            }
            _ => Box::new(move || values(&tensor)),
        };
        if is_transposed {
            shape.reverse();
        }
        self.weights.push(Weight {
            name: self.names.name(),
            shape,
            values,
        });
    }
}

fn values<const D: usize>(tensor: &Tensor<D>) -> TensorData {
    tensor.to_data().convert::<f32>()
}

/// A slice of the data itself: a vector of it would be a copy.
fn as_slice(data: &TensorData) -> &[f32] {
    data.as_slice().expect("converted to f32")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rounded(rounding: Rounding, dtype: Dtype, values: &[f32]) -> Vec<f32> {
        let config = ExportConfig {
            rounding,
            ..ExportConfig::default()
        };
        config.round(values, dtype, "a.weight").into_owned()
    }

    #[test]
    fn stochastic_rounding_is_right_on_average_and_exact_where_it_can_be() {
        for (dtype, unit) in [(Dtype::BF16, 2f32.powi(-7)), (Dtype::F16, 2f32.powi(-10))] {
            for (base, share) in [(1.0, 0.25f32), (-1.0, 0.25), (1.0, 0.9), (0.0, 0.0)] {
                let value = base * (1.0 + share * unit);
                let values = rounded(Rounding::Stochastic, dtype, &vec![value; 20_000]);
                let up = values.iter().filter(|&&x| x != base).count() as f32 / 20_000.0;
                assert!((up - share).abs() < 0.02, "{dtype:?} {value}: {up}");
                let neighbors = [base, base * (1.0 + unit)];
                assert!(values.iter().all(|value| neighbors.contains(value)));
                let nearest = rounded(Rounding::Nearest, dtype, &[value]);
                assert_eq!(nearest, [neighbors[usize::from(share > 0.5)]]);
            }
            // Below the smallest value, both signs; and what has no value above it.
            let tiny = [1e-8f32, -1e-8, 65504.0, f32::MAX];
            let both = rounded(Rounding::Stochastic, Dtype::F16, &tiny);
            assert!(both[0] >= 0.0 && both[1] <= 0.0 && both[2] == 65504.0);
            assert!(both[3].is_infinite(), "refused later");
        }
    }

    #[test]
    fn the_configuration_names_the_dtype() {
        let config = |dtype, text: &str, untied| {
            let config = ExportConfig {
                dtype,
                ..ExportConfig::default()
            };
            String::from_utf8(config.config(text.as_bytes(), untied)).unwrap()
        };
        let text = "{ \"dtype\": \"float16\" }";
        assert_eq!(config(OutputDtype::Same, text, false), text);
        assert!(config(OutputDtype::F32, text, false).contains("\"dtype\": \"float32\""));
        let both = config(OutputDtype::Bf16, "{\"tie_word_embeddings\": true}", true);
        assert!(both.contains("\"torch_dtype\": \"bfloat16\""), "{both}");
        assert!(both.contains("\"tie_word_embeddings\": false"), "{both}");
    }
}
