//! `llama_math verify`: whether an output is what was written, and what loads it.

use std::path::PathBuf;

use burn::tensor::Device;

use super::card::{Form, Layer, errors};
use super::format::Format;
use super::made::{Made, changed};
use super::probe::Probe;
use super::sums::check_sums;
use crate::console::conclude;
use crate::{Error, Pretrained};

/// A check of what a run or an export has written.
#[derive(Clone, Debug)]
pub struct Verify {
    /// The folder.
    pub folder: PathBuf,
    /// Folder of the pretrained model; a LoRA adapter and a delta need it.
    pub base: Option<PathBuf>,
    /// Where tensors live.
    pub device: Device,
}

impl Verify {
    /// Compares files with their digests and logits with those of the trained model, and says which
    /// program loads what.
    ///
    /// # Errors
    ///
    /// [`Error::Field`] for a file that has changed, for another pretrained model, and for weights that
    /// cannot be loaded.
    pub fn run(&self) -> Result<(), Error> {
        let made = Made::open(&self.folder)?;
        let folder = self.folder.display();
        conclude!("{folder}: {}, by {}", made.format, made.written_by);
        match check_sums(&self.folder)? {
            Some(count) => conclude!("files: {count}, all as they were written (SHA-256)"),
            None => conclude!("files: without digests to compare them with"),
        }
        let base = match &self.base {
            Some(base) => {
                let found = made.base(base)?;
                conclude!("base: {} is the model that was trained", base.display());
                Some(found)
            }
            None => None,
        };
        let changes = made.changes()?;
        let layers: Vec<Layer> = changes.iter().map(Layer::of).collect();
        if !layers.is_empty() {
            conclude!("{}", errors(&layers));
        }
        let model = match (made.format, &base) {
            (Format::Merged, _) => Pretrained::open(&self.folder)?.load(&self.device)?,
            (_, Some(base)) => changed(base, changes, &self.device)?,
            (format, None) => {
                return Err(Error::Option {
                    option: "model",
                    reason: format!("{folder} is a {format}, which needs the pretrained model"),
                });
            }
        };
        let vocabulary = model.model.embed_tokens.weight.lazy_shape()[0];
        match Probe::read(&self.folder, vocabulary)? {
            Some(probe) => conclude!("{}", probe.difference(&model)),
            None => conclude!("logits: without recorded ones to compare with"),
        }
        let form = match made.format {
            Format::Merged => Form::Merged,
            Format::Lora => Form::lora(&layers),
            Format::Delta => Form::Delta,
        };
        let base = self.base.clone().unwrap_or_else(|| "BASE".into());
        for line in form.usage(&self.folder, &base) {
            conclude!("{line}");
        }
        Ok(())
    }
}
