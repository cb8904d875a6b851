//! Rotary embeddings as `config.json` describes them.

use super::keys::{Fault, Keys};

/// How the frequencies of rotary embeddings are changed for long contexts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    Default,
    /// Positions divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3: low frequencies are divided by `factor`, high ones kept, those between blended.
    Llama3 {
        /// The divisor of low frequencies.
        factor: f64,
        /// Wavelengths above `original_context / low_freq_factor` are low frequencies.
        low_freq_factor: f64,
        /// Wavelengths below `original_context / high_freq_factor` are high frequencies.
        high_freq_factor: f64,
        /// Context length of the pre-training.
        original_context: f64,
    },
    /// YaRN (arXiv 2309.00071): frequencies of few turns within the original context are divided by
    /// `factor`, those of many kept, those between blended; the rotated heads are longer.
    Yarn {
        /// The divisor of low frequencies.
        factor: f64,
        /// The factor of cosines and sines.
        magnitude: f64,
        /// Turns above which a frequency is kept.
        beta_fast: f64,
        /// Turns below which it is divided.
        beta_slow: f64,
        /// Whether the blend begins and ends at whole dimensions.
        truncate: bool,
        /// Context length of the pre-training.
        original_context: f64,
    },
    /// Sequences beyond the context of the pre-training raise the base, the more the longer they are.
    Dynamic {
        /// How many times that context the base is made for.
        factor: f64,
    },
}

/// Older files hold `rope_theta` and `rope_scaling`, those of transformers 5 `rope_parameters`.
pub(super) fn rope(
    keys: &Keys<'_>,
    default_theta: f64,
    max_positions: usize,
) -> Result<(f64, RopeScaling), Fault> {
    let rope = match keys.object("rope_parameters", "rope_parameters.")? {
        Some(rope) => Some(rope),
        None => keys.object("rope_scaling", "rope_scaling.")?,
    };
    let own = match &rope {
        Some(rope) => rope.get("rope_theta")?,
        None => None,
    };
    let theta: f64 = match own {
        Some(theta) => theta,
        None => keys.get("rope_theta")?.unwrap_or(default_theta),
    };
    if !(theta.is_finite() && theta > 0.0) {
        let reason = format!("is {theta}; it must be above 0");
        return Err(("rope_theta".into(), reason));
    }
    refuse_partial(keys)?;
    let Some(rope) = rope else {
        return Ok((theta, RopeScaling::Default));
    };
    let key = |name: &str| format!("{}{name}", rope.prefix);
    refuse_partial(&rope)?;
    let positive = |name: &str, value: f64| match value.is_finite() && value > 0.0 {
        true => Ok(value),
        false => Err((key(name), format!("is {value}; it must be above 0"))),
    };
    let need = |name: &str| positive(name, rope.need(name)?);
    let may = |name: &str, default: f64| match rope.get(name)? {
        Some(value) => positive(name, value),
        None => Ok(default),
    };
    // transformers writes both names of the same thing.
    let names: [Option<String>; 2] = [rope.get("rope_type")?, rope.get("type")?];
    let name = match &names {
        [Some(new), Some(old)] if new != old => {
            let reason = format!("is `{new}`, and type beside it is `{old}`");
            return Err((key("rope_type"), reason));
        }
        [Some(name), _] | [None, Some(name)] => name,
        [None, None] => "default",
    };
    let scaling = match name {
        "default" => RopeScaling::Default,
        "linear" => RopeScaling::Linear {
            factor: need("factor")?,
        },
        "llama3" => RopeScaling::Llama3 {
            factor: need("factor")?,
            low_freq_factor: need("low_freq_factor")?,
            high_freq_factor: need("high_freq_factor")?,
            original_context: need("original_max_position_embeddings")?,
        },
        "dynamic" => RopeScaling::Dynamic {
            factor: need("factor")?,
        },
        "yarn" => {
            let factor = need("factor")?;
            // That of `scale` times as long a context.
            let magnitude = |of: f64| {
                if factor > 1.0 {
                    0.1 * of * factor.ln() + 1.0
                } else {
                    1.0
                }
            };
            let of = |name: &str| rope.get::<f64>(name);
            let default = match (of("mscale")?, of("mscale_all_dim")?) {
                (Some(one), Some(all)) if one != 0.0 && all != 0.0 => {
                    magnitude(one) / magnitude(all)
                }
                _ => magnitude(1.0),
            };
            RopeScaling::Yarn {
                factor,
                magnitude: may("attention_factor", default)?,
                beta_fast: may("beta_fast", 32.0)?,
                beta_slow: may("beta_slow", 1.0)?,
                truncate: rope.get("truncate")?.unwrap_or(true),
                original_context: may("original_max_position_embeddings", max_positions as f64)?,
            }
        }
        other => {
            let reason = format!("`{other}` is not supported");
            return Err((key("rope_type"), reason));
        }
    };
    Ok((theta, scaling))
}

/// Refuses heads that are rotated in part.
fn refuse_partial(keys: &Keys<'_>) -> Result<(), Fault> {
    let key = "partial_rotary_factor";
    match keys.get::<f64>(key)? {
        Some(part) if part != 1.0 => {
            let reason = format!("{part} is not supported");
            Err((format!("{}{key}", keys.prefix), reason))
        }
        _ => Ok(()),
    }
}
