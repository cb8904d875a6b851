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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::evidence::row::Row;
    use crate::method::{Adaptation, Method, SvdOption};
    use crate::tiny;
    use burn::tensor::Device;
    use hd_pissa::HdPissaAdapter;
    use std::path::Path;

    /// The factors of every weight of the tiny model.
    fn factors(adaptation: &Adaptation) -> Vec<Vec<f32>> {
        let model = tiny::pretrained().unwrap().load(&Device::flex().autodiff());
        let model = adaptation.apply(model.unwrap()).unwrap();
        let factors = model.matrices().into_iter().filter_map(|(_, weight)| {
            let adapter = weight.reparameterization::<HdPissaAdapter>()?;
            let factors = adapter.shards.iter().flat_map(|shard| [&shard.a, &shard.b]);
            let values = factors.flat_map(|factor| {
                let values: Vec<f32> = factor.val().inner().into_data().iter().collect();
                values
            });
            Some(values.collect())
        });
        factors.collect()
    }

    #[test]
    fn runs_share_the_cache() {
        let folder = tempfile::tempdir().unwrap();
        let cache = folder.path().join("cache");
        let count = |folder: &Path| std::fs::read_dir(folder).unwrap().count();
        for svd in [SvdOption::Exact, SvdOption::Krylov] {
            let computed = Adaptation {
                svd,
                ..Row::Published.adaptation(2, 4, 1)
            };
            let cached = Adaptation {
                svd_cache: Some(cache.clone()),
                ..computed.clone()
            };
            let expected = factors(&computed);
            // 7 projections in each of 4 blocks.
            assert_eq!(expected.len(), 28);
            assert_eq!(factors(&cached), expected);
            let files = count(&cache);
            assert_eq!(factors(&cached), expected);
            // PiSSA of the rank of all shards needs no others.
            let pissa = Adaptation {
                method: Method::Pissa,
                rank: 8,
                ..cached
            };
            factors(&pissa);
            assert_eq!(count(&cache), files);
        }
    }

    #[test]
    fn many_names_are_cut_short() {
        let names: Vec<String> = (0..11).map(|i| i.to_string()).collect();
        assert_eq!(list(&names[..3]), "0, 1, 2");
        assert_eq!(list(&names), "0, 1, 2, 3, 4, 5, 6, 7, and 3 more");
    }
}
