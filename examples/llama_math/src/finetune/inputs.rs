//! What a run reads and checks before it trains.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use hd_pissa::checkpoint::Checkpoint;
use sha2::{Digest, Sha256};

use super::held_out::HeldOut;
use super::options::FineTuning;
use crate::batch::Sequence;
use crate::data::read_records;
use crate::output::Staged;
use crate::run::Training;
use crate::tokenize::{PromptTemplate, Tokens};
use crate::weights::hexadecimal;
use crate::{Error, Pretrained, files};

/// What a run reads before it trains.
pub(super) struct Inputs {
    pub(super) template: PromptTemplate,
    pub(super) pretrained: Pretrained,
    pub(super) tokens: Tokens,
    pub(super) max_length: usize,
    /// What became of the records.
    pub(super) summary: String,
    pub(super) sequences: Arc<[Sequence]>,
    pub(super) held_out: Option<HeldOut>,
    /// The checkpoint to go on from.
    pub(super) saved: Option<Checkpoint>,
    pub(super) settings: BTreeMap<String, String>,
}

impl FineTuning {
    /// Reads the files of the run and checks them, also against the checkpoint to go on from.
    pub(super) fn read(&self, saved: Option<Checkpoint>) -> Result<Inputs, Error> {
        let template = read_template(self.template.as_deref())?;
        let pretrained = Pretrained::open(&self.model)?;
        let tokens = Tokens::of(&pretrained)?;
        let max_length = self.max_length(&pretrained)?;
        let records = read_records(&self.data, self.fields.as_ref())?;
        let cache = &self.token_cache;
        let data = cache.sequences(&tokens, &records, &template, max_length)?;
        let held_out = match &self.eval {
            Some((path, samples)) => {
                let mut records = read_records(path, self.fields.as_ref())?;
                records.truncate(*samples);
                Some(HeldOut::new(path, records, &tokens, &template, max_length)?)
            }
            None => None,
        };
        let summary = data.to_string();
        let digest = digest_of(&data.usable);
        let sequences: Arc<[Sequence]> = data.usable.into();
        let total = Training::new(&self.run, sequences.clone(), "")?.total();
        let settings = self.settings(&pretrained, max_length, digest, total)?;
        if let Some(saved) = &saved {
            self.check_settings(saved, &settings, total)?;
        }
        let size = pretrained.export_size(&self.export);
        Staged::check_room(&self.output, size)?;
        Ok(Inputs {
            template,
            pretrained,
            tokens,
            max_length,
            summary,
            sequences,
            held_out,
            saved,
            settings,
        })
    }

    fn max_length(&self, pretrained: &Pretrained) -> Result<usize, Error> {
        let largest = pretrained.config.max_positions;
        match self.max_length {
            Some(length) if length > largest => {
                let path = pretrained.path("config.json");
                let reason = format!("is {largest}, less than the --max-length {length}");
                Err(Error::field(path, "max_position_embeddings", reason))
            }
            Some(length) => Ok(length),
            None => Ok(largest.min(512)),
        }
    }
}

fn read_template(path: Option<&Path>) -> Result<PromptTemplate, Error> {
    let Some(path) = path else {
        return Ok(PromptTemplate::default());
    };
    let text = files::text(path)?;
    PromptTemplate::new(text).map_err(|reason| Error::field(path, "content", reason))
}

/// SHA-256 of everything that the steps see of the data.
fn digest_of(sequences: &[Sequence]) -> String {
    let mut hash = Sha256::new();
    for sequence in sequences {
        for number in [sequence.tokens.len(), sequence.prompt_len] {
            hash.update((number as u64).to_le_bytes());
        }
        for token in &sequence.tokens {
            hash.update(token.to_le_bytes());
        }
    }
    hexadecimal(&hash.finalize())
}
