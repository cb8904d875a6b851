//! Checkpoints in the Hugging Face layout: `config.json`, `tokenizer.json`, and safetensors in one
//! file or in shards with an index.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::io::Cursor;
use std::path::{Path, PathBuf};

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{DType, Device, Tensor, TensorData};
use safetensors::Dtype;
use sha2::{Digest, Sha256};

use crate::finetune::hexadecimal;
use crate::weights::{
    Encoded, Entry, SINGLE, Source, encode, read_header, transpose, weight_files,
};
use crate::{Error, Llama, LlamaConfig};

/// Files that an export carries over as they are.
const COMPANIONS: [&str; 10] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
];

/// A checkpoint whose configuration and tensor headers have been read and checked.
#[derive(Debug)]
pub struct Checkpoint {
    /// The folder; of the embedded model a name in angle brackets.
    pub folder: PathBuf,
    /// The shape of the model.
    pub config: LlamaConfig,
    /// Name and content of every other file, as an export carries it over.
    pub companions: BTreeMap<String, Vec<u8>>,
    tensors: BTreeMap<String, Entry>,
}

impl Checkpoint {
    /// Opens a folder, reading everything but the weights themselves.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] and [`Error::Field`], with the file at fault.
    pub fn open(folder: &Path) -> Result<Self, Error> {
        let read = |name: &str| {
            let path = folder.join(name);
            std::fs::read(&path).map_err(Error::io(path))
        };
        let config = LlamaConfig::from_json(&read("config.json")?, &folder.join("config.json"))?;
        let mut companions = BTreeMap::new();
        for name in COMPANIONS {
            if folder.join(name).is_file() {
                companions.insert(name.to_string(), read(name)?);
            }
        }
        let mut tensors = BTreeMap::new();
        for path in weight_files(folder)? {
            let file = File::open(&path).map_err(Error::io(&path))?;
            let size = file.metadata().map_err(Error::io(&path))?.len();
            read_header(file, size, Source::File(path.clone()), &path, &mut tensors)?;
        }
        Ok(Self {
            folder: folder.into(),
            config,
            companions,
            tensors,
        })
    }

    /// A checkpoint compiled into the program: its `model.safetensors` and its other files.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open), with `name` as the folder.
    pub fn embedded(
        name: &str,
        weights: &'static [u8],
        companions: &[(&str, &[u8])],
    ) -> Result<Self, Error> {
        let folder = PathBuf::from(name);
        let companions: BTreeMap<String, Vec<u8>> = companions
            .iter()
            .map(|(name, bytes)| (name.to_string(), bytes.to_vec()))
            .collect();
        let path = folder.join("config.json");
        let config = companions.get("config.json").map_or(&[][..], Vec::as_slice);
        let config = LlamaConfig::from_json(config, &path)?;
        let mut tensors = BTreeMap::new();
        let path = folder.join(SINGLE);
        let source = Source::Embedded(weights);
        read_header(
            Cursor::new(weights),
            weights.len() as u64,
            source,
            &path,
            &mut tensors,
        )?;
        Ok(Self {
            folder,
            config,
            companions,
            tensors,
        })
    }

    /// Path of one of the checkpoint's files, for messages.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// SHA-256 of `config.json` and the weight files.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] if one of them cannot be read.
    pub fn digest(&self) -> Result<String, Error> {
        let mut hash = Sha256::new();
        if let Some(config) = self.companions.get("config.json") {
            hash.update(config);
        }
        for source in self.sources() {
            source.hash(&mut hash)?;
        }
        Ok(hexadecimal(&hash.finalize()))
    }

    /// The weight files, in the order of their paths.
    fn sources(&self) -> Vec<&Source> {
        let files: BTreeMap<&PathBuf, &Source> = self
            .tensors
            .values()
            .map(|entry| (&entry.path, &entry.source))
            .collect();
        files.into_values().collect()
    }

    /// Loads the model with `f32` weights, whatever their dtype in the files: half-precision
    /// weights would lose most of a small update.
    ///
    /// # Errors
    ///
    /// [`Error::Field`] for a tensor that is missing, has another shape than `config.json` says,
    /// another dtype than f32, f16 or bf16, NaN or infinite values, or no place in the model.
    pub fn load(&self, device: &Device) -> Result<Llama, Error> {
        self.check_sizes()?;
        let mut loader = Loader {
            checkpoint: self,
            names: TensorName::default(),
            used: BTreeSet::new(),
            error: None,
        };
        let model = Llama::new(&self.config, device).map(&mut loader);
        if let Some(error) = loader.error {
            return Err(error);
        }
        let stray = self.tensors.iter().find(|(name, _)| {
            // Tables of old exports, and a copy of a tied head, hold nothing of their own.
            let derived = name.ends_with(".rotary_emb.inv_freq")
                || (self.config.tied && *name == "lm_head.weight");
            !derived && !loader.used.contains(*name)
        });
        match stray {
            Some((name, entry)) => Err(Error::field(
                &entry.path,
                name,
                "the architecture of config.json has no such tensor",
            )),
            None => Ok(model),
        }
    }

    /// Refuses sizes of `config.json` that no tensor could have, before anything of such a size is
    /// made.
    fn check_sizes(&self) -> Result<(), Error> {
        let largest = self.tensors.values().map(|entry| entry.len).max();
        for (key, size, limit) in [
            (
                "num_hidden_layers",
                self.config.num_layers,
                self.tensors.len(),
            ),
            ("head_dim", self.config.head_dim, largest.unwrap_or(0)),
        ] {
            if size > limit {
                let reason = format!("is {size}; the weights are too few for that");
                return Err(Error::field(self.path("config.json"), key, reason));
            }
        }
        Ok(())
    }

    /// Writes `model` into `folder` with the names, dtypes and other files of this checkpoint.
    ///
    /// Adapters are merged. The folder must exist.
    ///
    /// # Errors
    ///
    /// [`Error::Io`], and [`Error::Field`] for a weight that is not finite in the dtype of the
    /// checkpoint.
    pub fn export(&self, model: &Llama, folder: &Path) -> Result<(), Error> {
        let dtypes = |name: &str| {
            self.tensors
                .get(name)
                .map_or(Dtype::F32, |entry| entry.dtype)
        };
        write_weights(model, dtypes, &folder.join(SINGLE))?;
        for (name, bytes) in &self.companions {
            let path = folder.join(name);
            std::fs::write(&path, bytes).map_err(Error::io(&path))?;
        }
        Ok(())
    }
}

/// Follows a traversal and gives each parameter's name in the files.
#[derive(Default)]
struct TensorName {
    stack: Vec<String>,
    container: Vec<String>,
}

impl TensorName {
    fn enter(&mut self, name: &str, container: &str) {
        self.stack.push(name.into());
        self.container.push(container.into());
    }

    fn exit(&mut self) {
        self.stack.pop();
        self.container.pop();
    }

    fn name(&self) -> String {
        self.stack.join(".").replace(".gamma", ".weight")
    }

    /// Weights of linear layers are `[d_output, d_input]` in the files and transposed here.
    fn is_transposed(&self) -> bool {
        let is = |stack: &[String], name: &str| stack.last().is_some_and(|last| last == name);
        is(&self.stack, "weight") && is(&self.container, "Struct:HdPissaLinear")
    }
}

struct Loader<'a> {
    checkpoint: &'a Checkpoint,
    names: TensorName,
    used: BTreeSet<String>,
    error: Option<Error>,
}

impl Loader<'_> {
    fn tensor(&mut self, shape: &[usize]) -> Result<TensorData, Error> {
        let name = self.names.name();
        let Some(entry) = self.checkpoint.tensors.get(&name) else {
            let path = match self.checkpoint.tensors.values().next() {
                Some(entry) => entry.path.clone(),
                None => self.checkpoint.path(SINGLE),
            };
            return Err(Error::field(
                path,
                name,
                "the checkpoint has no such tensor",
            ));
        };
        let transposed = self.names.is_transposed();
        let expected: Vec<usize> = match transposed {
            true => shape.iter().rev().copied().collect(),
            false => shape.to_vec(),
        };
        if entry.shape != expected {
            let reason = format!(
                "has shape {:?}, but config.json makes it {expected:?}",
                entry.shape
            );
            return Err(Error::field(&entry.path, name, reason));
        }
        let mut values = entry.read(&name)?;
        if transposed {
            values = transpose(&values, expected[0], expected[1]);
        }
        self.used.insert(name);
        Ok(TensorData::new(values, shape.to_vec()))
    }
}

impl ModuleMapper for Loader<'_> {
    fn enter_module(&mut self, name: &str, container_type: &str) {
        self.names.enter(name, container_type);
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.names.exit();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if self.error.is_some() {
            return param;
        }
        let device = param.lazy_device();
        let shape: Vec<usize> = param.lazy_shape().to_vec();
        match self.tensor(&shape) {
            Ok(data) => {
                let id = param.id;
                let tensor = device.memory_persistent_allocations(data, |data| {
                    Tensor::from_data(data, (&device, DType::F32))
                });
                param.transform_for_load(tensor, id)
            }
            Err(error) => {
                self.error = Some(error);
                param
            }
        }
    }
}

/// Writes the model's weights in the layout of the files, each in the dtype that `dtype` gives its
/// name.
///
/// # Errors
///
/// See [`Checkpoint::export`].
pub fn write_weights(
    model: &Llama,
    dtype: impl Fn(&str) -> Dtype,
    path: &Path,
) -> Result<(), Error> {
    let mut collector = Collector {
        names: TensorName::default(),
        tensors: Vec::new(),
    };
    model.valid().materialize().visit(&mut collector);
    let mut encoded = Vec::with_capacity(collector.tensors.len());
    for (name, shape, values) in collector.tensors {
        let dtype = dtype(&name);
        let (bytes, finite) = encode(&values, dtype);
        if !finite {
            let reason = format!("is not finite as {dtype:?}; nothing was written");
            return Err(Error::field(path, name, reason));
        }
        encoded.push((
            name,
            Encoded {
                dtype,
                shape,
                bytes,
            },
        ));
    }
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    let views = encoded.iter().map(|(name, encoded)| (name, encoded));
    safetensors::serialize_to_file(views, Some(metadata), path)
        .map_err(|error| Error::field(path, "content", error.to_string()))
}

struct Collector {
    names: TensorName,
    tensors: Vec<(String, Vec<usize>, Vec<f32>)>,
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
        let mut values: Vec<f32> = tensor.into_data().iter().collect();
        if self.names.is_transposed() {
            values = transpose(&values, shape[0], shape[1]);
            shape.reverse();
        }
        self.tensors.push((self.names.name(), shape, values));
    }
}
