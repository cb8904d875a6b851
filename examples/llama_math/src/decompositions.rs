//! What the user should know of the decompositions at the start of a run.

use std::collections::BTreeSet;

use hd_pissa::{CacheUse, Decomposition, LayerProgress};

use crate::console::complain;

/// The weights whose decompositions need a word.
#[derive(Default)]
pub(crate) struct Decompositions {
    total: usize,
    /// Those whose block Krylov method did not converge.
    fallbacks: Vec<String>,
    /// Those that the cache had, but damaged.
    replaced: Vec<String>,
    /// Why some are not kept.
    not_kept: BTreeSet<String>,
}

impl Decompositions {
    pub(crate) fn push(&mut self, weight: &LayerProgress) {
        self.total += 1;
        if let Decomposition::Fallback(_) = weight.decomposition {
            self.fallbacks.push(weight.path.clone());
        }
        match &weight.cache {
            CacheUse::Replaced => self.replaced.push(weight.path.clone()),
            CacheUse::NotKept { reason } => drop(self.not_kept.insert(reason.clone())),
            _ => {}
        }
    }

    /// Prints a line for each kind of event.
    pub(crate) fn report(&self) {
        let total = self.total;
        if !self.fallbacks.is_empty() {
            let (count, names) = (self.fallbacks.len(), list(&self.fallbacks));
            complain!(
                "{count} of {total} weights are decomposed exactly, as the block Krylov method has not \
                 converged: {names}"
            );
        }
        if !self.replaced.is_empty() {
            let (count, names) = (self.replaced.len(), list(&self.replaced));
            complain!(
                "{count} of {total} weights are decomposed again, as their files in the cache were \
                 damaged: {names}"
            );
        }
        if let Some(reason) = self.not_kept.first() {
            complain!("the decompositions are not kept for later runs in {reason}");
        }
    }
}

fn list(names: &[String]) -> String {
    const SHOWN: usize = 8;
    match names.len() {
        count if count <= SHOWN => names.join(", "),
        count => format!("{}, and {} more", names[..SHOWN].join(", "), count - SHOWN),
    }
}
