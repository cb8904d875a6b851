//! What a run reads and checks before it trains.

use std::collections::BTreeMap;
use std::sync::Arc;

use hd_pissa::checkpoint::Checkpoint;
use sha2::{Digest, Sha256};

use super::held_out::HeldOut;
use super::options::FineTuning;
use super::watch::Watching;
use crate::batch::Sequence;
use crate::data::{Data, Split};
use crate::output::Staged;
use crate::run::Training;
use crate::tokenize::{Template, Tokens};
use crate::weights::hexadecimal;
use crate::{Error, Pretrained};

/// What a run reads before it trains.
pub(super) struct Inputs {
    pub(super) template: Arc<dyn Template>,
    /// Whether the checkpoint has no chat template, where one is used.
    pub(super) writes_by_default: bool,
    pub(super) pretrained: Arc<Pretrained>,
    pub(super) tokens: Arc<Tokens>,
    pub(super) max_length: usize,
    /// What became of the records.
    pub(super) summary: String,
    pub(super) sequences: Arc<[Sequence]>,
    pub(super) held_out: Option<Arc<HeldOut>>,
    /// What is measured between steps.
    pub(super) watching: Arc<Watching>,
    /// The checkpoint to go on from.
    pub(super) saved: Option<Checkpoint>,
    pub(super) settings: BTreeMap<String, String>,
}

impl FineTuning {
    /// Reads the files of the run and checks them, also against the checkpoint to go on from.
    pub(super) fn read(&self, saved: Option<Checkpoint>) -> Result<Inputs, Error> {
        let pretrained = Arc::new(Pretrained::open(&self.model)?);
        let tokens = Arc::new(Tokens::of(&pretrained)?);
        let max_length = self.max_length(&pretrained)?;
        let fields = self.fields.as_ref();
        let data = Data::read(&self.data, Split::Train, fields)?;
        let eval = match &self.eval {
            Some((paths, samples)) => {
                let mut eval = Data::read(paths, Split::HeldOut, fields)?;
                eval.records.truncate(*samples);
                Some((&paths[0], eval))
            }
            None => None,
        };
        let all: Vec<&Data> = eval.iter().map(|(_, eval)| eval).chain([&data]).collect();
        let (template, writes_by_default) = self.template(&pretrained, &all)?;
        let cache = &self.token_cache;
        let data = cache.sequences(&tokens, &data.records, &*template, max_length)?;
        let held_out = eval
            .map(|(path, eval)| HeldOut::new(path, eval.records, &tokens, &*template, max_length));
        let held_out = held_out.transpose()?.map(Arc::new);
        let template: Arc<dyn Template> = template.into();
        let watching = Watching::new(self, &pretrained, held_out.as_ref(), &tokens, &template)?;
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
            writes_by_default,
            pretrained,
            tokens,
            max_length,
            summary,
            sequences,
            held_out,
            watching: Arc::new(watching),
            saved,
            settings,
        })
    }

    fn max_length(&self, pretrained: &Pretrained) -> Result<usize, Error> {
        let largest = pretrained.config.longest();
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

/// SHA-256 of everything that the steps see of the data. A record whose targets are its end has the digest
/// that it had before there were others.
fn digest_of(sequences: &[Sequence]) -> String {
    let mut hash = Sha256::new();
    for sequence in sequences {
        let Sequence { tokens, targets } = sequence;
        let mut add = |number: usize| hash.update((number as u64).to_le_bytes());
        add(tokens.len());
        add(targets.first().map_or(0, |range| range.start));
        if targets.len() != 1 || targets[0].end != tokens.len() {
            targets.iter().for_each(|range| {
                add(range.start);
                add(range.end);
            });
        }
        for token in &sequence.tokens {
            hash.update(token.to_le_bytes());
        }
    }
    hexadecimal(&hash.finalize())
}
