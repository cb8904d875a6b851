//! `llama_math export`: the model of an earlier run in another form.

use std::path::{Path, PathBuf};

use burn::tensor::{Device, Tensor, TensorData};
use clap::ValueEnum;
use hd_pissa::HdPissaConfig;
use hd_pissa::export::{Peft, RankLimit, WeightChange, write_delta, write_peft};
use rayon::prelude::*;
use regex::Regex;

use super::card::{Card, Form, Layer, errors, name_of, worst};
use super::format::Format;
use super::made::{DELTA, FORMAT, Made, changed};
use super::merged::{ExportConfig, OutputDtype, README, RUN_README};
use super::probe::Probe;
use super::sums::{check_sums, write_sums};
use crate::console::{complain, conclude, say};
use crate::output::Staged;
use crate::pretrained::{EMBEDDING, HEAD};
use crate::weights::transpose;
use crate::{Error, Llama, Pretrained};

/// An export of the model that a run has written, or of one that an export has.
#[derive(Clone, Debug)]
pub struct Export {
    /// Folder with the trained model.
    pub source: PathBuf,
    /// Folder of the pretrained one.
    pub base: PathBuf,
    /// Folder of the export.
    pub output: PathBuf,
    /// Whether an existing folder is replaced.
    pub overwrite: bool,
    /// The form.
    pub format: Format,
    /// How the weights of a merged model are written.
    pub config: ExportConfig,
    /// How many components a LoRA adapter or a delta keeps.
    pub limit: RankLimit,
    /// Where tensors live.
    pub device: Device,
}

impl Export {
    /// Reads, writes, reads back what is written, and compares its logits with the trained model's.
    ///
    /// # Errors
    ///
    /// Whatever is wrong with the files, the pretrained model or the limits; nothing is written then.
    pub fn run(&self) -> Result<(), Error> {
        Staged::tidy(&self.output)?;
        let kept = [&*self.source, &*self.base, Path::new(".")];
        Staged::check(&self.output, self.overwrite, &kept)?;
        check_sums(&self.source)?;
        let made = Made::open(&self.source)?;
        let base = made.base(&self.base)?;
        match self.format {
            Format::Merged => self.merged(&made, &base),
            Format::Lora | Format::Delta => self.low_rank(&made, &base),
        }
    }

    fn merged(&self, made: &Made, base: &Pretrained) -> Result<(), Error> {
        Staged::check_room(&self.output, base.export_size(&self.config))?;
        let model = match made.format {
            Format::Merged => Pretrained::open(&self.source)?.load(&self.device)?,
            _ => changed(base, made.changes()?, &self.device)?,
        };
        let probe = self.probe(base, || Ok(model.clone()))?;
        let staged = Staged::new(&self.output, self.overwrite)?;
        let exported = base.export(&model, staged.path(), &self.config)?;
        drop(model);
        if !exported.left_out.is_empty() {
            complain!(
                "not carried over, or not known: {}",
                exported.left_out.join(", ")
            );
        }
        let written = Pretrained::open(staged.path())?.load(&self.device)?;
        let mut figures = vec![probe.difference(&written)];
        figures.extend(exported.figure());
        self.commit(staged, made, Form::Merged, &probe, figures, Vec::new())
    }

    fn low_rank(&self, made: &Made, base: &Pretrained) -> Result<(), Error> {
        if made.format != Format::Merged {
            let reason = format!(
                "{} is a {} already; export it as merged, or the run's output as {}",
                self.source.display(),
                made.format,
                self.format
            );
            return Err(Error::Option {
                option: "format",
                reason,
            });
        }
        let (config, targets) = made.adapters()?;
        let source = Pretrained::open(&self.source)?;
        let changes = self.find(&config, &targets, base, &source)?;
        let probe = self.probe(base, || source.load(&self.device))?;
        let staged = Staged::new(&self.output, self.overwrite)?;
        match self.format {
            Format::Lora => {
                let about = Peft {
                    base_model: name_of(&self.base),
                    task_type: Some("CAUSAL_LM".into()),
                };
                write_peft(staged.path(), &changes, &about)?;
            }
            _ => write_delta(&staged.path().join(DELTA), &changes)?,
        }
        // What is compared is what lies on the disk.
        let written = Made {
            folder: staged.path().into(),
            written_by: made.written_by.clone(),
            settings: made.settings.clone(),
            format: self.format,
        };
        let model = changed(base, written.changes()?, &self.device)?;
        let layers: Vec<Layer> = changes.iter().map(Layer::of).collect();
        let figures = vec![errors(&layers), probe.difference(&model)];
        for layer in &layers {
            say!("{layer}");
        }
        let is_rounded = made.settings.get("--output-dtype").map(String::as_str) != Some("f32");
        if worst(&layers) > 0.01 && is_rounded && self.limit == RankLimit::default() {
            complain!(
                "the weights of {} may be rounded to 16 bits, which no matrix of low rank holds: a run \
                 with --output-dtype f32 has all of the update",
                self.source.display()
            );
        }
        let form = match self.format {
            Format::Lora => Form::lora(&layers),
            _ => Form::Delta,
        };
        self.commit(staged, made, form, &probe, figures, layers)
    }

    /// The changes of all weights that had an adapter.
    fn find(
        &self,
        config: &HdPissaConfig,
        targets: &Regex,
        base: &Pretrained,
        source: &Pretrained,
    ) -> Result<Vec<WeightChange>, Error> {
        let names: Vec<&String> = base
            .tensors
            .iter()
            .filter(|(name, entry)| entry.shape.len() == 2 && targets.is_match(name))
            .map(|(name, _)| name)
            .filter(|name| !(base.config.tied && *name == HEAD))
            .collect();
        if let (true, Format::Lora) = (names.iter().any(|name| *name == EMBEDDING), self.format) {
            let reason = format!("PEFT has another form for an embedding such as `{EMBEDDING}`");
            return Err(Error::Option {
                option: "format",
                reason,
            });
        }
        let change = |&name: &&String| {
            let [base, trained] = [base, source].map(|model| self.read(model, name));
            let (base, trained) = (base?, trained?);
            let frames = config.frames(name, &base)?;
            Ok(WeightChange::new(
                name,
                &base,
                &trained,
                &frames,
                &self.limit,
            )?)
        };
        names.par_iter().map(change).collect()
    }

    /// A weight in the layout of the model.
    fn read(&self, model: &Pretrained, name: &str) -> Result<Tensor<2>, Error> {
        let Some(entry) = model.tensors.get(name) else {
            return Err(Error::field(&model.folder, name, "is missing"));
        };
        let &[rows, cols] = &*entry.shape else {
            return Err(Error::field(&entry.path, name, "is no matrix"));
        };
        let values = entry.read(name)?;
        let data = match name == EMBEDDING {
            true => TensorData::new(values, [rows, cols]),
            // A linear layer.
            false => TensorData::new(transpose(&values, rows, cols), [cols, rows]),
        };
        Ok(Tensor::from_data(data, &self.device))
    }

    /// The logits of the trained model: those that the run has noted, or else of what it has written.
    fn probe(
        &self,
        base: &Pretrained,
        model: impl FnOnce() -> Result<Llama, Error>,
    ) -> Result<Probe, Error> {
        match Probe::read(&self.source, base.config.vocab_size)? {
            Some(probe) => Ok(probe),
            None => Ok(Probe::new(&model()?, base.config.max_positions)),
        }
    }

    fn commit(
        &self,
        staged: Staged,
        made: &Made,
        form: Form,
        probe: &Probe,
        figures: Vec<String>,
        layers: Vec<Layer>,
    ) -> Result<(), Error> {
        for figure in &figures {
            say!("{figure}");
        }
        let mut settings = made.settings.clone();
        settings.insert(FORMAT.into(), self.format.to_string());
        let dtype = match self.format {
            Format::Merged => self.config.dtype,
            _ => OutputDtype::F32,
        };
        let dtype = dtype.to_possible_value();
        let dtype = dtype.map_or_else(String::new, |value| value.get_name().into());
        settings.insert("--output-dtype".into(), dtype);
        probe.write(staged.path())?;
        let page = self.source.join(README);
        if page.is_file() {
            let copy = staged.path().join(RUN_README);
            std::fs::copy(&page, &copy).map_err(Error::io(copy))?;
        }
        let card = Card {
            folder: self.output.clone(),
            base: self.base.clone(),
            data: None,
            form,
            settings: settings.clone(),
            figures,
            layers,
        };
        card.write(staged.path())?;
        write_sums(staged.path())?;
        let settings = serde_json::to_value(settings).expect("a map of texts has a JSON form");
        staged.with_settings(settings).commit()?;
        conclude!("written: {}", self.output.display());
        for line in form.usage(&self.output, &self.base) {
            say!("{line}");
        }
        Ok(())
    }
}
