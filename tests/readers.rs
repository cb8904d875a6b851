//! No input makes a reader of this workspace panic or allocate beyond the size of the file.
//!
//! `HD_PISSA_FUZZ_INPUTS` says how many inputs each target reads.

mod fuzz;

use std::path::{Path, PathBuf};

use burn::nn::{Linear, LinearConfig};
use burn::optim::{AdamConfig, ModuleOptimizer};
use burn::tensor::{Bytes, Device};
use hd_pissa::checkpoint::{Checkpoint, Checkpoints, Snapshot};
use hd_pissa::comm::Solo;
use hd_pissa::{HdPissaConfig, HdPissaModule, HdPissaOptimizerConfig};
use hd_pissa_check::recorded::RecordedRun;
use hd_pissa_tests::training::gradients_by;
use hd_pissa_tests::{normal, resumed, state};
use sha2::{Digest, Sha256};

use fuzz::fuzz;

fn adam() -> ModuleOptimizer {
    AdamConfig::new().init()
}

/// A folder in memory, if the system has one.
fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap_or_else(|_| tempfile::tempdir().unwrap())
}

/// A good checkpoint, one file of which is replaced.
struct Target {
    _folder: tempfile::TempDir,
    path: PathBuf,
    model: Linear,
    state: Vec<u8>,
}

impl Target {
    fn new() -> Self {
        let folder = folder();
        let device = Device::flex().autodiff();
        let config = HdPissaConfig::new().with_rank(1).with_shards(2);
        let linear = LinearConfig::new(4, 3).init(&device);
        let model = linear.apply_hd_pissa(&config, 0..2).unwrap();
        let mut optim = HdPissaOptimizerConfig::new().init(adam(), Solo).unwrap();
        let batches = (0..2).map(|shard| (shard, normal([2, 4], &device)));
        let (model, gradients) = gradients_by(model, Linear::forward, batches);
        let model = optim.step(1e-3, model, gradients).unwrap();
        let state = state(&optim);
        let mut snapshot = Snapshot::new(1, &model, state.clone());
        snapshot.settings.insert("rank".into(), "1".into());
        snapshot.progress = serde_json::json!({"seconds": 1.5, "places": [1, 2]});
        let checkpoints = Checkpoints::new(folder.path());
        let path = checkpoints.save(&snapshot, &Solo).unwrap();
        Self {
            _folder: folder,
            path,
            model,
            state: state.to_vec(),
        }
    }

    fn content(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path.join(name)).unwrap()
    }

    /// Size of all files.
    fn size(&self) -> usize {
        let entries = std::fs::read_dir(&self.path).unwrap();
        entries
            .map(|entry| entry.unwrap().metadata().unwrap().len() as usize)
            .sum()
    }

    /// Replaces a file and its digest, which would show the change.
    fn replace(&self, name: &str, content: &[u8]) {
        std::fs::write(self.path.join(name), content).unwrap();
        let digest = Sha256::digest(content);
        let digits: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        let sums = std::fs::read_to_string(self.path.join("SHA256SUMS")).unwrap();
        let lines: Vec<String> = sums
            .lines()
            .map(|line| match line.split_once("  ") {
                Some((_, other)) if other == name => format!("{digits}  {name}"),
                _ => line.to_string(),
            })
            .collect();
        std::fs::write(self.path.join("SHA256SUMS"), lines.join("\n")).unwrap();
    }

    /// Everything that a run does to resume, and one step with the result.
    fn resume(&self) -> Result<(), String> {
        let checkpoint = Checkpoint::open(&self.path).map_err(|e| e.to_string())?;
        checkpoint
            .check_settings(checkpoint.settings())
            .map_err(|e| e.to_string())?;
        let model = checkpoint
            .restore(self.model.clone())
            .map_err(|e| e.to_string())?;
        let state = checkpoint
            .optimizer(&model, &hd_pissa::comm::Solo)
            .map_err(|e| e.to_string())?;
        let optim = HdPissaOptimizerConfig::new().init(adam(), Solo).unwrap();
        let optim = resumed(optim, state).map_err(|e| e.to_string())?;
        optim.to_record().map(drop).map_err(|e| e.to_string())
    }

    fn fuzz(&self, name: &str) {
        let size = self.size();
        fuzz(name, &[self.content(name)], size, |input| {
            self.replace(name, input);
            self.resume()
        });
    }
}

#[test]
fn manifest() {
    Target::new().fuzz("manifest.json");
}

#[test]
fn digests() {
    let target = Target::new();
    let (good, size) = (target.content("SHA256SUMS"), target.size());
    fuzz("SHA256SUMS", &[good], size, |input| {
        std::fs::write(target.path.join("SHA256SUMS"), input).unwrap();
        target.resume()
    });
}

#[test]
fn tensors_of_the_model() {
    Target::new().fuzz("model.bpk");
}

#[test]
fn frames_of_a_shard() {
    Target::new().fuzz("frames-1-of-2.bpk");
}

#[test]
fn moments_of_a_shard() {
    Target::new().fuzz("moments-0-of-2.bpk");
}

#[test]
fn records_of_the_optimizer() {
    let state = Target::new().state;
    fuzz("optimizer record", &[state], 0, |input| {
        let optim = HdPissaOptimizerConfig::new().init(adam(), Solo).unwrap();
        let bytes = Bytes::from_bytes_vec(input.to_vec());
        let optim = resumed(optim, bytes).map_err(|e| e.to_string())?;
        optim.to_record().map(drop).map_err(|e| e.to_string())
    });
}

#[test]
fn recorded_runs() {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("data");
    let folder = folder();
    let path = folder.path().join("run.safetensors");
    let names = ["k1_r4_32x24.safetensors", "k2_r4_32x24.safetensors"];
    let corpus = names.map(|name| std::fs::read(data.join(name)).unwrap());
    fuzz("recorded run", &corpus, 0, |input| {
        std::fs::write(&path, input).unwrap();
        RecordedRun::read(&path)
            .map(drop)
            .map_err(|error| error.to_string())
    });
}
