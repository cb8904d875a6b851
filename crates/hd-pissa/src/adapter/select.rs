//! The choice of the shard that gradients go to.

use burn::module::{Flag, Module, ModuleMapper, Param};

use super::path::{PathTracker, Place, track_path};
use crate::GradientMode;

/// Enables the flag of one shard in every adapter and disables the others.
struct SelectShard {
    path: PathTracker,
    index: usize,
    found: bool,
}

impl ModuleMapper for SelectShard {
    track_path!(path);

    fn map_flag(&mut self, flag: Param<Flag>) -> Param<Flag> {
        match self.path.place() {
            Place::Shard { name, .. } => {
                assert!(
                    name.gradients == GradientMode::PerShard,
                    "select_shard({}): the shards share gradients, so that every forward pass \
                     serves all of them",
                    self.index
                );
                self.found |= name.index == self.index;
                flag.with_value(name.index == self.index)
            }
            Place::Residual { .. } | Place::Other(_) => flag,
        }
    }
}

pub(super) fn select_shard<M: Module>(model: M, index: usize) -> M {
    let mut mapper = SelectShard {
        path: PathTracker::default(),
        index,
        found: false,
    };
    let model = model.map(&mut mapper);
    assert!(
        mapper.found,
        "select_shard({index}): no adapter of this model hosts shard {index}"
    );
    model
}
