//! The parameters of a model in files.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use burn::module::{Module, ModuleVisitor, Param, ParamId};
use burn::tensor::{Bool, DType, Int, Shape, Tensor};
use burn_pack::{HEADER_SIZE, Header, Reader, Writer};
use hd_pissa_comm::Communicator;

use super::{CheckpointError, files};
use crate::GradientMode;
use crate::hosting::hosted_shards;
use crate::path::{PathTracker, Place, track_path};
use crate::windows::FrameChoice;

/// A parameter as a traversal shows it.
pub(super) struct Parameter {
    pub(super) id: ParamId,
    /// Index of the shard it belongs to, if any.
    pub(super) shard: Option<usize>,
    pub(super) entry: burn_pack::Tensor,
}

/// All parameters of a model, and the number of shards of its adapters.
pub(super) struct Parameters {
    pub(super) all: Vec<Parameter>,
    /// 0 without HD-PiSSA adapters.
    pub(super) shards: usize,
    pub(super) gradients: GradientMode,
    /// The frames of its first adapter.
    pub(super) frames: FrameChoice,
}

impl Parameters {
    /// Reads no values. The device is read when the bytes of an entry are requested.
    pub(super) fn of<M: Module>(model: &M) -> Self {
        let mut collector = Collector {
            path: PathTracker::default(),
            parameters: Self {
                all: Vec::new(),
                shards: 0,
                gradients: GradientMode::PerShard,
                frames: FrameChoice::published(),
            },
        };
        model.visit(&mut collector);
        collector.parameters
    }

    /// The shards whose factors the model has, by ascending index.
    pub(super) fn known(&self) -> Vec<usize> {
        let mut known: Vec<usize> = self.all.iter().filter_map(|p| p.shard).collect();
        known.sort_unstable();
        known.dedup();
        known
    }

    /// The shards that the worker of `communicator` hosts.
    pub(super) fn hosted(&self, communicator: &dyn Communicator) -> Vec<usize> {
        hosted_shards(&self.known(), self.shards, communicator)
    }

    pub(super) fn shard_of(&self) -> HashMap<u64, usize> {
        let shard = |parameter: &Parameter| Some((parameter.id.val(), parameter.shard?));
        self.all.iter().filter_map(shard).collect()
    }

    /// Writes the parameters of `shard`, or those outside all shards, one after the other.
    pub(super) fn write(&self, shard: Option<usize>, path: &Path) -> Result<(), CheckpointError> {
        let own = self.all.iter().filter(|p| p.shard == shard);
        let entries: Vec<_> = own.map(|p| p.entry.clone()).collect();
        write(Writer::new(entries.clone()), &entries, path)
    }

    /// Refuses a file whose tensors are not exactly the parameters of `shard`.
    pub(super) fn check(&self, shard: Option<usize>, path: &Path) -> Result<(), CheckpointError> {
        let mut saved: BTreeMap<String, burn_pack::Tensor> = read(path)?
            .into_iter()
            .map(|tensor| (tensor.name.clone(), tensor))
            .collect();
        let mismatch = |name: &str, reason: String| CheckpointError::Parameter {
            path: path.into(),
            name: name.into(),
            reason,
        };
        for parameter in self.all.iter().filter(|p| p.shard == shard) {
            let expected = &parameter.entry;
            let Some(found) = saved.remove(&expected.name) else {
                let reason = "the model has this parameter, the checkpoint does not";
                return Err(mismatch(&expected.name, reason.into()));
            };
            if (found.dtype, &found.shape) != (expected.dtype, &expected.shape) {
                let describe = |t: &burn_pack::Tensor| format!("{:?} {:?}", t.dtype, &t.shape[..]);
                let reason = format!(
                    "is {} in the checkpoint and {} in the model",
                    describe(&found),
                    describe(expected)
                );
                return Err(mismatch(&expected.name, reason));
            }
        }
        match saved.keys().next() {
            Some(name) => {
                let reason = "the checkpoint has this parameter, the model does not";
                Err(mismatch(name, reason.into()))
            }
            None => Ok(()),
        }
    }
}

struct Collector {
    path: PathTracker,
    parameters: Parameters,
}

impl Collector {
    fn push(
        &mut self,
        id: ParamId,
        dtype: DType,
        shape: Shape,
        data: impl Fn() -> burn::tensor::TensorData + Send + Sync + 'static,
    ) {
        let shard = match self.path.place() {
            Place::Shard { name, .. } => {
                if self.parameters.shards == 0 {
                    self.parameters.frames = name.frames;
                }
                self.parameters.shards = name.shards;
                self.parameters.gradients = name.gradients;
                Some(name.index)
            }
            Place::Residual { .. } | Place::Other(_) => None,
        };
        let (name, len) = (self.path.path(), shape.num_elements() * dtype.size());
        let bytes = move || data().into_parts().0;
        let entry = match dtype {
            // Its length follows from its content.
            DType::QFloat(_) => burn_pack::Tensor::new(name, dtype, shape, Some(id.val()), bytes()),
            _ => {
                let provider = move || Ok(bytes());
                burn_pack::Tensor::deferred(name, dtype, shape, Some(id.val()), len, provider)
            }
        };
        let parameter = Parameter { id, shard, entry };
        self.parameters.all.push(parameter);
    }
}

impl ModuleVisitor for Collector {
    track_path!(path);

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let tensor = param.transform_for_save().val();
        let (dtype, shape) = (tensor.dtype(), tensor.shape());
        self.push(param.id, dtype, shape, move || tensor.clone().into_data());
    }

    fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<D, Int>>) {
        let tensor = param.transform_for_save().val();
        let (dtype, shape) = (tensor.dtype(), tensor.shape());
        self.push(param.id, dtype, shape, move || tensor.clone().into_data());
    }

    fn visit_bool<const D: usize>(&mut self, param: &Param<Tensor<D, Bool>>) {
        let tensor = param.transform_for_save().val();
        let (dtype, shape) = (tensor.dtype(), tensor.shape());
        self.push(param.id, dtype, shape, move || tensor.clone().into_data());
    }
}

/// Writes a pack of `tensors` to a new file, waits for the disk, and compares the file with the
/// data in memory. Digests are then those of the right bytes.
pub(super) fn write(
    writer: Writer,
    tensors: &[burn_pack::Tensor],
    path: &Path,
) -> Result<(), CheckpointError> {
    let io = |error| match error {
        burn_pack::Error::IoError(reason) => {
            CheckpointError::io(path, std::io::Error::other(reason))
        }
        other => CheckpointError::io(path, other),
    };
    writer
        .overwrite(false)
        .write_to_file_in_place(path)
        .map_err(io)?;
    files::sync(path)?;
    let mut written: BTreeMap<String, burn_pack::Tensor> = read(path)?
        .into_iter()
        .map(|tensor| (tensor.name.clone(), tensor))
        .collect();
    for tensor in tensors {
        let expected = tensor.to_bytes().map_err(io)?;
        let found = written.remove(&tensor.name).map(|found| found.into_bytes());
        if found.transpose().map_err(io)?.as_deref() != Some(&expected[..]) {
            let reason = format!("`{}` is not what was written", tensor.name);
            return Err(CheckpointError::damaged(path, reason));
        }
    }
    Ok(())
}

/// Opens a pack, reading no values.
///
/// Burn's reader trusts parts of a header. This function checks the sizes that it allocates before
/// it looks at the file's size, and that tensors do not overlap.
pub(super) fn open(path: &Path) -> Result<Reader, CheckpointError> {
    let damaged = |reason: String| CheckpointError::damaged(path, reason);
    let io = |error: std::io::Error| CheckpointError::damaged_by(path, error);
    let size = std::fs::metadata(path).map_err(io)?.len();
    let mut prefix = [0; HEADER_SIZE];
    let mut file = std::fs::File::open(path).map_err(io)?;
    std::io::Read::read_exact(&mut file, &mut prefix).map_err(io)?;
    let header =
        Header::from_bytes(&prefix).map_err(|error| CheckpointError::damaged_by(path, error))?;
    if u64::from(header.metadata_size) > size {
        return Err(damaged(format!(
            "its header takes {} of {size} bytes",
            header.metadata_size
        )));
    }
    Reader::from_file_exact(path).map_err(|error| CheckpointError::damaged_by(path, error))
}

/// The tensors of a pack. Their values are read on request, which may fail.
pub(super) fn read(path: &Path) -> Result<Vec<burn_pack::Tensor>, CheckpointError> {
    let damaged = |reason: String| CheckpointError::damaged(path, reason);
    let reader = open(path)?;
    let size = std::fs::metadata(path)
        .map_err(|error| CheckpointError::damaged_by(path, error))?
        .len();
    let tensors = reader
        .into_tensors()
        .map_err(|error| CheckpointError::damaged_by(path, error))?;
    let total: u64 = tensors.iter().map(|t| t.byte_len() as u64).sum();
    if total > size {
        return Err(damaged(format!(
            "its tensors take {total} of {size} bytes: they overlap"
        )));
    }
    if let Some(tensor) = tensors.iter().find(|tensor| tensor.param_id.is_none()) {
        return Err(damaged(format!("`{}` has no parameter id", tensor.name)));
    }
    let tensors = tensors.into_iter().map(|tensor| read_later(tensor, path));
    tensors
        .collect::<Result<_, _>>()
        .map_err(|error| CheckpointError::damaged_by(path, error))
}

/// A tensor of the file `path` whose values are an error if the file has gone by the time they are
/// requested. Burn's reader would panic.
fn read_later(
    tensor: burn_pack::Tensor,
    path: &Path,
) -> Result<burn_pack::Tensor, burn_pack::Error> {
    let (name, dtype, shape, id, bytes) = tensor.into_parts()?;
    let (len, path) = (bytes.len(), path.to_path_buf());
    let provider = move || {
        let io =
            |reason: String| burn_pack::Error::IoError(format!("{}: {reason}", path.display()));
        let own = bytes
            .view(0, len)
            .map_err(|error| io(format!("{error:?}")))?;
        own.read(Default::default())
            .map_err(|error| io(error.to_string()))?;
        Ok(own)
    };
    Ok(burn_pack::Tensor::deferred(
        name, dtype, shape, id, len, provider,
    ))
}
