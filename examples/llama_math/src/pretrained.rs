//! Pretrained models in the Hugging Face layout: `config.json`, `tokenizer.json`, and safetensors in
//! one file or in shards with an index.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Cursor;
use std::path::{Path, PathBuf};

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{DType, Device, Tensor, TensorData};
use safetensors::Dtype;
use sha2::{Digest, Sha256};

use crate::model_dtype::ModelDtype;
use crate::weights::{
    Entry, INDEX, SINGLE, Source, hexadecimal, read_header, read_tensors, transpose,
};
use crate::{Error, Llama, LlamaConfig, device, files, memory};

/// Files with a meaning of their own to the tokenizer or an export, held in memory.
const KNOWN_FILES: [&str; 10] = [
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

/// Files that an export of this program writes itself.
const OWN: [&str; 10] = [
    "llama_math.json",
    "metrics.jsonl",
    "measurements.jsonl",
    "report.html",
    "loss.svg",
    "README.md",
    "README-base.md",
    "README-run.md",
    "SHA256SUMS",
    "probe.json",
];

/// Endings of files that hold weights or the state of a training.
const WEIGHTS: [&str; 13] = [
    "safetensors",
    "bin",
    "pt",
    "pth",
    "ckpt",
    "gguf",
    "ggml",
    "h5",
    "msgpack",
    "onnx",
    "bpk",
    "npz",
    "tflite",
];

pub(crate) const EMBEDDING: &str = "model.embed_tokens.weight";
pub(crate) const HEAD: &str = "lm_head.weight";

/// A pretrained model whose configuration and tensor headers have been read and checked.
#[derive(Debug)]
pub struct Pretrained {
    /// The folder; of the embedded model a name in angle brackets.
    pub folder: PathBuf,
    /// The shape of the model.
    pub config: LlamaConfig,
    /// Name and content of the files that belong to model and tokenizer.
    pub known_files: BTreeMap<String, Vec<u8>>,
    /// Every other file, relative to the folder, as an export carries it over.
    pub other_files: Vec<PathBuf>,
    /// Files and folders that an export does not carry over.
    pub left_out: Vec<String>,
    /// Whether the files hold a head of their own, which `config.json` does not mention.
    pub is_untied: bool,
    pub(crate) tensors: BTreeMap<String, Entry>,
}

impl Pretrained {
    /// Opens a folder, reading everything but the weights themselves.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] and [`Error::Field`], with the file at fault.
    pub fn open(folder: &Path) -> Result<Self, Error> {
        let read = |name: &str| files::read(&folder.join(name));
        let path = folder.join("config.json");
        let config = LlamaConfig::from_json(&read("config.json")?, &path)?;
        let mut known_files = BTreeMap::new();
        for name in KNOWN_FILES {
            if folder.join(name).exists() {
                known_files.insert(name.to_string(), read(name)?);
            }
        }
        let (tensors, weights) = read_tensors(folder)?;
        let mut rest = Rest {
            root: folder,
            used: weights,
            other_files: Vec::new(),
            left_out: Vec::new(),
        };
        rest.used.extend([SINGLE, INDEX].map(String::from));
        rest.used
            .extend(KNOWN_FILES.into_iter().chain(OWN).map(String::from));
        rest.look_into(Path::new(""))?;
        let Rest {
            other_files,
            left_out,
            ..
        } = rest;
        // Before anything reads the values.
        for (name, entry) in &tensors {
            entry.check_memory(name)?;
        }
        let pretrained = Self {
            folder: folder.into(),
            config,
            known_files,
            other_files,
            left_out,
            is_untied: false,
            tensors,
        };
        pretrained.with_stored_head()
    }

    /// Uses the head that is stored beside a tied embedding and differs from it, as transformers does.
    fn with_stored_head(mut self) -> Result<Self, Error> {
        if let (true, Some(embedding), Some(head)) = (
            self.config.tied,
            self.tensors.get(EMBEDDING),
            self.tensors.get(HEAD),
        ) {
            let is_same =
                embedding.shape == head.shape && embedding.read(EMBEDDING)? == head.read(HEAD)?;
            self.is_untied = !is_same;
            self.config.tied = is_same;
        }
        Ok(self)
    }

    /// A model compiled into the program: its `model.safetensors` and its other files.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open), with `name` as the folder.
    pub fn embedded(
        name: &str,
        weights: &'static [u8],
        known_files: &[(&str, &[u8])],
    ) -> Result<Self, Error> {
        let folder = PathBuf::from(name);
        let known_files: BTreeMap<String, Vec<u8>> = known_files
            .iter()
            .map(|(name, bytes)| (name.to_string(), bytes.to_vec()))
            .collect();
        let path = folder.join("config.json");
        let config = known_files
            .get("config.json")
            .map_or(&[][..], Vec::as_slice);
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
            known_files,
            other_files: Vec::new(),
            left_out: Vec::new(),
            is_untied: false,
            tensors,
        })
    }

    /// Path of one of the model's files, for messages.
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
        if let Some(config) = self.known_files.get("config.json") {
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

    /// Loads the model with `f32` weights, whatever their dtype in the files.
    ///
    /// # Errors
    ///
    /// [`Error::Field`] for a tensor that is missing, has another shape than `config.json` says,
    /// another dtype than f32, f16 or bf16, NaN or infinite values, or no place in the model.
    pub fn load(&self, device: &Device) -> Result<Llama, Error> {
        self.load_as(ModelDtype::F32, device)
    }

    /// Loads the model with weights and biases in `dtype`, those of norms in `f32`.
    ///
    /// # Errors
    ///
    /// Those of [`load`](Self::load).
    pub fn load_as(&self, dtype: ModelDtype, device: &Device) -> Result<Llama, Error> {
        self.check_sizes()?;
        let dtype = dtype.dtype();
        if device::is_host(device) {
            let values: usize = self.tensors.values().map(Entry::num_values).sum();
            let fits = memory::check((dtype.size() * values) as u64);
            fits.map_err(|reason| Error::field(&self.folder, "weights", reason))?;
        }
        let mut loader = Loader {
            pretrained: self,
            dtype,
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
            let derived =
                name.ends_with(".rotary_emb.inv_freq") || (self.config.tied && *name == HEAD);
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

    /// Whether a model that is loaded as `dtype` may have other values than the files.
    pub(crate) fn is_rounded_as(&self, dtype: ModelDtype) -> bool {
        let mut stored = self.tensors.values().map(|entry| entry.dtype);
        dtype == ModelDtype::Bf16 && stored.any(|stored| stored != Dtype::BF16)
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
}

/// Looks for what else is in the folder.
struct Rest<'a> {
    root: &'a Path,
    used: BTreeSet<String>,
    other_files: Vec<PathBuf>,
    left_out: Vec<String>,
}

impl Rest<'_> {
    fn look_into(&mut self, folder: &Path) -> Result<(), Error> {
        let path = self.root.join(folder);
        let entries = std::fs::read_dir(&path).map_err(Error::io(&path))?;
        let names = entries.map(|entry| entry.map(|entry| entry.file_name()));
        let mut names: Vec<_> = names.collect::<Result<_, _>>().map_err(Error::io(&path))?;
        names.sort();
        for name in names {
            let relative = folder.join(&name);
            let shown = relative.display().to_string();
            if self.used.contains(&shown) {
                continue;
            }
            let path = self.root.join(&relative);
            let is_link = path.is_symlink();
            let is_hidden = name.to_string_lossy().starts_with('.');
            // Links to files are how the hub's cache stores every file.
            match path.metadata() {
                Ok(found) if found.is_file() && !is_weights(&relative) => {
                    self.other_files.push(relative);
                }
                Ok(found) if found.is_dir() && !is_link && !is_hidden => {
                    match holds_weights(&path) {
                        true => self.left_out.push(format!("{shown}/")),
                        false => self.look_into(&relative)?,
                    }
                }
                _ => self.left_out.push(shown),
            }
        }
        Ok(())
    }
}

pub(crate) fn is_weights(path: &Path) -> bool {
    let ending = path
        .extension()
        .map(|ending| ending.to_string_lossy().to_lowercase());
    ending.is_some_and(|ending| WEIGHTS.contains(&ending.as_str()))
}

/// Whether a folder is a model of its own, or the state of a training.
fn holds_weights(folder: &Path) -> bool {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries.into_iter().any(|entry| {
        let path = entry.path();
        match path.is_dir() && !path.is_symlink() {
            true => holds_weights(&path),
            false => is_weights(&path),
        }
    })
}

/// Follows a traversal and gives each parameter's name in the files.
#[derive(Default)]
pub(crate) struct TensorName {
    stack: Vec<String>,
    container: Vec<String>,
}

impl TensorName {
    pub(crate) fn enter(&mut self, name: &str, container: &str) {
        self.stack.push(name.into());
        self.container.push(container.into());
    }

    pub(crate) fn exit(&mut self) {
        self.stack.pop();
        self.container.pop();
    }

    pub(crate) fn name(&self) -> String {
        self.stack.join(".").replace(".gamma", ".weight")
    }

    /// Weights of linear layers are `[d_output, d_input]` in the files and transposed here.
    pub(crate) fn is_transposed(&self) -> bool {
        let is_weight = self.stack.last().is_some_and(|last| last == "weight");
        is_weight && self.is_in("Struct:HdPissaLinear")
    }

    /// Whether this is a parameter of a norm.
    fn is_of_norm(&self) -> bool {
        self.is_in("Struct:RmsNorm")
    }

    fn is_in(&self, container: &str) -> bool {
        self.container.last().is_some_and(|last| last == container)
    }
}

struct Loader<'a> {
    pretrained: &'a Pretrained,
    dtype: DType,
    names: TensorName,
    used: BTreeSet<String>,
    error: Option<Error>,
}

impl Loader<'_> {
    fn tensor(&mut self, shape: &[usize]) -> Result<TensorData, Error> {
        let name = self.names.name();
        let Some(entry) = self.pretrained.tensors.get(&name) else {
            let path = match self.pretrained.tensors.values().next() {
                Some(entry) => entry.path.clone(),
                None => self.pretrained.path(SINGLE),
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
                let dtype = match self.names.is_of_norm() {
                    true => DType::F32,
                    false => self.dtype,
                };
                let tensor = device.memory_persistent_allocations(data, |data| {
                    Tensor::from_data(data.convert_dtype(dtype), (&device, dtype))
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
