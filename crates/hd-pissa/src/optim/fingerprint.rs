//! Fingerprints of parameters, by which workers compare their copies.

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{DType, Int, Tensor};
use hd_pissa_comm::{Communicator, gather_integers};

use super::OptimizerError;
use super::factors::Factors;
use crate::ops;
use crate::path::{PathTracker, Place, hash, track_path};

/// Fingerprints by path, on their device until they are read.
#[derive(Default)]
pub(super) struct Fingerprints {
    paths: Vec<String>,
    /// `[2]` for each path.
    words: Vec<Tensor<1, Int>>,
}

impl Fingerprints {
    /// Fingerprints of every float parameter outside the factors, and of all residual bits.
    pub(super) fn of_all<M: Module>(model: &M) -> Self {
        collect(model, |_, _| true)
    }

    /// Fingerprints of every parameter that a step moves, and of the packed frames of each weight
    /// that the step uses.
    pub(super) fn of_step<M: Module>(model: &M, factors: &Factors, frames: &[Tensor<2>]) -> Self {
        let mut found = collect(model, |path, trained| {
            trained || factors.weights.iter().any(|weight| weight.path == path)
        });
        found.push_frames(factors, frames);
        found
    }

    /// Fingerprints of the packed frames of each weight.
    pub(super) fn of_frames(factors: &Factors, frames: &[Tensor<2>]) -> Self {
        let mut found = Self::default();
        found.push_frames(factors, frames);
        found
    }

    fn push_frames(&mut self, factors: &Factors, frames: &[Tensor<2>]) {
        for (weight, frames) in factors.weights.iter().zip(frames) {
            let path = format!("{}.hd_pissa", weight.path);
            self.push(path, ops::fingerprint(frames.clone()));
        }
    }

    /// The words of all fingerprints, `[2 · n]`.
    pub(super) fn words(&self) -> Tensor<1, Int> {
        Tensor::cat(self.words.clone(), 0)
    }

    /// Compares them with those of the other workers. Every worker calls it at the same time.
    pub(super) fn compare(self, communicator: &dyn Communicator) -> Result<(), OptimizerError> {
        let found = self.read();
        let own: Vec<u64> = found.iter().map(|&(_, value)| value).collect();
        for (worker, theirs) in gather_integers(communicator, &own)?.into_iter().enumerate() {
            for ((path, ours), theirs) in found.iter().zip(theirs) {
                if theirs != *ours {
                    return Err(OptimizerError::Drift {
                        path: path.clone(),
                        worker,
                        ours: *ours,
                        theirs,
                    });
                }
            }
        }
        Ok(())
    }

    fn push(&mut self, path: String, words: Tensor<1, Int>) {
        self.paths.push(path);
        self.words.push(words);
    }

    /// Reads them from the device, all at once.
    fn read(self) -> Vec<(String, u64)> {
        if self.words.is_empty() {
            return Vec::new();
        }
        let words = Tensor::cat(self.words, 0).into_data();
        let words: Vec<u64> = words
            .iter::<i32>()
            .map(|word| u64::from(word as u32))
            .collect();
        let (pairs, _) = words.as_chunks::<2>();
        let values = pairs.iter().map(|&[low, high]| high << 32 | low);
        self.paths.into_iter().zip(values).collect()
    }

    /// One hash of all, with their paths.
    pub(super) fn read_joined(self) -> u64 {
        let all = self.read().into_iter();
        let lines = all.map(|(path, value)| format!("{path} {value:016x}\n"));
        hash(&lines.collect::<String>())
    }
}

fn collect<M: Module>(model: &M, chosen: impl Fn(&str, bool) -> bool) -> Fingerprints {
    let mut collector = Collector {
        path: PathTracker::default(),
        chosen,
        found: Fingerprints::default(),
    };
    model.visit(&mut collector);
    collector.found
}

struct Collector<F> {
    path: PathTracker,
    chosen: F,
    found: Fingerprints,
}

impl<F: Fn(&str, bool) -> bool> ModuleVisitor for Collector<F> {
    track_path!(path);

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Place::Other(path) = self.path.place()
            && (self.chosen)(&path, param.is_require_grad())
        {
            let value = param.base().inner();
            let value = match value.dtype() {
                // A quantized parameter is frozen. It counts with its dequantized values.
                DType::QFloat(_) => value.dequantize(),
                _ => value,
            };
            self.found.push(path, ops::fingerprint(matrix(value)));
        }
    }

    fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<D, Int>>) {
        if let Place::Residual { .. } = self.path.place() {
            let value = Tensor::<2, Int>::from_dispatch(param.val().into_dispatch());
            self.found
                .push(self.path.path(), ops::fingerprint_int(value));
        }
    }
}

/// A tensor of any number of dimensions as one of two dimensions. A matrix is not copied.
fn matrix<const D: usize>(value: Tensor<D>) -> Tensor<2> {
    match D {
        2 => Tensor::from_dispatch(value.into_dispatch()),
        _ => {
            let len = value.shape().num_elements();
            value.reshape([1, len])
        }
    }
}
