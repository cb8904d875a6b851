//! The choice of the shard that gradients go to.

use burn::module::{Flag, Module, ModuleMapper, ModuleVisitor, Param};

use crate::path::{PathTracker, Place, track_path};
use crate::{GradientMode, HdPissaError};

/// The shards of a model's adapters.
#[derive(Default)]
struct Shards {
    path: PathTracker,
    /// Indices, ascending.
    found: Vec<usize>,
    share_gradients: bool,
}

impl ModuleVisitor for Shards {
    track_path!(path);

    fn visit_flag(&mut self, _flag: &Param<Flag>) {
        if let Place::Shard { name, .. } = self.path.place() {
            self.share_gradients |= name.gradients == GradientMode::Shared;
            if let Err(position) = self.found.binary_search(&name.index) {
                self.found.insert(position, name.index);
            }
        }
    }
}

/// Enables the flag of one shard in every adapter and disables the others.
struct SelectShard {
    path: PathTracker,
    index: usize,
}

impl ModuleMapper for SelectShard {
    track_path!(path);

    fn map_flag(&mut self, flag: Param<Flag>) -> Param<Flag> {
        match self.path.place() {
            Place::Shard { name, .. } => flag.with_value(name.index == self.index),
            Place::Residual { .. } | Place::Other(_) => flag,
        }
    }
}

pub(super) fn select_shard<M: Module>(model: M, index: usize) -> Result<M, HdPissaError> {
    let mut shards = Shards::default();
    model.visit(&mut shards);
    let Shards {
        found,
        share_gradients,
        ..
    } = shards;
    if share_gradients {
        return Err(HdPissaError::SharesGradients { index });
    }
    if found.binary_search(&index).is_err() {
        return Err(HdPissaError::NotHosted {
            index,
            hosted: found,
        });
    }
    Ok(model.map(&mut SelectShard {
        path: PathTracker::default(),
        index,
    }))
}
