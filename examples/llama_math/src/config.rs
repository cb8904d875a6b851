//! `config.json` of a pretrained model in the Hugging Face layout.

use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::{Error, files};

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
}

/// Shape of a Llama-family decoder.
#[derive(Debug, Clone, PartialEq)]
pub struct LlamaConfig {
    /// The family.
    pub family: Family,
    /// Number of tokens in the vocabulary.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the feed-forward layers.
    pub intermediate_size: usize,
    /// Number of decoder layers.
    pub num_layers: usize,
    /// Number of query heads.
    pub num_heads: usize,
    /// Number of key and value heads.
    pub num_kv_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Longest sequence the model was made for.
    pub max_positions: usize,
    /// Epsilon of the RMS norms.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Scaling of the rotary frequencies.
    pub rope_scaling: RopeScaling,
    /// Whether the head is the embedding.
    pub tied: bool,
    /// Whether q, k and v projections have a bias.
    pub qkv_bias: bool,
    /// Whether the output projection of the attention has a bias.
    pub o_bias: bool,
    /// Whether the feed-forward projections have a bias.
    pub mlp_bias: bool,
    /// A position attends to this many positions at most, itself included.
    pub sliding_window: Option<usize>,
    /// Tokens that end a text.
    pub eos_tokens: Vec<u32>,
}

/// What is wrong with a key.
type Fault = (String, String);

/// The values of `config.json` by key.
struct Keys<'a> {
    map: &'a Map<String, Value>,
    /// What stands before a key in messages.
    prefix: &'static str,
}

impl<'a> Keys<'a> {
    /// The value of a key; `None` where it is missing or null.
    fn get<T: Deserialize<'a>>(&self, key: &str) -> Result<Option<T>, Fault> {
        match self.map.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => T::deserialize(value).map(Some).map_err(|error| {
                (
                    format!("{}{key}", self.prefix),
                    format!("is {value}: {error}"),
                )
            }),
        }
    }

    fn need<T: Deserialize<'a>>(&self, key: &str) -> Result<T, Fault> {
        let missing = || (format!("{}{key}", self.prefix), "is missing".into());
        self.get(key)?.ok_or_else(missing)
    }

    /// The object under a key.
    fn object(&self, key: &'static str, prefix: &'static str) -> Result<Option<Self>, Fault> {
        match self.map.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Self { map, prefix })),
            Some(value) => Err((key.into(), format!("is {value}, not an object"))),
        }
    }
}

/// Decoders this example knows. Llama covers SmolLM2.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// Llama 2 and 3, SmolLM2.
    Llama,
    /// Mistral.
    Mistral,
    /// Qwen2.
    Qwen2,
}

impl LlamaConfig {
    /// Reads `config.json`; `path` is for messages.
    ///
    /// # Errors
    ///
    /// [`Error::Field`] for JSON that cannot be read, a missing key, an architecture or a setting
    /// that is not supported, and shapes that do not fit together.
    pub fn from_json(json: &[u8], path: &Path) -> Result<Self, Error> {
        let text = files::as_text(json, path)?;
        let map: Map<String, Value> = serde_json::from_str(text)
            .map_err(|error| Error::field(path, "content", error.to_string()))?;
        let keys = Keys {
            map: &map,
            prefix: "",
        };
        Self::of(&keys).map_err(|(key, reason)| Error::field(path, key, reason))
    }

    fn of(keys: &Keys<'_>) -> Result<Self, Fault> {
        // First, so that nobody is told about the keys of a family that is not supported.
        let family = family(keys)?;
        if keys
            .map
            .get("quantization_config")
            .is_some_and(|value| !value.is_null())
        {
            let reason = "quantized checkpoints are not supported";
            return Err(("quantization_config".into(), reason.into()));
        }
        let act: Option<String> = keys.get("hidden_act")?;
        if let Some(act) = act.filter(|act| act != "silu") {
            let reason = format!("`{act}` is not supported, only `silu`");
            return Err(("hidden_act".into(), reason));
        }
        let sliding_window = match family {
            Family::Mistral => keys.get("sliding_window")?,
            Family::Qwen2 if keys.get("use_sliding_window")? == Some(true) => {
                let reason = "is not supported for qwen2";
                return Err(("use_sliding_window".into(), reason.into()));
            }
            _ => None,
        };
        let (rope_theta, rope_scaling) = rope(keys)?;
        let attention_bias = keys.get("attention_bias")?.unwrap_or(false);
        let hidden_size = keys.need("hidden_size")?;
        let num_heads: usize = keys.need("num_attention_heads")?;
        let config = Self {
            family,
            vocab_size: keys.need("vocab_size")?,
            hidden_size,
            intermediate_size: keys.need("intermediate_size")?,
            num_layers: keys.need("num_hidden_layers")?,
            num_heads,
            num_kv_heads: keys.get("num_key_value_heads")?.unwrap_or(num_heads),
            head_dim: match keys.get("head_dim")? {
                Some(dim) => dim,
                None => hidden_size / num_heads.max(1),
            },
            max_positions: keys.get("max_position_embeddings")?.unwrap_or(2048),
            rms_norm_eps: keys.get("rms_norm_eps")?.unwrap_or(1e-6),
            rope_theta,
            rope_scaling,
            tied: keys.get("tie_word_embeddings")?.unwrap_or(false),
            qkv_bias: family == Family::Qwen2 || (family == Family::Llama && attention_bias),
            o_bias: family == Family::Llama && attention_bias,
            mlp_bias: family == Family::Llama && keys.get("mlp_bias")?.unwrap_or(false),
            sliding_window,
            eos_tokens: match keys.map.get("eos_token_id") {
                Some(Value::Array(_)) => keys.need("eos_token_id")?,
                _ => keys.get("eos_token_id")?.into_iter().collect(),
            },
        };
        let fault = |(key, reason): (&str, String)| (key.to_string(), reason);
        config.check().map_err(fault)?;
        Ok(config)
    }

    fn check(&self) -> Result<(), (&'static str, String)> {
        for (key, value) in [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_layers),
            ("num_attention_heads", self.num_heads),
            ("num_key_value_heads", self.num_kv_heads),
            ("head_dim", self.head_dim),
            ("max_position_embeddings", self.max_positions),
        ] {
            if value == 0 || value > 1 << 24 {
                return Err((key, format!("is {value}; it must be from 1 to 2^24")));
            }
        }
        if !self.num_heads.is_multiple_of(self.num_kv_heads) {
            let reason = format!(
                "is {}; it must divide num_attention_heads, {}",
                self.num_kv_heads, self.num_heads
            );
            return Err(("num_key_value_heads", reason));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(("head_dim", format!("is {}; it must be even", self.head_dim)));
        }
        if !(self.rms_norm_eps.is_finite() && self.rms_norm_eps > 0.0) {
            let reason = format!("is {}; it must be above 0", self.rms_norm_eps);
            return Err(("rms_norm_eps", reason));
        }
        if self.sliding_window == Some(0) {
            return Err(("sliding_window", "is 0; it must be at least 1".into()));
        }
        Ok(())
    }
}

fn family(keys: &Keys<'_>) -> Result<Family, Fault> {
    let architectures: Option<Vec<String>> = keys.get("architectures")?;
    let architecture = architectures.and_then(|list| list.into_iter().next());
    let found = match (keys.get("model_type")?, architecture) {
        (Some(name), _) | (None, Some(name)) => name,
        (None, None) => String::new(),
    };
    let found = match found.as_str() {
        "llama" | "LlamaForCausalLM" => return Ok(Family::Llama),
        "mistral" | "MistralForCausalLM" => return Ok(Family::Mistral),
        "qwen2" | "Qwen2ForCausalLM" => return Ok(Family::Qwen2),
        "" => "is missing, and so is architectures".into(),
        other => format!("unsupported, unknown architecture `{other}`"),
    };
    let known = "supported are llama (Llama 2 and 3, SmolLM2), mistral and qwen2";
    Err(("model_type".into(), format!("{found}; {known}")))
}

/// Older files hold `rope_theta` and `rope_scaling`, those of transformers 5 `rope_parameters`.
fn rope(keys: &Keys<'_>) -> Result<(f64, RopeScaling), Fault> {
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
        None => keys.get("rope_theta")?.unwrap_or(10_000.0),
    };
    if !(theta.is_finite() && theta > 0.0) {
        let reason = format!("is {theta}; it must be above 0");
        return Err(("rope_theta".into(), reason));
    }
    let Some(rope) = rope else {
        return Ok((theta, RopeScaling::Default));
    };
    let key = |name: &str| format!("{}{name}", rope.prefix);
    let part: Option<f64> = rope.get("partial_rotary_factor")?;
    if let Some(part) = part.filter(|&part| part != 1.0) {
        let reason = format!("{part} is not supported");
        return Err((key("partial_rotary_factor"), reason));
    }
    let need = |name: &str| match rope.need::<f64>(name)? {
        value if value.is_finite() && value > 0.0 => Ok(value),
        value => Err((key(name), format!("is {value}; it must be above 0"))),
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
        other => {
            let reason = format!("`{other}` is not supported");
            return Err((key("rope_type"), reason));
        }
    };
    Ok((theta, scaling))
}
