//! Checkpoints of a training run: complete or absent, verified before they are used, and
//! independent of how shards are spread over workers.
//!
//! [`Checkpoints`] is a folder with one sub-folder per checkpoint:
//!
//! ```text
//! run.checkpoints/
//!   step-000000040/
//!     manifest.json            version, step, settings, progress, names and sizes of the files
//!     model.bpk                every parameter outside the shards, a Burn record
//!     optimizer.bpk            the optimizer's state of those parameters
//!     frames-0-of-8.bpk        the factors of shard 0, a Burn record
//!     moments-0-of-8.bpk       the optimizer's state of shard 0
//!     ...
//!     SHA256SUMS               digests of the files above; `sha256sum -c SHA256SUMS` checks them too
//! ```
//!
//! A checkpoint is written into a hidden folder next to it, synchronized to disk and renamed.
//! Whenever the program ends, a folder with the final name is complete. [`Checkpoints::latest`]
//! notices later damage: it hashes every file of the newest checkpoint, and takes the one before if
//! a file is missing or changed. Two programs may save into one folder by mistake: a checkpoint is
//! then one of theirs as a whole. Where the file system has locks, neither deletes what the other is
//! writing.
//!
//! Every parameter that a traversal of the model shows is saved by its path, in its own dtype, bit
//! for bit. Each shard has files of its own, written by the worker that hosts it. A checkpoint
//! therefore resumes on any number of workers. Workers write to the same folder: on several
//! machines it must be on a file system that all of them see.
//!
//! Burn cannot read a device's random state. A run that draws random numbers while it trains
//! resumes bit for bit only if it seeds its device from the step.
//!
//! ```
//! use burn::nn::LinearConfig;
//! use burn::optim::AdamConfig;
//! use burn::tensor::Device;
//! use hd_pissa::checkpoint::{Checkpoints, Snapshot};
//! use hd_pissa::{HdPissaConfig, HdPissaModule, HdPissaOptimizerConfig, HdPissaOptimizerRecord, comm::Solo};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let folder = tempfile::tempdir()?;
//! # let folder = folder.path().join("run.checkpoints");
//! let device = Device::flex().autodiff();
//! let config = HdPissaConfig::new().with_rank(2).with_shards(2);
//! let base = LinearConfig::new(8, 8).init(&device);
//! let model = base.clone().apply_hd_pissa(&config, 0..2)?;
//! let mut optim = HdPissaOptimizerConfig::new().init(AdamConfig::new().init(), Solo)?;
//!
//! let checkpoints = Checkpoints::new(folder).with_keep_last(2);
//! let mut snapshot = Snapshot::new(40, &model, optim.to_record()?.into_bytes()?);
//! snapshot.settings.insert("rank".into(), "2".into());
//! checkpoints.save(&snapshot, &Solo)?;
//!
//! // Later, in another process:
//! let found = checkpoints.latest()?;
//! for damaged in &found.damaged {
//!     eprintln!("skipped: {damaged}");
//! }
//! if let Some(checkpoint) = found.checkpoint {
//!     checkpoint.check_settings(&snapshot.settings)?;
//!     let model = checkpoint.apply_hd_pissa(base, &config, 0..2)?;
//!     let record = HdPissaOptimizerRecord::from_bytes(checkpoint.optimizer(&model, &Solo)?)?;
//!     optim.load_record(record)?;
//!     assert_eq!(checkpoint.step(), 40);
//! }
//! # Ok(())
//! # }
//! ```

mod error;
mod files;
mod folder;
mod manifest;
mod parameters;
mod saved;
mod states;

pub use error::{CheckpointError, RestoreError};
pub use folder::{Checkpoints, Found, Snapshot};
pub use saved::Checkpoint;
