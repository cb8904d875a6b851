//! Fingerprints of parameters: hashes of their bits, by which workers see that their copies agree.

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Int, Tensor, TensorData};

use super::factors::Factors;
use crate::adapter::path::{PathTracker, Place, track_path};

/// Path and hash of every float parameter outside the factors, and of every companion.
pub(super) fn of_all<M: Module>(model: &M) -> Vec<(String, u64)> {
    collect(model, |_, _| true)
}

/// Path and hash of every parameter that a step moves.
pub(super) fn of_trained<M: Module>(model: &M, factors: &Factors) -> Vec<(String, u64)> {
    collect(model, |path, trained| {
        trained || factors.weights.iter().any(|weight| weight.path == path)
    })
}

/// One hash of several.
pub(super) fn join(fingerprints: &[(String, u64)]) -> u64 {
    fingerprints.iter().fold(START, |hash, (path, own)| {
        mix(mix(hash, crate::adapter::path::hash(path)), *own)
    })
}

fn collect<M: Module>(model: &M, chosen: impl Fn(&str, bool) -> bool) -> Vec<(String, u64)> {
    let mut collector = Collector {
        path: PathTracker::default(),
        chosen,
        found: Vec::new(),
    };
    model.visit(&mut collector);
    collector.found
}

struct Collector<F> {
    path: PathTracker,
    chosen: F,
    found: Vec<(String, u64)>,
}

impl<F: Fn(&str, bool) -> bool> ModuleVisitor for Collector<F> {
    track_path!(path);

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Place::Other(path) = self.path.place()
            && (self.chosen)(&path, param.is_require_grad())
        {
            let hash = hash_of(&param.base().inner().into_data());
            self.found.push((path, hash));
        }
    }

    fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<D, Int>>) {
        if let Place::Companion { .. } = self.path.place() {
            let hash = hash_of(&param.val().into_data());
            self.found.push((self.path.path(), hash));
        }
    }
}

fn hash_of(data: &TensorData) -> u64 {
    let (words, rest) = data.as_bytes().as_chunks::<8>();
    let words = words.iter().map(|&word| u64::from_le_bytes(word));
    let rest = rest.iter().map(|&byte| u64::from(byte));
    words.chain(rest).fold(START, mix)
}

/// Start and factor of FNV-1a, here over words; one changed bit always changes the result.
const START: u64 = 0xcbf2_9ce4_8422_2325;

fn mix(hash: u64, word: u64) -> u64 {
    (hash ^ word).wrapping_mul(0x0000_0100_0000_01b3)
}
