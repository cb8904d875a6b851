//! The change of the adapted weights since the start of a run, weight by weight.

use std::sync::Arc;

use burn::tensor::{Tensor, TensorData};
use regex::Regex;

use crate::history::{Change, Measures, Spectrum};
use crate::method::{Adaptation, Method};
use crate::sketch::sketched;
use crate::spectrum::Ranks;
use crate::{Error, Llama, Pretrained};

/// Columns of a sketch beyond the largest rank that a change can have.
const SPARE: usize = 8;
/// Fewest and most columns of a sketch, and those where a change may have any rank.
const LEAST: usize = 128;
const MOST: usize = 512;
const OF_FULL: usize = 256;

/// Measures the change of the adapted weights.
pub struct Changes {
    pretrained: Arc<Pretrained>,
    targets: Regex,
    /// Columns of the sketches.
    columns: usize,
    /// The weight whose singular values are kept.
    layer: String,
}

impl Changes {
    /// For weights that are adapted like this; `layer` is the one whose singular values are kept, by
    /// default the last adapted one of the middle layer.
    ///
    /// # Errors
    ///
    /// [`Error::Option`] for a `layer` that is not adapted, and for targets that are no regular expression.
    pub fn new(
        pretrained: Arc<Pretrained>,
        adaptation: &Adaptation,
        layer: Option<&str>,
    ) -> Result<Self, Error> {
        let targets = adaptation.names()?;
        let adapted: Vec<&String> = pretrained
            .tensors
            .iter()
            .filter(|(name, entry)| entry.shape.len() == 2 && targets.is_match(name))
            .map(|(name, _)| name)
            .collect();
        let layer = match layer {
            Some(layer) => {
                let named = |name: &&&String| {
                    **name == layer || name.strip_suffix(".weight") == Some(layer)
                };
                let found = adapted.iter().find(named);
                let found = found.ok_or_else(|| Error::Option {
                    option: "report-layer",
                    reason: match adapted.first() {
                        Some(first) => format!("`{layer}` is no adapted weight, such as `{first}`"),
                        None => format!("`{layer}` is no adapted weight; none is"),
                    },
                })?;
                found.to_string()
            }
            None => {
                let middle = format!(".layers.{}.", pretrained.config.num_layers / 2);
                let of_middle = adapted.iter().filter(|name| name.contains(&middle));
                // The last one in the order of the model.
                let last = of_middle.max_by_key(|name| name.contains(".mlp.down_proj"));
                last.or(adapted.last())
                    .map_or_else(String::new, ToString::to_string)
            }
        };
        Ok(Self {
            columns: columns(adaptation),
            pretrained,
            targets,
            layer,
        })
    }

    /// The change of every adapted weight of `model`, in validation mode and after `step` steps, since the
    /// pretrained one. One weight after the other is read, so that no second model is in memory.
    ///
    /// # Errors
    ///
    /// Those of the files.
    pub fn measure(&self, step: usize, model: &Llama) -> Result<Measures, Error> {
        let (mut weights, mut spectrum) = (Vec::new(), None);
        for (index, (path, weight)) in model.matrices().into_iter().enumerate() {
            let entry = match self.pretrained.tensors.get(&path) {
                Some(entry) if self.targets.is_match(&path) => entry,
                _ => continue,
            };
            let [rows, cols] = weight.dims();
            let mut shape = [rows, cols];
            let is_linear = path.ends_with("_proj.weight") || path.starts_with("lm_head");
            if is_linear {
                shape.reverse();
            }
            let before = TensorData::new(entry.read(&path)?, shape);
            let before = Tensor::<2>::from_data(before, &model.device());
            let before = match is_linear {
                true => before.transpose(),
                false => before,
            };
            let size: f64 = before.clone().square().sum().into_scalar();
            let found = sketched(weight.val() - before, self.columns, index as u64);
            let noise = rounding(size.sqrt(), rows, cols, step);
            let threshold = Ranks::threshold(&found.values, rows, cols).max(noise);
            let ranks = Ranks::above(&found.values, threshold);
            if path == self.layer {
                let values = found.values.iter().take(ranks.numeric);
                let values = values.map(|&value| value as f32).collect();
                let path = path.clone();
                spectrum = Some(Spectrum { path, values });
            }
            weights.push(Change {
                path,
                relative: found.norm / size.sqrt().max(f64::MIN_POSITIVE),
                rank: ranks.numeric,
                effective_rank: ranks.effective,
                missed: found.missed,
            });
        }
        Ok(Measures::Changes { weights, spectrum })
    }
}

/// An estimate from above of the largest singular value of what rounding a weight of this norm to `f32` in
/// every step adds up to: random numbers of half a unit in the last place, and the spectral norm of a matrix of
/// them.
fn rounding(norm: f64, rows: usize, cols: usize, steps: usize) -> f64 {
    let spectral = (rows as f64).sqrt().recip() + (cols as f64).sqrt().recip();
    f64::from(f32::EPSILON) * norm * spectral * (steps as f64).sqrt()
}

/// Columns that find every direction of a change, where its rank has a bound.
fn columns(adaptation: &Adaptation) -> usize {
    let Adaptation { rank, shards, .. } = *adaptation;
    // Both factors of an adapter move: twice its rank, but for the product of both moves, which is of second
    // order in the learning rate. A LoRA adapter starts at zero.
    let bound = match adaptation.method {
        Method::HdPissa => 2 * rank * shards,
        Method::Pissa => 2 * rank,
        Method::Lora => rank,
        Method::Full => return OF_FULL,
    };
    (bound + SPARE).clamp(LEAST, MOST)
}
